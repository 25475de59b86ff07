"""Showing results: terminal tables and progress."""
