"""`everest study DIR`: the paper's comparisons in miniature, on generated videos, run by the `everest` commands."""
