"""Passes of particles through a Feynman-Kac model, and what they leave: paths, an evidence, a genealogy.

Start with ``filter`` (``particle_filter``), then ``forward``, the pass behind it. ``streaming`` filters one observation
at a time, ``watched`` lets Python look on between steps.
"""
