"""`everest benchmark`: measurements of data, steps and operations."""
