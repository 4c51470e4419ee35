"""Plans a run: whether it fits, and what takes the memory."""
