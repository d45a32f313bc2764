"""How many effective hyperparameter draws does NUTS give for a second of CPU, ours and NumPyro's?

Question: the smallest bulk (and tail) effective sample size over the ten hyperparameters, per process-CPU second, of
the hyperparameter posterior of an exact Gaussian process, ours beside NumPyro's NUTS on the same model by hand.

Protocol: concrete (a seeded subsample of n = 500, 8 columns, standardized), squared exponential with one lengthscale a
column, Gaussian noise, the priors of ``gp.default_prior``, float64, one thread. Ours: ``gp.fit(...,
learn=mcmc.NUTS(num_draws=...))`` with its own warm-up. NumPyro: the model as a user writes it, ``MultivariateNormal``
with ``covariance_matrix``, squared distances by one matrix product (2.6 times faster to differentiate than
broadcasting an (n, n, d) array, which ``--broadcast`` takes), ``chain_method="sequential"``, with its default diagonal
mass matrix and with ``dense_mass=True``. Both start where they choose to. Same number of chains and draws. The log
densities of the two are compared at random positions first: they differ by a constant. ESS and R-hat of both are
computed by the same code (``probinfer.inference.diagnostics``, tested against ArviZ).

A run is timed whole (process CPU). The first seed compiles, the others do not; compile time is what the first takes
beyond its gradients at the pace of the others. The table gives ESS per second without compilation, with warm-up and for
the draws alone, and splits the ratio into its two factors: CPU time of a gradient, and gradients for an effective draw.
Intervals are over seeds (Student's t on the log scale).

Criterion: the ratio of ours to the better NumPyro configuration, warm-up included, is at least 3.
"""

from __future__ import annotations

import math
import time
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from measurements import measurement
from numpyro.infer import MCMC
from numpyro.infer import NUTS as NumPyroNUTS
from numpyro.infer.util import initialize_model

from probinfer import gp, mcmc
from probinfer.inference import diagnostics

OURS, DIAGONAL, DENSE = "probinfer NUTS", "NumPyro NUTS, diagonal", "NumPyro NUTS, dense"
NAMES = ("variance", "lengthscale", "noise")


def load(num: int, seed: int = 0):
    """Return a subsample of the concrete data, standardized."""
    data = measurement("concrete")
    rows = np.random.default_rng(seed).permutation(len(data.y))[:num]
    X, y = data.X[rows], data.y[rows]
    return (X - X.mean(0)) / X.std(0), (y - y.mean()) / y.std()


def by_hand(X, y, broadcast=False):
    """The model in NumPyro, with the priors of ``gp.default_prior`` on standardized inputs."""
    dims = X.shape[1]
    variance = numpyro.sample("variance", dist.LogNormal(0.0, 2.0))
    prior = dist.LogNormal(jnp.full(dims, math.sqrt(2) + 0.5 * math.log(dims)), math.sqrt(3))
    lengthscale = numpyro.sample("lengthscale", prior.to_event(1))
    noise = numpyro.sample("noise", dist.LogNormal(-3.0, 2.5))
    if broadcast:
        squared = jnp.sum(((X[:, None, :] - X[None, :, :]) / lengthscale) ** 2, -1)
    else:
        Z = X / lengthscale
        norms = jnp.sum(Z**2, -1)
        squared = jnp.maximum(norms[:, None] + norms[None, :] - 2 * Z @ Z.T, 0.0)
    covariance = variance * jnp.exp(-0.5 * squared) + noise * jnp.eye(len(y))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(y)), covariance_matrix=covariance), obs=y)


def our_model(X):
    return gp.Model(gp.kernels.RBF(1.0, jnp.ones(X.shape[1])), gp.likelihoods.Gaussian(0.1))


def our_target(X, y):
    model = our_model(X)
    data = jnp.asarray(X), jnp.asarray(y)
    return gp.hyper_posterior(model, gp.default_prior(model, X), *data, gp.Exact())[1]


def log_draws(variance, lengthscale, noise) -> np.ndarray:
    """Logarithms of the ten hyperparameters, (chain, draw, 10)."""
    return np.log(
        np.concatenate([np.asarray(a).reshape(*a.shape[:2], -1) for a in (variance, lengthscale, noise)], -1)
    )


