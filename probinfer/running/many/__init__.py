"""One posterior for each of many data sets, in one compiled program.

Start with ``driver`` (``run_many``). ``lanes`` lets a lane that has finished take the next data set; ``posteriors`` is
what comes back.
"""
