"""Pictures: one style, and drawing into matplotlib axes. matplotlib is imported when something is drawn.

Start with ``style``. ``ranks`` draws rank checks, ``ancestry`` the particles of a language model as a tree.
"""
