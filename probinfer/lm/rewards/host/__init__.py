"""Python functions as rewards: called on the host, in worker processes, so that their faults do not stop the run.

Start with ``function_score``. ``registry`` is how a compiled program finds a Python object, ``workers`` the processes,
and ``worker`` the script that each of them runs.
"""
