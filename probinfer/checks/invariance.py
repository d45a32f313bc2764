r"""Does a Markov kernel leave its posterior invariant? Exact tests on the joint distribution of parameters and data.

Each of S independent lanes draws :math:`\theta^*\sim p(\theta)` and :math:`x\sim p(x\mid\theta^*)`, so
:math:`\theta^*` is a posterior draw given x, without any sampler. Two tests of the kernel follow, both without
burn-in and with exact p-values:

* *chain*: :math:`\theta^*` takes a random position in a chain of L + 1 states, run forward and backward from it. If the
  kernel leaves the posterior invariant, every position was equally likely given the states, and the rank of
  :math:`f(\theta^*, x)` among them is uniform. Running backward needs the reversed kernel; a reversible kernel (MH,
  HMC, NUTS) is its own reversal.
* *end*: the end of the chain has the distribution of :math:`\theta^*`, jointly with x, so its :math:`f` has a uniform
  rank among L fresh draws from the joint distribution. This holds for any kernel but detects less.

A kernel that does not move passes both tests. So the movement is measured, and where there is none the check cannot
tell.

References:
    Geweke (2004), "Getting it right: joint distribution tests of posterior simulators". Gandy and Scott (2020),
    "Unit testing for MCMC and other Monte Carlo methods", algorithms 1 and 2 (ranks, random position).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.checks.calibration.rank_uniformity import OUTCOMES, UniformityReport, judge
from probinfer.checks.calibration.ranks import RankTable, named_quantities, rank_table, scalar_names
from probinfer.checks.power.ranks import of_kernel
from probinfer.core.algorithms import as_partial
from probinfer.core.arguments import check_key
from probinfer.core.errors import shortened
from probinfer.core.trees import select
from probinfer.core.types import Array, ArrayTree, PRNGKey, field, pytree
from probinfer.running.checkpoint import Checkpoint
from probinfer.running.many.driver import run_many

__all__ = ["JointReport", "joint_test"]

_MIN_MOVED = 0.5  # minimum share of lanes in which a parameter must change


@dataclass(frozen=True)
class JointReport:
    """Verdict of the joint tests on a kernel.

    Attributes:
        ranks: tests of uniformity, ``chain.f`` and ``end.f`` for each quantity f.
        moved: by scalar parameter, the share of lanes in which the chain changed it at all.
        traveled: by scalar parameter, root mean square distance from the start to the end, in prior standard
            deviations.
        transitions: number of transitions of the kernel in a lane.
    """

    ranks: UniformityReport
    moved: dict[str, float]
    traveled: dict[str, float]
    transitions: int

    @property
    def pvalues(self) -> dict[str, float]:
        """P-values by test and quantity, adjusted by Holm's rule over all of them."""
        return self.ranks.pvalues

    @property
    def rejected(self) -> tuple[str, ...]:
        """Names of the tests that the kernel fails."""
        return self.ranks.rejected

    @property
    def stuck_parameters(self) -> tuple[str, ...]:
        """Parameters that the kernel hardly moves, about which the check cannot tell."""
        return tuple(name for name, share in self.moved.items() if share < _MIN_MOVED)

    @property
    def passed(self) -> bool | None:
        """True, False, or None if the check cannot tell."""
        return None if self.stuck_parameters and not self.rejected else self.ranks.passed

    @property
    def verdict(self) -> str:
        """The verdict in words, with how far the kernel moved."""
        parts = [
            f"the kernel hardly moves {name}: it changed in {self.moved[name]:.1%} of the lanes, so an error in it "
            "cannot be detected"
            for name in self.stuck_parameters
        ]
        if self.rejected:
            smallest = sorted(self.rejected, key=lambda name: self.pvalues[name])[:5]
            listed = ", ".join(f"{name} (p = {self.pvalues[name]:.2g})" for name in smallest)
            parts.insert(0, f"the kernel does not leave the posterior invariant: {listed}")
            if not any(name.startswith("end.") for name in self.rejected):
                parts.append(
                    "or it is not reversible: then pass its reversal as reverse, or reverse=None for any kernel"
                )
        elif self.ranks.blind:
            parts.append(self.ranks.blind)
        if self.traveled:
            slowest = min(self.traveled, key=lambda name: self.traveled[name])
            parts.append(
                f"{self.ranks.num_simulations} lanes of {self.transitions} transitions traveled "
                f"{self.traveled[slowest]:.2g} prior sd or more ({slowest})"
            )
        if self.ranks.power is not None:
            parts.append(f"if the chains forget their starts, they {self.ranks.power}")
        if not any(self.ranks.ranks.uses_data):
            parts.append("no quantity depends on the data, so a kernel that ignores the data is not detected")
        parts.extend(f"{num} lanes failed: {reason}" for reason, num in self.ranks.ranks.failures)
        return f"{OUTCOMES[self.passed]}: " + "; ".join(parts)

    def plot(self, axes: Any = None) -> Any:
        """Draw the distribution functions of the ranks minus the diagonal, with the band; see ``UniformityReport``."""
        return self.ranks.plot(axes)

    def __str__(self) -> str:
        return self.verdict


