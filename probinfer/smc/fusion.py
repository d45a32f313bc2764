r"""Fusion: from draws of sub-posteriors, each of a shard of the data, to draws of their product.

.. math:: f(\theta) \propto \prod_{c=1}^{C} f_c(\theta)

Shards are merged two by two along a binary tree. A merge of two groups tempers from a Student-t to the product of all
the shards in both: its center and scale are those of the product of two normal distributions with the moments of the
groups, widened in the direction in which the groups disagree. The moments of a single shard are those of its draws;
those of a group are those of the tempered population of its own merge, which targets its exact density. So a skewed or
bimodal shard is corrected at its first merge. A normal approximation of all shards at once (consensus Monte Carlo)
accumulates the errors of C shards under a distribution that is narrower than any of them by the square root of C.

The last merge is a complete run of ``Tempered``. The Student-t only sets where it starts: the bridge ends in the exact
product, its schedule is frozen before the islands run, and so their evidence is unbiased and their weighted draws are
consistent in the number of particles (Del Moral, Doucet and Jasra 2006), whatever the draws of the shards were. Bad
draws cost more levels, or miss modes that are far from the start; they cause no bias.

The method needs the log densities and gradients of all shards in one process, and draws of each. Methods that need
draws alone (consensus, density products) are not exact; Monte Carlo Fusion and Bayesian Fusion are exact, but evaluate
the same densities, their gradients and Laplacians, and need bounds for them.

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
from probinfer.numerics import covariance_factor, weights
from probinfer.running import progress as bars
from probinfer.running.checkpoint import Checkpoint
from probinfer.smc.tempered.bridge import DEGREES_OF_FREEDOM, StudentBridge, flatten_position, unflatten
from probinfer.smc.tempered.engine import Tempered, sample_from
from probinfer.smc.tempered.initial_distribution import COVARIANCE_INFLATION, InitialDistribution
from probinfer.smc.tempered.populations import child_checkpoint, learn_schedule
from probinfer.targets import Target

__all__ = ["GroupMoments", "combine", "fuse"]


class GroupMoments(NamedTuple):
    """Mean and covariance of a group of shards.

    Attributes:
        mean: of the draws.
        factor: of their covariance, (d, d) or (d,), see ``numerics.covariance_factor``.
    """

    mean: Float[Array, " d"]
    factor: Float[Array, "..."]


class _Product(NamedTuple):
    """Product of the densities of shards; a group of them is a mask, so that one program serves every merge.

    Attributes:
        shard_fns: log density, or log likelihood, of each shard.
        base_fn: log density of the prior that they share, or the log Jacobian.
        template: one unconstrained position.
        share_prior: whether ``base_fn`` is the prior.
    """

    shard_fns: tuple
    base_fn: Any
    template: ArrayTree
    share_prior: bool

    def bridge(self, start: int, stop: int, left: GroupMoments, right: GroupMoments) -> StudentBridge:
        shards = jnp.arange(len(self.shard_fns))
        active = (shards >= start) & (shards < stop)
        product_fn = _with_prior if self.share_prior else _with_jacobian
        loc, factor, inverse_factor = combine(left, right)
        return StudentBridge(
            logdensity_fn=jax.tree_util.Partial(product_fn, self.shard_fns, self.base_fn, active),
            template=self.template,
            loc=loc,
            factor=factor,
            inverse_factor=inverse_factor,
        )


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

    The cost is about that of ``Tempered`` on all data from a good start, and of log2(C) - 1 pilots for the merges
    before the last. Memory: the draws, and the particles of one population.

    Args:
        key: random key.
        targets: C targets, 2 or more, with the same unknowns and constraints.
        draws: of each shard: a ``Posterior``, or unconstrained positions with one leading axis. They need not be many
            or perfect: only their mean and covariance are used.
        share_prior: False: take the product of the sub-posteriors as they are; if each has a prior, give it the power
            1/C. True: every target has the same prior (and knows its likelihood), which counts once.
        engine: a ``Tempered``, for the merges and the last run: its particles, islands and mode.
        progress: a bar; ``None`` means on a terminal.
        checkpoint: where to keep checkpoints; the same call continues from there to the same draws.

    Returns:
        As ``Tempered``: draws with axes (island, particle), constrained by the first target, weights, and the log of
        the integral of the product over the constrained values, unnormalized as the targets are; with ``share_prior``
        the log marginal likelihood of all data. ``info`` is a ``TemperedInfo``; its gradients are of the product: one
        of a shard counts 1/C.

    Raises:
        TypeError: not a key, a target, an engine, or a minibatch target.
        ValueError: fewer than two shards, not one set of draws each, draws of another structure or shape than the
            target's positions, constraints that differ, or ``share_prior`` although a target does not know its prior or
            the priors differ.
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
        >>> shard_targets = [targets.from_prior(prior, LogDensity(log_likelihood, y)) for y in shards]
        >>> key = jax.random.key(0)
        >>> draws = [jnp.mean(y) + 0.7 * jax.random.normal(key, (200,)) for y in shards]  # from any sampler
        >>> posterior = smc.fuse(key, shard_targets, draws, share_prior=True, progress=False)
        >>> bool(abs(posterior.expectation(lambda mu: mu) - 1.61) < 0.1)
        True
    """
    engine = Tempered() if engine is None else engine
    if not isinstance(engine, Tempered):
        raise TypeError(f"engine must be a smc.Tempered, got {type(engine).__name__}")
    Checkpoint.check(checkpoint)
    targets, draws = _check_input(key, targets, draws)
    product = _product(targets, _template(targets[0]), share_prior)
    shard_moments = [
        _moments_of_shard(index, target, shard_draws, product.template)
        for index, (target, shard_draws) in enumerate(zip(targets, draws, strict=True))
    ]
    _check_agreement(targets, unflatten(product.template, shard_moments[0].mean), share_prior)
    num_shards, num_gradients = len(targets), 0.0

    # Groups are half-open ranges of shards
    def merge(start: int, stop: int) -> GroupMoments:
        nonlocal num_gradients
        if stop - start == 1:
            return shard_moments[start]
        bridge, name = bridge_from_halves(start, stop), f"shards {start + 1} to {stop}"
        try:
            state = learn_schedule(
                engine,
                InitialDistribution(bridge, 1, 0),
                jax.random.fold_in(key_merge, start * num_shards + stop),
                bars.label(progress, name),
                child_checkpoint(checkpoint, name),
            )
        except NumericalError as error:
            raise NumericalError(f"merging {name}: {error}", error.status) from error
        num_gradients += int(state.num_gradients) * (stop - start) / num_shards
        return _moments(jnp.zeros_like(state.log_ratios), state.positions)

    def bridge_from_halves(start: int, stop: int) -> StudentBridge:
        middle = (start + stop) // 2
        bridge = product.bridge(start, stop, merge(start, middle), merge(middle, stop))
        if not np.all(np.isfinite(bridge.inverse_factor)):
            raise NumericalError(
                f"the covariances of shards {start + 1} to {stop} cannot be combined: they are numerically singular; "
                "rescale the unknowns, or give more draws",
                Status.NOT_POSITIVE_DEFINITE,
            )
        return bridge

    key_merge, key_pilot, key_islands = jax.random.split(key, 3)
    with bars.task("fuse", None, bars.label(progress, "fuse")):
        bridge = bridge_from_halves(0, num_shards)
        initial = InitialDistribution(bridge, 1, round(num_gradients))
        return sample_from(engine, initial, (key_pilot, key_islands), targets[0], progress, checkpoint)


