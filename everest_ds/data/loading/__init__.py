"""Loading: batches made by worker processes, which may hang or crash without harm."""
