"""Rewards as a user writes them: sums and powers of all kinds against their potentials, and refused settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from degraded import degrade

from probinfer import lm
from probinfer.lm.rewards import calibration
from probinfer.lm.rewards.algebra import ProductPotential, TemperedPotential
from probinfer.lm.rewards.deferred import Deferred, bind
from probinfer.lm.rewards.host.function_score import Faults
from probinfer.lm.rewards.meanings import LogOdds
from probinfer.lm.rewards.model import RewardModel
from tests.lm import tables

WORDS = tables.model().tokenizer


def score():
    return tables.PrefixScore(jnp.asarray(tables.TABLE, jnp.result_type(float)))


def half(prompt, text):
    return 0.5


def evidence(reward):
    key, method = jax.random.key(0), lm.Exact(step=lm.every(1))
    found = lm.infer(key, tables.model(), "a;", reward, method, answer=lm.answers.text, max_tokens=3)
    return found.log_evidence


def test_scores_stand_for_their_odds_in_sums_and_powers():
    """Enumerated evidence: of sums and powers of bare scores, and of the potentials that they mean."""
    odds = lm.rewards.from_model(score())
    assert evidence(score() + 0.5 * score()) == pytest.approx(evidence(1.5 * odds), rel=1e-9)
    assert evidence(np.float64(0.5) * score()) == pytest.approx(evidence(0.5 * odds), rel=1e-9)
    assert abs(evidence(1.5 * odds) - evidence(0.5 * odds)) > 1e-3


def test_sums_of_all_kinds_keep_their_order():
    kinds = {
        "score": (score, lm.rewards.LogOdds),
        "potential": (lambda: lm.rewards.sharpened(2.0), lm.rewards.Sharpened),
        "deferred": (lambda: lm.rewards.from_python(half, workers=0), lm.rewards.PrefixTwist),
    }
    for left, first in kinds.values():
        for right, second in kinds.values():
            total = left() + right()
            bound = bind(total, WORDS)
            assert isinstance(bound, ProductPotential)
            assert [type(part) for part in bound.parts] == [first, second]
        for power in (2, jnp.asarray(2.0)):
            assert isinstance(bind(power * left(), WORDS), TemperedPotential)
            assert isinstance(bind(left() * power, WORDS), TemperedPotential)
    assert isinstance(bind(sum([score(), score()], score()), WORDS), ProductPotential)


@pytest.mark.parametrize("make", [score, lambda: lm.rewards.sharpened(2.0), lambda: lm.rewards.regex("a")])
@pytest.mark.parametrize("other", [3, len, "a"])
def test_what_is_no_reward_is_not_added(make, other):
    for add in (lambda: make() + other, lambda: other + make()):
        with pytest.raises(TypeError, match="rewards are added to rewards, got"):
            add()
    with pytest.raises(TypeError, match="tempered by a number"):
        make() * "2"
    with pytest.raises(ValueError, match="finite and not negative"):
        -1 * make()


def test_deferred_rewards_are_made_once():
    total = score() + lm.rewards.from_python(half, workers=0)
    assert isinstance(total, Deferred)
    assert total.bind(WORDS) is total.bind(WORDS)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: lm.rewards.from_python(half, bogus=1),
            TypeError,
            "no setting 'bogus': there are takes, scale",
        ),
        (lambda: lm.rewards.from_python(half, takes="all"), ValueError, "one of text, steps; got 'all'"),
        (lambda: lm.rewards.from_python(half, timeout="3"), ValueError, "timeout must be positive"),
        (
            lambda: lm.rewards.from_python(half, workers=1.5),
            TypeError,
            "workers must be an int of at least 0",
        ),
        (lambda: lm.rewards.from_python(half, max_steps=0), ValueError, "max_steps must be at least 1"),
        (lambda: lm.rewards.regex(3), TypeError, "a regular expression must be a string, got 3"),
        (lambda: lm.rewards.grammar(None), TypeError, "a grammar must be a string"),
        (lambda: lm.rewards.json_schema("{"), ValueError, "not a JSON object"),
        (lambda: lm.rewards.json_schema("[1]"), ValueError, "not a JSON object"),
        (lambda: lm.rewards.json_schema([1]), TypeError, "a dictionary or its text"),
        (lambda: lm.rewards.sharpened("x"), TypeError, "power must be a number, got 'x'"),
        (lambda: lm.rewards.sharpened(float("nan")), ValueError, "finite and not negative, got nan"),
        (lambda: lm.rewards.sharpened(-1), ValueError, "finite and not negative"),
        (lambda: lm.rewards.self_certainty("x"), TypeError, "temperature must be a number"),
        (lambda: lm.rewards.self_certainty(float("nan")), ValueError, "temperature must be positive"),
        (lambda: lm.rewards.regex("[a-"), ValueError, "regular expression '\\[a-' cannot be followed"),
        (
            lambda: lm.rewards.json_schema({"type": "nonsense"}),
            ValueError,
            "the JSON schema cannot be followed",
        ),
        (lambda: lm.rewards.grammar("start: foo"), ValueError, "the grammar cannot be followed"),
    ],
)
def test_bad_settings_are_refused_when_they_are_written(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_numbers_may_be_arrays_and_tracers():
    @jax.jit
    def power(alpha):
        return lm.rewards.sharpened(alpha).power + lm.rewards.self_certainty(alpha).temperature

    assert float(power(jnp.asarray(2.0))) == 4.0
    assert float(lm.rewards.sharpened(np.float32(2)).power) == 2.0


def test_words_say_whose_score_it_is():
    model = tables.model().network
    judge = RewardModel(model, jnp.ones(4), jnp.asarray(0.0))
    calibrated = lm.rewards.calibrated(judge, calibration.Affine(jnp.asarray(0.5), jnp.asarray(0.0)))
    total = judge + lm.rewards.from_python(half, workers=0) + lm.rewards.self_certainty(2.0)
    odds = "the product of the odds of the scores of its steps by"
    assert bind(total, WORDS).description == (
        f"{odds} the reward model, times the score of the whole text by the function half, "
        f"times {odds} the self-certainty, to the power 0.5"
    )
    assert (2 * calibrated).description == f"({odds} the reward model (calibrated)) to the power 2"
    noisy = lm.rewards.from_model(degrade(judge, 1.0), meaning="likelihood")
    assert noisy.description == "the product of the scores of its steps by the reward model (with noise)"
    nameless = lm.rewards.from_python(lambda prompt, text: 0.5, meaning="terminal", workers=0)
    assert bind(nameless, WORDS).description == "the score of the whole text by a function without name"


def test_faults_begin_with_their_cause_where_nothing_is_left():
    trace = "Traceback:\n  line 3\nValueError: no key\n"
    some, every = Faults({"exception": 3}, trace, 8, 8), Faults({"exception": 6, "NaN": 2}, trace, 8, 8)
    assert str(some).startswith("3 of 8 scores lost: 3 by exception; the first:\nTraceback")
    assert str(every).startswith(
        "ValueError: no key: 8 of 8 scores lost: 6 by exception, 2 by NaN; the first:"
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_what_odds_at_a_temperature_show_is_the_score(temperature):
    """The last step multiplied by (r / (1 - r))^(1 / tau); its score is r."""
    odds = LogOdds(score(), temperature=temperature)
    r = jnp.asarray([0.2, 0.9])
    last = jnp.log(r / (1 - r)) / temperature
    np.testing.assert_allclose(odds.log_score(last, last), jnp.log(r), rtol=1e-12)
