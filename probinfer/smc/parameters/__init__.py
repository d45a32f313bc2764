"""Parameters of Feynman-Kac models: priors on what a model depends on, and engines for them.

Start with ``model`` (``Parameters``). The engines are ``pmmh``, ``smc2`` and ``gibbs``; ``parameter_particles`` is the
population that SMC^2 moves, and ``pilot`` finds the settings of an engine.
"""
