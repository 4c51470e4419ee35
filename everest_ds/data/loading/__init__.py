"""Loading: worker processes that make batches and may hang or crash."""
