"""Shifted keys: those of the tests and no others, once, and back; what failed at which offset is told."""

import jax
import numpy as np
import pytest

from tests import keys, offsets


@pytest.fixture
def shift(request):
    yield keys.shift
    keys.shift(request.config.getoption("--key-offset"))


def data(key):
    return np.asarray(jax.random.key_data(key)).tolist()


def test_offsets_replace_one_another(shift):
    """The library's own keys, made by a function that is none of the tests', stay."""
    plain = {seed: data(keys.MAKERS["key"](seed)) for seed in (3, 10, 14)}
    library = eval("lambda: jax.random.key(3)", {"jax": jax})
    library = type(library)(library.__code__.replace(co_filename="probinfer/running/driver.py"), {"jax": jax})
    for offset in (7, 11, 0):
        shift(offset)
        assert data(jax.random.key(3)) == plain[3 + offset]
        assert data(library()) == plain[3]
        assert jax.random.PRNGKey(3).tolist() == keys.MAKERS["PRNGKey"](3 + offset).tolist()


def test_what_leads_to_a_key_is_found(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text(
        "import jax\ndef draw(): return jax.random.normal(jax.random.key(0))\n"
        "def test_a(): assert draw() < 9\ndef test_b(key): pass\ndef test_c(): assert jax.random\n"
        "@pytest.fixture\ndef drawn(key): return key\ndef test_d(drawn): pass\n"
        "def of(key): return key\ndef test_e(): assert of(1) and sorted([1], key=of)\n"
    )
    found = {name for name in keys.leading_to_keys(file) if name.startswith("test")}
    assert found == {"test_a", "test_b", "test_d"}
    assert not keys.makes_no_key(file)
    assert keys.makes_no_key(keys.TESTS / "reference" / "stein.py")


def test_what_failed_is_told(capsys):
    right, wrong = {"passed": 3, "failed": []}, {"passed": 2, "failed": ["test_b[1]"]}
    report = {"tests/test_a.py float64": {"offsets": {"1000": wrong, "20": right, "300": wrong}}}
    assert offsets._conclude(["tests/test_a.py float64", "tests/test_new.py float64"], report) == 1
    assert capsys.readouterr().out.splitlines() == [
        "failed at 300, 1000: tests/test_a.py float64::test_b[1]",
        "7 passed, 2 failed",
    ]
    assert offsets._conclude(["tests/test_a.py float64"], {}) == 0


def test_files_of_a_folder_and_by_name():
    root = offsets.ROOT / "tests"
    found = offsets._files([root / "resampling", root / "test_vi.py"])
    assert "tests/resampling/test_laws.py" in found
    assert "tests/test_vi.py" in found
    assert not [file for file in offsets._files([root]) if "notebooks" in file]


MARKED = """
@pytest.mark.parametrize("case", ["a", pytest.param("b", 2, marks=pytest.mark.slow), "c"])
@pytest.mark.slow
@pytest.mark.f32(slow=True)
def test_one(case):
    ...
"""


@pytest.mark.parametrize(
    ("change", "is_the_same_code"),
    [
        (("@pytest.mark.slow\n", ""), True),
        (('pytest.param("b", 2, marks=pytest.mark.slow)', '("b", 2)'), True),
        (("(slow=True)", ""), True),
        (('"a"', '"z"'), False),
        (("marks=pytest.mark.slow", "id='x'"), False),
    ],
)
def test_that_a_test_became_slow_is_no_change(change, is_the_same_code):
    (before, on), (after, still_on) = (
        offsets._digest(source) for source in (MARKED, MARKED.replace(*change))
    )
    assert (before == after) == is_the_same_code
    assert on == {"test_one pytest.mark.slow", "test_one pytest.mark.f32(slow=True)", "('b', 2)"}
    assert still_on < on or not is_the_same_code
