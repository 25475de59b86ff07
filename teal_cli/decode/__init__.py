"""Decoding one sequence: prefill dense, then one token at a time."""
