"""Parameters of a test of which the quick suite takes some, one of each kind, and ``make test-all`` all."""

import pytest


def quick(values, *taken):
    """Every value as a parameter, slow if it is not among those taken, which must be there."""
    values = list(values)
    assert all(one in values for one in taken), f"{taken} are not all among {values}"
    return [pytest.param(value, marks=[pytest.mark.slow] * (value not in taken)) for value in values]
