"""Trained models over lists of videos: which weights, forward passes, scores, probes, and the files they become."""
