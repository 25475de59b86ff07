"""Figures that the pages quote, each compared with its result file at its place."""
