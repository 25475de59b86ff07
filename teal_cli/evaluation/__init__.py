"""Measuring quality: perplexity and drift on held-out text, and harness tasks."""
