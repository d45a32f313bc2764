"""Continuation of a stopped search: when, from which position and with which sites; Student-t data that need it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import gp
from probinfer.core.status import Status
from probinfer.gp.approximation.conditioning import SiteSolutions
from probinfer.gp.approximation.sites import Sites
from probinfer.gp.hyperparameters.continuation import continue_search
from probinfer.gp.hyperparameters.verification import VerifiedEstimate
from probinfer.vi import MAPInfo

OK, STALLED, MISSED = Status.OK, Status.LINE_SEARCH_STALLED, Status.MAX_ITERATIONS


def end(value, status, sites_status=OK, position=0.0):
    """The best of three ends, at ``position``, with sites that identify it."""
    values = jnp.asarray([-100.0, value, -200.0])
    info = MAPInfo(
        values[1], values, jnp.zeros(3, jnp.int32), jnp.full(3, 10), jnp.int32(1), None, jnp.int32(status),
        positions={"a": jnp.asarray([7.0, position, 7.0])},
    )  # fmt: skip
    sites = Sites(jnp.asarray([[position, 1.0]]), jnp.asarray([[position, 2.0]]))
    return VerifiedEstimate(
        jnp.zeros(1), SiteSolutions(sites, values[1:2], jnp.asarray([sites_status], jnp.int32)), info
    )


def run(first, *others):
    """Continue with prepared ends; return the best and the arguments of each search."""
    calls = []

    def search_from(sites, starts):
        calls.append((sites, np.asarray(starts["a"])))
        return others[len(calls) - 1]

    return continue_search(first, search_from, jax.random.key(0)), calls


@pytest.mark.parametrize(
    "first",
    [
        end(-3.0, OK),
        end(-3.0, Status.INTERRUPTED),
        end(-3.0, STALLED, sites_status=MISSED),
        end(-3.0, MISSED),
    ],
)
def test_ends_that_are_no_edge_of_the_sites_are_left(first):
    best, calls = run(first)
    assert best is first
    assert calls == []


def test_it_goes_on_from_the_best_end_with_the_sites_there():
    best, calls = run(
        end(-3.0, STALLED, position=1.5), end(-2.0, STALLED, position=2.5), end(-1.0, OK, position=3.5)
    )
    assert int(best.info.status) == OK
    assert float(best.info.log_density) == -1.0
    np.testing.assert_array_equal(best.info.num_evaluations, [30, 30, 30])
    for (sites, starts), position in zip(calls, (1.5, 2.5), strict=True):
        np.testing.assert_array_equal(sites.lam1, [position, 1.0])
        np.testing.assert_array_equal(sites.lam2, [position, 2.0])
        assert starts[0] == position
        assert np.all((np.abs(starts[1:] - position) > 0) & (np.abs(starts[1:] - position) < 0.5))


def test_a_round_that_gains_nothing_is_the_last_and_one_that_loses_does_not_count():
    first = end(-3.0, STALLED)
    assert run(first, end(-4.0, OK))[0] is first
    tied = end(-3.0, STALLED)
    best, calls = run(first, tied)
    assert len(calls) == 1
    assert int(best.info.status) == STALLED
    rising = [end(-3.0 + 0.1 * i, STALLED) for i in range(1, 9)]
    assert len(run(first, *rising)[1]) == 4


@pytest.mark.slow
def test_a_search_that_the_sites_of_its_start_end_goes_on():
    """24 points, three outliers at 1000 noise scales: stopped at 52.1887 with a slope of .12, called stalled.

    From the sites at that end all restarts come to one maximum.
    """
    X = np.linspace(0, 10, 24)[:, None]
    rng = np.random.default_rng([19, 3])
    K = np.exp(-0.5 * ((X - X.T) / rng.uniform(1, 3)) ** 2)
    y = np.linalg.cholesky(K + 1e-8 * np.eye(24)) @ rng.normal(size=24) + 0.1 * rng.standard_t(4, 24)
    where = rng.choice(24, 3, replace=False)
    y[where] += rng.choice([-1, 1], 3) * 100 * rng.uniform(0.5, 2, 3)
    model = gp.Model(gp.kernels.RBF(), gp.likelihoods.StudentT())
    fit = gp.fit(jax.random.key(19), model, X, y, inference=gp.EP(), progress=False)
    assert fit.info.status == OK
    np.testing.assert_allclose(fit.info.log_density, 52.1890084, atol=1e-5)
    assert fit.info.log_likelihood == fit.info.log_density
    best = gp.condition(fit.model, fit.X, fit.y, gp.EP(), sites=jax.tree.map(lambda leaf: leaf[0], fit.sites))
    assert best.status == OK
    gradient = jax.grad(
        lambda log_variance: (
            gp.condition(
                gp.replace(fit.model, {"kernel.variance": jnp.exp(log_variance)}),
                fit.X,
                fit.y,
                gp.EP(),
                sites=best.sites,
            ).log_evidence
        )
    )(jnp.log(fit.model.kernel.variance))
    assert abs(float(gradient)) < 1e-3
