"""Services that show a run during training. metrics.jsonl is the record; trackers show copies of it."""
