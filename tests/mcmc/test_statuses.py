"""Verdicts on a run of chains: lost chains, low E-BFMI, truncated trajectories, improper densities."""

import warnings
from types import SimpleNamespace

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probinfer as pi
from probinfer import coin, mcmc, smc, targets, vi
from probinfer.core.errors import NumericalError
from probinfer.core.status import Status
from probinfer.mcmc import energies, engines, report
from probinfer.mcmc.adaptation import metric as metrics
from probinfer.mcmc.adaptation import warmup as warmups
from probinfer.mcmc.ensemble import ChainsInfo, ChainsState
from tests.mcmc.test_engines import LOC, SCALE, make_target, two_normals


def warmed_up(draws, logdensities, dtype):
    """The warm-up after draws (step, chain, 2), their gradients those of a normal."""
    config = warmups.WarmupConfig(jnp.ones(3, bool), jnp.asarray(0.8, dtype), 200, 2)
    num_chains = draws.shape[1]
    state = warmups.init(config, num_chains, metrics.identity(2, 2, dtype))
    update = jax.jit(warmups.update)
    sources = []
    for row, values in zip(jnp.asarray(draws, dtype), jnp.asarray(logdensities, dtype)):
        state = update(config, state, row, -row, values, jnp.full(num_chains, 0.8, dtype), jnp.int32(7))
        sources.append(np.asarray(state.sources))
    return state, np.array(sources)


