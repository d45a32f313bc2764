r"""Calibration around the data that were observed, rather than over the prior.

SBC averages over the prior: errors of opposite sign in two of its regions cancel, and regions that the observed data
rule out count as much as those that matter. Posterior SBC draws :math:`\theta^*_s \sim p(\theta\mid x)`, simulates
new data :math:`x'_s\sim p(x'\mid\theta^*_s)` and checks the inference from both, :math:`p(\theta\mid x, x'_s)`. The
draws that it starts from are those of the procedure under test (or of a better one): it checks that the procedure
agrees with itself as data are added, near the data at hand.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.checks.calibration.simulation_based import SBCReport, calibrate, check_functions, check_number
from probinfer.core.algorithms import as_partial
from probinfer.core.errors import check_key
from probinfer.core.types import ArrayTree, PRNGKey
from probinfer.inference import diagnostics

__all__ = ["posterior_sbc"]

_CAVEAT = (
    "errors are measured against the exact update of the draws that it started from: one that these share is seen in "
    "part only (of a bias of every posterior by the same number of its standard deviations 29 %, where the new data "
    "say as much as all that was known before)"
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
    chunk: int | None = None,
    path: str | os.PathLike | None = None,
    progress: bool | str | None = None,
) -> SBCReport:
    """Check that an inference procedure is calibrated near the observed data.

    Args:
        key: random key.
        draws: of the posterior given the observed data, leaves (chain, draw, ...).
        simulate: ``(key, theta)`` -> new data like the observed.
        infer_fn: ``(key, x_new)`` -> draws of the posterior given the observed *and* the new data, leaves (L, ...) or
            (chain, L, ...), or ``(draws, info)``.
        log_posterior_fn: log density of theta given the observed data, up to a constant; ranked too.
        log_likelihood_fn: ``(theta, x_new)`` -> log likelihood of the new data, ranked too; with the posterior, their
            sum as well. They are called "log_prior", "log_likelihood" and "log_joint", as in ``sbc``.
        num_simulations: number S of new data sets. None: one for every two independent draws, 1000 at most.
        quantities: as in ``sbc``.
        reference: as in ``sbc``.
        num_projections: as in ``sbc``.
        level: as in ``sbc``.
        mode: as in ``sbc``.
        chunk: as in ``sbc``.
        path: as in ``sbc``.
        progress: as in ``sbc``.

    Returns:
        The report of ``sbc``.

    Raises:
        TypeError: ``key`` is not a key, or a function is not callable.
        ValueError: draws without the axes (chain, draw), draws that are not finite, more simulations than independent
            draws, and what ``sbc`` refuses.

    References:
        Säilynoja, Schmitt, Bürkner and Vehtari (2025), "Posterior SBC: Simulation-Based Calibration Checking
        Conditional on Data", section 3.
    """
    check_key(key)
    check_functions(simulate=simulate)
    key_pick, key_x, key_rest = jax.random.split(key, 3)
    independent = _independent(draws)
    number = min(max(independent // 2, 1), 1000) if num_simulations is None else num_simulations
    check_number(number)
    if number > independent:
        raise ValueError(
            f"{number} simulations need as many independent draws, but the draws are worth {independent} (effective "
            "sample size): run longer chains, or ask for fewer simulations"
        )
    theta = _spread(key_pick, draws, int(number))
    x = _simulated(as_partial(simulate), jax.random.split(key_x, number), theta)
    return calibrate(
        key_rest,
        theta,
        x,
        infer_fn,
        log_prior_fn=log_posterior_fn,
        log_likelihood_fn=log_likelihood_fn,
        quantities=quantities,
        reference=reference,
        num_projections=num_projections,
        level=level,
        run={"mode": mode, "chunk": chunk, "path": path, "progress": progress},
        caveat=_CAVEAT,
    )


@jax.jit
def _simulated(simulate: Callable, keys: Any, theta: ArrayTree) -> ArrayTree:
    return jax.vmap(simulate)(keys, theta)


def _independent(draws: ArrayTree) -> int:
    """How many independent draws the worst coordinate is worth, rounded up; all of them for chains below 4 draws."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(draws)]
    if not leaves or any(leaf.ndim < 2 or leaf.shape[:2] != leaves[0].shape[:2] for leaf in leaves):
        raise ValueError(
            f"draws must have leaves (chain, draw, ...), got {[leaf.shape for leaf in leaves]}; add a chain axis with "
            "leaf[None]"
        )
    if not all(np.isfinite(leaf).all() for leaf in leaves):
        raise ValueError("draws are NaN or infinite: repair the posterior before it is checked")
    chains, length = leaves[0].shape[:2]
    if length < 4:
        return chains * length
    sizes = [np.asarray(diagnostics.ess(jnp.asarray(leaf))).ravel() for leaf in leaves]
    known = np.concatenate([size[np.isfinite(size)] for size in sizes])
    return min(int(np.ceil(known.min(initial=chains * length))), chains * length)


def _spread(key: PRNGKey, draws: ArrayTree, number: int) -> ArrayTree:
    """``number`` draws evenly spaced over the chains, in random order."""
    chains, length = np.shape(jax.tree.leaves(draws)[0])[:2]
    rows = np.floor((np.arange(number) + 0.5) * chains * length / number).astype(int)
    rows = rows[np.asarray(jax.random.permutation(key, number))]
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(-1, *np.shape(leaf)[2:])[rows], draws)
