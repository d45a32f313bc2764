"""The demo's section on coin SVGD, which needs no learning rate: logistic regression, compared with NUTS."""

from __future__ import annotations

import time
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from probinfer import coin, data, mcmc, targets
from probinfer.app.pages.engines import count_gradients
from probinfer.app.pages.run_facts import user_warnings
from probinfer.core.binding import LogDensity
from probinfer.core.types import Array, Float, PRNGKey, Scalar
from probinfer.data import Dataset
from probinfer.plots.style import Picture, draw
from probinfer.report.html import Gallery, Paragraph, Section
from probinfer.report.tables import TextTable, seconds
from probinfer.running.driver import run

__all__ = ["ParticleComparison", "coin_section", "coin_table", "compare_particles"]

_HALF = 5.05
_NUM_PATHS = 40  # particles whose paths are drawn


class ParticleComparison(NamedTuple):
    """The posteriors by particles and by chains.

    Attributes:
        coin: the posterior of ``coin.SVGD``.
        nuts: the posterior of ``mcmc.NUTS``, for comparison.
        seconds: wall times of both, including compilation.
        paths: ``(step, particle, 2)``, two coefficients of some particles during the run.
        pair: indices of these coefficients.
        remarks: warnings of both engines.
    """

    coin: Any
    nuts: Any
    seconds: tuple[float, float]
    paths: Float[np.ndarray, "step particle 2"]
    pair: tuple[int, int]
    remarks: tuple[str, ...]


