"""`everest study DIR`: the paper's comparisons in miniature, on the demo data, by this project's own commands."""
