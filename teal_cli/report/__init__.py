"""Showing results: terminal tables and progress, plots, and one page about a run."""
