"""What chains learn before they draw: starting points, metric and step size.

Start with ``warmup``, the warm-up of a set of chains. ``tuning`` does the same for one chain, transition by transition.
"""
