"""The commands of the command line, one file for each.

Start with ``regression`` (``probinfer gp``), ``check`` or ``generate``; ``live`` shows texts while they are generated.
"""
