"""Services that show a run while it trains. metrics.jsonl stays the record; trackers hold views of it."""
