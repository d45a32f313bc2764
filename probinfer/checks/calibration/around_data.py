r"""Calibration near the observed data, rather than over the prior.

SBC averages over the prior: errors of opposite sign in different regions cancel, and regions that the observed data
rule out count as much as those that matter. Posterior SBC draws :math:`\theta^*_s \sim p(\theta\mid x)`, simulates
new data :math:`x'_s\sim p(x'\mid\theta^*_s)` and checks the inference from both, :math:`p(\theta\mid x, x'_s)`. The
initial draws are from the procedure under test (or from a better one): the check is whether the procedure is
consistent with itself as data are added, near the observed data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.checks.calibration.simulation_based import SBCReport, calibrate, check_functions, check_number
from probinfer.core.algorithms import as_partial
from probinfer.core.arguments import check_key
from probinfer.core.types import ArrayTree, PRNGKey
from probinfer.inference import diagnostics
from probinfer.running.checkpoint import Checkpoint

__all__ = ["posterior_sbc"]

_CAVEAT = (
    "errors are measured against the exact update of the initial draws: an error that these share is detected in part "
    "only (29 % of a bias of every posterior by the same number of standard deviations, if the new data are as "
    "informative as the observed data and the prior)"
)


def posterior_sbc(
    key: PRNGKey,
    draws: ArrayTree,
    simulate: Callable,
    infer_fn: Callable,
    *,
    log_posterior_fn: Callable | None = None,
    log_likelihood_fn: Callable | None = None,
    num_simulations: int | None = None,
    quantities: Sequence[Callable] | Mapping[str, Callable] = (),
    reference: Callable | None = None,
    num_projections: int = 20,
    level: float = 0.05,
    mode: str = "auto",
    batch_size: int | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool | str | None = None,
) -> SBCReport:
    """Check that an inference procedure is calibrated near the observed data.

    Args:
        key: random key.
        draws: posterior draws given the observed data, leaves (chain, draw, ...).
        simulate: ``(key, theta)`` -> new data of the same form as the observed data.
        infer_fn: ``(key, x_new)`` -> draws of the posterior given the observed *and* the new data, leaves (L, ...) or
            (chain, L, ...), or ``(draws, info)``.
        log_posterior_fn: log density of theta given the observed data, up to a constant; ranked too.
        log_likelihood_fn: ``(theta, x_new)`` -> log likelihood of the new data, ranked too; with the posterior, their
            sum as well. Their names are "log_prior", "log_likelihood" and "log_joint", as in ``sbc``.
        num_simulations: number S of new data sets. None: one for every two independent draws, at most 1000.
        quantities: as in ``sbc``.
        reference: as in ``sbc``.
        num_projections: as in ``sbc``.
        level: as in ``sbc``.
        mode: as in ``sbc``.
        batch_size: as in ``sbc``.
        checkpoint: as in ``sbc``.
        progress: as in ``sbc``.

    Returns:
        The report of ``sbc``.

    Raises:
        TypeError: ``key`` is not a key, or a function is not callable.
        ValueError: the draws lack the axes (chain, draw) or are not finite, there are more simulations than independent
            draws, or ``sbc`` refuses the input.

    References:
        Säilynoja, Schmitt, Bürkner and Vehtari (2025), "Posterior SBC: Simulation-Based Calibration Checking
        Conditional on Data", section 3.
    """
    check_key(key)
    check_functions(simulate=simulate)
    key_select, key_x, key_calibrate = jax.random.split(key, 3)
    num_independent = _num_independent(draws)
    if num_simulations is None:
        num_simulations = min(max(num_independent // 2, 1), 1000)
    check_number(num_simulations)
    if num_simulations > num_independent:
        raise ValueError(
            f"{num_simulations} simulations need as many independent draws, but the effective sample size of the draws "
            f"is {num_independent}: run longer chains, or ask for fewer simulations"
        )
    theta = _select_evenly(key_select, draws, int(num_simulations))
    x = _simulate_data(as_partial(simulate), jax.random.split(key_x, num_simulations), theta)
    return calibrate(
        key_calibrate,
        theta,
        x,
        infer_fn,
        log_prior_fn=log_posterior_fn,
        log_likelihood_fn=log_likelihood_fn,
        quantities=quantities,
        reference=reference,
        num_projections=num_projections,
        level=level,
        run_settings={"mode": mode, "batch_size": batch_size, "checkpoint": checkpoint, "progress": progress},
        caveat=_CAVEAT,
    )


@jax.jit
def _simulate_data(simulate: Callable, keys: Any, true_values: ArrayTree) -> ArrayTree:
    return jax.vmap(simulate)(keys, true_values)


def _num_independent(draws: ArrayTree) -> int:
    """Return the smallest effective sample size, rounded up; the number of draws for chains of fewer than 4."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(draws)]
    if not leaves or any(leaf.ndim < 2 or leaf.shape[:2] != leaves[0].shape[:2] for leaf in leaves):
        raise ValueError(
            f"draws must have leaves (chain, draw, ...), got {[leaf.shape for leaf in leaves]}; add a chain axis with "
            "leaf[None]"
        )
    if not all(np.isfinite(leaf).all() for leaf in leaves):
        raise ValueError("draws are NaN or infinite: repair the posterior before checking it")
    num_chains, length = leaves[0].shape[:2]
    if length < 4:
        return num_chains * length
    sizes = [np.asarray(diagnostics.ess(jnp.asarray(leaf))).ravel() for leaf in leaves]
    finite = np.concatenate([size[np.isfinite(size)] for size in sizes])
    return min(int(np.ceil(finite.min(initial=num_chains * length))), num_chains * length)


def _select_evenly(key: PRNGKey, draws: ArrayTree, count: int) -> ArrayTree:
    """Return ``count`` draws evenly spaced over the chains, in random order."""
    num_chains, length = np.shape(jax.tree.leaves(draws)[0])[:2]
    rows = np.floor((np.arange(count) + 0.5) * num_chains * length / count).astype(int)
    rows = rows[np.asarray(jax.random.permutation(key, count))]
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(-1, *np.shape(leaf)[2:])[rows], draws)
