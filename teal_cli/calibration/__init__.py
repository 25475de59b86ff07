"""Measuring hidden states: collection (hooks), histograms (maths), and their artefact."""
