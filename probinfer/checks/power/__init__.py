"""Power of the checks: the smallest error of a posterior that a check detects with a given probability.

Start with ``ranks``; ``coverage`` is for TARP, ``distances`` for two sets of draws.
"""
