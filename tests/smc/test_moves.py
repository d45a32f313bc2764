"""Moves of tempered runs: the joint distribution, integrals by hand, the choice of a pilot and its cost; bad input."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats
from scipy.special import logsumexp

import probinfer as pi
from probinfer import smc, targets
from probinfer.app.suite import known_targets, trials
from probinfer.checks import evidence_sandwich
from probinfer.numerics import covariance_factor
from probinfer.smc.tempered.bridge import DEGREES_OF_FREEDOM
from probinfer.smc.tempered.moves import choice, hamiltonian, independent, no_u_turn
from probinfer.smc.tempered.schedule import LevelSettings
from tests.smc import tempered_cases as cases
from tests.smc.test_tempered import infer

ROOT = np.array([[0.7, 0.0], [-0.1, 0.4]])
LOC = np.array([0.3, -0.2])


def nuts_once(logdensity_fn, key, position):
    def evaluate(u):
        return jax.value_and_grad(lambda u: (logdensity_fn(u), jnp.zeros(())), has_aux=True)(u)

    root, step_size = jnp.asarray(ROOT, position.dtype), jnp.asarray(0.9, position.dtype)
    moved = no_u_turn.nuts_moves(
        key, evaluate, position[None], root, step_size, 0 * step_size, num_moves=1, mode="vmap"
    )
    return moved.positions[-1, 0], moved.acceptance


def independent_once(logdensity_fn, key, position):
    moved = independent.independent_moves(
        key,
        lambda u: (logdensity_fn(u), jnp.zeros(())),
        position[None],
        jnp.asarray(LOC, position.dtype),
        jnp.asarray(2 * ROOT, position.dtype),
        jnp.asarray(8),
        num_moves=1,
        mode="vmap",
    )
    return moved.positions[-1, 0], moved.acceptance


@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=pytest.mark.slow) for step in (nuts_once, independent_once)]
)
def test_the_move_leaves_the_joint_distribution(step):
    kernel = trials.Transition(step.__name__, lambda fn, theta: theta, step, lambda state: state)
    report, passed, verdict = trials.joint(
        kernel, known_targets.location_and_scale(), 400, jax.random.key(2), 1e-4
    )
    assert passed, verdict  # a false alarm has probability 1e-4
    assert min(report.moved.values()) > 0.6


@pytest.mark.f32
def test_acceptance_and_distribution_of_one_proposal(dtype):
    """Exact normal draws with a narrow proposal: acceptance by double integral, and they stay normal."""
    num = 4000
    start = jax.random.normal(jax.random.key(0), (num, 1), dtype)
    moved = jax.jit(
        lambda key, start: independent.independent_moves(
            key,
            lambda u: (-0.5 * jnp.sum(u**2), u[0]),
            start,
            jnp.full(1, 0.5, dtype),
            jnp.full((1, 1), 0.4, dtype),
            jnp.asarray(1),
            num_moves=1,
            mode="vmap",
        )
    )(jax.random.key(1), start)
    u = np.linspace(-9, 9, 1201)
    log_proposal = stats.t(DEGREES_OF_FREEDOM, 0.5, 0.4).logpdf(u)
    log_weight = stats.norm.logpdf(u) - log_proposal
    accept = np.minimum(1, np.exp(log_weight[None] - log_weight[:, None]))
    exact = np.einsum("i,j,ij->", stats.norm.pdf(u), np.exp(log_proposal), accept) * (u[1] - u[0]) ** 2
    assert abs(moved.acceptance[1] - exact) < 4.5 * 0.5 / np.sqrt(
        num
    )  # sd of a probability is .5 at most: 7e-6
    ends = np.asarray(moved.positions[1, :, 0], float)
    assert stats.kstest(ends, "norm").pvalue > 1e-4  # fixed key; a false alarm has probability 1e-4
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(moved.log_ratios[1], moved.positions[1, :, 0], rtol=8 * eps, atol=8 * eps)
    assert np.mean(moved.positions[1] != start) > 0.2
    assert moved.positions.dtype == moved.acceptance.dtype == dtype
    assert int(moved.num_densities) == 2 * num
    assert int(moved.num_gradients) == 0


def test_a_proposal_that_is_the_target_accepts_everything():
    target = dist.MultivariateStudentT(DEGREES_OF_FREEDOM, jnp.asarray(LOC), jnp.asarray(ROOT))
    start = target.sample(jax.random.key(3), (64,))
    moved = jax.jit(
        lambda key, start: independent.independent_moves(
            key,
            lambda u: (target.log_prob(u), jnp.zeros(())),
            start,
            jnp.asarray(LOC),
            jnp.asarray(ROOT),
            jnp.asarray(2),
            num_moves=2,
            mode="vmap",
        )
    )(jax.random.key(4), start)
    np.testing.assert_allclose(moved.acceptance[1:], 1, rtol=1e-9)
    assert np.all(np.diff(moved.positions, axis=0) != 0)
    z = np.linalg.solve(ROOT, (np.asarray(moved.positions[-1]) - LOC).T)
    assert (
        stats.kstest(z.ravel(), stats.t(DEGREES_OF_FREEDOM).cdf).pvalue > 1e-4
    )  # fixed key; probability 1e-4


def moved_to(positions):
    unused = jnp.zeros(())
    return hamiltonian.MoveResult(
        positions=jnp.asarray(positions),
        log_ratios=unused,
        acceptance=unused,
        step_size=unused,
        num_gradients=unused,
        num_densities=unused,
    )


def test_mixing_and_the_proposals_that_it_takes():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(3, 2000, 2)) @ ROOT.T
    # independent draws mix by one: squared jumps over twice the variance, 8000 of them: sd .016
    assert abs(choice.measure_mixing(moved_to(draws), jnp.asarray(ROOT)) - 1) < 0.06
    stay = np.where(rng.random((2000, 1)) < 0.5, draws[0], draws[1])
    half = choice.measure_mixing(moved_to(np.stack([draws[0], stay])), jnp.asarray(ROOT))
    assert abs(half - 0.5) < 0.1
    wide = choice.measure_mixing(moved_to(draws), jnp.asarray([0.7, np.hypot(0.1, 0.4)]))
    np.testing.assert_allclose(wide, choice.measure_mixing(moved_to(draws), jnp.asarray(ROOT)), rtol=1e-12)
    table = {(0.8, 0.81): 1, (0.8, 0.5): 3, (0.8, 0.0): 16, (1.0, 0.3): 9, (0.0, 0.5): 1, (0.8, 1.0): 1}
    for (wanted, single), tries in table.items():
        assert choice.tries_for_mixing(jnp.asarray(wanted), jnp.asarray(single)) == tries


class Straight(NamedTuple):
    """A path from a standard normal, whose log ratio is a coordinate."""

    def terms(self, u):
        return -0.5 * jnp.sum(u**2), u[0]


@jax.jit
def learned(key, level, positions):
    return choice.move_particles(
        "auto", key, Straight(), level, positions, jnp.asarray(True), num_moves=7, mode="vmap"
    )


def test_the_pilot_chooses_by_what_it_measured():
    particles = jnp.asarray(np.random.default_rng(2).normal(size=(256, 2)))
    factor = covariance_factor.estimate(jnp.zeros(256), particles)
    level = LevelSettings(
        temperature=jnp.zeros(()),
        loc=jnp.mean(particles, axis=0),
        factor=factor,
        step_size=jnp.asarray(0.5),
        tries=jnp.zeros((), jnp.int32),
    )
    # short steps: a trajectory takes many, an independent proposal one; 1 or 2 proposals for each of 1000 keys
    moved, after = learned(jax.random.key(1), level._replace(step_size=jnp.asarray(0.05)), particles[::8])
    assert 1 <= after.tries <= 3
    assert moved.num_densities == 32 * (1 + 7)  # one proposal a move while learning
    assert moved.num_gradients > 32 * 7
    _, refused = learned(jax.random.key(1), level._replace(loc=level.loc + 8), particles[::8])
    assert refused.tries == 0  # a proposal that misses the particles


def counted(values):
    return np.where(np.floor(values) % 2 == 0, 1.0, -0.5).sum(axis=-1).astype(values.dtype)


def stairs(u):
    """A step function from Python: no gradient."""
    shape = jax.ShapeDtypeStruct(u.shape[:-1], u.dtype)
    return jax.pure_callback(counted, shape, u, vmap_method="expand_dims")


@pytest.mark.slow
def test_a_likelihood_without_gradient():
    target = targets.from_prior(dist.Normal(jnp.zeros(2), 2.0), stairs)
    edges = np.arange(-20, 21)
    cells = np.diff(stats.norm(0, 2).cdf(edges))
    exact = 2 * logsumexp(np.where(edges[:-1] % 2 == 0, 1.0, -0.5), b=cells)
    posterior = infer(3, target, smc.Tempered(256, moves="independent", mode="vmap"))
    info = posterior.info
    low, high = info.interval(0.999)
    assert low < exact < high  # .001
    # base draws of islands and pilot; 32 ancestors, evaluated and moved 7 times; the pilot makes one proposal a move
    assert info.num_gradients == 0
    assert info.num_densities == 9 * 256 + 32 * (8 * len(info.tries) + 8 * int(np.sum(1 + 7 * info.tries)))
    with pytest.raises(ValueError, match="callback"):
        infer(3, target, smc.Tempered(256, moves="hmc", mode="vmap"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nuts", "independent"])
def test_weights_of_both_directions(kind):
    log_evidence, mean, covariance = cases.conjugate()
    frozen = smc.annealing(
        jax.random.key(1),
        cases.target_of(cases.NORMAL),
        num_particles=256,
        refine=8,
        moves=kind,
        progress=False,
    )
    draws = np.random.default_rng(5).multivariate_normal(mean, covariance, 512)
    logs = (
        frozen.forward_all(jax.random.key(2), 512),
        frozen.reverse_all(jax.random.key(3), jnp.asarray(draws)),
    )
    ratio = np.exp(np.asarray(logs[0]) - log_evidence)  # E w = Z: 4.5 errors are 7e-6
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std(ddof=1) / np.sqrt(512)
    assert ratio.std() < 3
    report = evidence_sandwich(*(np.asarray(values, float) for values in logs), level=0.001)
    low, high = report.interval
    assert low < log_evidence < high  # .001
    assert not report.contradiction
    assert 0 < report.gap < 4  # nats


@pytest.mark.slow
def test_a_resumed_annealing_is_the_uninterrupted_one(tmp_path):
    def run(checkpoint=None):
        return smc.anneal(
            jax.random.key(6),
            cases.target_of(cases.SKEWED),
            num_particles=256,
            refine=4,
            progress=False,
            checkpoint=checkpoint,
        )

    plain, checkpoint = run(), pi.Checkpoint(tmp_path / "run", every=3)
    checkpointed = run(checkpoint)
    steps = sorted((tmp_path / "run" / "runs").glob("step_*.part"))
    assert len(steps) > 1
    steps[-1].unlink()
    again = run(checkpoint)
    for posterior in (checkpointed, again):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(posterior), strict=True):
            np.testing.assert_array_equal(a, b)


def test_unknown_moves():
    with pytest.raises(ValueError, match="moves must be one of auto, hmc, nuts, independent, got 'gibbs'"):
        smc.Tempered(moves="gibbs")
    with pytest.raises(ValueError, match="moves must be"):
        smc.annealing(jax.random.key(0), cases.target_of(cases.NORMAL), moves="gibbs", progress=False)
