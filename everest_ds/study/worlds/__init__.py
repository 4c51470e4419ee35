"""Worlds that a study can use besides the discs of `everest_ds.data.demo`."""
