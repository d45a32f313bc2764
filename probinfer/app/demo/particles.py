"""The demo's particles without a learning rate: logistic regression on tumours, beside chains of NUTS."""

from __future__ import annotations

import time
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from probinfer import coin, data, mcmc, targets
from probinfer.app.pages.engines import gradients_spent
from probinfer.core.binding import LogDensity
from probinfer.core.types import Array, Float, PRNGKey, Scalar
from probinfer.data import Dataset
from probinfer.plots.style import Picture, draw
from probinfer.report.html import Gallery, Paragraph, Section
from probinfer.report.tables import TextTable, seconds
from probinfer.running.driver import run

__all__ = ["Carried", "carry", "coin_section", "coin_table"]

_HALF = 5.05
_SHOWN = 40  # particles whose paths are drawn


class Carried(NamedTuple):
    """What became of the particles, and what the chains say.

    Attributes:
        coin: the posterior of ``coin.SVGD``.
        nuts: that of ``mcmc.NUTS``, for comparison.
        seconds: wall times of both, compilation included.
        paths: ``(step, particle, 2)``, two coefficients on their way.
        pair: which two.
        remarks: what was warned of.
    """

    coin: Any
    nuts: Any
    seconds: tuple[float, float]
    paths: Float[np.ndarray, "step particle 2"]
    pair: tuple[int, int]
    remarks: tuple[str, ...]


