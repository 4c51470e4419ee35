"""Commands that use trained weights: scores, labels, pictures, other layouts."""
