"""The self-check suite: which engines, samplers and transitions pass which checks on which targets.

Start with ``suite``; ``known_targets`` and ``known_states`` define the targets and models of the checks.
"""
