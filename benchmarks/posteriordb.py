"""How close is each engine to the reference draws of eleven posteriors of posteriordb?

Question: errors of posterior means and second moments of every quantity, in standard deviations, against reference
draws that another program (Stan, long runs, checked) made.

Protocol: the eleven posteriors of ``posteriordb_models.py``, float64. Each port is verified first, on every run: by the
Stein identities E[grad log p] = 0 and E[(u - mean) grad log p] = -1 on its 10 000 reference draws, unconstrained; the
largest of the 2 d z-scores is shown. A wrong density gives tens; a weak prior forgotten would not be seen. Then every
engine of ``probinfer/report/engines.py`` that takes any target runs with its defaults: Markov chains with 4 chains of
2500 draws, the others with 10 000 draws, a mode search with its one. No engine is told anything about a model. Tempered
SMC draws 8 islands of 1256 particles; it starts from the prior, and where that is improper (five posteriors) from a
Student-t fitted to a short run of NUTS, whose gradients are counted; the row says which.

Error: |E_engine f - E_reference f| / sd_reference f for f = theta and theta^2 of every stored quantity; the table shows
the largest over quantities. Beside it the Monte Carlo standard error of the reference itself, in the same unit, and the
largest error in units of both Monte Carlo errors together (z; of weighted draws from the spread of four or more chains
or islands). MMD^2: all coordinates at once, unconstrained, 2500
evenly chosen draws of either side, with a permutation p-value; draws that are too few or too autocorrelated for a test
are refused by the check. Gradients: of all chains, warm-up and the search for
starting points included. Seconds: CPU time of the engine, compilation included.

Criterion: every error of NUTS is below 0.1. The other engines are reported as they are; an engine that fails is a row.
"""

from __future__ import annotations

import time
import warnings
import zlib
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from posteriordb_data import read_data, read_draws
from posteriordb_models import PORTS, Port, find_port
from posteriordb_plot import FAR, plot

from probinfer import checks
from probinfer.app.pages.engines import EngineEntry, count_gradients, find_engine, target_engines
from probinfer.app.suite.trials import equally_weighted
from probinfer.core.status import Status
from probinfer.inference import diagnostics
from probinfer.inference.posterior import Posterior

NAME = "posteriordb"
DRAWS = 2500  # of a chain
COMPARED = 2500  # draws of either side in the MMD
ASKED = 0.1


