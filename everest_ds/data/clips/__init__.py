"""Clips: choosing frames, cropping and augmenting them, and collating clips into batches."""
