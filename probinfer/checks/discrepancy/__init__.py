"""How far are draws from other draws, or from a log density?

Start with ``two_sample``, the report of distances between two sets of draws; ``permutation`` has their null
distribution. ``kernel_stein`` and ``stein_identities`` need a log density instead of draws.
"""
