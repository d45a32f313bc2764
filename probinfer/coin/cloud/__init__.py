"""A set of particles as one object: a table of positions, its spread, and the kernels that suit it.

Start with ``table`` (ravelled positions) and ``geometry`` (the metric of a cloud).
"""
