"""Clouds of particles: flattened positions, their coordinates relative to the cloud, and kernel bandwidths.

Start with ``particles`` (flattened positions and their scores) and ``geometry`` (the metric of a cloud).
"""