@jax.jit
def combine(left: GroupMoments, right: GroupMoments) -> tuple[Array, Array, Array]:
    r"""Fit a Student-t to the product of two normal distributions.

    .. math:: P^{-1}=\Sigma_1^{-1}+\Sigma_2^{-1},\; m=P(\Sigma_1^{-1}\mu_1+\Sigma_2^{-1}\mu_2),\;
        S \propto P + \tfrac12\sum_c(\mu_c-m)(\mu_c-m)^\top

    The second part of S is about P if the two agree, and otherwise reaches both means: the product of tails heavier
    than normal has its mass there.

    Args:
        left: one group.
        right: the other.

    Returns:
        Location m, factor of the scale matrix S, and the inverse of the factor.
    """
    # The covariance of a Student-t is df / (df - 2) times its scale matrix.
    scale = (COVARIANCE_INFLATION * (DEGREES_OF_FREEDOM - 2) / DEGREES_OF_FREEDOM) ** 0.5
    if left.factor.ndim == 1:
        precisions = [1 / group.factor**2 for group in (left, right)]
        variance = 1 / sum(precisions)
        loc = variance * (precisions[0] * left.mean + precisions[1] * right.mean)
        between = 0.5 * ((left.mean - loc) ** 2 + (right.mean - loc) ** 2)
        factor = scale * jnp.sqrt(variance + between)
        return loc, factor, 1 / factor
    identity = jnp.eye(left.mean.shape[0], dtype=left.mean.dtype)
    # Coordinates with the standard deviations of the left group as units and its mean as origin: no precision is lost
    # to the scales of the unknowns.
    sd = jnp.sqrt(jnp.sum(left.factor**2, axis=1))
    inverses = [_inverse(group.factor / sd[:, None]) for group in (left, right)]
    precisions = [inverse.T @ inverse for inverse in inverses]
    inverse = _inverse(jnp.linalg.cholesky(precisions[0] + precisions[1]))
    covariance = inverse.T @ inverse
    means = [(group.mean - left.mean) / sd for group in (left, right)]
    loc = covariance @ (precisions[1] @ means[1])  # the left mean is zero
    deviations = jnp.stack([mean - loc for mean in means])
    factor = scale * sd[:, None] * jnp.linalg.cholesky(covariance + 0.5 * deviations.T @ deviations)
    return left.mean + sd * loc, factor, jax.scipy.linalg.solve_triangular(factor, identity, lower=True)


