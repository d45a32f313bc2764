"""Triggers, adaptive resampling, schemes by name, bad input, and equality with and without jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import resampling
from probinfer.numerics import weights
from probinfer.resampling.base import check

LOG_WEIGHTS = np.array([-0.2, -7.0, -np.inf, 1.3, 0.4, -2.0])
run = jax.jit(lambda adaptive, key, log_weights, t: adaptive(key, log_weights, 6, t))


@pytest.fixture
def log_weights(dtype):
    return jnp.asarray(LOG_WEIGHTS, dtype)


@pytest.mark.f32
@pytest.mark.parametrize(
    ("trigger", "size"),
    [(resampling.ess_below, weights.ess), (resampling.entropic_below, weights.entropic_ess)],
)
def test_triggers_watch_the_effective_sample_size(log_weights, trigger, size):
    level = float(size(log_weights)) / 6
    assert not trigger(0.99 * level)(log_weights, 0)
    assert trigger(1.01 * level)(log_weights, 0)
    assert trigger(jnp.asarray(1.01 * level))(log_weights, 0)


@pytest.mark.f32
def test_above_the_threshold_nothing_moves_and_below_it_the_scheme_runs(key, log_weights):
    level = float(weights.ess(log_weights)) / 6
    ancestors, unchanged, fired = run(
        resampling.adaptive(trigger=resampling.ess_below(0.99 * level)), key, log_weights, 0
    )
    assert ancestors.tolist() == list(range(6))
    assert not fired
    np.testing.assert_array_equal(unchanged, log_weights)
    *resampled, fired = run(
        resampling.adaptive(trigger=resampling.ess_below(1.01 * level)), key, log_weights, 0
    )
    assert fired
    for actual, expected in zip(resampled, resampling.systematic(key, log_weights, 6), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    totals = [float(weights.normalize(x).log_sum) for x in (log_weights, unchanged, resampled[1])]
    np.testing.assert_allclose(totals, totals[0], rtol=1e-5)


def test_default_is_systematic_below_half(key, dtype):
    adaptive = resampling.adaptive()
    assert adaptive.scheme == "systematic"
    four_of_six = jnp.asarray([0.0, 0.0, 0.0, 0.0, -50.0, -50.0], dtype)
    two_of_six = jnp.asarray([0.0, 0.0, -50.0, -50.0, -50.0, -50.0], dtype)
    assert not run(adaptive, key, four_of_six, 0)[2]
    assert run(adaptive, key, two_of_six, 0)[2]


def test_every_and_always(log_weights):
    assert [bool(resampling.every(3)(log_weights, t)) for t in range(7)] == [t in (0, 3, 6) for t in range(7)]
    assert resampling.always()(log_weights, 5)


def test_a_function_is_a_trigger(log_weights):
    adaptive = resampling.adaptive("killing", lambda log_weights, t: jnp.max(log_weights) > 10)
    assert not adaptive.trigger(log_weights, 0)
    assert adaptive.trigger(log_weights + 10, 0)
    assert len(jax.tree.leaves(adaptive)) == 0


def test_bad_weights_pass_through(key, dtype):
    adaptive = resampling.adaptive()
    dead = run(adaptive, key, jnp.full(6, -jnp.inf, dtype), 0)
    assert dead[0].tolist() == list(range(6))
    assert np.all(np.isneginf(dead[1]))
    assert np.isnan(run(adaptive, key, jnp.zeros(6, dtype).at[2].set(jnp.nan), 0)[1]).any()


def test_new_numbers_in_a_trigger_trace_nothing(key, log_weights, count_compiles):
    run(resampling.adaptive("systematic", resampling.ess_below(0.3)), key, log_weights, 0)
    others = [resampling.adaptive("systematic", resampling.ess_below(level)) for level in (0.2, 0.9)]
    with count_compiles() as counter:
        fired = [bool(run(adaptive, key, log_weights, 1)[2]) for adaptive in others]
    assert counter.count == 0
    assert fired == [False, True]


def test_a_batch_decides_row_by_row(key, dtype):
    rows = jnp.stack([jnp.zeros(6, dtype), jnp.asarray(LOG_WEIGHTS, dtype)])
    adaptive = resampling.adaptive(trigger=resampling.ess_below(0.7))
    ancestors, _, fired = jax.jit(jax.vmap(lambda k, x: adaptive(k, x, 6, 0)))(jax.random.split(key), rows)
    assert fired.tolist() == [False, True]
    assert ancestors[0].tolist() == list(range(6))
    assert not np.isin(2, ancestors[1])


def test_conditional_form_keeps_the_trigger():
    adaptive = resampling.adaptive("multinomial", resampling.every(2))
    assert adaptive.conditional().scheme is resampling.conditional("multinomial")
    assert adaptive.conditional().trigger is adaptive.trigger
    assert adaptive.conditional().conditional().scheme is adaptive.conditional().scheme
    assert resampling.conditional(resampling.ssp) is resampling.conditional("ssp")


@pytest.mark.parametrize(
    ("ancestors", "expected"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        ([1, 1, 1, 3], [1, 1, 1, 3]),
        ([0, 0, 3, 3], [0, 0, 3, 3]),
        ([3, 3, 2, 2], [2, 3, 2, 3]),
        ([2, 2, 2, 2], [2, 2, 2, 2]),
    ],
)
def test_in_place_moves_as_few_as_can_be(ancestors, expected):
    assert resampling.in_place(jnp.asarray(ancestors, jnp.int32)).tolist() == expected


def test_same_without_jit(key, log_weights):
    for actual, expected in zip(
        resampling.systematic.__wrapped__(key, log_weights, 6),
        resampling.systematic(key, log_weights, 6),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("name", list(resampling.SCHEMES))
@pytest.mark.parametrize(("size", "num"), [(3, 0), (0, 3)])
def test_nothing_to_choose_is_refused(key, dtype, name, size, num):
    with pytest.raises(ValueError, match="num >= 1 and at least one weight"):
        resampling.get(name)(key, jnp.zeros(size, dtype), num)
    if name in resampling.CONDITIONAL:
        with pytest.raises(ValueError, match="num >= 1 and at least one weight"):
            resampling.conditional(name)(key, jnp.zeros(size, dtype), num)


def test_shapes_and_dtypes_are_checked(dtype):
    with pytest.raises(ValueError, match=r"vector of log weights.*\(2, 3\).*vmap"):
        check(jnp.zeros((2, 3), dtype), 3)
    with pytest.raises(TypeError, match="floating numbers, got dtype int32"):
        check(jnp.zeros(3, jnp.int32), 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda key, x: resampling.killing(key, x, 5), ValueError, "num must be the number of draws, 6"),
        (lambda key, x: resampling.conditional("killing")(key, x, 7), ValueError, "got num=7"),
        (lambda key, x: resampling.optimal(key, x, 7), ValueError, "at most 6, got num=7"),
        (lambda key, x: resampling.adaptive()(key, x, 5, 0), ValueError, "num must be 6, got num=5"),
        (lambda key, x: resampling.get("systematik"), ValueError, "'systematik'; choose from multinomial"),
        (lambda key, x: resampling.adaptive("ess"), ValueError, "no resampling scheme is called"),
        (lambda key, x: resampling.get(3), TypeError, "got int"),
        (lambda key, x: resampling.adaptive(trigger=0.5), TypeError, "a trigger is a function"),
        (lambda key, x: resampling.conditional("optimal"), ValueError, "no conditional form of 'optimal'"),
        (lambda key, x: resampling.adaptive("residual").conditional(), ValueError, "no conditional form"),
        (lambda key, x: resampling.ess_below(0), ValueError, "0 < fraction <= 1, got 0"),
        (lambda key, x: resampling.entropic_below(1.5), ValueError, "0 < fraction <= 1, got 1.5"),
        (lambda key, x: resampling.every(0), ValueError, "positive integer, got 0"),
        (lambda key, x: resampling.every(1.5), ValueError, "positive integer, got 1.5"),
    ],
)
def test_bad_input_is_refused(key, log_weights, call, error, message):
    with pytest.raises(error, match=message):
        call(key, log_weights)


@pytest.mark.parametrize(
    ("name", "is_conditional"), [("optimal", False), ("multinomial", True), ("ssp", True)]
)
def test_one_draw(key, dtype, name, is_conditional):
    scheme = resampling.conditional(name) if is_conditional else resampling.get(name)
    ancestors, log_weights = scheme(key, jnp.asarray([-3.0], dtype), 1)
    assert ancestors.tolist() == [0]
    np.testing.assert_allclose(log_weights, -3, rtol=1e-6)
