"""Commands that make, find, check and re-encode videos and their lists."""
