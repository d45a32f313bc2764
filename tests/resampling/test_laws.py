"""The distribution of counts of every scheme, conditional or not, against enumeration; properties of all schemes."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import resampling
from probinfer.core.status import Status
from probinfer.numerics import weights
from tests.reference import resampling as oracle

REPEATS = 12_000
# asymmetric; dead draws in the middle and at the end; equal; heavy and light first draws; two alive, one alive
CASES = np.array(
    [
        [0.1, 0.35, 0.15, 0.4],  # fractional parts that sum to 2: the order matters
        [0.1, 0.0, 0.72, 0.18],
        [0.25, 0.25, 0.25, 0.25],
        [0.6, 0.17, 0.23, 0.0],
        [0.37, 0.0, 0.0, 0.63],
        [1.0, 0.0, 0.0, 0.0],
    ]
)
LOG_TOTALS = np.array([0.0, 300.0, -5.0, -300.0, 2.0, 1.0])
BAD = np.array([[-np.inf] * 4, [0.0, np.nan, 0.0, 0.0], [0.0, 0.0, np.inf, 0.0], [-np.inf, 0.0, 0.0, 0.0]])
SINGLE = [
    ("systematic", False),
    ("multinomial", False),
    ("killing", True),
    ("stratified", True),
]  # also in float32
FORMS = [(name, False) for name in resampling.SCHEMES] + [(name, True) for name in resampling.CONDITIONAL]
forms = pytest.mark.parametrize(
    ("name", "is_conditional"),
    [
        pytest.param(*f, id=f[0] + "-given" * f[1], marks=[pytest.mark.f32] if f in SINGLE else [])
        for f in FORMS
    ],
)


def scheme_of(name, is_conditional):
    return resampling.conditional(name) if is_conditional else resampling.get(name)


def law_of(name, is_conditional, probabilities, num):
    return (oracle.conditional_law if is_conditional else oracle.law)(name, probabilities, num)


def counts_of(ancestors, size):
    return np.sum(np.asarray(ancestors)[..., None] == np.arange(size), axis=-2)


def sample(name, is_conditional, rows, num, seed):
    keys = jax.random.split(jax.random.key(seed), rows.shape[0])
    drawn = jax.jit(jax.vmap(lambda key, row: scheme_of(name, is_conditional)(key, row, num)))(keys, rows)
    return jax.device_get(drawn)


@lru_cache
def drawn(name, is_conditional):
    """All cases many times, and the bad ones, in one compiled call: ancestors and log weights by case."""
    with np.errstate(divide="ignore"):
        rows = np.log(CASES) + LOG_TOTALS[:, None]
    rows = jnp.asarray(np.concatenate([np.repeat(rows, REPEATS, axis=0), BAD]), jnp.result_type(float))
    ancestors, log_weights = sample(name, is_conditional, rows, size_of(name), seed=7)
    cases = [slice(i * REPEATS, (i + 1) * REPEATS) for i in range(len(CASES))]
    bad = slice(len(CASES) * REPEATS, None)
    return [(ancestors[s], log_weights[s]) for s in cases], (ancestors[bad], log_weights[bad])


def size_of(name):
    return 2 if name == "optimal" else 4


@forms
def test_counts_have_the_enumerated_law(name, is_conditional):
    # false-fail rate 1e-6 a case; in single precision the probabilities are off by 1e-7, not visible in 1e4 draws
    for (ancestors, log_weights), probabilities in zip(drawn(name, is_conditional)[0], CASES, strict=True):
        # ``optimal`` returns no more draws than are alive.
        living_ancestors = np.where(np.isneginf(log_weights), -1, ancestors)
        assert_law = oracle.assert_law
        assert_law(counts_of(living_ancestors, 4), law_of(name, is_conditional, probabilities, size_of(name)))
        assert not np.isin(ancestors, np.flatnonzero(probabilities == 0)).any()
        assert not is_conditional or np.all(ancestors[:, 0] == 0)


@forms
def test_enumerated_laws_are_unbiased(name, is_conditional):
    for probabilities in CASES:
        num = size_of(name)
        law = law_of(name, is_conditional, probabilities, num)
        np.testing.assert_allclose(sum(law.values()), 1, rtol=1e-12)
        if not is_conditional:
            c = oracle.threshold(probabilities, num) if name == "optimal" else 0.0
            value = num * np.maximum(probabilities, c) if name == "optimal" else np.ones(4)
            mean = sum(p * np.array(counts) * value for counts, p in law.items())
            np.testing.assert_allclose(mean, num * probabilities, atol=1e-12)


@forms
def test_total_weight_is_kept(name, is_conditional, dtype):
    for (_, log_weights), log_total in zip(drawn(name, is_conditional)[0], LOG_TOTALS, strict=True):
        assert log_weights.dtype == dtype
        total = np.logaddexp.reduce(log_weights[:100], axis=1)
        np.testing.assert_allclose(total, log_total, rtol=1e-6, atol=1e-5 if dtype == np.float32 else 1e-12)
        equal = log_weights == log_weights[:, :1]
        assert name == "optimal" or equal.all()


@forms
def test_bad_weights_are_reported_and_move_nobody(name, is_conditional):
    ancestors, log_weights = drawn(name, is_conditional)[1]
    codes = [int(weights.status(jnp.asarray(row))) for row in log_weights]
    # A reference of weight zero cannot have survived.
    impossible = Status.NON_FINITE if is_conditional else Status.OK
    assert codes == [Status.DEGENERATE_WEIGHTS, Status.NON_FINITE, Status.NON_FINITE, impossible]
    assert np.all(np.isneginf(log_weights[0]))
    assert np.all(np.isnan(log_weights[1:3]))
    assert ancestors[:3].tolist() == [list(range(size_of(name)))] * 3
    assert is_conditional or not np.any(ancestors[3] == 0)


@pytest.mark.parametrize(
    ("name", "is_conditional"), [("multinomial", False), ("ssp", True), ("stratified", True)]
)
def test_other_numbers_have_the_enumerated_law(name, is_conditional, dtype):
    # two and three living draws; false-fail rate 1e-6 a case
    cases = np.array([[0.21, 0.11, 0.68], [0.37, 0.0, 0.63]])
    rows = jnp.repeat(jnp.log(jnp.asarray(cases, dtype)), REPEATS, axis=0)
    ancestors, _ = sample(name, is_conditional, rows, 5, seed=5)
    for part, probabilities in zip(np.split(ancestors, 2), cases, strict=True):
        oracle.assert_law(counts_of(part, 3), law_of(name, is_conditional, probabilities, 5))


@pytest.mark.parametrize("name", list(resampling.CONDITIONAL))
def test_identical_scores_treat_the_reference_like_the_others(name):
    ancestors, _ = drawn(name, True)[0][2]
    if name == "multinomial":
        # every free slot chooses each of the four draws with probability 1/4; 12 comparisons at 6 sigma: 3e-8
        share = np.stack([(ancestors[:, 1:] == i).mean(axis=0) for i in range(4)])
        assert np.abs(share - 0.25).max() < 6 * np.sqrt(0.25 * 0.75 / REPEATS)
    else:
        assert np.all(counts_of(ancestors, 4) == 1)


@pytest.mark.parametrize("name", ["multinomial", "stratified", "systematic", "ssp"])
def test_free_slots_of_a_conditional_scheme_have_one_law(name):
    # 4 cases x 3 slots x 4 draws at 6 sigma: false-fail rate below 1e-7 a scheme
    for (ancestors, _), probabilities in list(zip(drawn(name, True)[0], CASES, strict=True))[:4]:
        law = law_of(name, True, probabilities, 4)
        mean = (sum(p * np.array(counts) for counts, p in law.items()) - np.eye(4)[0]) / 3
        mean = np.clip(mean, 0, 1)
        share = np.stack([(ancestors[:, 1:] == i).mean(axis=0) for i in range(4)])
        assert np.all(np.abs(share.T - mean) <= 6 * np.sqrt(mean * (1 - mean) / REPEATS) + 1e-12)


@pytest.mark.parametrize("name", ["systematic", "ssp", "residual", "killing"])
def test_equal_weights_keep_everybody(name):
    ancestors, _ = drawn(name, False)[0][2]
    assert np.all(ancestors == np.arange(4))


def test_killing_leaves_survivors_in_their_slots():
    ancestors, _ = drawn("killing", False)[0][0]
    # the heaviest always survives; others stay with probability w / max w or are drawn again. 6 sigma: 2e-9 each
    probabilities = CASES[0]
    stay = probabilities / probabilities.max()
    stay = stay + (1 - stay) * probabilities
    share = (ancestors == np.arange(4)).mean(axis=0)
    assert share[probabilities.argmax()] == 1
    assert np.all(np.abs(share - stay) <= 6 * np.sqrt(stay * (1 - stay) / REPEATS) + 1e-12)


@pytest.mark.parametrize("name", ["stratified", "systematic", "ssp", "residual", "optimal"])
def test_ancestors_come_sorted(name):
    assert np.all(np.diff(drawn(name, False)[0][0][0], axis=1) >= 0)
