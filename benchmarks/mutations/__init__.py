"""Planted faults of posteriors and transitions, and every check of the library applied to them."""
