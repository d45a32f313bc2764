"""Gaussian-process models: kernel, likelihood, mean and the priors of their hyperparameters.

Start with ``model`` (``Model``). ``leaves`` names hyperparameters by dotted paths, ``units`` and ``scaling`` convert
values from the user's units to those of the standardized data, ``validation`` checks data.
"""
