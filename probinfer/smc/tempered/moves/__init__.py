"""The moves of particles at one level: Hamiltonian, no-U-turn or independent.

Start with ``choice``, which selects them by name or by the measurements of a pilot.
"""