@pytree
class _Lane:
    """One lane: parameters, data and a chain, as a function of a key.

    Attributes:
        prior_sample: ``key`` -> parameters.
        simulate: ``(key, parameters)`` -> data.
        transition_fn: ``(key, state, data)`` -> state.
        reverse: the reversed kernel; None: the chain runs forward only.
        init_fn: ``(parameters, data)`` -> state; None: the parameters are the state.
        position_fn: state -> parameters; None: the field ``position``.
        functions: test quantities besides the scalar parameters.
        num_draws: number L of states besides the start.
        num_steps: transitions between two states.
    """

    prior_sample: Callable
    simulate: Callable
    transition_fn: Callable
    reverse: Callable | None
    init_fn: Callable | None
    position_fn: Callable | None
    functions: tuple
    num_draws: int = field(static=True)
    num_steps: int = field(static=True)

    def __call__(self, key: PRNGKey, _: None) -> dict[str, Array]:
        """Return the quantities at the start (1, Q), along the chain (L, Q), at its end (1, Q) and afresh (L, Q)."""
        key_parameters, key_data, key_position, key_chain, key_fresh = jax.random.split(key, 5)
        # Sample the parameters and their data
        parameters = self.prior_sample(key_parameters)
        data = self.simulate(key_data, parameters)
        # Run the chain around the true parameters
        position = jax.random.randint(key_position, (), 0, self.num_draws + 1)
        position = position if self.reverse is not None else jnp.zeros_like(position)
        states = self._chain(key_chain, parameters, data, position)
        # The end that is further away: the backward end, number position - 1, or the last state.
        end = jnp.where(2 * position > self.num_draws, position - 1, self.num_draws - 1)
        # Sample fresh parameters and data
        fresh_keys = jax.random.split(key_fresh, (self.num_draws, 2))
        fresh = jax.vmap(self.prior_sample)(fresh_keys[:, 0])
        fresh_data = jax.vmap(self.simulate)(fresh_keys[:, 1], fresh)
        # Evaluate start and chain in one computation, so that an unchanged state has the same values to the last bit.
        start_and_chain = jax.tree.map(
            lambda start, chain: jnp.concatenate([jnp.asarray(start, chain.dtype)[None], chain]),
            parameters,
            states,
        )
        values = jax.vmap(self.values, (0, None))(start_and_chain, data)
        chain_values = values[1:]
        return {
            "start": values[:1],
            "chain": chain_values,
            "end": chain_values[end][None],
            "fresh": jax.vmap(self.values)(fresh, fresh_data),
        }

    def values(self, parameters: ArrayTree, data: ArrayTree) -> Array:
        """Return the scalar parameters, then the other quantities (Q,)."""
        dtype = jnp.result_type(float)
        others = [function(parameters, data) for function in self.functions]
        return jnp.concatenate(
            [jnp.ravel(jnp.asarray(leaf, dtype)) for leaf in [*jax.tree.leaves(parameters), *others]]
        )

    def _chain(self, key: PRNGKey, parameters: ArrayTree, data: ArrayTree, position: Array) -> ArrayTree:
        """Return the L states besides the start: ``position`` of them run backward from it, the others forward."""
        start = parameters if self.init_fn is None else self.init_fn(parameters, data)

        def advance(state, inputs):
            index, key = inputs
            # The backward part comes first; at ``position`` the chain restarts and runs forward.
            state = select(index == position, start, state)
            keys = jax.random.split(key, self.num_steps)
            state, _ = jax.lax.scan(
                lambda s, k: (self._transition(index < position, k, s, data), None), state, keys
            )
            return state, self.position(state)

        indices = jnp.arange(self.num_draws)
        return jax.lax.scan(advance, start, (indices, jax.random.split(key, self.num_draws)))[1]

    def _transition(self, backward: Array, key: PRNGKey, state: ArrayTree, data: ArrayTree) -> ArrayTree:
        if self.reverse is None or self.reverse is self.transition_fn:
            return self.step(self.transition_fn, key, state, data)
        return jax.lax.cond(
            backward,
            lambda: self.step(self.reverse, key, state, data),
            lambda: self.step(self.transition_fn, key, state, data),
        )

    def step(self, kernel: Callable | None, key: PRNGKey, state: ArrayTree, data: ArrayTree) -> ArrayTree:
        """Return the state after a transition; a kernel with its own state may return (state, info)."""
        result = kernel(key, state, data)
        has_info = self.init_fn is not None and type(result) is tuple and len(result) == 2
        return result[0] if has_info else result

    def position(self, state: ArrayTree) -> ArrayTree:
        """Return the parameters in a state."""
        if self.init_fn is None:
            return state
        return state.position if self.position_fn is None else self.position_fn(state)


