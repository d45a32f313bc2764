r"""Two-filter smoothing: a forward filter is joined to an independent one that runs backwards.

The likelihood of the future, :math:`\beta_t(x)=p(y_{t+1:T-1}\mid x_t=x)`, is not a density in x. Multiplied by an
*artificial prior* :math:`\gamma_t` it is one, and a filter that starts at :math:`x_{T-1}\sim\gamma_{T-1}` and moves
backwards by :math:`q_t(x_t\mid x_{t+1})` follows :math:`\gamma_t\beta_t` with the weights

.. math:: \frac{\gamma_t(x_t)M_{t+1}(x_t,x_{t+1})G_{t+1}(x_t,x_{t+1})}{\gamma_{t+1}(x_{t+1})\,q_t(x_t\mid x_{t+1})}.

Its particle z of step t, of weight w, joined to all forward particles i of step t - 1, has the smoothing weight

.. math:: w\sum_i W_{t-1}^i M_t(x_{t-1}^i,z)\,G_t(x_{t-1}^i,z)\,/\,\gamma_t(z),

and the sum of these, times the evidences of both filters, estimates the evidence without bias at each t. If
:math:`\gamma_t` is near the filtering distribution and :math:`q_t` near that of :math:`x_t` given
:math:`x_{t+1},y_{0:t}`, the weights hardly vary: by default both are fitted to a pilot filter.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial

from probinfer.core.arguments import check_key
from probinfer.core.types import Array, ArrayTree, Float, Int, PRNGKey, Scalar
from probinfer.numerics import weights
from probinfer.smc.filtering.filter import as_adaptive, check_counts
from probinfer.smc.filtering.forward_pass import forward
from probinfer.smc.filtering.genealogy import all_records
from probinfer.smc.filtering.traces import FilterTrace
from probinfer.smc.models.feynman_kac import FeynmanKac, lift
from probinfer.smc.smoothing.artificial_priors import ArtificialPrior, check_real, fit_artificial

__all__ = ["TwoFilterResult", "two_filter"]

_CHUNK = 2**17  # pairs of particles that are in memory at once


class TwoFilterResult(NamedTuple):
    r"""Weighted particles from the distribution of each state given all data.

    Attributes:
        particles: leaves (T, N, ...): of the backward filter, in row 0 of the forward one.
        log_weights: (T, N), normalized: exponentials of a row sum to one. Minus infinity if a filter died.
        log_evidence: log of the mean of the T - 1 estimates, unbiased like each of them.
        log_evidences: (T,), by joining the filters at step t; rows 0 and 1 are the same.
        ess: (T,) effective sample sizes of the weights.
        status: the worst of the pilot, both filters and their weights: ``OK``, ``DEGENERATE_WEIGHTS``,
            ``NON_FINITE`` (also if the particles of the pilot do not span the space, so that no distribution can be
            fitted to them: use more particles, or an artificial prior of your own).
    """

    particles: ArrayTree
    log_weights: Float[Array, "T N"]
    log_evidence: Scalar
    log_evidences: Float[Array, " T"]
    ess: Float[Array, " T"]
    status: Int[Array, ""]


def two_filter(
    key: PRNGKey,
    fk: Any,
    num_steps: int,
    num_particles: int,
    *,
    artificial: Any = None,
    resampling: Any = "systematic",
    ess_threshold: Any = 0.5,
) -> TwoFilterResult:
    r"""Weigh N particles of each step by the distribution of :math:`x_t` given all data.

    The particles of a step are not those of the filter, so that early steps are as diverse as late ones, and the
    smoothing distribution may differ from the filtering one. Jits and vmaps. Time: T N^2 transition densities, in
    chunks; memory: O(N T).

    Args:
        key: random key.
        fk: the model, with its ``log_transition``.
        num_steps: T, at least 1.
        num_particles: N, of each filter and of the pilot.
        artificial: artificial prior and backward transitions; None: Student-t distributions fitted to a pilot filter,
            for real states.
        resampling: as for ``particle_filter``, for all filters.
        ess_threshold: as for ``particle_filter``.

    Returns:
        Particles and weights, with a status: value failures do not raise.

    Raises:
        TypeError: as ``particle_filter``; ``fk`` is not a ``FeynmanKac``, or ``artificial`` not an
            ``ArtificialPrior``.
        ValueError: as ``particle_filter``; no ``log_transition``; states that are not real without ``artificial``.

    References:
        Briers, Doucet and Maskell (2010), sections 3 and 4; Fearnhead, Wyncoll and Tawn (2010).
    """
    check_key(key)
    check_counts(num_steps=num_steps, num_particles=num_particles)
    _check_model(fk)
    if artificial is None:
        check_real(fk)
    elif not isinstance(artificial, ArtificialPrior):
        raise TypeError(f"artificial must be a smc.ArtificialPrior or None, got {type(artificial).__name__}")
    return _run(key, fk, artificial, as_adaptive(resampling, ess_threshold), num_steps, num_particles)


def _check_model(fk: Any) -> None:
    if not isinstance(fk, FeynmanKac):
        raise TypeError(
            f"two-filter smoothing needs the density of a step of one particle: expected a smc.FeynmanKac, got "
            f"{type(fk).__name__}"
        )
    if fk.log_transition is None:
        raise ValueError(
            "two-filter smoothing joins two filters by the density of a step: give log_transition"
        )


@partial(jax.jit, static_argnames=("num_steps", "num_particles"))
def _run(
    key: Array, fk: FeynmanKac, artificial: Any, adaptive: Any, num_steps: int, num_particles: int
) -> TwoFilterResult:
    key_pilot, key_forward, key_backward = jax.random.split(key, 3)
    sizes = (num_steps, num_particles, "history")
    forward_trace = forward(key_forward, lift(fk), adaptive, None, *sizes)
    statuses: tuple = (forward_trace.status,)
    if num_steps == 1:
        log_weights: Any = forward_trace.past_log_weights
        return _collect(all_records(forward_trace), log_weights, forward_trace.log_evidences, statuses)
    if artificial is None:
        pilot = forward(key_pilot, lift(fk), adaptive, None, *sizes)
        artificial, statuses = fit_artificial(pilot), (*statuses, pilot.status)
    reversed_model = lift(_reversed_model(fk, artificial, num_steps))
    backward_trace = forward(key_backward, reversed_model, adaptive, None, *sizes)
    return _join_filters(fk, artificial, forward_trace, backward_trace, (*statuses, backward_trace.status))


def _reversed_model(fk: FeynmanKac, artificial: ArtificialPrior, num_steps: int) -> FeynmanKac:
    """Return the backward filter as a model whose step s is t = T - 1 - s."""
    last = jnp.int32(num_steps - 1)
    return FeynmanKac(
        artificial.sample_last,
        Partial(_propagate_backward, artificial, last),
        Partial(_log_backward_potential, fk, artificial, last),
    )


def _propagate_backward(
    artificial: ArtificialPrior, last: Array, key: Array, x: ArrayTree, s: Array
) -> ArrayTree:
    return artificial.propagate(key, x, last - s)


def _log_backward_potential(
    fk: FeynmanKac, artificial: ArtificialPrior, last: Array, x_next: ArrayTree, x: ArrayTree, s: Array
) -> Array:
    t = last - s
    t_next = jnp.minimum(t + 1, last)
    log_prior_ratio = artificial.log_prior(x, t) - artificial.log_prior(x_next, t_next)
    value = log_prior_ratio + _log_step(fk, x, x_next, t_next) - artificial.log_propagate(x_next, x, t)
    return jnp.where(s == 0, jnp.zeros_like(value), value)


def _log_step(fk: FeynmanKac, x_previous: ArrayTree, x: ArrayTree, t: Array) -> Array:
    return fk.log_transition(x_previous, x, t) + fk.log_potential(x_previous, x, t)


def _join_filters(
    fk: FeynmanKac,
    artificial: ArtificialPrior,
    forward_trace: FilterTrace,
    backward_trace: FilterTrace,
    statuses: tuple,
) -> TwoFilterResult:
    """Join particles of step t of the backward filter to those of step t - 1 of the forward one."""

    def flip(leaf: Any) -> Array:
        return leaf[::-1]

    forward_states, backward_states = (
        all_records(forward_trace),
        jax.tree.map(flip, all_records(backward_trace)),
    )
    forward_weights: Any = forward_trace.past_log_weights
    backward_weights = flip(backward_trace.past_log_weights)
    log_evidences = forward_trace.log_evidences[:-1] + flip(backward_trace.log_evidences)[1:]

    def join(t: Array, reverse: bool) -> Array:
        """Return log weights of backward particles of step t; with ``reverse`` of forward ones of step t - 1."""
        early = jax.tree.map(lambda leaf: leaf[t - 1], forward_states)
        late = jax.tree.map(lambda leaf: leaf[t], backward_states)
        early_weights, late_weights = _normalized(forward_weights[t - 1]), _normalized(backward_weights[t])

        # Divide the backward weights by the artificial prior; where they are zero the prior may be zero too
        without_prior = late_weights - jax.vmap(artificial.log_prior, (0, None))(late, t)
        late_weights = jnp.where(late_weights == -jnp.inf, -jnp.inf, without_prior)

        # Sum over the particles of the other filter
        log_pair = lambda x, z: _log_step(fk, x, z, t)  # noqa: E731
        if reverse:
            total = early_weights + _log_sum_over(lambda x, z: log_pair(z, x), late, late_weights, early)
            total = jnp.where(early_weights == -jnp.inf, -jnp.inf, total)
        else:
            total = late_weights + _log_sum_over(log_pair, early, early_weights, late)
            total = jnp.where(late_weights == -jnp.inf, -jnp.inf, total)
        return total + log_evidences[t - 1]

    times = jnp.arange(1, forward_weights.shape[0], dtype=jnp.int32)
    rows = lax.map(lambda t: join(t, False), times)
    totals = jnp.concatenate([join(jnp.int32(1), True)[None], rows])
    particles = jax.tree.map(lambda a, b: jnp.concatenate([a[:1], b[1:]]), forward_states, backward_states)
    return _collect(particles, totals, jax.vmap(lambda row: weights.normalize(row).log_sum)(totals), statuses)


def _normalized(log_weights: Array) -> Array:
    return weights.normalize(log_weights).log_weights


def _log_sum_over(log_pair: Any, sources: ArrayTree, log_weights: Array, targets: ArrayTree) -> Array:
    r"""Return :math:`\log\sum_i W_i e^{\mathrm{log\_pair}(x_i,z_j)}` for each target j, in chunks of targets."""

    def log_sum(target: ArrayTree) -> Array:
        value = log_weights + jax.vmap(log_pair, (0, None))(sources, target)
        # a dead particle contributes nothing, even if its density is NaN
        return weights.normalize(jnp.where(log_weights == -jnp.inf, -jnp.inf, value)).log_sum

    num_particles = log_weights.shape[0]
    chunk = max(1, _CHUNK // num_particles)
    return (
        jax.vmap(log_sum)(targets) if chunk >= num_particles else lax.map(log_sum, targets, batch_size=chunk)
    )


def _collect(
    particles: ArrayTree, log_weights: Array, log_evidences: Array, statuses: tuple
) -> TwoFilterResult:
    weight_status = jnp.max(jax.vmap(weights.status)(log_weights))
    return TwoFilterResult(
        particles=particles,
        log_weights=jax.vmap(_normalized)(log_weights),
        log_evidence=weights.log_mean_exp(log_evidences[-max(1, log_evidences.shape[0] - 1) :]),
        log_evidences=log_evidences,
        ess=jax.vmap(weights.ess)(log_weights),
        status=jnp.max(jnp.stack([weight_status, *statuses])),
    )
