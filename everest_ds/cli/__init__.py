"""The command line: `everest COMMAND ...`."""

from everest_ds.cli.main import main

__all__ = ["main"]
