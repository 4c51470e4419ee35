"""Use of trained weights: scores, predictions, features, pictures, conversion."""