def carry(
    key: PRNGKey, rows: int, *, draws: int, max_steps: int, progress: bool | None = None
) -> tuple[Dataset, Carried]:
    """Learn to tell benign from malignant tumours, by particles and by chains.

    Args:
        key: random key.
        rows: how many tumours.
        draws: of a chain of NUTS.
        max_steps: the most steps of the particles.
        progress: a bar; None means on a terminal.

    Returns:
        The data, and what was found.
    """
    table = data.breast_cancer().take(np.arange(rows))
    target = _target(table)
    keys = jax.random.split(key, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        found = coin.SVGD(max_steps=max_steps).sample(keys[0], target, progress=progress)
        middle = time.perf_counter()
        chains = mcmc.NUTS(num_draws=draws).sample(keys[1], target, progress=progress)
        spent = (middle - start, time.perf_counter() - middle)
    pair = _two_of(chains)
    remarks = tuple(
        dict.fromkeys(str(item.message) for item in caught if issubclass(item.category, UserWarning))
    )
    paths = _paths(keys[2], target, pair, int(found.info.num_particles), min(max_steps, 128))
    return table, Carried(found, chains, spent, paths, pair, remarks)


def _target(table: Dataset) -> targets.Target:
    """Standard normal coefficients of standardised measurements, and an intercept."""
    X = (table.X - table.X.mean(axis=0)) / table.X.std(axis=0)
    design = np.column_stack([np.ones(len(X)), X])
    dtype = jnp.result_type(float)
    like = LogDensity(_log_likelihood, jnp.asarray(design, dtype), jnp.asarray(2 * table.y - 1, dtype))
    prior = dist.Normal(jnp.zeros(design.shape[1], dtype), jnp.ones((), dtype)).to_event(1)
    return targets.from_prior(prior, like)


def _log_likelihood(design: Array, sides: Array, coefficients: Array) -> Scalar:
    return -jnp.sum(jnp.logaddexp(0, -sides * (design @ coefficients)))


def _two_of(chains: Any) -> tuple[int, int]:
    """The pair of coefficients with the strongest correlation: there a cloud must turn, not only shrink."""
    draws = np.asarray(chains.draws).reshape(-1, np.shape(chains.draws)[-1])
    correlation = np.abs(np.triu(np.corrcoef(draws.T), 1))
    first, second = np.unravel_index(np.argmax(correlation), correlation.shape)
    return int(first), int(second)


def _paths(
    key: PRNGKey, target: targets.Target, pair: tuple[int, int], num_particles: int, num_steps: int
) -> Float[np.ndarray, "step particle 2"]:
    """Two coefficients of some particles in the first steps of a run like that of the engine."""
    algorithm = coin.svgd(target.logdensity_fn)
    start = target.init(key, num_particles)
    collect = jax.tree_util.Partial(_two, jnp.asarray(pair))
    _, history = run(key, algorithm, algorithm.init(start), num_steps, collect=collect)
    path = np.concatenate([np.asarray(start)[None][..., list(pair)], np.asarray(history.records)])
    return path[:, :_SHOWN]


def _two(pair: Array, state: Any, info: Any) -> Array:
    del info
    return state.positions[:, pair]


def _moments(posterior: Any) -> tuple[np.ndarray, np.ndarray]:
    draws = np.asarray(posterior.draws, float)
    draws = draws.reshape(-1, draws.shape[-1])
    shares = np.exp(np.asarray(posterior.flat_log_weights(), float))  # a lost particle has weight zero
    mean = shares @ draws
    return mean, np.sqrt(shares @ (draws - mean) ** 2)


def _distance(found: Carried) -> tuple[float, float]:
    """Root mean square distance of the means in standard deviations, and mean ratio of standard deviations."""
    (mean, sd), (right, spread) = _moments(found.coin), _moments(found.nuts)
    return float(np.sqrt(np.mean(((mean - right) / spread) ** 2))), float(np.mean(sd / spread))


def coin_table(found: Carried) -> TextTable:
    """One row for the particles, one for the chains."""
    error, ratio = _distance(found)
    info = found.coin.info
    virial = float(np.mean([np.mean(leaf) for leaf in jax.tree.leaves(info.virial)]))
    rows = (
        (
            "coin SVGD",
            str(int(info.num_particles)),
            str(gradients_spent(info)),
            f"{virial:.3f}",
            f"{error:.3f}",
            f"{ratio:.3f}",
            seconds(found.seconds[0]),
        ),
        (
            "NUTS (reference)",
            str(int(np.prod(np.shape(found.nuts.draws)[:2]))),
            str(gradients_spent(found.nuts.info)),
            "-",
            "-",
            "-",
            seconds(found.seconds[1]),
        ),
    )
    columns = (
        "engine",
        "draws",
        "gradients",
        "virial (-1 is right)",
        "distance of means, sd",
        "sd over NUTS's",
        "time",
    )
    return TextTable("Breast cancer: particles without a learning rate", columns, rows)


def coin_section(table: Dataset, found: Carried, scores: TextTable) -> Section:
    """The story, the finding, the table and the pictures."""
    num_dims = np.shape(found.coin.draws)[-1]
    story = (
        f"{table.description} A logistic regression with {num_dims} coefficients on {len(table.y)} of them. Particles "
        "drawn from the prior are carried to the posterior: gradients pull, the other particles push. How far to go "
        "is a bet in units of the cloud, so there is no learning rate to choose; the run ends by itself. Whether the "
        "cloud is too narrow, the usual failure of such methods, is judged without any exact answer by the virial, "
        "the mean of position times gradient, which is -1 for every density. Chains of NUTS stand beside it."
    )
    remarks = [Paragraph(remark, "remark") for remark in found.remarks]
    return Section(
        "Breast cancer: particles without a learning rate",
        (
            Paragraph(story),
            Paragraph(finding(found), "finding"),
            scores._replace(title=""),
            *remarks,
            Gallery((_travel(found), _curves(found), _spreads(found))),
        ),
    )


def finding(found: Carried) -> str:
    """What the comparison says, in a sentence."""
    error, ratio = _distance(found)
    ours, theirs = (gradients_spent(one.info) for one in (found.coin, found.nuts))
    spent = f"{ours / theirs:.2g} times" if ours and theirs else "an unknown share of"
    return (
        f"The means of the particles lie {error:.2f} standard deviations from NUTS's (root mean square over the "
        f"coefficients), their standard deviations are {ratio:.2f} of NUTS's, with {spent} the gradients."
    )


def _travel(found: Carried) -> Picture:
    first, second = found.pair

    def fn(axes, theme):
        draws = np.asarray(found.nuts.draws).reshape(-1, np.shape(found.nuts.draws)[-1])
        axes.plot(draws[::4, first], draws[::4, second], ".", color=theme.series[0], alpha=0.25, markersize=3)
        for particle in range(found.paths.shape[1]):
            axes.plot(*found.paths[:, particle].T, color=theme.series[1], alpha=0.35, linewidth=0.7)
        axes.plot(*found.paths[-1].T, "o", color=theme.series[1], markersize=3.5)
        axes.set(xlabel=f"coefficient {first}", ylabel=f"coefficient {second}")

    caption = (
        f"Lines: {found.paths.shape[1]} particles in their first {len(found.paths) - 1} steps, from the prior to the "
        "dots. Cloud: draws of NUTS."
    )
    return draw("On their way", caption, fn, width=_HALF, height=3.2)


def _curves(found: Carried) -> Picture:
    info = found.coin.info

    def fn(axes, theme):
        steps = np.arange(1, len(np.asarray(info.virials)) + 1)
        axes.plot(steps, np.abs(np.asarray(info.virials)), color=theme.series[0], label="minus the virial")
        axes.plot(
            steps, np.asarray(info.direction_norms), color=theme.series[1], label="length of the direction"
        )
        axes.axhline(1, color=theme.series[0], linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="step")
        axes.legend(frameon=False)

    caption = (
        "Both curves should be level where the run stopped itself, and the virial near its dashed line. Spikes are "
        "restarts of the bet."
    )
    return draw("Has it settled?", caption, fn, width=_HALF, height=3.2)


def _spreads(found: Carried) -> Picture:
    (mean, sd), (right, spread) = _moments(found.coin), _moments(found.nuts)

    def fn(axes, theme):
        axes.axhline(1, color=theme.series[0], linewidth=0.8, linestyle="--")
        axes.axvline(0, color=theme.series[0], linewidth=0.8, linestyle="--")
        axes.plot((mean - right) / spread, sd / spread, "o", color=theme.series[1], markersize=4)
        axes.set(xlabel="error of the mean, in sd", ylabel="sd over NUTS's")

    caption = "One dot a coefficient; the dashed lines cross where particles and chains agree."
    return draw("Do they agree?", caption, fn, width=_HALF, height=3.2)
