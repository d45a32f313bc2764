"""Hyperparameters learned: point estimates that are verified, and whole posteriors.

Start with ``fitting`` (``fit``). ``posterior`` makes a target of the marginal hyperparameter posterior, ``joint`` of
latent values and hyperparameters together; ``verdicts`` is what a fit must say of itself.
"""