def test_a_chain_of_negligible_mass_continues_from_another(dtype):
    """Chain 3 lies lower by 40 nats; chain 2 as well, but it is wide: e^40 in two directions."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(71, 4, 2))
    draws[:, 1] *= np.exp(20.0)
    logdensities = np.zeros((71, 4)) - rng.exponential(size=(71, 4)) - [0.0, 40.0, 40.0, 0.0]
    state, sources = warmed_up(draws, logdensities, dtype)
    unchanged = np.arange(4)
    assert np.all(sources[:-2] == unchanged)  # windows of ten and twenty draws are too short to tell
    assert sources[69].tolist() == [0, 1, 3, 3]
    assert sources[70].tolist() == unchanged.tolist()
    assert state.num_restarts.tolist() == [0, 0, 1, 0]
    assert float(state.deficits[2]) == pytest.approx(40, abs=1)
    # within the margin of 10 + 2 log 3 no chain moves
    state, sources = warmed_up(draws[:, [0, 2]], logdensities[:, [0, 0]] - [0.0, 12.0], dtype)
    assert np.all(sources == np.arange(2))
    assert not state.num_restarts.any()


def test_a_lost_chain_is_restarted_where_the_others_are(dtype):
    """One of four chains starts in a mode e^40 lower; after the warm-up all are in the other one."""
    target = make_target(
        LOC - 30 * SCALE, LOC + 30 * SCALE, np.diag(SCALE**2), dtype, example=LOC, lower=40.0
    )
    config = mcmc.WarmupConfig(jnp.ones(3, bool), jnp.asarray(0.8, dtype), 120, 4)
    algorithm = mcmc.chains(target.logdensity_fn, mcmc.Trajectories("nuts"), config)
    positions = np.array([LOC - 30 * SCALE] * 4)
    positions[1] = LOC + 30 * SCALE
    state = jax.jit(algorithm.init)(jnp.asarray(positions, dtype))
    state, _ = pi.run(jax.random.key(0), algorithm, state, 120)
    assert state.warmup.num_restarts.tolist() == [0, 1, 0, 0]
    assert np.all(np.asarray(state.chains.position) < LOC)
    assert float(state.warmup.deficits[1]) == pytest.approx(40, abs=10)


def test_restarts_are_reported():
    info = report.MCMCInfo(**dict.fromkeys(report.MCMCInfo._fields))._replace(
        diverging=np.zeros((4, 1)),
        metric=metrics.identity(2, 2, float),
        num_dropped_starts=0,
        num_shared_starts=0,
        num_restarts=np.array([0, 0, 1, 0]),
        deficits=np.array([0.0, 0.0, 41.3, 0.0]),
    )
    assert info.starts_reason == (
        "none of 16 starts dropped; restarted in the warm-up from another chain, for negligible mass: chain 3 (41 "
        "nats below)"
    )


def judged(energy, dtype, *, draws=None, depth=3, diverging=None, num_draws=400):
    """The finding of NUTS on draws of four chains, independent if none are given."""
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(4, num_draws, 4)) if draws is None else draws
    verdict = report.convergence(jnp.asarray(draws, dtype))
    diverging = jnp.zeros((4, num_draws), bool) if diverging is None else diverging
    verdict = report.with_divergences(verdict, diverging)
    info = ChainsInfo(
        diverging=diverging,
        acceptance_rate=None,
        num_leapfrogs=None,
        energy=jnp.asarray(energy, dtype),
        tree_depth=jnp.asarray(np.broadcast_to(depth, (4, num_draws))),
    )
    state = ChainsState(SimpleNamespace(position=jnp.asarray(draws[:, -1], dtype)), None, None)
    zero, matrix = jnp.zeros(4, dtype), jnp.eye(4, dtype=dtype)
    logdensity_fn = targets.LogDensity(two_normals, zero, zero, matrix, jnp.zeros((), dtype))
    run = engines._SamplingRun(mcmc.NUTS(), None, False, None, logdensity_fn)
    return engines._finding(run, verdict, info, state)


@pytest.fixture
def energy():
    """Independent energies of a normal in four dimensions: their E-BFMI is 2, with an error of .25."""
    return np.random.default_rng(2).gamma(4.0, size=(4, 400))


def test_the_chain_of_low_density_is_named(energy, dtype):
    draws = np.random.default_rng(1).normal(size=(4, 400, 4))
    draws[2] += 30.0
    low = energy + np.array([0.0, 0.0, 40.0, 0.0])[:, None]
    finding = judged(low, dtype, draws=draws)
    assert finding.status == Status.CHAINS_DISAGREE
    assert "chain 3 lies 40 nats below chain" in finding.details
    assert "run more draws (num_draws)" in finding.advised
    # modes of equal height, and chains that agree: no chain is named
    assert "nats below" not in judged(energy, dtype, draws=draws).details
    assert judged(energy, dtype).status == Status.OK


def test_low_ebfmi_is_reported(energy, dtype):
    walk = np.cumsum(np.random.default_rng(3).normal(size=(4, 400)), axis=1)
    finding = judged(np.where(np.arange(4)[:, None] == 1, walk, energy), dtype)
    assert finding.status == Status.CHAINS_DISAGREE
    assert "E-BFMI is 0.0" in finding.details
    assert "in chain 2 (below 0.3)" in finding.details
    assert "reparametrize" in finding.advised
    assert energies.low_ebfmi(jnp.asarray(walk[:, :50])) is None  # too few to tell


def test_truncated_trajectories_are_reported(energy, dtype):
    depth = np.where(np.arange(400) < 20, 10, 4)
    finding = judged(energy, dtype, depth=depth)
    assert finding.status == Status.MAX_ITERATIONS
    assert finding.details.startswith("80 of 1600 trajectories were cut off at max_tree_depth=10")
    assert "raise max_tree_depth" in finding.advised
    assert judged(energy, dtype, depth=np.where(np.arange(400) < 19, 10, 4)).status == Status.OK
    # a trajectory that diverged was not truncated
    diverging = jnp.broadcast_to(jnp.arange(400) < 20, (4, 400))
    finding = judged(energy, dtype, depth=depth, diverging=diverging)
    assert finding.status == Status.DIVERGENT_TRANSITIONS
    assert "target_acceptance" in finding.advised


def flat(x):
    return 0.0 * jnp.sum(x)


def sum_is_known(x):
    return -0.5 * (jnp.sum(x) - 1.0) ** 2


def falls_slowly(x):
    return -jnp.log1p(jnp.sum(x**2))


BLACKJAX = mcmc.Blackjax(lambda fn: blackjax.nuts(fn, 0.5, jnp.ones(2)), num_draws=500)


@pytest.mark.parametrize(
    ("engine", "density"),
    [
        (mcmc.NUTS(), flat),
        (vi.MAP(), flat),
        (vi.MAP(), sum_is_known),
        pytest.param(vi.MeanField(), falls_slowly, marks=pytest.mark.slow),
        pytest.param(vi.MeanField(), sum_is_known, marks=pytest.mark.slow),
        pytest.param(mcmc.NUTS(), sum_is_known, marks=pytest.mark.slow),
        pytest.param(mcmc.NUTS(), falls_slowly, marks=pytest.mark.slow),
        pytest.param(mcmc.HMC(), flat, marks=pytest.mark.slow),
        pytest.param(mcmc.HMC(), falls_slowly, marks=pytest.mark.slow),
        pytest.param(vi.FullRank(), flat, marks=pytest.mark.slow),
        pytest.param(vi.FullRank(), sum_is_known, marks=pytest.mark.slow),
        pytest.param(vi.MeanField(), flat, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_improper_densities_are_refused_or_reported(engine, density, dtype):
    status, text = outcome(engine, density, dtype)
    assert status is Status.IMPROPER_DENSITY
    assert "away the log density" in text
    assert "the density has no finite integral" in text


def outcome(engine, density, dtype):
    """Status and text, of the last warning or an error."""
    target = targets.from_logdensity(density, jnp.zeros(2, dtype))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            status = engine.sample(jax.random.key(0), target, progress=False).info.status
            text = str(caught[-1].message)
        except NumericalError as error:
            status, text = error.status, str(error)
    return status, text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "density", "message"),
    [
        (coin.SVGD(num_particles=32), flat, "it is flat, or improper"),
        (coin.SVGD(num_particles=32), sum_is_known, "it is flat, or improper"),
        (coin.SVGD(num_particles=32), falls_slowly, "no finite integral"),
        (coin.LAWGD(), flat, "is it normalisable"),
        (coin.LAWGD(), sum_is_known, "no finite integral"),
        (coin.LAWGD(), falls_slowly, "too heavy"),
        (smc.Tempered(num_particles=64), flat, "away the log density"),
        (smc.Tempered(num_particles=64), sum_is_known, "away the log density"),
        (smc.Tempered(num_particles=64), falls_slowly, "away the log density"),
        (BLACKJAX, flat, "no finite integral"),
        (BLACKJAX, sum_is_known, ""),  # the chains walk and disagree
        (BLACKJAX, falls_slowly, "no finite integral"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_other_engines_report_it_in_their_terms(engine, density, message, dtype):
    status, text = outcome(engine, density, dtype)
    assert status != Status.OK
    assert message in text


class Called(Exception):
    pass


@pytest.mark.slow
def test_bars_end_where_the_draws_do(monkeypatch, dtype):
    """The bar of a phase is as long as the phase, though both phases have room for the longer one."""
    calls = []

    def record_call(key, algorithm, state, stop_fn, num_steps, **settings):
        calls.append((settings["progress"], num_steps, settings["room"]))
        raise Called

    monkeypatch.setattr(engines, "run_until", record_call)
    target = make_target(LOC, LOC, np.diag(SCALE**2), dtype)
    for num_warmup in (0, 30):
        with pytest.raises(Called):
            mcmc.NUTS(num_warmup=num_warmup, num_draws=10).sample(jax.random.key(0), target, progress="NUTS")
    assert calls == [("draws", 10, 10), ("warm-up", 30, 30)]
