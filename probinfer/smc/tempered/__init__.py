"""From a distribution that can be sampled to a target, by densities between the two.

Start with ``engine`` (``Tempered``), then ``levels``, one population from level to level. ``bridge`` has the densities
between, ``schedule`` what a pilot chose, ``moves`` what carries particles at a level. ``annealed`` weighs independent
runs.
"""
