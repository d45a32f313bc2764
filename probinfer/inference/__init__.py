"""Engines and posteriors: what turns a target into draws, what the draws are, and what is said of them.

Start with ``engine`` (the contract of every engine) and ``facade`` (``infer``). ``posterior`` holds draws, ``summary``
their table, ``diagnostics`` says whether chains have mixed, ``tails`` whether a density is proper at all.
"""
