"""Python functions as rewards: called on the host, in worker processes, with their faults contained.

Start with ``function_score``. ``registry`` is how a compiled program finds an object of Python, ``workers`` the
processes, ``worker`` the script that each of them runs.
"""
