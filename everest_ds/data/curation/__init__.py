"""Curation: checking and re-encoding the videos of a list."""
