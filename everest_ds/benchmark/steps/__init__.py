"""`everest benchmark step`: six measurements of a recipe's training steps."""
