"""Planning: does a run fit, and what takes the memory."""
