"""Finding, converting, describing and loading models."""
