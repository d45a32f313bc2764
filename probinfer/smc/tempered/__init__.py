"""From a distribution that can be sampled to a target, by densities between the two.

Start with ``engine`` (``Tempered``), then ``levels``, which takes one population from level to level. ``bridge``
defines the densities in between, ``schedule`` the settings that a pilot chose, and ``moves`` the moves of the particles
at a level. ``annealed`` weighs independent runs.
"""
