"""Filters around a path that is given: Markov chains of whole paths.

Start with ``filter`` (``conditional_filter``) and ``gibbs`` (``particle_gibbs``); ``tempering`` runs several such
chains that exchange their paths.
"""
