"""Ways to sample texts, and to search them: all are passes of the same particles with the same ledger."""
