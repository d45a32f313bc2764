"""Texts of many particles, token by token, as a batched Feynman-Kac model.

Start with ``token_model``, then ``stepping``, one step of all particles. ``prompts`` turns prompts into such models,
``proposals`` says how tokens are drawn, ``step_rules`` where a step ends.
"""