def run_ours(seed, X, y, settings):
    """Run ``gp.fit`` once; return its costs and the draws."""
    engine = mcmc.NUTS(num_chains=settings["chains"], num_draws=settings["draws"])
    start = time.process_time()
    fit = gp.fit(jax.random.key(seed), our_model(X), X, y, learn=engine, progress=False)
    jax.block_until_ready(fit.models)
    seconds = time.process_time() - start
    info, draws = fit.info, fit.posterior.draws
    return {
        "seconds": seconds,
        "gradients": (int(info.num_warmup_gradients), int(np.sum(info.num_leapfrogs))),
        "warm-up steps": int(info.num_warmup),
        "divergences": int(np.sum(info.diverging)),
        "note": info.metric_name,
    }, log_draws(draws["kernel.variance"], draws["kernel.lengthscale"], draws["likelihood.variance"])


def numpyro_sampler(dense, model, settings) -> MCMC:
    """NumPyro's sampler; one object serves all seeds, so that only the first compiles."""
    return MCMC(
        NumPyroNUTS(model, dense_mass=dense),
        num_warmup=settings["warm-up of NumPyro"],
        num_samples=settings["draws"],
        num_chains=settings["chains"],
        chain_method="sequential",
        progress_bar=False,
    )


def run_numpyro(sampler, seed, X, y, settings):
    """One run of NumPyro's NUTS as ``run_ours``."""
    start = time.process_time()
    sampler.warmup(jax.random.PRNGKey(seed), X, y, extra_fields=("num_steps",), collect_warmup=True)
    warmup_steps = int(np.sum(sampler.get_extra_fields()["num_steps"]))
    sampler.run(sampler.post_warmup_state.rng_key, X, y, extra_fields=("num_steps", "diverging"))
    draws = jax.block_until_ready(sampler.get_samples(group_by_chain=True))
    seconds = time.process_time() - start
    fields = sampler.get_extra_fields()
    return {
        "seconds": seconds,
        "gradients": (warmup_steps, int(np.sum(fields["num_steps"]))),
        "warm-up steps": settings["warm-up of NumPyro"],
        "divergences": int(np.sum(fields["diverging"])),
        "note": "as asked",
    }, log_draws(*(draws[name] for name in NAMES))


def gradient_milliseconds(fn, position, repeats=20) -> float:
    """Median process-CPU time of a compiled value and gradient."""
    compiled = jax.jit(jax.value_and_grad(fn))
    jax.block_until_ready(compiled(position))
    times = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(compiled(position))
        times.append(time.process_time() - start)
    return 1e3 * float(np.median(times))


def gradients_alone(X, y) -> dict:
    """Check that both sides sample the same density, and time one gradient of each."""
    ours, Xj, yj = our_target(X, y), jnp.asarray(X), jnp.asarray(y)
    theirs = {
        name: initialize_model(
            jax.random.PRNGKey(0), partial(by_hand, broadcast=broadcast), model_args=(Xj, yj)
        )
        for name, broadcast in (("matrix product", False), ("broadcast", True))
    }
    gaps = []
    for seed in range(4):
        normal = np.random.default_rng(seed).normal
        z = {"variance": normal(), "noise": normal(-2), "lengthscale": normal(1, 0.5, X.shape[1])}
        z = jax.tree.map(jnp.asarray, z)
        named = {
            "kernel.variance": z["variance"],
            "kernel.lengthscale": z["lengthscale"],
            "likelihood.variance": z["noise"],
        }
        gaps.append(float(ours.logdensity_fn(named)) + float(theirs["matrix product"].potential_fn(z)))
    gap_range = max(gaps) - min(gaps)
    if gap_range > 1e-6:
        raise RuntimeError(f"the two log densities differ by more than a constant: {gaps}")
    times = {"probinfer": gradient_milliseconds(ours.logdensity_fn, named)}
    for name, info in theirs.items():
        times[f"NumPyro, {name}"] = gradient_milliseconds(info.potential_fn, z)
    return {"milliseconds a gradient": times, "log density differs by a constant to": gap_range}


