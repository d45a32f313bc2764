"""Coin samplers as engines: when a cloud has settled, how it is finished, and what can be said of it.

Start with ``svgd``, the default engine. ``diagnostics``, ``trajectories`` and ``modes`` ask whether particles are where
they should be; ``reports`` turns their answers into a status and words.
"""