def _inverse(factor: Array) -> Array:
    return jax.scipy.linalg.solve_triangular(factor, jnp.eye(factor.shape[0], dtype=factor.dtype), lower=True)


def _with_prior(shard_fns: tuple, prior_fn: Callable, active: Array, position: ArrayTree) -> Scalar:
    """Return the log prior and the log likelihoods of the shards in the group."""
    return prior_fn(position) + sum(_active_values(shard_fns, active, position))


def _with_jacobian(shard_fns: tuple, log_jacobian_fn: Callable, active: Array, position: ArrayTree) -> Scalar:
    """Return the log of the product of densities of constrained values: the Jacobian, part of each, counts once."""
    total = sum(_active_values(shard_fns, active, position))
    return total - (jnp.sum(active) - 1).astype(total.dtype) * log_jacobian_fn(position)


def _active_values(shard_fns: tuple, active: Array, position: ArrayTree) -> list:
    """Return the values of the shards in the group; a shard outside it is not evaluated."""

    def value(fn: Callable, is_active: Array) -> Array:
        shape = jax.eval_shape(fn, position)
        return jax.lax.cond(is_active, fn, lambda _: jnp.zeros((), shape.dtype), position)

    return [value(fn, active[i]) for i, fn in enumerate(shard_fns)]


