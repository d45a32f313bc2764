"""The table of mutants fits the library as it is: every anchor occurs once, every change changes, every test exists."""

from pathlib import Path

import pytest

from tests.mutations.table import MUTANTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}:{mutant.old[:30]}")
def test_mutants_can_be_planted(mutant):
    source = (ROOT / "probinfer" / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    compile(source.replace(mutant.old, mutant.new), mutant.file, "exec")
    assert mutant.old != mutant.new
    for test in mutant.tests:
        assert (ROOT / "tests" / test.removesuffix("[f32]").partition("::")[0]).is_file()


def test_no_mutant_is_planted_twice():
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)
