"""Code that `everest convert --to hf` copies into the folders that it writes. It runs without everest_ds."""
