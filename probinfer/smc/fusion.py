r"""Fusion: from draws of sub-posteriors, each of a shard of the data, to draws of their product.

.. math:: f(\theta) \propto \prod_{c=1}^{C} f_c(\theta)

Shards are merged two by two along a binary tree. A merge of two groups tempers from a Student-t to the product of all
the shards in both: its centre and scale are those of the product of two normal laws with the moments of the groups,
widened in the direction in which the groups disagree. The moments of single shards are those of their draws; those of a
group are those of the tempered population of its own merge, which has seen its exact density. So a skewed or bimodal
shard is corrected as soon as it meets another, where the normal approximation of all shards at once (consensus Monte
Carlo) adds up the errors of C shards under a law that is narrower by the square root of C than any of them.

The last merge is a whole run of ``Tempered``. The Student-t only says where it starts: the path ends in the exact
product, its schedule is frozen before the islands run, and so their evidence is unbiased and their weighted draws are
consistent in the number of particles (Del Moral, Doucet and Jasra 2006), whatever the draws of the shards were. Bad
draws cost levels, or modes that no start finds; they leave no bias behind.

Needed are the log densities and their gradients of all shards in one process, and draws of each. Methods that need
draws alone (consensus, density products) are not exact; Monte Carlo Fusion and Bayesian Fusion, which are, evaluate the
same densities, their gradients and Laplacians, and need bounds for them.

References:
    Dai, Pollock and Roberts (2019), "Monte Carlo Fusion"; Chan, Pollock, Johansen and Roberts (2023),
    "Divide-and-conquer Fusion" (the tree); Lindsten, Johansen, Naesseth, Kirkpatrick, Schon, Aston and Bouchard-Cote
    (2017), "Divide-and-conquer with sequential Monte Carlo"; Scott, Blocker, Bonassi, Chipman, George and McCulloch
    (2016), consensus Monte Carlo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.core.algorithms import as_partial
from probinfer.core.errors import NumericalError
from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Float, Scalar
from probinfer.inference import engine as engines
from probinfer.inference.posterior import Posterior
from probinfer.numerics import weights
from probinfer.numerics.covariance_factor import root_of
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.smc.tempered.bridge import FREEDOM, StudentPath, flatten_one, unflatten
from probinfer.smc.tempered.engine import Tempered, sample_from
from probinfer.smc.tempered.initial_distribution import INFLATION, Start
from probinfer.smc.tempered.populations import learn_schedule
from probinfer.targets import Target

__all__ = ["Belief", "combine", "fuse"]


class Belief(NamedTuple):
    """Mean (d,) and root (d, d) or (d,) of the covariance of a group of shards, see ``spread``."""

    mean: Any
    root: Any


class _Product(NamedTuple):
    """The densities of all shards; a group is a mask, so that one program serves every merge."""

    fns: tuple
    base_fn: Any  # the prior they share, or the log Jacobian
    like: Any
    share_prior: bool

    def path(self, low: int, high: int, left: Belief, right: Belief) -> StudentPath:
        active = (jnp.arange(len(self.fns)) >= low) & (jnp.arange(len(self.fns)) < high)
        fn = _with_prior if self.share_prior else _with_jacobian
        logdensity_fn = jax.tree_util.Partial(fn, self.fns, self.base_fn, active)
        return StudentPath(logdensity_fn, self.like, *combine(left, right))


def fuse(
    key: Any,
    targets: Any,
    draws: Any,
    *,
    share_prior: bool = False,
    engine: Any = None,
    progress: bool | str | None = None,
    checkpoint: Checkpoint | None = None,
) -> Posterior:
    r"""Draw from the product of C sub-posteriors, given draws of each, and estimate its integral.

    Costs about as much as ``Tempered`` on the whole data from a good start, and log2(C) - 1 pilots for the merges
    before the last. Memory: the draws, and the particles of one population.

    Args:
        key: random key.
        targets: C of them, 2 or more, with the same unknowns and constraints.
        draws: of each shard: a ``Posterior``, or unconstrained positions with one leading axis. They need not be many
            or perfect: their mean and covariance are used.
        share_prior: False: the product of the sub-posteriors as they are; with a prior in each, give it the power 1/C.
            True: every target has the same prior (and knows its likelihood), which counts once.
        engine: a ``Tempered``, for the merges and the last run: its particles, islands and mode.
        progress: a bar; ``None`` means on a terminal.
        checkpoint: where to keep checkpoints; the same call continues from there to the same draws.

    Returns:
        As ``Tempered``: draws with axes (island, particle), constrained by the first target, weights, and the log of
        the integral of the product over the constrained values, unnormalised as the targets are; with ``share_prior``
        the log marginal likelihood of all data. ``info`` is a ``TemperedInfo``; its gradients are of the product: one
        of a shard counts 1/C.

    Raises:
        TypeError: not a key, a target, an engine, or a minibatch target.
        ValueError: fewer than two shards, not one set of draws each, draws of another structure or shape than the
            target's positions, constraints that differ, or ``share_prior`` where a target does not know its prior or
            they differ.
        NumericalError: draws of a shard that are not finite or do not vary, or a merge that fails as ``Tempered`` does.

    Warns:
        ConvergenceWarning: as ``Tempered``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> from probinfer import smc, targets
        >>> from probinfer.core.binding import LogDensity
        >>> def log_likelihood(y, mu): return jnp.sum(-0.5 * (y - mu) ** 2)
        >>> shards = [jnp.array([1.0, 2.0]), jnp.array([3.0, 0.5])]
        >>> prior = dist.Normal(0.0, 5.0)
        >>> made = [targets.from_prior(prior, LogDensity(log_likelihood, y)) for y in shards]
        >>> key = jax.random.key(0)
        >>> draws = [jnp.mean(y) + 0.7 * jax.random.normal(key, (200,)) for y in shards]  # from any sampler
        >>> posterior = smc.fuse(key, made, draws, share_prior=True, progress=False)
        >>> bool(abs(posterior.expectation(lambda mu: mu) - 1.61) < 0.1)
        True
    """
    engine = Tempered() if engine is None else engine
    if not isinstance(engine, Tempered):
        raise TypeError(f"engine must be a smc.Tempered, got {type(engine).__name__}")
    Checkpoint.check(checkpoint)
    targets, draws = _checked(key, targets, draws)
    product = _product(targets, _like(targets[0]), share_prior)
    leaves = [_belief_of(i, *pair, product.like) for i, pair in enumerate(zip(targets, draws, strict=True))]
    _check_same(targets, unflatten(product.like, leaves[0].mean), share_prior)
    count, spent = len(targets), 0.0

    def merge(low: int, high: int) -> Belief:
        nonlocal spent
        if high - low == 1:
            return leaves[low]
        path, name = halves(low, high), f"shards {low + 1} to {high}"
        try:
            state = learn_schedule(
                engine,
                Start(path, 1, 0),
                jax.random.fold_in(key_merge, low * count + high),
                bars.label(progress, name),
                None if checkpoint is None else checkpoint.child(name.replace(" ", "-")),
            )
        except NumericalError as error:
            raise NumericalError(f"merging {name}: {error}", error.status) from error
        spent += int(state.num_gradients) * (high - low) / count
        return _belief(jnp.zeros_like(state.log_ratios), state.positions)

    def halves(low: int, high: int) -> StudentPath:
        middle = (low + high) // 2
        path = product.path(low, high, merge(low, middle), merge(middle, high))
        if not np.all(np.isfinite(path.inverse)):
            raise NumericalError(
                f"the covariances of shards {low + 1} to {high} cannot be combined: they are singular to rounding; "
                "rescale the unknowns, or give more draws",
                Status.NOT_POSITIVE_DEFINITE,
            )
        return path

    key_merge, key_pilot, key_islands = jax.random.split(key, 3)
    with bars.task("fuse", None, bars.label(progress, "fuse")):
        found = Start(halves(0, count), 1, round(spent))
        return sample_from(engine, found, (key_pilot, key_islands), targets[0], progress, checkpoint)


@jax.jit
def combine(left: Belief, right: Belief) -> tuple[Array, Array, Array]:
    r"""Return location, root and inverse root of a Student-t around the product of two normal laws.

    .. math:: P^{-1}=\Sigma_1^{-1}+\Sigma_2^{-1},\; m=P(\Sigma_1^{-1}\mu_1+\Sigma_2^{-1}\mu_2),\;
        S \propto P + \tfrac12\sum_c(\mu_c-m)(\mu_c-m)^\top

    The second part of S is about P where the two agree, and reaches both where they do not: the product of tails
    heavier than normal ones lives there.

    Args:
        left: one group.
        right: the other.
    """
    factor = (INFLATION * (FREEDOM - 2) / FREEDOM) ** 0.5
    if left.root.ndim == 1:
        precisions = [1 / belief.root**2 for belief in (left, right)]
        variance = 1 / sum(precisions)
        loc = variance * (precisions[0] * left.mean + precisions[1] * right.mean)
        apart = 0.5 * ((left.mean - loc) ** 2 + (right.mean - loc) ** 2)
        root = factor * jnp.sqrt(variance + apart)
        return loc, root, 1 / root
    identity = jnp.eye(left.mean.shape[0], dtype=left.mean.dtype)
    unit = jnp.sqrt(jnp.sum(left.root**2, axis=1))  # standard deviations: all below is without units
    inverses = [_inverse(belief.root / unit[:, None]) for belief in (left, right)]
    precisions = [inverse.T @ inverse for inverse in inverses]
    inverse = _inverse(jnp.linalg.cholesky(precisions[0] + precisions[1]))
    covariance = inverse.T @ inverse
    means = [(belief.mean - left.mean) / unit for belief in (left, right)]
    middle = covariance @ (precisions[1] @ means[1])
    apart = jnp.stack([mean - middle for mean in means])
    root = factor * unit[:, None] * jnp.linalg.cholesky(covariance + 0.5 * apart.T @ apart)
    return left.mean + unit * middle, root, jax.scipy.linalg.solve_triangular(root, identity, lower=True)


def _inverse(root: Array) -> Array:
    return jax.scipy.linalg.solve_triangular(root, jnp.eye(root.shape[0], dtype=root.dtype), lower=True)


def _with_prior(fns: tuple, prior_fn: Callable, active: Array, position: ArrayTree) -> Scalar:
    """The prior once, and the likelihoods of the shards in the group."""
    return prior_fn(position) + sum(_active_values(fns, active, position))


def _with_jacobian(fns: tuple, log_jacobian_fn: Callable, active: Array, position: ArrayTree) -> Scalar:
    """The product is one of densities of constrained values: the Jacobian, which is in each factor, counts once."""
    total = sum(_active_values(fns, active, position))
    return total - (jnp.sum(active) - 1).astype(total.dtype) * log_jacobian_fn(position)


def _active_values(fns: tuple, active: Array, position: ArrayTree) -> list:
    """Values of the shards in the group; a shard outside it is not evaluated."""

    def one(fn: Callable, on: Array) -> Array:
        shape = jax.eval_shape(fn, position)
        return jax.lax.cond(on, fn, lambda _: jnp.zeros((), shape.dtype), position)

    return [one(fn, active[i]) for i, fn in enumerate(fns)]


def _product(targets: tuple, like: ArrayTree, share_prior: bool) -> _Product:
    if not share_prior:
        fns = tuple(as_partial(target.logdensity_fn) for target in targets)
        return _Product(fns, as_partial(targets[0].log_jacobian_fn), like, False)
    for number, target in enumerate(targets, 1):
        if target.prior is None or target.log_likelihood_fn is None:
            raise ValueError(
                f"share_prior needs targets that know their normalised prior and their log likelihood; target "
                f"{number} does not. Make it with targets.from_prior or from_numpyro, or give each shard the prior to "
                f"the power 1/{len(targets)} and share_prior=False"
            )
    fns = tuple(as_partial(target.log_likelihood_fn) for target in targets)
    return _Product(fns, as_partial(targets[0].prior.logdensity_fn), like, True)


def _check_same(targets: tuple, position: ArrayTree, share_prior: bool) -> None:
    """Hold the Jacobians of the targets, and the priors they share, against each other at one position."""
    parts = [("have one set of constraints", "log Jacobian", [target.log_jacobian_fn for target in targets])]
    if share_prior:
        parts += [
            ("share one prior", "log prior density", [target.prior.logdensity_fn for target in targets])
        ]
    for wish, name, fns in parts:
        values = [float(_evaluate(fn, position)) for fn in fns]
        for number, value in enumerate(values[1:], 2):
            if not abs(value - values[0]) <= 1e-3 * (1 + abs(values[0])):
                raise ValueError(
                    f"the targets must {wish}: at the mean of the first shard the {name} is {values[0]:.6g} in target "
                    f"1 and {value:.6g} in target {number}"
                )


@jax.jit
def _evaluate(fn: Callable, position: ArrayTree) -> Array:
    return fn(position)


def _checked(key: Any, targets: Any, draws: Any) -> tuple[tuple, tuple]:
    targets, draws = tuple(targets), tuple(draws)
    if len(targets) < 2 or len(targets) != len(draws):
        raise ValueError(
            f"fuse needs two or more targets and one set of draws for each, got {len(targets)} targets and "
            f"{len(draws)} sets of draws"
        )
    for target in targets:
        engines.check(key, target, "fuse")
    return targets, draws


def _like(target: Target) -> ArrayTree:
    shapes = jax.eval_shape(lambda key: target.candidates(key, 1), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), shapes)


def _belief_of(index: int, target: Target, draws: Any, like: ArrayTree) -> Belief:
    """Moments of a shard's draws, weighted where they carry weights."""
    positions, log_weights = draws, None
    if isinstance(draws, Posterior):
        positions, log_weights = draws.unconstrained, draws.flat_log_weights()
        if positions is None:
            positions = jax.vmap(target.unconstrain)(draws.flat())
        else:
            positions = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), positions)
    expected = jax.tree.map(jnp.shape, like)
    found = jax.tree.map(lambda leaf: jnp.shape(leaf)[1:], positions)
    if expected != found or len({jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(positions)}) != 1:
        raise ValueError(
            f"draws of shard {index + 1} must be unconstrained positions with one leading axis, each of shapes "
            f"{expected}, got {jax.tree.map(jnp.shape, positions)}"
        )
    flat = jax.vmap(flatten_one)(positions)
    log_weights = (
        jnp.zeros(flat.shape[0], flat.dtype) if log_weights is None else log_weights.astype(flat.dtype)
    )
    belief = _belief(log_weights, flat)
    if not all(np.all(np.isfinite(part)) for part in belief):
        raise NumericalError(
            f"the draws of shard {index + 1} are not finite or do not vary in every direction ({flat.shape[0]} draws "
            f"of {flat.shape[1]} numbers): run its sampler again, longer",
            Status.NON_FINITE,
        )
    return belief


@jax.jit
def _belief(log_weights: Float[Array, " n"], positions: Float[Array, "n d"]) -> Belief:
    first, centred = (
        positions[0],
        positions - positions[0],
    )  # what does not vary is zero then, without rounding
    return Belief(first + weights.mean(log_weights, centred), root_of(log_weights, centred))
