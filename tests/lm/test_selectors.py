"""Votes against brute force, ties, dead particles, and the stopping rule against the law that it integrates."""

import math
from itertools import permutations

import jax
import numpy as np
import pytest
from scipy import integrate, stats

from probinfer.lm import selectors

ANSWERS = ["7", "3", None, "7", "5", "3", "7"]


def brute(answers, weights):
    """Shares by answer, one by one."""
    return {
        a: sum(w for b, w in zip(answers, weights, strict=True) if b == a) / sum(weights)
        for a in set(answers)
    }


@pytest.mark.parametrize("seed", range(3))
def test_votes_are_sums_of_weights(seed):
    weights = np.random.default_rng(seed).exponential(size=7) ** 3
    expected = brute(ANSWERS, weights)
    votes = (
        selectors.posterior_vote(ANSWERS, np.log(weights) - 900),
        selectors.weighted_vote(ANSWERS, weights),
    )
    for vote in votes:
        assert dict(vote.ranking) == pytest.approx(
            {a: w for a, w in expected.items() if a is not None}, rel=1e-12
        )
        assert vote.unanswered == pytest.approx(expected[None], rel=1e-12)
        shares = [share for _, share in vote.ranking]
        assert shares == sorted(shares, reverse=True)
        assert vote.answer == max(("7", "3", "5"), key=expected.__getitem__)
        assert vote.probability == shares[0]
    assert dict(selectors.majority(ANSWERS).ranking) == pytest.approx({"7": 3 / 7, "3": 2 / 7, "5": 1 / 7})


def test_dead_particles_have_no_vote():
    vote = selectors.posterior_vote(["7", "3", "5"], [-np.inf, 0.0, -np.inf])
    assert vote == ((("3", 1.0),), 0.0)
    nobody = selectors.posterior_vote(["7", None], [-np.inf, -np.inf])
    assert nobody.answer is None
    assert nobody.ranking == ()
    assert math.isnan(nobody.unanswered)
    none = selectors.majority([None, None])
    assert (none.answer, none.probability, none.unanswered) == (None, 0.0, 1.0)


def test_ties_go_to_the_first_whatever_the_order_of_addition():
    weights = [
        0.1,
        0.7,
        0.2,
        0.3,
        0.3,
        0.4,
    ]  # 0.1 + 0.7 + 0.2 != 0.3 + 0.3 + 0.4 in floating point, added from the left
    for order in permutations(range(6)):
        answers = ["aaabbb"[i] for i in order]
        vote = selectors.weighted_vote(answers, [weights[i] for i in order])
        assert vote.answer == answers[0], order
    assert selectors.argmax(["x", "y", "z"], [1.0, 2.0, 2.0]) == ("y", 1)


def test_argmax_wants_an_answer():
    assert selectors.argmax(ANSWERS, [1, 2, 9, 4, 0, 3, 3.5]) == ("7", 3)
    assert selectors.argmax([None, None], [1, 2]) == (None, 1)
    assert selectors.argmax(["a", None], [-np.inf, 2]) == (None, 1)
    assert selectors.argmax(["a", "b"], [-np.inf, -np.inf]) == (None, -1)
    assert selectors.argmax(["a", "b"], [0.5, np.inf]) == ("b", 1)


@pytest.mark.f32
def test_sample_draws_in_proportion(key):
    log_weights = np.log([1.0, 0.0, 2.0, 5.0], where=[True, False, True, True], out=np.full(4, -np.inf))
    keys = jax.random.split(key, 400)
    drawn = np.array([selectors.sample(k, ["a", "b", None, "c"], log_weights).particle for k in keys])
    counts = np.bincount(drawn, minlength=4)
    assert counts[1] == 0
    # three z-tests at 5.3 standard deviations: false-fail rate 4e-7
    expected, spread = (
        np.array([50, 0, 100, 250]),
        np.sqrt(400 * np.array([1, 0, 2, 5]) / 8 * np.array([7, 8, 6, 3]) / 8),
    )
    assert (np.abs(counts - expected) <= 5.3 * spread).all()
    assert selectors.sample(key, ["a"], [-np.inf]) == (None, -1)
    only = selectors.sample(key, ["a", "b"], [-np.inf, -3.0])
    assert only == ("b", 1)
    assert selectors.sample(key, [None], [0.0]) == (None, 0)