def compare_particles(
    key: PRNGKey, rows: int, *, draws: int, max_steps: int, progress: bool | None = None
) -> tuple[Dataset, ParticleComparison]:
    """Classify tumors as benign or malignant, by particles and by chains.

    Args:
        key: random key.
        rows: number of tumors.
        draws: number of draws per chain of NUTS.
        max_steps: maximum number of steps of the particles.
        progress: whether to show progress; None shows it on a terminal.

    Returns:
        The data, and the comparison of both posteriors.
    """
    table = data.breast_cancer().take(np.arange(rows))
    target = _target(table)
    keys = jax.random.split(key, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        particles = coin.SVGD(max_steps=max_steps).sample(keys[0], target, progress=progress)
        coin_end = time.perf_counter()
        chains = mcmc.NUTS(num_draws=draws).sample(keys[1], target, progress=progress)
        wall_times = (coin_end - start, time.perf_counter() - coin_end)
    pair = _most_correlated(chains)
    remarks = tuple(user_warnings(caught))
    paths = _paths(keys[2], target, pair, int(particles.info.num_particles), min(max_steps, 128))
    comparison = ParticleComparison(
        coin=particles, nuts=chains, seconds=wall_times, paths=paths, pair=pair, remarks=remarks
    )
    return table, comparison


def _target(table: Dataset) -> targets.Target:
    """Return a logistic regression on standardized measurements and an intercept, with a standard normal prior."""
    X = (table.X - table.X.mean(axis=0)) / table.X.std(axis=0)
    design = np.column_stack([np.ones(len(X)), X])
    dtype = jnp.result_type(float)
    log_likelihood = LogDensity(
        _log_likelihood, jnp.asarray(design, dtype), jnp.asarray(2 * table.y - 1, dtype)
    )
    prior = dist.Normal(jnp.zeros(design.shape[1], dtype), jnp.ones((), dtype)).to_event(1)
    return targets.from_prior(prior, log_likelihood)


def _log_likelihood(design: Array, signs: Array, coefficients: Array) -> Scalar:
    return -jnp.sum(jnp.logaddexp(0, -signs * (design @ coefficients)))


def _most_correlated(chains: Any) -> tuple[int, int]:
    """Return the pair of coefficients with the strongest correlation, the hardest for the particles."""
    draws = np.asarray(chains.draws).reshape(-1, np.shape(chains.draws)[-1])
    correlation = np.abs(np.triu(np.corrcoef(draws.T), 1))
    first, second = np.unravel_index(np.argmax(correlation), correlation.shape)
    return int(first), int(second)


def _paths(
    key: PRNGKey, target: targets.Target, pair: tuple[int, int], num_particles: int, num_steps: int
) -> Float[np.ndarray, "step particle 2"]:
    """Return two coefficients of some particles in the first steps of a run with the settings of the engine."""
    algorithm = coin.svgd(target.logdensity_fn)
    initial = target.init(key, num_particles)
    collect = jax.tree_util.Partial(_positions_of, jnp.asarray(pair))
    _, history = run(key, algorithm, algorithm.init(initial), num_steps, collect=collect)
    paths = np.concatenate([np.asarray(initial)[None][..., list(pair)], np.asarray(history.records)])
    return paths[:, :_NUM_PATHS]


def _positions_of(pair: Array, state: Any, info: Any) -> Array:
    del info
    return state.positions[:, pair]


def _moments(posterior: Any) -> tuple[np.ndarray, np.ndarray]:
    draws = np.asarray(posterior.draws, float)
    draws = draws.reshape(-1, draws.shape[-1])
    weights = np.exp(
        np.asarray(posterior.flat_log_weights(), float)
    )  # a particle that diverged has weight zero
    mean = weights @ draws
    return mean, np.sqrt(weights @ (draws - mean) ** 2)


def _distance(comparison: ParticleComparison) -> tuple[float, float]:
    """Return the RMS distance of the means in standard deviations, and the mean ratio of standard deviations."""
    (mean, coin_sd), (nuts_mean, nuts_sd) = _moments(comparison.coin), _moments(comparison.nuts)
    return float(np.sqrt(np.mean(((mean - nuts_mean) / nuts_sd) ** 2))), float(np.mean(coin_sd / nuts_sd))


def coin_table(comparison: ParticleComparison) -> TextTable:
    """Return one row for the particles and one for the chains."""
    error, ratio = _distance(comparison)
    info = comparison.coin.info
    virial = float(np.mean([np.mean(leaf) for leaf in jax.tree.leaves(info.virial)]))
    rows = (
        (
            "coin SVGD",
            str(int(info.num_particles)),
            str(count_gradients(info)),
            f"{virial:.3f}",
            f"{error:.3f}",
            f"{ratio:.3f}",
            seconds(comparison.seconds[0]),
        ),
        (
            "NUTS (reference)",
            str(int(np.prod(np.shape(comparison.nuts.draws)[:2]))),
            str(count_gradients(comparison.nuts.info)),
            "-",
            "-",
            "-",
            seconds(comparison.seconds[1]),
        ),
    )
    columns = (
        "engine",
        "draws",
        "gradients",
        "virial (exact: -1)",
        "error of the means, sd",
        "sd / sd of NUTS",
        "time",
    )
    return TextTable("Breast cancer: particles without a learning rate", columns, rows)


def coin_section(table: Dataset, comparison: ParticleComparison, scores: TextTable) -> Section:
    """Return the section: introduction, conclusion, table and plots."""
    num_dims = np.shape(comparison.coin.draws)[-1]
    introduction = (
        f"{table.description} A logistic regression with {num_dims} coefficients is fitted to {len(table.y)} of them. "
        "Particles drawn from the prior are transported to the posterior: gradients attract them, the other particles "
        "repel them. The step sizes come from coin betting, in units of the spread of the particles, so that there is "
        "no learning rate to choose; the run stops by itself. The usual failure of such methods is that the particles "
        "are too concentrated. The virial, the mean of position times gradient, detects it without an exact answer: it "
        "is -1 for every density. NUTS is the reference."
    )
    remarks = [Paragraph(remark, "remark") for remark in comparison.remarks]
    return Section(
        "Breast cancer: particles without a learning rate",
        (
            Paragraph(introduction),
            Paragraph(conclusion(comparison), "finding"),
            scores._replace(title=""),
            *remarks,
            Gallery(
                (_paths_picture(comparison), _convergence_picture(comparison), _agreement_picture(comparison))
            ),
        ),
    )


def conclusion(comparison: ParticleComparison) -> str:
    """Return the conclusion from the comparison, in one sentence."""
    error, ratio = _distance(comparison)
    num_coin, num_nuts = (count_gradients(posterior.info) for posterior in (comparison.coin, comparison.nuts))
    cost = (
        f"{num_coin / num_nuts:.2g} times the gradients"
        if num_coin and num_nuts
        else "an unknown number of gradients"
    )
    return (
        f"The means of the particles differ from those of NUTS by {error:.2f} standard deviations (root mean square "
        f"over the coefficients), and their standard deviations are {ratio:.2f} times those of NUTS, with {cost}."
    )


def _paths_picture(comparison: ParticleComparison) -> Picture:
    first, second = comparison.pair

    def fn(axes, theme):
        draws = np.asarray(comparison.nuts.draws).reshape(-1, np.shape(comparison.nuts.draws)[-1])
        axes.plot(draws[::4, first], draws[::4, second], ".", color=theme.series[0], alpha=0.25, markersize=3)
        for particle in range(comparison.paths.shape[1]):
            axes.plot(*comparison.paths[:, particle].T, color=theme.series[1], alpha=0.35, linewidth=0.7)
        axes.plot(*comparison.paths[-1].T, "o", color=theme.series[1], markersize=3.5)
        axes.set(xlabel=f"coefficient {first}", ylabel=f"coefficient {second}")

    caption = (
        f"Lines: paths of {comparison.paths.shape[1]} particles in the first {len(comparison.paths) - 1} steps, which "
        "end at the large dots. Small dots: draws of NUTS."
    )
    return draw("Paths of the particles", caption, fn, width=_HALF, height=3.2)


def _convergence_picture(comparison: ParticleComparison) -> Picture:
    info = comparison.coin.info

    def fn(axes, theme):
        steps = np.arange(1, len(np.asarray(info.virials)) + 1)
        axes.plot(steps, np.abs(np.asarray(info.virials)), color=theme.series[0], label="minus the virial")
        axes.plot(
            steps, np.asarray(info.direction_norms), color=theme.series[1], label="norm of the direction"
        )
        axes.axhline(1, color=theme.series[0], linewidth=0.8, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="step")
        axes.legend(frameon=False)

    caption = (
        "Both curves should be flat at the end of the run, and the virial close to the dashed line. Spikes are "
        "restarts of the betting."
    )
    return draw("Convergence", caption, fn, width=_HALF, height=3.2)


def _agreement_picture(comparison: ParticleComparison) -> Picture:
    (mean, coin_sd), (nuts_mean, nuts_sd) = _moments(comparison.coin), _moments(comparison.nuts)

    def fn(axes, theme):
        axes.axhline(1, color=theme.series[0], linewidth=0.8, linestyle="--")
        axes.axvline(0, color=theme.series[0], linewidth=0.8, linestyle="--")
        axes.plot((mean - nuts_mean) / nuts_sd, coin_sd / nuts_sd, "o", color=theme.series[1], markersize=4)
        axes.set(xlabel="error of the mean, in sd", ylabel="sd / sd of NUTS")

    caption = "One dot per coefficient; at the intersection of the dashed lines, particles and chains agree."
    return draw("Agreement of particles and chains", caption, fn, width=_HALF, height=3.2)
