"""`everest benchmark step`: training steps of a recipe, measured in six ways."""
