"""The records of a training run: metrics, events, pictures, a profile, and what is printed."""
