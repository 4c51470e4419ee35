"""Commands that use trained weights: evaluate, predict, show and convert."""
