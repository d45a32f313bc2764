"""What the commands of the command line do, one file a command.

Start with ``regression`` (``probinfer gp``), ``check`` or ``generate``; ``live`` shows texts while they grow.
"""
