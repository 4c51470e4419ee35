"""What ends a run that hangs or computes other numbers on one rank than on another, and says which rank it was."""
