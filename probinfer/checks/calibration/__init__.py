"""Are posteriors right on average over data that their own model simulates?

Start with ``simulation_based`` (``sbc``), then ``ranks`` and ``rank_uniformity``, the table and its verdict.
``coverage`` is TARP, ``symmetry`` a test of location alone, ``bands`` the simultaneous bands of ranks.
"""
