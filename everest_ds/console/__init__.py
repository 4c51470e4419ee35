"""Terminal output of a command, and the destination of all other output. Leaves."""