def columns(draws: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    """Return the names of the scalars and their values (chain, draw, scalar)."""
    names, values = [], []
    for key in sorted(draws):
        value = np.asarray(draws[key], float)
        shape = value.shape[2:]
        names += [key + "".join(f"[{i + 1}]" for i in index) for index in np.ndindex(*shape)]
        values.append(value.reshape(*value.shape[:2], -1))
    return names, np.concatenate(values, axis=2)


def functions(values: np.ndarray) -> np.ndarray:
    """The two functions f of every scalar: (2, chain, draw, scalar)."""
    return np.stack([values, values**2])


def monte_carlo_error(values: np.ndarray) -> np.ndarray:
    """Standard errors of the means of (2, chain, draw, scalar), (2, scalar)."""
    return np.stack([np.asarray(diagnostics.mcse_mean(jnp.asarray(draws))) for draws in values])


def reference_of(port: Port) -> dict[str, Any]:
    """Return the target, its reference draws, their moments, and the verification of the port."""
    target, stored = port.target(read_data(port.data)), read_draws(port.name)
    positions = port.positions(target, stored)
    stein = checks.stein_identity(positions, target.logdensity_fn)
    names, values = columns(stored)
    both = functions(values)
    sd = both.std(axis=(1, 2))
    return {
        "target": target,
        "positions": positions,
        "names": names,
        "mean": both.mean(axis=(1, 2)),
        "sd": sd,
        "mcse": monte_carlo_error(both) / sd,
        "facts": {
            "posterior": port.name,
            "dimension": len(stein.location),
            "Stein max|z|": float(np.max(np.abs([stein.location_z, stein.spread_z]))),
            "Stein p": stein.pvalue,
            "environment": {key: common.environment()[key] for key in ("date", "commit", "device", "x64")},
        },
    }


def accuracy(posterior: Posterior, reference: dict[str, Any]) -> dict[str, Any]:
    """Standardized errors of means and second moments: the largest, where, and in Monte Carlo errors.

    Args:
        posterior: of the engine; its draws have every quantity of the reference, and may have more.
        reference: with ``names`` and the arrays (2, scalar) ``mean``, ``sd``, and ``mcse`` in units of ``sd``.
    """
    names, values = columns(posterior.draws)
    kept = [names.index(name) for name in reference["names"]]
    both = functions(values[..., kept])
    weights = np.exp(np.asarray(posterior.flat_log_weights(), float))
    means = np.einsum("n,fnq->fq", weights, both.reshape(2, len(weights), -1))
    errors = np.abs(means - reference["mean"]) / reference["sd"]
    record: dict[str, Any] = {}
    for label, error, mcse in zip(("mean", "second moment"), errors, reference["mcse"], strict=True):
        index = int(np.argmax(np.where(np.isfinite(error), error, np.inf)))
        record[label] = float(error[index])
        record[f"{label} of"] = reference["names"][index]
        record[f"{label}, median"] = float(np.median(error))
        record[f"{label}, reference MCSE"] = float(np.max(mcse))
    sampling_error = own_error(both, weights, posterior.log_weights is not None)
    if sampling_error is not None:
        sampling_error = sampling_error / reference["sd"]
        record["own MCSE"] = float(np.max(sampling_error))
        record["z"] = float(np.max(errors / np.hypot(sampling_error, reference["mcse"])))
    return record


def own_error(values: np.ndarray, weights: np.ndarray, weighted: bool) -> np.ndarray | None:
    """Standard errors of the (weighted) means of (2, chain, draw, scalar); None where the draws cannot say.

    Weighted: that of the ratio of means over four or more independent chains, by the delta method.
    """
    chains, draws = values.shape[1:3]
    if not weighted:
        return monte_carlo_error(values) if draws > 1 else None
    if chains < 4:
        return None
    weights = weights.reshape(chains, draws)
    parts = np.einsum("cn,fcnq->fcq", weights, values)
    residuals = parts - weights.sum(axis=1)[:, None] * parts.sum(axis=1, keepdims=True)
    return np.sqrt(chains / (chains - 1) * np.sum(residuals**2, axis=1))


def discrepancy(key: Any, posterior: Posterior, reference: dict[str, Any]) -> dict[str, Any]:
    """Return the squared MMD of unconstrained draws with its p-value; empty for a single draw."""
    if posterior.num_draws * posterior.num_chains < 20:
        return {}
    draws = equally_weighted(jax.random.fold_in(key, 1), posterior)
    report = checks.mmd(thinned(draws), thinned(reference["positions"]), key=key)
    return {"MMD2": report.statistic, "MMD p": report.pvalue, "MMD2 detectable": report.detectable}


def compare(key: Any, posterior: Posterior, reference: dict[str, Any]) -> dict[str, Any]:
    """Return the discrepancy, or the error of the check."""
    try:
        return discrepancy(key, posterior, reference)
    except ValueError as error:
        return {"MMD refused": str(error).splitlines()[0]}


def thinned(draws: Any) -> Any:
    """Every k-th draw of every chain, about ``COMPARED`` in total; an array of rows where there is one chain."""
    chains, num = jax.tree.leaves(draws)[0].shape[:2]
    draws = jax.tree.map(lambda leaf: leaf[:, :: max(1, chains * num // COMPARED)], draws)
    if chains > 1:
        return draws
    return jnp.concatenate([leaf[0].reshape(leaf.shape[1], -1) for leaf in jax.tree.leaves(draws)], axis=1)


def own_report(posterior: Posterior) -> dict[str, Any]:
    """Return the report of the engine."""
    info = posterior.info
    record: dict[str, Any] = {"status": Status(int(info.status)).name, "gradients": count_gradients(info)}
    if hasattr(info, "rhat"):
        flat = {
            name: np.concatenate([np.ravel(x) for x in jax.tree.leaves(getattr(info, name))])
            for name in ("rhat", "ess")
        }
        record |= {"R-hat": float(flat["rhat"].max()), "ESS": float(flat["ess"].min())}
    if hasattr(info, "diverging"):
        record |= {"divergences": int(np.sum(info.diverging)), "metric": info.metric_name}
    if hasattr(info, "num_dropped_starts"):
        record["dropped starts"] = int(info.num_dropped_starts)
    if hasattr(info, "khat"):
        record["k-hat"] = float(info.khat)
    if hasattr(info, "log_evidence_error"):
        record |= {
            "log evidence": float(posterior.log_evidence),
            "log evidence error": float(info.log_evidence_error),
            "levels": len(info.temperatures),
            "starts from": info.start,
        }
    return record


def run(key: Any, entry: EngineEntry, reference: dict[str, Any], draws: int) -> dict[str, Any]:
    """Run one engine on one posterior; a failure is recorded as its status."""
    key_sample, key_compare = jax.random.split(key)
    row = {"posterior": reference["facts"]["posterior"], "engine": entry.name}
    start = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            posterior = entry.make(draws).sample(key_sample, reference["target"], progress=False)
            jax.block_until_ready(posterior.draws)
            row["seconds"] = time.process_time() - start
            row |= own_report(posterior) | accuracy(posterior, reference)
            row |= compare(key_compare, posterior, reference)
        except Exception as error:
            row.setdefault("seconds", time.process_time() - start)
            row["status"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    row["warnings"] = list(
        dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))
    )
    return row


def text(value: Any, form: str = ".3f") -> str:
    if value is None:
        return "-"
    return format(value, ".1e" if form == ".3f" and abs(value) >= FAR else form)


def table_row(row: dict[str, Any]) -> list[str]:
    checked = [
        f"{label} {text(row[label], form)}"
        for label, form in (("R-hat", ".3f"), ("k-hat", ".2f"))
        if label in row
    ]
    if row.get("divergences"):
        checked.append(f"{row['divergences']} diverging")
    if row.get("dropped starts"):
        checked.append(f"{row['dropped starts']} starts dropped")
    if "log evidence" in row:
        checked.append(f"log Z {row['log evidence']:.3f} ± {row['log evidence error']:.3f}")
    if "metric" in row:
        checked.append(row["metric"])
    get = row.get
    return [
        find_engine(row["engine"]).label,
        text(get("mean")),
        text(get("second moment")),
        text(get("mean, reference MCSE")),
        text(get("z"), ".1f"),
        "refused" if "MMD refused" in row else text(1e3 * row["MMD2"] if "MMD2" in row else None, ".2f"),
        text(get("MMD p")),
        text(get("gradients"), ",d"),
        text(get("seconds"), ".1f"),
        ", ".join([row["status"], *checked]),
    ]


HEADER = [
    "engine",
    "mean",
    "second moment",
    "reference MCSE",
    "z",
    "1000 MMD²",
    "p",
    "gradients",
    "CPU s",
    "status",
]


def show(facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    title = f"{facts['posterior']}: d = {facts['dimension']}, Stein max|z| {facts['Stein max|z|']:.1f}"
    common.print_table(f"{title} (p = {facts['Stein p']:.2f})", HEADER, [table_row(row) for row in rows])
    for row in rows:
        if "MMD refused" in row:
            print(f"MMD of {find_engine(row['engine']).label} refused: {row['MMD refused']}")


def verdict(rows: list[dict[str, Any]]) -> str:
    """Return the conclusion for NUTS."""
    nuts_errors = {row["posterior"]: largest_error(row) for row in rows if row["engine"] == "nuts"}
    if not nuts_errors:
        return "NUTS did not run"
    bad = [name for name, error in nuts_errors.items() if not error < ASKED]
    return (
        f"NUTS: {len(nuts_errors) - len(bad)} of {len(nuts_errors)} posteriors with every standardized error below "
        f"{ASKED} (largest {max(nuts_errors.values()):.3g})" + (f"; not {', '.join(bad)}" if bad else "")
    )


def largest_error(row: dict[str, Any]) -> float:
    """Return the largest error of means and second moments; infinite if it is missing or NaN."""
    errors = [row.get("mean", np.nan), row.get("second moment", np.nan)]
    return float(max(errors)) if np.isfinite(errors).all() else float("inf")


def merged(results: dict[str, Any], facts: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Results with these rows in place of those of the same posterior and engine, in the order of the tables."""
    posteriors = {fact["posterior"]: fact for fact in [*results.get("posteriors", []), facts]}
    table = {(row["posterior"], row["engine"]): row for row in [*results.get("rows", []), *rows]}
    names = [port.name for port in PORTS if port.name in posteriors]
    engines = [entry.name for entry in target_engines()]
    return {
        "posteriors": [posteriors[name] for name in names],
        "rows": [table[name, engine] for name in names for engine in engines if (name, engine) in table],
    }


def run_port(port: Port, arguments: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Verify one port and run the engines on it."""
    reference = reference_of(port)
    key = jax.random.fold_in(jax.random.key(arguments.seed), PORTS.index(port))
    rows = []
    for name in arguments.engines:
        print(f"{port.name}: {find_engine(name).label}", flush=True)
        # a key of the engine's name: other engines do not change its draws
        engine_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        rows.append(run(engine_key, find_engine(name), reference, 100 if arguments.small else DRAWS))
        rows[-1]["seed"] = arguments.seed
    show(reference["facts"], rows)
    return reference["facts"], rows


def main() -> None:
    parser = common.parser(__doc__)
    names = [entry.name for entry in target_engines()]
    kept = "by the beginning of their names; the results of the others are kept from the last run"
    parser.add_argument("--only", nargs="+", default=[], help=f"posteriors, {kept}")
    parser.add_argument(
        "--engines", nargs="+", choices=names, default=names, help="the others' results are kept"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    results: dict[str, Any] = {} if arguments.small else common.read_results(NAME)
    for port in [find_port(name) for name in arguments.only] or PORTS:
        results = merged(results, *run_port(port, arguments))
        if not arguments.small:
            answer = {"question": __doc__.splitlines()[0], "answer": verdict(results["rows"])}
            common.write_results(NAME, {**answer, "draws of a chain": DRAWS, **results})
            plot(NAME, ASKED, results["posteriors"], results["rows"])
        jax.clear_caches()  # hundreds of compiled programs are not needed again
    print(verdict(results["rows"]))


if __name__ == "__main__":
    main()