def judge(record: dict, draws: np.ndarray) -> dict:
    """Add the diagnostics of a run to its record."""
    draws = jnp.asarray(draws)
    return record | {
        "ess": float(jnp.min(diagnostics.ess(draws))),
        "ess tail": float(jnp.min(diagnostics.ess_tail(draws))),
        "rhat": float(jnp.max(diagnostics.rhat(draws))),
        "means": np.asarray(draws.mean((0, 1))).tolist(),
        "sds": np.asarray(draws.std((0, 1))).tolist(),
    }


def rates(runs: list[dict]) -> dict:
    """ESS per second of each seed but the first (which compiles), and what compilation takes."""
    warm = runs[1:]
    pace = float(np.median([run["seconds"] / sum(run["gradients"]) for run in warm]))
    compile_seconds = runs[0]["seconds"] - pace * sum(runs[0]["gradients"])
    seconds = [runs[0]["seconds"] - compile_seconds] + [run["seconds"] for run in warm]
    share = [run["gradients"][1] / sum(run["gradients"]) for run in runs]
    pairs = list(zip(runs, seconds, share, strict=True))
    return {
        "ess per second": [run["ess"] / s for run, s, _ in pairs],
        "tail ess per second": [run["ess tail"] / s for run, s, _ in pairs],
        "ess per second, draws alone": [run["ess"] / (s * f) for run, s, f in pairs],
        "ess per second, with compilation": [run["ess"] / (s + compile_seconds) for run, s, _ in pairs],
        "milliseconds a gradient": [1e3 * s / sum(run["gradients"]) for run, s, _ in pairs],
        "gradients an effective draw": [sum(run["gradients"]) / run["ess"] for run, _, _ in pairs],
        "compile seconds": compile_seconds,
        "seconds": seconds,
    }


def ratio(numerator: list[float], denominator: list[float]) -> tuple[float, float, float]:
    """Ratio of geometric means with a 95 % interval over seeds (Student's t, log scale)."""
    from scipy.stats import t

    a, b = np.log(numerator), np.log(denominator)
    middle = a.mean() - b.mean()
    error = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    half = float(t.ppf(0.975, len(a) + len(b) - 2)) * error
    return tuple(float(np.exp(middle + s * half)) for s in (0, -1, 1))


_RATE = "ess per second"
RATES = (_RATE, f"tail {_RATE}", f"{_RATE}, draws alone", f"{_RATE}, with compilation")
COSTS = ("milliseconds a gradient", "gradients an effective draw")


def report(records: dict, gradients: dict, settings: dict) -> None:
    """Print the table and the ratios; write the results and the plot."""
    summary = {name: rates(runs) for name, runs in records.items()}
    header = [
        "",
        "min ESS / s (seeds)",
        "tail",
        "draws alone",
        "with compile",
        "ms / gradient",
        "gradients / ESS",
    ]
    header += ["gradients: warm-up + draws", "least ESS", "worst R-hat", "CPU s (+ compile)"]
    title = f"concrete, n = {settings['n']}, {settings['chains']} x {settings['draws']} draws"
    common.print_table(title, header, [row(name, summary[name], records[name]) for name in records])
    ours = summary[OURS]
    ratios = {
        other: {key: ratio(ours[key], summary[other][key]) for key in RATES}
        | {key: ratio(summary[other][key], ours[key]) for key in COSTS}
        for other in (DIAGONAL, DENSE)
    }
    for other, found in ratios.items():
        for key, (middle, low, high) in found.items():
            print(f"advantage over {other}: {key}: {middle:.2f} ({low:.2f} to {high:.2f})")
    gaps = posterior_gaps(records)
    print("largest difference of posterior means, in posterior sd:", gaps)
    if not settings["small"]:
        body = {"settings": settings, "ratios": ratios, "gradients alone": gradients, "mean gaps": gaps}
        common.write_results("gp_nuts_ess", body | {"summary": summary, "runs": records})
        plot(summary, ratios)


