r"""Simulation-based calibration of a whole inference procedure, in one call.

Draw :math:`\theta^*_s \sim p(\theta)` and :math:`x_s \sim p(x\mid\theta^*_s)`, infer from every :math:`x_s` in one
compiled program, and rank the true values among the draws. The ranked quantities are every scalar parameter, the log
densities if they are given, random projections, and the distance to a point that depends on the data (TARP), which
detects a posterior that ignores the data even if no density is known.

References:
    Talts, Betancourt, Simpson, Vehtari and Gelman (2018), "Validating Bayesian inference algorithms with
    simulation-based calibration", algorithm 2. Modrák et al. (2023), section 3 (quantities that depend on the data).
    Lemos, Coogan, Hezaveh and Perreault-Levasseur (2023), theorem 3 (references that depend on the data).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.checks.calibration.ball_centers import reference_points
from probinfer.checks.calibration.bands import Band
from probinfer.checks.calibration.rank_uniformity import UniformityReport, uniformity
from probinfer.checks.calibration.ranks import RankTable, check_shapes, named_quantities, rank_table
from probinfer.checks.calibration.references import References
from probinfer.checks.calibration.whitening import columns
from probinfer.checks.power.ranks import Detectable
from probinfer.core.algorithms import as_partial
from probinfer.core.arguments import check_key
from probinfer.core.errors import shortened
from probinfer.core.types import Array, ArrayTree, PRNGKey, Scalar, pytree
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.many.driver import ManyPosteriors, run_many
from probinfer.targets.transforms import structure

__all__ = ["SBCReport", "calibrate", "sbc"]

_WITHOUT_DENSITIES = (
    "without log_prior_fn and log_likelihood_fn the log joint density was not ranked, so errors that only it shows "
    "(biases that cancel over the data, small errors of the shape) may not be detected"
)


@dataclass(frozen=True)
class SBCReport:
    """Result of simulation-based calibration of an inference procedure.

    Attributes:
        uniform: test of all ranks: p-values, bands, detectable errors.
        posteriors: draws and diagnostics of every data set: status, cost, divergences, effective sample sizes.
        theta: true values, leaves (S, ...).
        x: simulated data, leaves (S, ...).
        references: reference points of the quantity "tarp"; None if there are none.
        has_densities: whether the log joint density was ranked.
        caveat: reference of the errors in the verdict, if it is not the prior and the model.
    """

    uniform: UniformityReport
    posteriors: ManyPosteriors
    theta: ArrayTree
    x: ArrayTree
    references: References | None
    has_densities: bool
    caveat: str = ""

    @property
    def ranks(self) -> RankTable:
        """Ranks of every quantity, -1 where a simulation failed."""
        return self.uniform.ranks

    @property
    def pvalues(self) -> dict[str, float]:
        """P-values by quantity, adjusted by Holm's rule over all of them."""
        return self.uniform.pvalues

    @property
    def raw_pvalues(self) -> dict[str, float]:
        """P-values by quantity, unadjusted."""
        return self.uniform.raw_pvalues

    @property
    def bands(self) -> Band:
        """Simultaneous band of one quantity, at its share of the level by Holm's rule."""
        return self.uniform.bands

    @property
    def power(self) -> Detectable | None:
        """Smallest errors of one quantity that would have been detected; None if nothing was ranked."""
        return self.uniform.power

    @property
    def rejected(self) -> tuple[str, ...]:
        """Quantities whose ranks are not uniform."""
        return self.uniform.rejected

    @property
    def passed(self) -> bool | None:
        """True, False, or None if the check cannot tell."""
        return self.uniform.passed

    @property
    def verdict(self) -> str:
        """The verdict in words: errors found, detectable errors, undetectable errors, and reports of the runs."""
        parts = [self.uniform.verdict]
        if not self.has_densities:
            parts.append(_WITHOUT_DENSITIES)
        if self.caveat:
            parts.append(self.caveat)
        if self.posteriors.failures:
            counts = (f"{count} data sets {reason}" for reason, count in self.posteriors.failures)
            parts.append("the inference reports " + "; ".join(counts))
        return "; ".join(parts)

    def plot(self, axes: Any = None) -> Any:
        """Draw the distribution functions of the ranks minus the diagonal, with the band; see ``UniformityReport``."""
        return self.uniform.plot(axes)

    def __str__(self) -> str:
        return self.verdict


