"""Coin samplers as engines: when a run stops, how its particles are polished, and how they are diagnosed.

Start with ``svgd``, the default engine. ``diagnostics``, ``trajectories`` and ``modes`` test whether the particles
represent the density; ``reports`` turns their results into a status and a warning.
"""
