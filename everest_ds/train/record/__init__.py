"""What a training run writes down."""
