"""Ends a run that hangs, or whose ranks compute different numbers, and names the rank at fault."""
