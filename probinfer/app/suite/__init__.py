"""The self-check suite: which engines, samplers and kernels pass which checks on which targets.

Start with ``suite``; ``known_targets`` and ``known_states`` have what engines are judged on.
"""