def joint_test(
    key: PRNGKey,
    prior_sample: Callable,
    simulate: Callable,
    transition_fn: Callable,
    *,
    reverse: Callable | str | None = "same",
    init_fn: Callable | None = None,
    position_fn: Callable | None = None,
    log_prior_fn: Callable | None = None,
    log_likelihood_fn: Callable | None = None,
    quantities: Sequence[Callable] | Mapping[str, Callable] = (),
    num_simulations: int = 1000,
    num_draws: int = 20,
    num_steps: int = 1,
    level: float = 0.05,
    mode: str = "auto",
    batch_size: int | None = None,
    checkpoint: Checkpoint | None = None,
    progress: bool | str | None = None,
) -> JointReport:
    """Test whether a Markov kernel leaves the posterior of every data set invariant.

    Args:
        key: random key.
        prior_sample: ``key`` -> theta, any tree.
        simulate: ``(key, theta)`` -> x.
        transition_fn: ``(key, theta, x)`` -> theta, one transition that should leave p(theta | x) invariant. It must
            not adapt.
        reverse: "same" for a reversible kernel; the reversed kernel (such as the sweep in opposite order), with the
            same signature; or None: then only the ends of the chains are tested, which is valid for any kernel.
        init_fn: ``(theta, x)`` -> state, for kernels that carry more than theta from step to step (such as gradients);
            ``transition_fn`` is then ``(key, state, x)`` -> state or ``(state, info)``.
        position_fn: state -> theta; by default its field ``position``.
        log_prior_fn: log prior of one theta, ranked too.
        log_likelihood_fn: ``(theta, x)`` -> log likelihood, ranked too; with the prior, their sum as well.
        quantities: further functions ``(theta, x)`` -> scalar, as in ``rank_table``.
        num_simulations: number S of lanes.
        num_draws: number L of states besides the first.
        num_steps: transitions between two states.
        level: probability of a false alarm of the whole test.
        mode: "map", "vmap" or "auto", see ``run_many``.
        batch_size: chains that are run together, see ``run_many``.
        checkpoint: where to keep finished batches, see ``run_many``.
        progress: whether to show a progress bar; None: only on a terminal.

    Returns:
        The report. It passes only if the kernel moved every parameter in at least half of the lanes.

    Raises:
        TypeError: ``key`` is not a key, or a transition changes the structure, shapes or dtypes of its state.
        ValueError: a count is below 1, ``reverse`` is unknown, a quantity is not a scalar, two quantities share a
            name, or the level is not between 0 and 0.5.

    References:
        Gandy and Scott (2020), algorithm 2 (chain). Geweke (2004), section 3 (end).
    """
    check_key(key)
    _check_counts(num_simulations=num_simulations, num_draws=num_draws, num_steps=num_steps)
    if not (reverse is None or reverse == "same" or callable(reverse)):
        raise ValueError(
            f"reverse must be 'same', a kernel or None, got {shortened(reverse)}; 'same' is for reversible kernels"
        )
    key_lanes, key_ties = jax.random.split(key)
    parameters = jax.eval_shape(prior_sample, key)
    names, functions, uses_data = named_quantities(log_prior_fn, log_likelihood_fn, quantities, ())
    forward = as_partial(transition_fn)
    lane = _Lane(
        prior_sample=as_partial(prior_sample),
        simulate=as_partial(simulate),
        transition_fn=forward,
        reverse=forward if reverse == "same" else None if reverse is None else as_partial(reverse),  # type: ignore[arg-type]
        init_fn=None if init_fn is None else as_partial(init_fn),
        position_fn=None if position_fn is None else as_partial(position_fn),
        functions=functions,
        num_draws=num_draws,
        num_steps=num_steps,
    )
    scalars = scalar_names(jax.tree.map(lambda leaf: np.empty((1, *leaf.shape)), parameters))
    _check_lane(lane, key, scalars, names)
    # Run the lanes
    keys = jax.random.split(key_lanes, num_simulations)
    values = run_many(
        lane, keys, None, mode=mode, batch_size=batch_size, checkpoint=checkpoint, progress=progress
    ).draws
    # Rank the start along the chain, and the end among fresh draws
    uses_data_by_name = dict(zip((*scalars, *names), (*[False] * len(scalars), *uses_data), strict=True))
    chain = reverse is not None
    table = _rank_lanes(key_ties, values, uses_data_by_name, chain)
    ranks = judge(table, level, partial(of_kernel, table.num_draws + 1, chain=chain))
    moved, traveled = _movement(values, scalars)
    return JointReport(ranks=ranks, moved=moved, traveled=traveled, transitions=num_draws * num_steps)


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more, got {shortened(count)}")


