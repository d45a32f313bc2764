"""Particles inside constraints: mirror maps that take the walls away, and repulsion with a barrier.

Start with ``mirrored`` (``mirrored_svgd`` and ``mirrored_svmd``); ``repulsion`` is ``mied``.
"""
