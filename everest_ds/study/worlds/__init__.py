"""Worlds that a study can be made in, besides the drawn discs of `everest_ds.data.demo`."""
