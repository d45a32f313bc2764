"""Running an algorithm: the guarded loop, its records, checkpoints and progress, and how it is interrupted.

Start with ``driver`` (``run`` and ``run_until``), then ``loop``, which both drive. ``many`` runs one inference for each
of many data sets. ``checkpoint``, ``store`` and ``sealed_files`` are three layers of files that are whole or absent.
"""
