"""What a Gaussian-process model is: kernel, likelihood, mean and the priors of their hyperparameters.

Start with ``model`` (``Model``). ``leaves`` names hyperparameters by dotted paths, ``units`` and ``scaling`` turn
values in the user's units into those of the standardized data, ``validation`` refuses bad data.
"""
