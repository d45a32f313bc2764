"""Do the tests notice a fault? Faults planted one at a time in a copy of the library; start with ``table.py``."""
