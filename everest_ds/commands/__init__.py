"""One module for each sub-command; `everest_ds.cli` parses and calls them."""
