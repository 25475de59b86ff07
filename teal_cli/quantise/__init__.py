"""Weights of 8 or 4 bits: how they are chosen, and putting them into a model."""
