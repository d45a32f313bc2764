"""Building blocks of the pages of the commands and the demo: fits of several engines, scores, plots and texts.

Start with ``sections``; ``engines`` is the table of the library's engines.
"""
