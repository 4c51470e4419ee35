"""Checks of `everest doctor`. They are imported in a child process, because a library may be broken."""
