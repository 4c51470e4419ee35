"""Clips: which frames, how they are cut and augmented, and the batches made of them."""
