"""Training: tasks -> DeepSpeed engine -> loop -> metrics and checkpoints."""
