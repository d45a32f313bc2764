"""The demo: several engines or approximations on real data sets, a language model, and a report.

Start with ``demo``; each other file is one section of the report.
"""