def sbc(
    key: PRNGKey,
    prior_sample: Callable,
    simulate: Callable,
    infer_fn: Callable,
    *,
    log_prior_fn: Callable | None = None,
    log_likelihood_fn: Callable | None = None,
    num_simulations: int = 1000,
    quantities: Sequence[Callable] | Mapping[str, Callable] = (),
    reference: Callable | None = None,
    num_projections: int = 20,
    level: float = 0.05,
    mode: str = "auto",
    batch_size: int | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool | str | None = None,
) -> SBCReport:
    """Check that an inference procedure is calibrated over the prior of a model.

    Args:
        key: random key.
        prior_sample: ``key`` -> theta, any tree.
        simulate: ``(key, theta)`` -> x, any tree.
        infer_fn: ``(key, x)`` -> draws with leaves (L, ...) or (chain, L, ...) and the structure of theta, or
            ``(draws, info)``; see ``run_many`` and ``mcmc.posterior_sampler``.
        log_prior_fn: log prior of theta, ranked too.
        log_likelihood_fn: ``(theta, x)`` -> log likelihood, ranked too; with the prior, the log joint density as well.
        num_simulations: number S of data sets.
        quantities: further functions ``(theta, x)`` -> scalar, by name or named by their ``__name__``.
        reference: ``(key, x)`` -> reference point of TARP; None: predicted from the data, see ``tarp``.
        num_projections: number of random directions in whitened coordinates.
        level: probability of a false alarm of the whole report.
        mode: "auto", "map", "vmap" or "queue", see ``run_many``.
        batch_size: data sets that are done together, see ``run_many``.
        checkpoint: where to keep finished batches; the same call made again continues from there.
        progress: whether to show a progress bar; None: only on a terminal.

    Returns:
        The report. Data sets whose inference failed are counted and reported.

    Raises:
        TypeError: ``key`` is not a key, or a function is not callable.
        KeyboardInterrupt: Ctrl-C before a data set was finished, or twice.
        ValueError: there is less than one simulation, draws do not match theta, a quantity is not a scalar, two
            quantities share a name, or the level is not between 0 and 0.5.
    """
    check_key(key)
    check_functions(prior_sample=prior_sample, simulate=simulate)
    check_number(num_simulations)
    key_theta, key_x, key_calibrate = jax.random.split(key, 3)
    keys = jax.random.split(key_theta, num_simulations), jax.random.split(key_x, num_simulations)
    theta, x = _simulate_joint(as_partial(prior_sample), as_partial(simulate), *keys)
    return calibrate(
        key_calibrate,
        theta,
        x,
        infer_fn,
        log_prior_fn=log_prior_fn,
        log_likelihood_fn=log_likelihood_fn,
        quantities=quantities,
        reference=reference,
        num_projections=num_projections,
        level=level,
        run_settings={"mode": mode, "batch_size": batch_size, "checkpoint": checkpoint, "progress": progress},
    )


def calibrate(
    key: PRNGKey,
    theta: ArrayTree,
    x: ArrayTree,
    infer_fn: Callable,
    *,
    log_prior_fn: Callable | None,
    log_likelihood_fn: Callable | None,
    quantities: Sequence[Callable] | Mapping[str, Callable],
    reference: Callable | None,
    num_projections: int,
    level: float,
    run_settings: Mapping[str, Any],
    caveat: str = "",
) -> SBCReport:
    """Run the inference on simulated data and test the ranks of the true values, the second half of ``sbc``.

    Args:
        key: random key.
        theta: true values, leaves (S, ...).
        x: data, leaves (S, ...).
        infer_fn: as in ``sbc``.
        log_prior_fn: as in ``sbc``.
        log_likelihood_fn: as in ``sbc``.
        quantities: as in ``sbc``.
        reference: as in ``sbc``.
        num_projections: as in ``sbc``.
        level: as in ``sbc``.
        run_settings: settings of ``run_many``.
        caveat: caveat of the report.

    Raises:
        ValueError: the draws do not match theta.
    """
    key_infer, key_reference, key_ranks = jax.random.split(key, 3)
    # Sample the posterior of every data set
    num_simulations = len(jax.tree.leaves(theta)[0])
    posteriors = run_many(infer_fn, jax.random.split(key_infer, num_simulations), x, **run_settings)
    theta, x = jax.tree.map(lambda leaf: leaf[: len(posteriors.status)], (theta, x))  # fewer after Ctrl-C
    draws = _by_chain(posteriors.draws, theta)
    flat = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:]), draws)
    # Rank parameters, densities, projections, and the distance to the reference as one more function of (x, point)
    references, matrix = reference_points(key_reference, flat, theta, x, reference)
    functions = _functions(log_prior_fn, log_likelihood_fn, quantities, x)
    table = rank_table(
        key_ranks,
        draws,
        theta,
        (x, jnp.asarray(references.points, matrix.dtype)),
        quantities={name: fn for name, (fn, _) in functions.items()} | {"tarp": _ReferenceDistance(matrix)},
        num_projections=num_projections,
        chain_axis=True,
    )
    uses_data = {name: function.uses_data for name, function in functions.items()}
    uses_data["tarp"] = references.uses_data
    table = table._replace(uses_data=tuple(uses_data.get(name, False) for name in table.names))
    # Judge
    return SBCReport(
        uniform=uniformity(_without_failed(table, posteriors), level=level),
        posteriors=posteriors,
        theta=jax.device_get(theta),
        x=jax.device_get(x),
        references=references,
        has_densities=log_prior_fn is not None and log_likelihood_fn is not None,
        caveat=caveat,
    )


