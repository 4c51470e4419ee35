"""Checkpoints: saved, sealed, found again, resharded, read."""
