"""`everest benchmark`: measurements that are comparable side by side, one module each."""
