"""Scores of diffusion models as parts of new models: powers and products of the distributions that they belong to.

Start with ``correctors`` (``composed`` and ``sample_composed``); ``noise`` says how data are noised.
"""