def _product(targets: tuple, template: ArrayTree, share_prior: bool) -> _Product:
    if not share_prior:
        logdensity_fns = tuple(as_partial(target.logdensity_fn) for target in targets)
        return _Product(logdensity_fns, as_partial(targets[0].log_jacobian_fn), template, False)
    for number, target in enumerate(targets, 1):
        if target.prior is None or target.log_likelihood_fn is None:
            raise ValueError(
                f"share_prior needs targets that know their normalized prior and their log likelihood; target "
                f"{number} does not. Make it with targets.from_prior or from_numpyro, or give each shard the prior to "
                f"the power 1/{len(targets)} and share_prior=False"
            )
    log_likelihood_fns = tuple(as_partial(target.log_likelihood_fn) for target in targets)
    return _Product(log_likelihood_fns, as_partial(targets[0].prior.logdensity_fn), template, True)


def _check_agreement(targets: tuple, position: ArrayTree, share_prior: bool) -> None:
    """Compare the Jacobians of the targets, and the priors that they share, at one position."""
    checks = [("have one set of constraints", "log Jacobian", [target.log_jacobian_fn for target in targets])]
    if share_prior:
        checks += [
            ("share one prior", "log prior density", [target.prior.logdensity_fn for target in targets])
        ]
    for requirement, name, fns in checks:
        values = [float(_evaluate(fn, position)) for fn in fns]
        for number, value in enumerate(values[1:], 2):
            if not abs(value - values[0]) <= 1e-3 * (1 + abs(values[0])):
                raise ValueError(
                    f"the targets must {requirement}: at the mean of the first shard the {name} is {values[0]:.6g} in "
                    f"target 1 and {value:.6g} in target {number}"
                )


@jax.jit
def _evaluate(fn: Callable, position: ArrayTree) -> Array:
    return fn(position)


def _check_input(key: Any, targets: Any, draws: Any) -> tuple[tuple, tuple]:
    targets, draws = tuple(targets), tuple(draws)
    if len(targets) < 2 or len(targets) != len(draws):
        raise ValueError(
            f"fuse needs two or more targets and one set of draws for each, got {len(targets)} targets and "
            f"{len(draws)} sets of draws"
        )
    for target in targets:
        engines.check_target(key, target, "fuse")
    return targets, draws


def _template(target: Target) -> ArrayTree:
    shapes = jax.eval_shape(lambda key: target.candidates(key, 1), jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), shapes)


def _moments_of_shard(index: int, target: Target, draws: Any, template: ArrayTree) -> GroupMoments:
    """Return the moments of a shard's draws, which may have weights."""
    positions, log_weights = draws, None
    if isinstance(draws, Posterior):
        positions, log_weights = draws.unconstrained, draws.flat_log_weights()
        if positions is None:
            positions = jax.vmap(target.unconstrain)(draws.flat())
        else:
            positions = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), positions)
    expected = jax.tree.map(jnp.shape, template)
    shapes = jax.tree.map(lambda leaf: jnp.shape(leaf)[1:], positions)
    if expected != shapes or len({jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(positions)}) != 1:
        raise ValueError(
            f"draws of shard {index + 1} must be unconstrained positions with one leading axis, each of shapes "
            f"{expected}, got {jax.tree.map(jnp.shape, positions)}"
        )
    flat = jax.vmap(flatten_position)(positions)
    log_weights = (
        jnp.zeros(flat.shape[0], flat.dtype) if log_weights is None else log_weights.astype(flat.dtype)
    )
    moments = _moments(log_weights, flat)
    if not all(np.all(np.isfinite(part)) for part in moments):
        raise NumericalError(
            f"the draws of shard {index + 1} are not finite or do not vary in every direction ({flat.shape[0]} draws "
            f"of {flat.shape[1]} numbers): run its sampler again, longer",
            Status.NON_FINITE,
        )
    return moments


@jax.jit
def _moments(log_weights: Float[Array, " n"], positions: Float[Array, "n d"]) -> GroupMoments:
    # Subtract the first draw: a coordinate that does not vary is then exactly zero, without rounding.
    first, centered = positions[0], positions - positions[0]
    mean = first + weights.mean(log_weights, centered)
    return GroupMoments(mean, covariance_factor.estimate(log_weights, centered))
