"""Measuring speed: decoding, and the products alone."""