class _Quantity(NamedTuple):
    fn: Callable
    uses_data: bool


@pytree
class _ReferenceDistance:
    """Squared distance to the reference point, in whitened coordinates."""

    matrix: Any

    def __call__(self, parameters: ArrayTree, data: tuple) -> Scalar:
        whitened = columns(parameters, 0).astype(self.matrix.dtype) @ self.matrix.T
        return jnp.sum(jnp.square(whitened - data[1]))


def _functions(log_prior_fn, log_likelihood_fn, quantities, x) -> dict[str, _Quantity]:
    """Return every test quantity by name, as a function of theta and (x, reference point)."""
    names, functions, uses_data = named_quantities(log_prior_fn, log_likelihood_fn, quantities, x)
    if len(set(names)) < len(names) or "tarp" in names:
        raise ValueError(
            f"test quantities need different names, and 'tarp' is reserved; got {list(names)}: pass quantities as a "
            "mapping with other names"
        )
    return {
        name: _Quantity(jax.tree_util.Partial(_of_data, fn), uses)
        for name, fn, uses in zip(names, functions, uses_data, strict=True)
    }


def _of_data(function: Callable, parameters: ArrayTree, data: tuple) -> Array:
    return function(parameters, data[0])


@jax.jit
def _simulate_joint(prior_sample: Callable, simulate: Callable, keys_theta: Array, keys_x: Array) -> tuple:
    """Return true values and data sets, leaves (S, ...)."""
    true_values = jax.vmap(prior_sample)(keys_theta)
    return true_values, jax.vmap(simulate)(keys_x, true_values)


def _by_chain(draws: ArrayTree, theta: ArrayTree) -> ArrayTree:
    """Return the draws with leaves (S, chain, draw, ...)."""
    if structure(draws) != structure(theta):
        raise ValueError(
            f"infer_fn must return draws with the structure of theta, {jax.tree.structure(theta)}, got "
            f"{jax.tree.structure(draws)}"
        )
    extra_axes = {
        np.ndim(leaf) - np.ndim(true)
        for leaf, true in zip(jax.tree.leaves(draws), jax.tree.leaves(theta), strict=True)
    }
    if extra_axes not in ({1}, {2}):
        shapes = [np.shape(leaf)[1:] for leaf in jax.tree.leaves(draws)]
        theta_shapes = [np.shape(leaf)[1:] for leaf in jax.tree.leaves(theta)]
        raise ValueError(
            f"infer_fn must return draws with leaves (L, ...) or (chain, L, ...) for theta with leaves "
            f"{theta_shapes}, got "
            f"{shapes}"
        )
    if extra_axes == {1}:
        draws = jax.tree.map(lambda leaf: leaf[:, None], draws)
    check_shapes(draws, theta, None, 3)
    return draws


def _without_failed(table: RankTable, posteriors: ManyPosteriors) -> RankTable:
    """Remove the ranks of simulations whose inference failed, even if their draws are finite."""
    failed = posteriors.failed & np.any(table.ranks >= 0, axis=1)
    if not failed.any():
        return table
    ranks = np.where(failed[:, None], -1, table.ranks)
    reasons = (*table.failures, ("the inference failed although its draws are finite", int(failed.sum())))
    return table._replace(ranks=ranks, failures=reasons)


def check_functions(**functions: Any) -> None:
    """Check that every argument is a function.

    Raises:
        TypeError: one of them is not callable.
    """
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {shortened(function)}")


def check_number(num_simulations: Any) -> None:
    """Check the number of simulations.

    Raises:
        ValueError: it is not an integer of at least one.
    """
    is_integer = isinstance(num_simulations, (int, np.integer)) and not isinstance(num_simulations, bool)
    if not is_integer or num_simulations < 1:
        raise ValueError(
            f"num_simulations must be a whole number, 1 or more, got {shortened(num_simulations)}"
        )
