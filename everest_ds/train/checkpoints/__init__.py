"""Saves, seals, finds, reshards and reads checkpoints."""