def _check_lane(lane: _Lane, key: PRNGKey, scalars: list[str], names: tuple) -> None:
    """Refuse kernels that change the structure of their state, and quantities that are not scalars or share a name."""
    if duplicates := {name for name in names if [*scalars, *names].count(name) > 1}:
        raise ValueError(f"two test quantities are called {sorted(duplicates)}; pass quantities as a mapping")
    parameters = jax.eval_shape(lane.prior_sample, key)
    data = jax.eval_shape(lane.simulate, key, parameters)
    for name, function in zip(names, lane.functions, strict=True):
        shape: Any = jax.tree.map(jnp.shape, jax.eval_shape(function, parameters, data))
        if shape != ():
            raise ValueError(f"the test quantity '{name}' must be a scalar, got shape {shape}")
    start = parameters if lane.init_fn is None else jax.eval_shape(lane.init_fn, parameters, data)
    for kernel in (lane.transition_fn, lane.reverse):
        if kernel is None:
            continue
        state = jax.eval_shape(lambda *args, kernel=kernel: lane.step(kernel, *args), key, start, data)
        for before, after in ((start, state), (parameters, jax.eval_shape(lane.position, state))):
            if _signature(before) != _signature(after):
                raise TypeError(
                    "a transition must keep the structure, shapes and dtypes of its state: expected "
                    f"{shortened(before)}, got {shortened(after)}; one with a state needs init_fn and position_fn"
                )


def _signature(tree: ArrayTree) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _rank_lanes(
    key: PRNGKey, values: dict[str, np.ndarray], uses_data: dict[str, bool], chain: bool
) -> RankTable:
    """Rank the start along the chain, if there is one in both directions, and the end among fresh draws."""
    tests = {"end": ("end", "fresh")} | ({"chain": ("start", "chain")} if chain else {})
    pairs = {
        f"{test}.{name}": (values[ranked][:, 0, q], values[references][:, :, q])
        for test, (ranked, references) in tests.items()
        for q, name in enumerate(uses_data)
    }
    true, draws = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    table = rank_table(key, draws, true, num_projections=0, whiten=None, thin=1)
    return table._replace(uses_data=tuple(uses_data[name.split(".", 1)[1]] for name in table.names))


def _movement(values: dict[str, np.ndarray], scalars: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the share of lanes in which each parameter changed, and its distance from start to end in prior sd."""
    start, end, chain = (values[name][..., : len(scalars)] for name in ("start", "end", "chain"))
    moved = np.mean(np.any(chain != start, axis=1), axis=0)
    prior_sd = np.std(start[:, 0], axis=0)
    distance = np.sqrt(np.mean((end - start)[:, 0] ** 2, axis=0)) / np.where(prior_sd > 0, prior_sd, 1)
    return dict(zip(scalars, moved.tolist(), strict=True)), dict(zip(scalars, distance.tolist(), strict=True))
