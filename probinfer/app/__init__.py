"""What people run: the command line, the demo, the self-check suite, the reports and the training of the reasoner.

Nothing but ``__main__`` and the console script imports this package. Start with ``command_line``.
"""
