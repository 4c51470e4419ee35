"""The command line: `everest COMMAND ...`."""

from everest_ds.cli.dispatch import COMMANDS, main

__all__ = ["COMMANDS", "main"]
