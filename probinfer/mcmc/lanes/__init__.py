"""Samplers as pure functions of a key and a data set, made for ``run_many``.

Start with ``sampler``, which builds the sampler of ``hmc`` or ``nuts``.
"""
