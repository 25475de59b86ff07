"""The artefacts on disk: read, write, validate, version. Formats: docs/formats.md."""
