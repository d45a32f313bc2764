"""What chains learn before they draw: starting points, metric and step size.

Start with ``warmup``, the warm-up of a set of chains, which chooses its metric by ``metric``. ``starts`` finds the
starting points before it. ``tuning`` is the warm-up of a single chain, transition by transition.
"""
