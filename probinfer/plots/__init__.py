"""Plots in one style, drawn into matplotlib axes; matplotlib is imported on first use.

Start with ``style``. ``ranks`` draws rank checks, ``ancestry`` the particles of a language model as a tree.
"""
