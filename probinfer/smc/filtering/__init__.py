"""Passes of particles through a Feynman-Kac model and their results: paths, an evidence, a genealogy.

Start with ``filter`` (``particle_filter``), then ``forward_pass``, the pass behind it, and ``traces``, its result.
``streaming`` filters one observation at a time; ``single_steps`` calls a Python function between the steps.
"""
