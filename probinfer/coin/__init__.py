"""Particles that are carried to a density without a learning rate."""
