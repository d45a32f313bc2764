r"""Does a Markov kernel leave its posterior alone? Exact tests on the joint distribution of parameters and data.

Each of S independent lanes draws :math:`\theta^*\sim p(\theta)` and :math:`x\sim p(x\mid\theta^*)`, so
:math:`\theta^*` is a posterior draw given x, without any sampler. Two tests of the kernel follow, both without
burn-in and with exact p-values:

* *chain*: :math:`\theta^*` takes a random place in a chain of L + 1 states, run forwards and backwards from it. If the
  kernel leaves the posterior alone, every place was equally likely given the states, and the rank of
  :math:`f(\theta^*, x)` among them is uniform. Running backwards needs the reversed kernel; a reversible kernel (MH,
  HMC, NUTS) is its own.
* *end*: the end of the chain is distributed as :math:`\theta^*` was, jointly with x, so :math:`f` of it has a uniform
  rank among L fresh draws of the joint distribution. It holds for any kernel, but sees less.

A kernel that does not move passes both; so what it moved is measured, and where it stood still the check cannot tell.

References:
    Geweke (2004), "Getting it right: joint distribution tests of posterior simulators". Gandy and Scott (2020),
    "Unit testing for MCMC and other Monte Carlo methods", algorithms 1 and 2 (ranks, random position).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probinfer.checks.calibration.rank_uniformity import WORDS, UniformityReport, judge
from probinfer.checks.calibration.ranks import named_quantities, rank_table, scalar_names
from probinfer.checks.power.ranks import of_kernel
from probinfer.core.algorithms import as_partial
from probinfer.core.errors import check_key, shortened
from probinfer.core.types import Array, ArrayTree, PRNGKey, field, pytree
from probinfer.running.many.driver import run_many

__all__ = ["JointReport", "joint_test"]

_MOVED = 0.5  # share of lanes in which a parameter must change at least


@dataclass(frozen=True)
class JointReport:
    """What the joint tests say of a kernel.

    Attributes:
        ranks: the tests of uniformity: ``chain.f`` and ``end.f`` for each quantity f.
        moved: by scalar parameter, the share of lanes in which the chain ever changed it.
        travelled: by scalar parameter, root mean square distance from the start to the end, in prior standard
            deviations.
        transitions: of the kernel in a lane.
    """

    ranks: UniformityReport
    moved: dict[str, float]
    travelled: dict[str, float]
    transitions: int

    @property
    def pvalues(self) -> dict[str, float]:
        """By test and quantity, adjusted by Holm's rule over all of them."""
        return self.ranks.pvalues

    @property
    def rejected(self) -> tuple[str, ...]:
        """Tests that the kernel fails."""
        return self.ranks.rejected

    @property
    def still(self) -> tuple[str, ...]:
        """Parameters that the kernel hardly moves: nothing can be said about them."""
        return tuple(name for name, share in self.moved.items() if share < _MOVED)

    @property
    def passed(self) -> bool | None:
        """True, False, or None where the check cannot tell."""
        return None if self.still and not self.rejected else self.ranks.passed

    @property
    def verdict(self) -> str:
        """The verdict in words, with how far the kernel moved."""
        word = WORDS[self.passed]
        parts = [
            f"the kernel hardly moves {name}: it changed in {self.moved[name]:.1%} of the lanes, so that an error in "
            "it cannot be seen"
            for name in self.still
        ]
        if self.rejected:
            worst = sorted(self.rejected, key=lambda name: self.pvalues[name])[:5]
            named = ", ".join(f"{name} (p = {self.pvalues[name]:.2g})" for name in worst)
            parts.insert(0, f"the kernel does not leave the posterior alone: {named}")
            if not any(name.startswith("end.") for name in self.rejected):
                parts.append(
                    "or it is not reversible: then pass its reversal as reverse, or reverse=None to test any kernel"
                )
        elif self.ranks.blind:
            parts.append(self.ranks.blind)
        if self.travelled:
            least = min(self.travelled, key=lambda name: self.travelled[name])
            parts.append(
                f"{self.ranks.num_simulations} lanes of {self.transitions} transitions travelled "
                f"{self.travelled[least]:.2g} prior sd or more ({least})"
            )
        if self.ranks.power is not None:
            parts.append(f"had they forgotten their starts, they {self.ranks.power}")
        if not any(self.ranks.ranks.uses_data):
            parts.append("no quantity looks at the data, so a kernel that ignores the data is not seen")
        parts.extend(f"{num} lanes failed: {reason}" for reason, num in self.ranks.ranks.failures)
        return f"{word}: " + "; ".join(parts)

    def plot(self, axes: Any = None) -> Any:
        """Draw the distribution functions of the ranks minus the diagonal, with the band; see ``UniformityReport``."""
        return self.ranks.plot(axes)

    def __str__(self) -> str:
        return self.verdict


