"""Planted faults of posteriors and kernels, and every check of the library run on them."""
