"""The commands, one module each. A module parses and checks the command line; `everest_ds.cli` calls it."""
