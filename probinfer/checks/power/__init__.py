"""What a check could have seen: the smallest error of a posterior that it finds with a given probability.

Start with ``ranks``; ``balls`` is for TARP, ``distances`` for two sets of draws.
"""
