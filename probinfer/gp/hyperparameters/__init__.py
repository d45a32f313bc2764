"""Learning of hyperparameters: verified point estimates, and posteriors.

Start with ``fitting`` (``fit``). ``posterior`` builds the target of the marginal hyperparameter posterior, ``joint``
that of latent values and hyperparameters together; ``verdicts`` warns about fits at a limit.
"""
