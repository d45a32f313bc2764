"""Laplacian-adjusted Wasserstein gradient descent, for densities in one or two dimensions.

Start with ``direction``; ``spectrum`` finds the eigenfunctions that it needs, ``engine`` is the engine ``LAWGD``.
"""
