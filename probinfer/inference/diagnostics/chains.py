"""R-hat, effective sample sizes and Monte Carlo errors of draws (chain, draw, ...), and the verdict on them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from probinfer.core.status import Status
from probinfer.core.types import Array, ArrayTree, Float, Int
from probinfer.inference.diagnostics.quantity import normal_scores, per_quantity

__all__ = [
    "convergence_status",
    "ebfmi",
    "ess",
    "ess_mean",
    "ess_quantile",
    "ess_tail",
    "mcse_mean",
    "mcse_quantile",
    "mcse_sd",
    "rhat",
]


def rhat(draws: ArrayTree) -> ArrayTree:
    r"""Return the rank-normalized split :math:`\hat R`, the larger of the bulk and the folded one.

    :math:`\hat R^2 = (B/W + n - 1)/n` with the variance between (B) and within (W) half-chains of the normal
    scores of x and of :math:`|x - \mathrm{median}|`. Below 1.01 is good.

    Args:
        draws: pytree with leaves (chain, draw, ...).

    Returns:
        Tree with leaves (...). Infinite when every chain is stuck at a place of its own; NaN for a single
        chain, which cannot disagree with another.

    Raises:
        ValueError: a leaf lacks the two leading axes.
    """
    return per_quantity(_rhat, draws)


def ess(draws: ArrayTree) -> ArrayTree:
    """Return the bulk effective sample size: that of the mean of the normal scores.

    Args:
        draws: pytree with leaves (chain, draw, ...).

    Raises:
        ValueError: a leaf lacks the two leading axes.
    """
    return per_quantity(_ess_bulk, draws)


def ess_tail(draws: ArrayTree) -> ArrayTree:
    """Return the tail effective sample size: the smaller of those of the 5 % and the 95 % quantile.

    A quantile that no draw lies beyond (possible for discrete quantities) is left out.

    Args:
        draws: pytree with leaves (chain, draw, ...).

    Raises:
        ValueError: a leaf lacks the two leading axes.
    """
    return per_quantity(_ess_tail, draws)


def ess_mean(draws: ArrayTree) -> ArrayTree:
    """Return the effective sample size of the mean, without rank normalization.

    Args:
        draws: pytree with leaves (chain, draw, ...).

    Raises:
        ValueError: a leaf lacks the two leading axes.
    """
    return per_quantity(_ess_mean, draws)


def ess_quantile(draws: ArrayTree, probability: float | int) -> ArrayTree:
    """Return the effective sample size of a quantile: that of the indicator of lying below it.

    Args:
        draws: pytree with leaves (chain, draw, ...).
        probability: level of the quantile, between 0 and 1, neither of them.

    Raises:
        ValueError: a leaf lacks the two leading axes, or the level is not between 0 and 1.
    """
    return per_quantity(jax.tree_util.Partial(_ess_quantile, probability=_level(probability)), draws)


def mcse_mean(draws: ArrayTree) -> ArrayTree:
    """Return the Monte Carlo standard error of the mean, sd / sqrt(ESS), in the units of the draws.

    Args:
        draws: pytree with leaves (chain, draw, ...).

    Raises:
        ValueError: a leaf lacks the two leading axes.
    """
    return per_quantity(_mcse_mean, draws)


def mcse_sd(draws: ArrayTree) -> ArrayTree:
    r"""Return the Monte Carlo standard error of the standard deviation.

    From the variance of :math:`(x-\bar x)^2` by the delta method, so right for non-normal draws too.

    Args:
        draws: pytree with leaves (chain, draw, ...).

    Raises:
        ValueError: a leaf lacks the two leading axes.

    References:
        Kenney and Keeping (1951), "Mathematics of statistics", standard error of a standard deviation.
    """
    return per_quantity(_mcse_sd, draws)


def mcse_quantile(draws: ArrayTree, probability: float | int) -> ArrayTree:
    """Return the Monte Carlo standard error of a quantile.

    Half the distance of the order statistics at the 16 % and 84 % quantiles of Beta(S p + 1, S (1 - p) + 1),
    S the effective sample size of the quantile.

    Args:
        draws: pytree with leaves (chain, draw, ...).
        probability: level p of the quantile, between 0 and 1, neither of them.

    Raises:
        ValueError: a leaf lacks the two leading axes, or the level is not between 0 and 1.
    """
    return per_quantity(jax.tree_util.Partial(_mcse_quantile, probability=_level(probability)), draws)


def ebfmi(energy: Float[Array, "chain draw"]) -> Float[Array, " chain"]:
    r"""Return :math:`\sum_t (E_t - E_{t-1})^2 / \sum_t (E_t - \bar E)^2`, by chain.

    The energy Bayesian fraction of missing information: below 0.3 the momentum refreshment of Hamiltonian
    Monte Carlo moves too slowly between energy levels, and heavy tails are explored badly.

    Args:
        energy: Hamiltonian at each draw, in nats.

    References:
        Betancourt (2016), "Diagnosing suboptimal cotangent disintegrations in Hamiltonian Monte Carlo".
    """
    centered = energy - jnp.mean(energy, axis=1, keepdims=True)
    return jnp.mean(jnp.square(jnp.diff(energy, axis=1)), axis=1) / jnp.mean(jnp.square(centered), axis=1)


def convergence_status(
    draws: ArrayTree, *, max_rhat: float = 1.01, min_ess: float | int | None = None
) -> Int[Array, ""]:
    """Judge every quantity by the rule: R-hat below 1.01, bulk and tail ESS of at least 100 a chain.

    A single chain is judged by its ESS alone. Quantities that never change in any chain (deterministic ones)
    are not judged; where nothing can be judged, because nothing changes or there are fewer than four draws,
    the chains have not been shown to agree.

    Args:
        draws: pytree with leaves (chain, draw, ...).
        max_rhat: R-hat must be below.
        min_ess: bulk and tail ESS must reach this; None: 100 times the number of chains.

    Returns:
        ``OK``, ``CHAINS_DISAGREE``, or ``NON_FINITE`` if a draw is NaN or infinite.

    Raises:
        ValueError: a leaf lacks the two leading axes.
    """
    leaves = [leaf for leaf in jax.tree.leaves(draws) if leaf.size]
    return _judge(leaves, max_rhat, 100 * leaves[0].shape[0] if min_ess is None else min_ess)


@jax.jit
def _judge(leaves: list[Array], max_rhat: Array | float, min_ess: Array | float | int) -> Array:
    num_chains, num_draws = leaves[0].shape[:2]
    judged, good = jnp.asarray(False), jnp.asarray(True)
    for leaf in leaves if num_draws >= 4 else []:
        moving = jnp.any(leaf != leaf[:1, :1], axis=(0, 1))
        fine = (ess(leaf) >= min_ess) & (ess_tail(leaf) >= min_ess)
        fine &= (rhat(leaf) < max_rhat) | (num_chains == 1)
        judged |= jnp.any(moving)
        good &= jnp.all(fine | ~moving)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
    code = jnp.where(judged & good, int(Status.OK), int(Status.CHAINS_DISAGREE))
    return jnp.where(finite, code, int(Status.NON_FINITE)).astype(jnp.int32)


def _level(probability: float | int) -> float:
    if not 0 < probability < 1:
        raise ValueError(
            f"the level of a quantile must lie between 0 and 1, got {probability}; the smallest and the largest draw "
            "estimate no quantile, so they have no Monte Carlo error"
        )
    return float(probability)


def _split(draws: Array) -> Array:
    half = draws.shape[1] // 2
    return jnp.concatenate([draws[:, :half], draws[:, -half:]])


def _split_rhat(chains: Array) -> Array:
    num_draws = chains.shape[1]
    within = jnp.mean(jnp.var(chains - chains[:, :1], axis=1, ddof=1))
    between = num_draws * jnp.var(jnp.mean(chains, axis=1), ddof=1)
    value = jnp.sqrt((between / within + num_draws - 1) / num_draws)
    return jnp.where(jnp.all(chains == chains[0, 0]), jnp.nan, value)


def _rhat(draws: Array) -> Array:
    if draws.shape[0] == 1:
        return jnp.asarray(jnp.nan, draws.dtype)
    halves = _split(draws)
    folded = jnp.abs(halves - jnp.median(halves))
    bulk, spread = _split_rhat(normal_scores(halves)), _split_rhat(normal_scores(folded))
    flat = jnp.all(folded == folded[0, 0])  # a two-point quantity folds to a constant
    return jnp.where(flat, bulk, jnp.maximum(bulk, spread))


def _ess(chains: Array) -> Array:
    """Effective sample size of the mean by Geyer's initial monotone sequence."""
    num_chains, num_draws = chains.shape
    scale = jnp.std(chains - chains[0, 0])
    chains = (chains - chains[0, 0]) / scale
    chain_means = jnp.mean(chains, axis=1)
    covariance = _autocovariance(chains - chain_means[:, None])
    total = covariance[0] + (jnp.var(chain_means, ddof=1) if num_chains > 1 else 0)
    # rho_t = 1 - (W - mean autocovariance) / var+
    correlation = 1 - (covariance[0] * num_draws / (num_draws - 1) - covariance) / total
    correlation = correlation.at[0].set(1)
    pairs = correlation[: 2 * max((num_draws - 1) // 2, 1)].reshape(-1, 2)
    sums = jnp.sum(pairs, axis=1)
    stop = jnp.argmax((sums <= 0).at[-1].set(True))  # first pair that is not positive, or the last
    kept = jnp.where(jnp.arange(len(sums)) < stop, jax.lax.cummin(sums), 0)
    rest = jnp.where((pairs[stop, 0] > 0) | (sums[stop] >= 0), pairs[stop, 0], 0)
    time = jnp.maximum(2 * jnp.sum(kept) + rest - 1, 1 / jnp.log10(float(chains.size)))
    return jnp.where(jnp.isfinite(total) & (scale > 0), chains.size / time, jnp.nan).astype(chains.dtype)


def _autocovariance(centered: Array) -> Array:
    """Mean over chains of the biased autocovariance at lags 0 ... n - 1."""
    num_draws = centered.shape[1]
    size = 1 << (2 * num_draws - 1).bit_length()
    spectrum = jnp.fft.rfft(centered, n=size, axis=1)
    power = jnp.mean(jnp.square(spectrum.real) + jnp.square(spectrum.imag), axis=0)
    return jnp.fft.irfft(power, n=size)[:num_draws] / num_draws


def _ess_bulk(draws: Array) -> Array:
    return _ess(normal_scores(_split(draws)))


def _ess_mean(draws: Array) -> Array:
    return _ess(_split(draws))


def _ess_quantile(draws: Array, probability: float | Array) -> Array:
    below = (draws <= jnp.quantile(draws, probability)).astype(draws.dtype)
    return jnp.where(jnp.any(jnp.isnan(draws)), jnp.nan, _ess(_split(below)))


def _ess_tail(draws: Array) -> Array:
    return jnp.fmin(_ess_quantile(draws, 0.05), _ess_quantile(draws, 0.95))


def _mcse_mean(draws: Array) -> Array:
    return jnp.std(draws, ddof=1) / jnp.sqrt(_ess_mean(draws))


def _mcse_sd(draws: Array) -> Array:
    squares = jnp.square(draws - jnp.mean(draws))
    return jnp.sqrt(jnp.var(squares) / (_ess_mean(squares) * 4 * jnp.mean(squares)))


def _mcse_quantile(draws: Array, probability: float | Array) -> Array:
    size = _ess_quantile(draws, probability)
    tails = jnp.asarray([0.1586553, 0.8413447], draws.dtype)
    low, high = draws.size * _beta_quantile(tails, size * probability + 1, size * (1 - probability) + 1) - 1
    ordered = jnp.sort(draws.ravel())
    low = jnp.clip(jnp.floor(low), 0, draws.size - 1).astype(jnp.int32)
    high = jnp.clip(jnp.ceil(high), 0, draws.size - 1).astype(jnp.int32)
    return jnp.where(jnp.isnan(size), jnp.nan, (ordered[high] - ordered[low]) / 2)


def _beta_quantile(probabilities: Array, a: Array, b: Array) -> Array:
    """Quantiles of Beta(a, b) by bisection of the regularized incomplete beta function."""

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        below = jax.scipy.special.betainc(a, b, middle) < probabilities
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    bracket = (jnp.zeros_like(probabilities), jnp.ones_like(probabilities))
    return sum(jax.lax.fori_loop(0, 40, halve, bracket)) / 2
