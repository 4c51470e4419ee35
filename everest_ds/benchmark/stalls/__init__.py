"""What a run stands still for besides its steps."""
