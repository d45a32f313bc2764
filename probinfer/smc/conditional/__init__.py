"""Filters conditioned on a reference path: Markov chains of paths.

Start with ``filter`` (``conditional_filter``) and ``gibbs`` (``particle_gibbs``); ``tempering`` runs several such
chains that exchange their paths.
"""
