"""Feynman-Kac models: how particles start, propagate and are weighed.

Start with ``feynman_kac``, what every filter runs, and ``state_space_model``, as users write one. ``proposals`` and
``nested_steps`` turn a model into one that needs fewer particles; ``host_potentials`` weighs in Python; ``interop``
takes models of other libraries.
"""
