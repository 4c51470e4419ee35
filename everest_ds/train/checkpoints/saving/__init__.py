"""Saves in the background of training: copies in shared memory, a process that writes them, and the seal."""
