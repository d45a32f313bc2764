"""Smoothing: states given all observations, also the later ones.

Start with ``backward`` (``backward_smoother``). ``two_filters`` joins a forward filter to a backward one, whose priors
are in ``artificial_priors``.
"""
