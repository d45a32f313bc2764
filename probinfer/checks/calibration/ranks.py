r"""Ranks of true values among their posterior draws, for many test quantities at once.

Simulation s draws :math:`\theta^*_s \sim p(\theta)`, :math:`x_s \sim p(x\mid\theta^*_s)` and L posterior draws
:math:`\theta_{sl}`. If the posterior is right and the draws are independent, the rank
:math:`\sum_l 1[f(\theta_{sl}, x_s) < f(\theta^*_s, x_s)]` of any quantity f is uniform on {0, ..., L}. Which
errors are detected depends on the quantities: parameters alone cannot detect a posterior that ignores the data, the
joint density can. Ties are broken at random, autocorrelated draws are thinned, and simulations with NaN are counted
with a reason.

References:
    Talts, Betancourt, Simpson, Vehtari and Gelman (2018), "Validating Bayesian inference algorithms with
    simulation-based calibration", theorem 1 and section 5.1 (thinning). Modrák et al. (2023), "Simulation-based
    calibration checking for Bayesian computation: the choice of test quantities shapes sensitivity", section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from probinfer.checks.calibration.references import generator
from probinfer.checks.calibration.thinning import MAX_SIMULATIONS, needed_thinning
from probinfer.checks.calibration.whitening import columns, whitening_matrix
from probinfer.core.algorithms import as_partial
from probinfer.core.arguments import check_key
from probinfer.core.types import Array, ArrayTree, PRNGKey
from probinfer.targets.transforms import leaf_names, structure

__all__ = ["RankTable", "check_shapes", "named_quantities", "rank_table", "scalar_names"]


class RankTable(NamedTuple):
    """Ranks of S true values for Q test quantities.

    Attributes:
        ranks: (S, Q) integers in 0 ... num_draws; -1 where the simulation failed.
        names: names of the quantities (Q,).
        num_draws: number L of draws that a true value is ranked among, after thinning.
        thin: every ``thin``-th draw of each chain is used.
        failures: (reason, number of simulations).
        constant: quantities whose draws all equal the true value, so that their ranks carry no information.
        uses_data: (Q,) whether a quantity depends on the data.
    """

    ranks: Int[np.ndarray, "S Q"]
    names: tuple[str, ...]
    num_draws: int
    thin: int
    failures: tuple[tuple[str, int], ...]
    constant: tuple[str, ...]
    uses_data: tuple[bool, ...]

    @property
    def remarks(self) -> list[str]:
        """Sentences about quantities and simulations that could not be ranked, for a verdict."""
        constant = [f"cannot tell about {name}: its draws all equal the true value" for name in self.constant]
        return constant + [f"{count} simulations failed: {reason}" for reason, count in self.failures]


def rank_table(
    key: PRNGKey,
    draws: ArrayTree,
    theta: ArrayTree,
    x: ArrayTree = None,
    *,
    log_prior_fn: Callable | None = None,
    log_likelihood_fn: Callable | None = None,
    quantities: Sequence[Callable] | Mapping[str, Callable] = (),
    num_projections: int = 20,
    whiten: str | None = "pooled",
    chain_axis: bool = False,
    thin: int | None = None,
) -> RankTable:
    """Rank every scalar parameter, the log densities, random projections and further quantities.

    Args:
        key: random key (directions, ties).
        draws: posterior draws, leaves (S, L, ...), or (S, chain, draw, ...) with ``chain_axis``.
        theta: true values, leaves (S, ...).
        x: data, leaves (S, ...); may be None.
        log_prior_fn: log prior of one ``theta``.
        log_likelihood_fn: ``(theta, x)`` -> log likelihood; with the prior it gives the log joint density too.
        quantities: functions ``(theta, x)`` -> scalar, named by their ``__name__`` or the keys of a mapping.
        num_projections: number of random directions in whitened coordinates; none in one dimension.
        whiten: coordinates of the directions: "pooled", "prior" or None.
        chain_axis: whether the draws have a chain axis before the draw axis.
        thin: use every ``thin``-th draw. None: chosen from the autocorrelation, 1 if it is negligible.

    Returns:
        The ranks, with the failures and constant quantities.

    Raises:
        TypeError: ``key`` is not a key.
        ValueError: trees or leading axes differ, there are no draws, a likelihood has no data, two quantities share a
            name, a quantity is not a scalar, or ``thin`` exceeds the number of draws.

    References:
        Talts et al. (2018), algorithm 2. Modrák et al. (2023), section 3 (densities as quantities).
    """
    check_key(key)
    sizes = check_shapes(draws, theta, x, 2 + chain_axis)
    if log_likelihood_fn is not None and x is None:
        raise ValueError("log_likelihood_fn needs the data it is evaluated at; pass x with leaves (S, ...)")
    if thin is not None and not 1 <= thin <= sizes[-1]:
        raise ValueError(f"thin must lie between 1 and the {sizes[-1]} draws of a chain, got {thin}")
    key_projections, key_ties = jax.random.split(key)
    chained = draws if chain_axis else jax.tree.map(lambda leaf: jnp.asarray(leaf)[:, None], draws)
    names, functions, uses_data = named_quantities(log_prior_fn, log_likelihood_fn, quantities, x)
    flat, true = columns(chained, 3), columns(theta, 1)
    dimension = true.shape[-1]
    num_projections = num_projections if dimension > 1 else 0
    matrix = whitening_matrix(flat.reshape(sizes[0], -1, dimension), true, whiten=whiten)
    directions = _directions(key_projections, matrix, num_projections)
    _check_scalars(functions, names, theta, x)
    names = (*scalar_names(theta), *names, *(f"projection[{i}]" for i in range(num_projections)))
    if len(set(names)) < len(names):
        duplicates = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"two test quantities are called {duplicates}; pass quantities as a mapping with other names"
        )
    quantity_fns = (functions, directions)
    # Thin by the autocorrelation of the test quantities
    if thin is None:
        subset = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:MAX_SIMULATIONS], (chained, x))
        thin = needed_thinning(_chain_values(quantity_fns, *subset))
    thinned = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:, :, thin - 1 :: thin], chained)
    # Rank, with ties broken at random so that ranks of discrete quantities are uniform too
    below, ties, valid = jax.device_get(_counts(quantity_fns, thinned, theta, x))
    ranks = np.where(valid, below + generator(key_ties).integers(ties + 1), -1)
    uses_data = (*[False] * dimension, *uses_data, *[False] * num_projections)
    return _table(ranks, ties, flat, true, names, uses_data, thin)


def _table(
    ranks: np.ndarray,
    ties: np.ndarray,
    flat: Array,
    true: Array,
    names: tuple[str, ...],
    uses_data: tuple[bool, ...],
    thin: int,
) -> RankTable:
    """Count the failures, and find the quantities whose draws all equal the true value."""
    num_simulations = len(ranks)
    num_draws = flat.shape[1] * (flat.shape[2] // thin)
    invalid_draws = ~np.isfinite(np.asarray(flat)).all(axis=(1, 2, 3))
    invalid_truth = ~np.isfinite(np.asarray(true)).all(axis=1)
    failures = [
        ("a draw is NaN or infinite", invalid_draws),
        ("the true value is NaN or infinite", invalid_truth),
    ]
    invalid = invalid_draws | invalid_truth
    for name, column in zip(names, ranks.T, strict=True):
        failures.append((f"{name} is NaN", (column < 0) & ~invalid))
    ranks = np.where(invalid[:, None], -1, ranks)
    ranked = ranks >= 0
    constant = np.all((ties == num_draws) | ~ranked, axis=0) & ranked.any(axis=0) & (num_simulations > 0)
    return RankTable(
        ranks=ranks,
        names=names,
        num_draws=num_draws,
        thin=thin,
        failures=tuple((reason, int(failed.sum())) for reason, failed in failures if failed.any()),
        constant=tuple(name for name, is_constant in zip(names, constant, strict=True) if is_constant),
        uses_data=uses_data,
    )


def check_shapes(draws: ArrayTree, theta: ArrayTree, x: ArrayTree, leading: int) -> tuple[int, ...]:
    """Check the shapes, and return the leading sizes (S, L) or (S, chain, draw) of the draws.

    Args:
        draws: leaves (S, L, ...) or (S, chain, draw, ...).
        theta: leaves (S, ...).
        x: None or leaves (S, ...).
        leading: number of leading axes of the draws.

    Raises:
        ValueError: structures or shapes differ, or an axis is empty.
    """
    if structure(draws) != structure(theta) or not jax.tree.leaves(draws):
        raise ValueError(
            f"draws and theta must be trees of the same structure with at least one leaf, got "
            f"{jax.tree.structure(draws)} and {jax.tree.structure(theta)}"
        )
    sizes = np.shape(jax.tree.leaves(draws)[0])[:leading]
    expected = "(S, chain, draw, ...)" if leading == 3 else "(S, L, ...)"
    for name, leaf, true in zip(
        leaf_names(theta), jax.tree.leaves(draws), jax.tree.leaves(theta), strict=True
    ):
        if np.shape(leaf)[:leading] != sizes or np.shape(leaf) != (*sizes, *np.shape(true)[1:]):
            raise ValueError(
                f"draws must have leaves {expected} and theta leaves (S, ...) that match, got "
                f"{np.shape(leaf)} and {np.shape(true)} at '{name}'"
            )
        if np.shape(true)[:1] != sizes[:1]:
            raise ValueError(
                f"there are {sizes[0]} simulations of draws but theta has shape {np.shape(true)} at '{name}'"
            )
    if len(sizes) < leading or 0 in sizes:
        raise ValueError(f"draws must have leading axes {expected}, none of them empty, got {sizes}")
    for leaf in jax.tree.leaves(x):
        if np.shape(leaf)[:1] != sizes[:1]:
            raise ValueError(f"x must have leaves (S, ...) with S = {sizes[0]}, got shape {np.shape(leaf)}")
    return sizes


def named_quantities(
    log_prior_fn: Callable | None,
    log_likelihood_fn: Callable | None,
    quantities: Sequence[Callable] | Mapping[str, Callable],
    x: ArrayTree,
) -> tuple[tuple, tuple, tuple]:
    """Return the names of the functions of (theta, x), the functions, and whether each depends on the data.

    Args:
        log_prior_fn: log prior of theta, or None.
        log_likelihood_fn: log likelihood of (theta, x), or None.
        quantities: further functions of (theta, x).
        x: the data; None if there are none.
    """
    items: list[tuple[str, Callable, bool]] = []
    if log_prior_fn is not None:
        items.append(("log_prior", jax.tree_util.Partial(_of_theta, as_partial(log_prior_fn)), False))
    if log_likelihood_fn is not None:
        items.append(("log_likelihood", as_partial(log_likelihood_fn), True))
    if log_prior_fn is not None and log_likelihood_fn is not None:
        parts = (as_partial(log_prior_fn), as_partial(log_likelihood_fn))
        items.append(("log_joint", jax.tree_util.Partial(_joint, *parts), True))
    named = quantities.items() if isinstance(quantities, Mapping) else ((_name(f), f) for f in quantities)
    items.extend((name, as_partial(fn), x is not None) for name, fn in named)
    return tuple(zip(*items, strict=True)) if items else ((), (), ())


def _name(function: Callable) -> str:
    return getattr(getattr(function, "func", function), "__name__", type(function).__name__)


def _of_theta(log_prior_fn: Callable, theta: ArrayTree, x: ArrayTree) -> Array:
    return log_prior_fn(theta)


def _joint(log_prior_fn: Callable, log_likelihood_fn: Callable, theta: ArrayTree, x: ArrayTree) -> Array:
    return log_prior_fn(theta) + log_likelihood_fn(theta, x)


def _check_scalars(functions: tuple, names: tuple, theta: ArrayTree, x: ArrayTree) -> None:
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], (theta, x))
    for name, function in zip(names, functions, strict=True):
        shape: Any = jax.tree.map(jnp.shape, jax.eval_shape(function, *first))
        if shape != ():
            raise ValueError(
                f"the test quantity '{name}' must be a scalar, got shape {shape}; pass one function per scalar"
            )


def scalar_names(theta: ArrayTree) -> list[str]:
    """Return one name per scalar of a tree with leaves (S, ...): ``mu``, ``weights[3]``."""
    names = []
    for name, leaf in zip(leaf_names(theta), jax.tree.leaves(theta), strict=True):
        for index in np.ndindex(np.shape(leaf)[1:]):
            names.append(f"{name}[{','.join(map(str, index))}]" if index else name)
    return names


def _directions(key: PRNGKey, matrix: Array, num_directions: int) -> Array:
    """Return random unit vectors w of the whitened space as rows w W, which apply to raw values."""
    normal = generator(key).normal(size=(num_directions, len(matrix)))
    units = normal / np.linalg.norm(normal, axis=1, keepdims=True)
    return jnp.asarray(units, matrix.dtype) @ matrix


def _values(quantity_fns: tuple, parameters: ArrayTree, data: ArrayTree) -> Array:
    """Return all test quantities (N, Q) of N values of the parameters and one data set."""
    functions, directions = quantity_fns
    flat = columns(parameters, 1)
    others = [
        jax.vmap(function, (0, None))(parameters, data).astype(flat.dtype)[:, None] for function in functions
    ]
    return jnp.concatenate([flat, *others, flat @ directions.T], axis=1)


@jax.jit
def _chain_values(quantity_fns: tuple, draws: ArrayTree, data: ArrayTree) -> Array:
    """Return the test quantities of every draw (S, chain, draw, Q)."""

    def values_of_one(simulation):
        chains, one_data = simulation
        sizes = jax.tree.leaves(chains)[0].shape[:2]
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), chains)
        return _values(quantity_fns, flat, one_data).reshape(*sizes, -1)

    return jax.lax.map(values_of_one, (draws, data))


def _true_first(true: Array, draws: Array) -> Array:
    """Concatenate the true value and the draws of all chains of one simulation."""
    return jnp.concatenate([jnp.asarray(true)[None].astype(draws.dtype), draws.reshape(-1, *draws.shape[2:])])


@jax.jit
def _counts(
    quantity_fns: tuple, draws: ArrayTree, true_values: ArrayTree, data: ArrayTree
) -> tuple[Array, Array, Array]:
    """Count the draws below the true value and equal to it, and check that no value is NaN (S, Q)."""

    def count_one(simulation):
        chains, true, one_data = simulation
        # The true value is evaluated with the draws, so that equal values have equal quantities.
        values = _values(quantity_fns, jax.tree.map(_true_first, true, chains), one_data)
        below = jnp.sum(values[1:] < values[0], axis=0)
        ties = jnp.sum(values[1:] == values[0], axis=0)
        return below, ties, ~jnp.any(jnp.isnan(values), axis=0)

    return jax.lax.map(count_one, (draws, true_values, data))
