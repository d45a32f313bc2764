"""The demo: real data sets, every engine or approximation on each, a language model, and a report in plain words.

Start with ``demo``; every other file is one of its stories.
"""
