"""Trained weights over videos: scores, predictions, features."""
