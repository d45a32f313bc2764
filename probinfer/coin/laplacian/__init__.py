"""Laplacian-adjusted Wasserstein gradient descent, for densities in one or two dimensions.

Start with ``direction``; ``spectrum`` computes the eigenfunctions that it needs, and ``engine`` is the engine
``LAWGD``.
"""
