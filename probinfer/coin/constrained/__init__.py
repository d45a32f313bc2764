"""Particles inside constraints: mirror maps to unconstrained coordinates, and repulsion with a barrier.

Start with ``mirrored`` (``mirrored_svgd`` and ``mirrored_svmd``); ``repulsion`` is ``mied``.
"""