@pytree
class _Lane:
    """One lane: everything it calls, and its lengths."""

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
        """Values (1 + 2 L, Q): at the start, along the chain, and at fresh draws; the end's index comes with them."""
        keys = dict(zip(("theta", "x", "place", "chain", "fresh"), jax.random.split(key, 5), strict=True))
        theta = self.prior_sample(keys["theta"])
        x = self.simulate(keys["x"], theta)
        place = jax.random.randint(keys["place"], (), 0, self.num_draws + 1)
        place = place if self.reverse is not None else jnp.zeros_like(place)
        states = self._chain(keys["chain"], theta, x, place)
        # The end that is further away: the backward one, number place - 1, or the last.
        end = jnp.where(2 * place > self.num_draws, place - 1, self.num_draws - 1)
        fresh_keys = jax.random.split(keys["fresh"], (self.num_draws, 2))
        fresh = jax.vmap(self.prior_sample)(fresh_keys[:, 0])
        fresh_x = jax.vmap(self.simulate)(fresh_keys[:, 1], fresh)
        # In one computation, so that a state that did not change has the same values to the last bit.
        both = jax.tree.map(
            lambda one, many: jnp.concatenate([jnp.asarray(one, many.dtype)[None], many]), theta, states
        )
        values = jax.vmap(self.values, (0, None))(both, x)
        along = values[1:]
        return {
            "start": values[:1],
            "chain": along,
            "end": along[end][None],
            "fresh": jax.vmap(self.values)(fresh, fresh_x),
        }

    def values(self, theta: ArrayTree, x: ArrayTree) -> Array:
        """Scalar parameters, then the other quantities (Q,)."""
        dtype = jnp.result_type(float)
        others = [function(theta, x) for function in self.functions]
        return jnp.concatenate(
            [jnp.ravel(jnp.asarray(leaf, dtype)) for leaf in [*jax.tree.leaves(theta), *others]]
        )

    def _chain(self, key: PRNGKey, theta: ArrayTree, x: ArrayTree, place: Array) -> ArrayTree:
        """The L states besides the start: ``place`` of them backwards, the others forwards, both from the start."""
        start = theta if self.init_fn is None else self.init_fn(theta, x)

        def advance(state, inputs):
            number, key = inputs
            state = jax.tree.map(lambda new, old: jnp.where(number == place, new, old), start, state)
            keys = jax.random.split(key, self.num_steps)
            state, _ = jax.lax.scan(lambda s, k: (self._move(number < place, k, s, x), None), state, keys)
            return state, self.position(state)

        numbers = jnp.arange(self.num_draws)
        return jax.lax.scan(advance, start, (numbers, jax.random.split(key, self.num_draws)))[1]

    def _move(self, backwards: Array, key: PRNGKey, state: ArrayTree, x: ArrayTree) -> ArrayTree:
        if self.reverse is None or self.reverse is self.transition_fn:
            return self.step(self.transition_fn, key, state, x)
        return jax.lax.cond(
            backwards,
            lambda: self.step(self.reverse, key, state, x),
            lambda: self.step(self.transition_fn, key, state, x),
        )

    def step(self, kernel: Callable | None, key: PRNGKey, state: ArrayTree, x: ArrayTree) -> ArrayTree:
        """The state after a transition; a kernel with a state of its own may return (state, info)."""
        moved = kernel(key, state, x)
        paired = self.init_fn is not None and type(moved) is tuple and len(moved) == 2
        return moved[0] if paired else moved

    def position(self, state: ArrayTree) -> ArrayTree:
        """The parameters in a state."""
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
    chunk: int | None = None,
    path: str | os.PathLike | None = None,
    progress: bool | str | None = None,
) -> JointReport:
    """Test whether a Markov kernel leaves the posterior of every data set as it is.

    Args:
        key: random key.
        prior_sample: ``key`` -> theta, any tree.
        simulate: ``(key, theta)`` -> x.
        transition_fn: ``(key, theta, x)`` -> theta, one transition that should keep p(theta | x). It must not adapt.
        reverse: "same" for a reversible kernel; the reversed kernel (the sweep in opposite order, say), called in the
            same way; or None: then only the ends of the chains are tested, which holds for any kernel.
        init_fn: ``(theta, x)`` -> state, for kernels that keep more than theta from step to step (gradients): then
            ``transition_fn`` is ``(key, state, x)`` -> state or ``(state, info)``.
        position_fn: state -> theta; default its field ``position``.
        log_prior_fn: log prior of one theta, ranked too.
        log_likelihood_fn: ``(theta, x)`` -> log likelihood, ranked too; with the prior, their sum as well.
        quantities: further functions ``(theta, x)`` -> scalar, as in ``rank_table``.
        num_simulations: number S of lanes.
        num_draws: number L of states besides the first.
        num_steps: transitions between two states.
        level: probability of a false alarm of the whole test.
        mode: "map", "vmap" or "auto", see ``run_many``.
        chunk: lanes at a time, see ``run_many``.
        path: folder for finished lanes, see ``run_many``.
        progress: a bar; None means on a terminal.

    Returns:
        The report. It passes only if the kernel moved every parameter in half of the lanes.

    Raises:
        TypeError: ``key`` is not a key, or a transition changes structure, shapes or dtypes of what it is given.
        ValueError: counts below 1, an unknown ``reverse``, a quantity that is not a scalar or two of one name, or a
            level not between 0 and 0.5.

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
    theta = jax.eval_shape(prior_sample, key)
    names, functions, uses_data = named_quantities(log_prior_fn, log_likelihood_fn, quantities, ())
    forward = as_partial(transition_fn)
    lane = _Lane(
        as_partial(prior_sample),
        as_partial(simulate),
        forward,
        forward if reverse == "same" else None if reverse is None else as_partial(reverse),  # type: ignore[arg-type]
        None if init_fn is None else as_partial(init_fn),
        None if position_fn is None else as_partial(position_fn),
        functions,
        num_draws,
        num_steps,
    )
    scalars = scalar_names(jax.tree.map(lambda leaf: np.empty((1, *leaf.shape)), theta))
    _check_lane(lane, key, scalars, names)
    keys = jax.random.split(key_lanes, num_simulations)
    values = run_many(lane, keys, None, mode=mode, chunk=chunk, path=path, progress=progress).draws
    uses = dict(zip((*scalars, *names), (*[False] * len(scalars), *uses_data), strict=True))
    chain = reverse is not None
    table = _ranked(key_ties, values, uses, chain)
    ranks = judge(table, level, partial(of_kernel, table.num_draws + 1, chain=chain))
    return JointReport(ranks, *_movement(values, scalars), num_draws * num_steps)


def _check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more, got {shortened(count)}")


def _check_lane(lane: _Lane, key: PRNGKey, scalars: list[str], names: tuple) -> None:
    """Refuse kernels that change the kind of their state, and quantities that are not scalars or share a name."""
    if twice := {name for name in names if [*scalars, *names].count(name) > 1}:
        raise ValueError(f"two test quantities are called {sorted(twice)}; pass quantities as a mapping")
    theta = jax.eval_shape(lane.prior_sample, key)
    x = jax.eval_shape(lane.simulate, key, theta)
    for name, function in zip(names, lane.functions, strict=True):
        shape: Any = jax.tree.map(jnp.shape, jax.eval_shape(function, theta, x))
        if shape != ():
            raise ValueError(f"the test quantity '{name}' must be a scalar, got shape {shape}")
    start = theta if lane.init_fn is None else jax.eval_shape(lane.init_fn, theta, x)
    for kernel in (lane.transition_fn, lane.reverse):
        if kernel is None:
            continue
        moved = jax.eval_shape(lambda *args, kernel=kernel: lane.step(kernel, *args), key, start, x)
        for before, after in ((start, moved), (theta, jax.eval_shape(lane.position, moved))):
            if _kinds(before) != _kinds(after):
                raise TypeError(
                    "a transition must return what it was given in structure, shapes and dtypes: expected "
                    f"{shortened(before)}, got {shortened(after)}; one with a state needs init_fn and position_fn"
                )


def _kinds(tree: ArrayTree) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _ranked(key: PRNGKey, values: dict[str, np.ndarray], uses: dict[str, bool], chain: bool) -> Any:
    """Ranks of the start along the chain, and of the end among fresh draws."""
    tests = {"end": ("end", "fresh")} | ({"chain": ("start", "chain")} if chain else {})
    both = {
        f"{test}.{name}": (values[one][:, 0, q], values[many][:, :, q])
        for test, (one, many) in tests.items()
        for q, name in enumerate(uses)
    }
    true, draws = ({name: pair[i] for name, pair in both.items()} for i in (0, 1))
    table = rank_table(key, draws, true, num_projections=0, whiten=None, thin=1)
    return table._replace(uses_data=tuple(uses[name.split(".", 1)[1]] for name in table.names))


def _movement(values: dict[str, np.ndarray], scalars: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Share of lanes in which each parameter changed, and its distance from start to end in prior sd."""
    num = len(scalars)
    start, end, chain = (values[name][..., :num] for name in ("start", "end", "chain"))
    moved = np.mean(np.any(chain != start, axis=1), axis=0)
    spread = np.std(start[:, 0], axis=0)
    distance = np.sqrt(np.mean((end - start)[:, 0] ** 2, axis=0)) / np.where(spread > 0, spread, 1)
    return dict(zip(scalars, moved.tolist(), strict=True)), dict(zip(scalars, distance.tolist(), strict=True))