def leads(first, second):
    """P(p1 > p2) under Dirichlet(first + 1, second + 1, 1): the integral over the simplex."""
    density = lambda y, x: stats.dirichlet.pdf([x, y, 1 - x - y], [first + 1, second + 1, 1])  # noqa: E731
    upper = lambda x: min(x, 1 - x)  # noqa: E731
    halves = [integrate.dblquad(density, a, b, 0, upper, epsabs=1e-8)[0] for a, b in ((0, 0.5), (0.5, 1))]
    return sum(halves)


@pytest.mark.parametrize(("first", "second"), [(3, 1), (4, 4), (2, 0)])
def test_the_stopping_probability_is_the_integral_over_the_simplex(first, second):
    decision = selectors.decided(["a"] * first + [None] + ["b"] * second)
    assert decision.probability == pytest.approx(leads(first, second), abs=1e-6)
    assert decision.num_effective == first + second
    assert decision.leader == "a"
    assert decision.runner_up == ("b" if second else None)


def test_the_vote_is_decided_when_it_is_clear():
    assert [selectors.decided(["a"] * n).stop for n in (1, 2, 3, 4)] == [False, False, False, True]
    assert selectors.decided(["a"] * 3).probability == 1 - 0.5**4
    assert selectors.decided(["a"] * 3, confidence=0.9).stop
    assert not selectors.decided(["a", "b"] * 50).stop
    assert selectors.decided(["a"] * 30 + ["b"] * 10 + ["c"] * 9).stop
    assert selectors.decided([None, None]) == (False, 0.0, None, None, 0.0)
    assert selectors.decided(["a"], [-np.inf]) == (False, 0.0, None, None, 0.0)


def test_weights_count_by_their_effective_size():
    equal = selectors.decided(["a", "a", "a", "b"], [2.0] * 4)
    assert equal == selectors.decided(["a", "a", "a", "b"])
    skewed = selectors.decided(["a"] * 20, np.log([1.0] + [1e-9] * 19))
    assert skewed.num_effective == pytest.approx(1.0, rel=1e-6)
    assert skewed.probability == pytest.approx(0.75, rel=1e-6)
    assert not skewed.stop
    weights = np.array([3.0, 1.0, 2.0, 5.0])
    decision = selectors.decided(["a", "b", "a", None], np.log(weights))
    size = 36 / (9 + 1 + 4)
    assert decision.num_effective == pytest.approx(size)
    assert decision.probability == pytest.approx(stats.beta.sf(0.5, size * 5 / 6 + 1, size / 6 + 1))
    fewer = selectors.decided(["a"] * 20, num_effective=2)
    assert fewer.probability == pytest.approx(0.875)


def test_bad_input_is_refused_in_words(key):
    with pytest.raises(TypeError, match="answers must be strings or None"):
        selectors.majority([1, 2])
    with pytest.raises(TypeError, match="answers must be strings or None"):
        selectors.majority("77")
    with pytest.raises(ValueError, match="no answers to choose from"):
        selectors.majority([])
    for bad in ([0.0], [[0.0, 0.0]], 0.0):
        with pytest.raises(ValueError, match=r"log_weights must be one number for each answer, \(2,\)"):
            selectors.posterior_vote(["a", "b"], bad)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="log_weights must be finite or minus infinity"):
            selectors.sample(key, ["a"], [bad])
    for bad in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="take probabilities, not logits"):
            selectors.weighted_vote(["a"], [bad])
    with pytest.raises(ValueError, match="must not be NaN"):
        selectors.argmax(["a"], [np.nan])
    for bad in (0.5, 1.0, 95, np.nan):
        with pytest.raises(ValueError, match="confidence must lie between"):
            selectors.decided(["a"], confidence=bad)
    with pytest.raises(ValueError, match="num_effective must be finite"):
        selectors.decided(["a"], num_effective=-1)
