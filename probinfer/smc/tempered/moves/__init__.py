"""What carries particles at one level: Hamiltonian, no-U-turn or independent moves.

Start with ``choice``, which takes them by name or as a pilot measured.
"""
