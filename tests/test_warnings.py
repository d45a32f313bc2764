"""In these tests a warning that the library's own code causes is an error; one that it gives to its caller is none."""

import pytest

CAUSES_ONE = "import warnings\nwarnings.warn('soon gone', DeprecationWarning, stacklevel=1)"


def test_a_warning_that_the_library_causes_is_an_error():
    with pytest.raises(DeprecationWarning, match="soon gone"):
        exec(CAUSES_ONE, {"__name__": "probinfer.gp.anything"})


def test_a_warning_of_others_is_none():
    with pytest.warns(DeprecationWarning, match="soon gone"):
        exec(CAUSES_ONE, {"__name__": "a_script_of_a_user"})