def row(name: str, rate: dict, runs: list[dict]) -> list[str]:
    """Return one row of the table."""
    mean = {key: float(np.mean(value)) for key, value in rate.items()}
    first, *others = RATES
    warmup, draws = np.mean([run["gradients"] for run in runs], axis=0)
    return [
        name,
        f"{mean[first]:.2f} ({min(rate[first]):.2f} - {max(rate[first]):.2f})",
        *(f"{mean[key]:.2f}" for key in others),
        *(f"{mean[key]:.1f}" for key in COSTS),
        f"{warmup:.0f} + {draws:.0f}",
        f"{min(run['ess'] for run in runs):.0f}",
        f"{max(run['rhat'] for run in runs):.3f}",
        f"{mean['seconds']:.0f} + {mean['compile seconds']:.1f}",
    ]


def posterior_gaps(records: dict) -> dict:
    mean = {name: np.mean([run["means"] for run in runs], 0) for name, runs in records.items()}
    sd = np.mean([run["sds"] for run in records[OURS]], 0)
    return {name: float(np.max(np.abs(mean[name] - mean[OURS]) / sd)) for name in (DIAGONAL, DENSE)}


def plot(summary: dict, ratios: dict) -> None:
    """Plot the ESS per second of each seed, and the factors of the ratio."""
    figure, (left, right) = common.figure(width=9.0, height=3.2, columns=2)
    names = list(summary)
    for row, name in enumerate(names):
        values = summary[name]["ess per second"]
        left.barh(row, np.mean(values), 0.6, color=f"C{row}", alpha=0.6)
        left.plot(values, [row] * len(values), "k.", markersize=5)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("smallest bulk ESS per CPU second (points: seeds)")
    keys = ("ess per second", "milliseconds a gradient", "gradients an effective draw")
    labels = ("ESS per second", "time of a gradient", "gradients per ESS")
    for shift, (other, ratio) in enumerate(ratios.items()):
        for row, key in enumerate(keys):
            middle, low, high = ratio[key]
            error = [[middle - low], [high - middle]]
            label = f"over {other.split(', ')[1]}" if row == 0 else None
            right.errorbar(
                middle, row + 0.2 * shift - 0.1, xerr=error, fmt="o", color=f"C{shift + 1}", label=label
            )
    right.axvline(1, color="0.6", linewidth=1)
    right.axvline(3, color="0.6", linewidth=1, linestyle="--")
    right.set_yticks(range(len(keys)), labels)
    right.set_ylim(len(keys) - 0.5, -0.5)
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    right.set_xlabel("advantage of probinfer (dashed: aim)")
    right.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    common.save_figure(figure, "gp_nuts_ess")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=4, help="runs of each sampler")
    parser.add_argument("--draws", type=int, default=300, help="draws of a chain")
    parser.add_argument("--warmup", type=int, default=300, help="warm-up of NumPyro; ours decides itself")
    parser.add_argument(
        "--broadcast", action="store_true", help="the slower form of the distances in NumPyro"
    )
    arguments = parser.parse_args()
    small = arguments.small
    settings = {
        "n": 100 if small else 500,
        "chains": 4,
        "draws": 100 if small else arguments.draws,
        "warm-up of NumPyro": 100 if small else arguments.warmup,
        "seeds": 2 if small else arguments.seeds,
        "broadcast": arguments.broadcast,
        "small": small,
    }
    X, y = load(settings["n"])
    gradients = gradients_alone(X, y)
    print(gradients, flush=True)
    model = partial(by_hand, broadcast=arguments.broadcast)
    runners = {
        OURS: run_ours,
        DIAGONAL: partial(run_numpyro, numpyro_sampler(False, model, settings)),
        DENSE: partial(run_numpyro, numpyro_sampler(True, model, settings)),
    }
    records: dict = {name: [] for name in runners}
    for seed in range(settings["seeds"]):
        for name, runner in runners.items():
            data = (X, y) if name == OURS else (jnp.asarray(X), jnp.asarray(y))
            records[name].append(judge(*runner(seed, *data, settings)))
            shown = {key: value for key, value in records[name][-1].items() if key not in ("means", "sds")}
            print(f"seed {seed}: {name}: {shown}", flush=True)
    report(records, gradients, settings)


if __name__ == "__main__":
    main()
