"""Samplers of powers and products of distributions, from the scores of diffusion models.

Start with ``correctors`` (``composed`` and ``sample_composed``); ``noise`` defines the noising processes.
"""
