"""Verdicts of particle engines: which populations pass, which do not, and the messages."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import probinfer as pi
from probinfer import smc, targets
from probinfer.core.errors import NumericalError
from probinfer.core.status import Status
from probinfer.inference import findings
from probinfer.mcmc import report
from probinfer.smc.parameters import smc2
from probinfer.smc.tempered import engine as tempered
from probinfer.smc.tempered import levels, schedule
from probinfer.smc.tempered.bridge import bridge_from_prior
from tests.smc import parameter_cases
from tests.smc import tempered_cases as cases

RUNS = 100


def share_ok(populations):
    return np.mean(
        [int(report.convergence(jnp.asarray(one), populations=True).status) == 0 for one in populations]
    )


@pytest.mark.parametrize("size", [(4, 64, 2), (2, 32, 1)])
def test_populations_that_agree_pass_and_others_do_not(size):
    """Right ones fail by R-hat once in 10^4: more than 3 of 100 by chance in 4e-8 of all runs of this test."""
    rng = np.random.default_rng(0)
    right = rng.normal(size=(RUNS, *size))
    assert share_ok(right) >= 0.97
    # each particle copied thrice, as by moves that were refused: nine in ten draws are worth nothing
    copied = np.repeat(right[:, :, : -(-size[1] // 10)], 10, axis=2)[:, :, : size[1]]
    assert share_ok(copied[:20]) == 0.0
    apart = right.copy()
    apart[:, 0, :, -1] += 3.0  # of one population: 3 standard deviations
    assert share_ok(apart[:20]) == 0.0


def test_verdicts_name_the_settings_of_their_engine():
    config, agreed = smc.SMC2(num_parameters=64), report.Convergence(None, None, None, Status.OK)
    assert smc2._verdict(config, agreed, [False] * 4, np.zeros(4)) is None
    finding = smc2._verdict(config, agreed, [False] * 4, np.array([0.0, 0.0, 0.0, 20.0]))
    assert finding.status == Status.CHAINS_DISAGREE
    assert "the evidences of the islands differ" in finding.details
    assert finding.advised == "raise num_parameters (it is 64)"
    apart = report.convergence(
        jnp.asarray(np.random.default_rng(0).normal(size=(4, 64, 1)) + np.arange(4)[:, None, None])
    )
    finding = smc2._verdict(config, apart, [False] * 4, np.zeros(4))
    assert "the islands disagree most on" in finding.details
    assert "num_draws" not in finding.advised
    assert smc2._verdict(config, agreed, [True, False], np.zeros(2)).status == Status.DEGENERATE_WEIGHTS


@pytest.mark.slow
def test_few_parameters_can_be_enough():
    """12 of 12 right runs of 64 parameters pass: ESS is 170 to 370, where 64 are asked for, and R-hat 1.03 at most."""
    target = parameter_cases.target(parameter_cases.observations(0))
    for seed in range(3):
        posterior = pi.infer(jax.random.key(seed), target, smc.SMC2(num_parameters=64), progress=False)
        assert posterior.info.status is Status.OK


def test_undefined_values_are_told_from_one_in_a_hundred():
    assert findings.undefined(0, 100, "draws") is None
    assert findings.undefined(9, 1000, "draws") is None
    finding = findings.undefined(10, 1000, "draws of the prior")
    assert finding.status == Status.NON_FINITE
    assert finding.details.startswith("10 of 1000 draws of the prior have an undefined (NaN) log likelihood")


def test_findings_are_combined():
    assert findings.combined([None, None]).status == Status.OK
    one = findings.Finding(Status.MAX_ITERATIONS, "one", "do this")
    two = findings.Finding(Status.POOR_APPROXIMATION, "two", "do this")
    both = findings.combined([one, None, two])
    assert both == (Status.POOR_APPROXIMATION, "one, two", "do this")
    assert "iteration limit" in findings.combined([findings.Finding(Status.MAX_ITERATIONS, "one")]).advised


def states_of(positions, ratios, best_position, best_log_ratio):
    state = SimpleNamespace(
        positions=jnp.asarray(positions),
        log_ratios=jnp.asarray(ratios),
        best_position=jnp.asarray(best_position),
        best_log_ratio=jnp.asarray(best_log_ratio),
        status=0,
        num_undefined=0,
    )
    return (state, state)


def test_a_narrow_mode_that_was_lost_is_reported():
    """Two bumps of the likelihood: particles at the end are in the wide one, one on the way was in the narrow one."""
    narrow = np.array([3.0, 1.0])
    case = cases.bumps([0.5, 0.5], [[-3.0, 0.0], narrow], [np.eye(2) * 0.25, np.eye(2) * 1e-12], [3.0, 2.0])
    target = cases.target_of(case)
    bridge = bridge_from_prior(target, jnp.zeros(2))
    positions = np.array([-3.0, 0.0]) + 0.5 * np.random.default_rng(0).normal(size=(64, 2))
    ratios = np.array([float(bridge.terms(jnp.asarray(row))[1]) for row in positions])
    finding = tempered._lost_mode(bridge, states_of(positions, ratios, narrow, 30.0), "raise num_particles")
    assert finding.status == Status.POOR_APPROXIMATION
    assert "nats above all at the end: a narrow mode was lost" in finding.details
    final = states_of(positions, ratios, positions[np.argmax(ratios)], np.max(ratios))
    assert tempered._lost_mode(bridge, final, "") is None


def test_a_level_reports_its_moves_and_remembers_the_best(dtype):
    """Steps a million times too long are all refused. The row before the first move is no move."""
    bridge = bridge_from_prior(cases.target_of(cases.NORMAL), jnp.zeros(2, dtype))
    algorithm = levels.tempering(
        bridge, levels.TemperingSettings(jnp.asarray(0.5, dtype), "hmc", True, "vmap")
    )
    empty = schedule.empty_schedule(2, 1)
    refused = empty._replace(
        temperatures=jnp.ones(1, dtype),
        factors=1e6 * jnp.ones_like(empty.factors),
        step_sizes=jnp.ones(1, dtype),
    )
    state = levels.init_population(
        algorithm, jax.random.key(0), refused, jnp.asarray(False), num_particles=32
    )
    first = float(jnp.max(state.log_ratios))
    assert float(state.best_log_ratio) == first
    state, level = jax.jit(algorithm.step)(jax.random.key(1), state)
    assert float(level.acceptance) < 1e-6
    assert float(state.best_log_ratio) == max(first, float(jnp.max(state.log_ratios)))
    np.testing.assert_allclose(bridge.terms(state.best_position)[1], state.best_log_ratio, rtol=1e-5)


def half_known(params):
    return -0.5 * (params["a"] + params["b"] - 1.0) ** 2


@pytest.mark.slow
def test_an_evidence_without_a_normalized_prior_is_reported(dtype):
    free = dist.ImproperUniform(dist.constraints.real, (), ())
    engine = smc.Tempered(num_particles=64, num_islands=2)
    target = targets.from_prior({"a": dist.Normal(0.0, 1.0), "b": free}, half_known)
    with pytest.warns(UserWarning, match="arbitrary constant"):
        posterior = pi.infer(jax.random.key(0), target, engine, progress=False)
    assert "only if that contains a normalized prior" in posterior.info.evidence_reason
    target = targets.from_prior({"a": free, "b": free}, half_known)
    with pytest.raises(NumericalError, match="away the log density") as caught:
        pi.infer(jax.random.key(0), target, engine, progress=False)
    assert caught.value.status == Status.IMPROPER_DENSITY
