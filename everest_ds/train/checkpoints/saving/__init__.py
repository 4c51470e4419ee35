"""Saves that the training does not wait for: copies in shared memory, a process that writes them, and the seal."""
