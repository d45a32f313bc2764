"""Is every particle method correct on finite models, where sums are exact? Every scheme, trigger and method.

Models: asymmetric hidden Markov models of 3 to 6 states and up to 6 steps, potentials of a step that depend on both of
its states and are zero for one in seven; evidence and smoothing probabilities by forward and backward sums.

(1) Filters of 6 particles (bootstrap, guided by half of the potential, auxiliary with the best lookahead, nested with 3
candidates), for all 7 resampling schemes and 4 triggers: the mean of the evidence and of the unnormalized smoothing
masses over independent runs, as z against the exact values, of states with a probability of 2 % or more: a mean of
rare visits is far from normal. Where particles are hardly resampled ("optimal" keeps all of as many) weights are so
uneven that 5000 runs are not enough for a normal mean: a combination beyond 5 is run again, 40 times as often with
other keys, and the second z counts. A run in which all particles die counts as zero.
(2) Particle Gibbs of 3 particles (genealogy, ancestor and backward sampling), for all conditional schemes and triggers:
chains started at exact draws; paths after 4 iterations against the path law by chi-squared.
(3) Four particles of identical scores, three steps: how often the path of the reference is kept. A quarter is right for
schemes that give each of equal weights one copy, 37 / 64 for independent draws, which may choose it again.
(4) Total variation between the path law and the weighted paths of filter and backward smoother, against N.

A z is accused beyond the two-sided normal quantile, a chi-squared below the level, which let everything right pass with
probability 1 - 1e-6 (Bonferroni over the run).
"""

from __future__ import annotations

import time
from functools import partial
from itertools import product

import common
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats
from smc_enumeration_models import (
    FiniteModel,
    bootstrap,
    chi_squared,
    masses,
    methods,
    path_law,
    random_model,
    z_of,
)

from probinfer import resampling, smc
from probinfer.core.types import field, pytree

NAME = "smc_enumeration"
SIZES = ((3, 6), (4, 5), (5, 4), (6, 6))  # states, steps
PARTICLES, FAMILY, SUSPECT = 6, 1e-6, 5.0
TRIGGERS = {
    "ESS": resampling.ess_below(0.6),
    "entropic": resampling.entropic_below(0.8),
    "every second": resampling.every(2),
    "always": resampling.always(),
}


@pytree
class AnyScheme(resampling.Adaptive):
    """Schemes and triggers by number, so that one program serves them all."""

    scheme: tuple = field(static=True)
    trigger: tuple
    is_conditional: bool = field(static=True, default=False)

    def __call__(self, key, log_weights, num, t):
        """As ``resampling.Adaptive``."""
        table = resampling.CONDITIONAL if self.is_conditional else resampling.SCHEMES
        which_scheme, which_trigger = self.trigger
        fires = jax.lax.switch(which_trigger, [partial(rule, log_weights, t) for rule in TRIGGERS.values()])
        schemes = [partial(table[name], key, log_weights, num) for name in self.scheme]
        ancestors, log_weights = jax.lax.cond(
            fires,
            lambda: jax.lax.switch(which_scheme, schemes),
            lambda: (jnp.arange(num, dtype=jnp.int32), log_weights),
        )
        return ancestors, log_weights, fires

    def conditional(self):
        """The same with conditional schemes."""
        return AnyScheme(self.scheme, self.trigger, True)


def any_scheme(scheme: str, trigger: str, names: tuple) -> AnyScheme:
    """Return the schemes by name."""
    return AnyScheme(names, (jnp.int32(names.index(scheme)), jnp.int32(list(TRIGGERS).index(trigger))))


@partial(jax.jit, static_argnames=("num_steps", "num_states"))
def estimates(keys, fk, adaptive, num_steps: int, num_states: int):
    """Evidence (runs,) and smoothing masses (runs, T, K)."""

    def one(key):
        result = smc.particle_filter(key, fk, num_steps, PARTICLES, resampling=adaptive)
        weights = jnp.exp(result.log_weights) / PARTICLES
        mass = jnp.einsum("n,ntk->tk", weights, jax.nn.one_hot(result.paths, num_states))
        return jnp.exp(result.log_evidence), jnp.where(result.status == 0, mass, 0.0)

    return jax.vmap(one)(keys)


def scores_of(keys, fk, adaptive, exact: np.ndarray) -> np.ndarray:
    """Of the smoothing masses that are not rare, and of the evidence, which is last."""
    evidence, mass = estimates(keys, fk, adaptive, *exact.shape)
    often = exact >= 0.02 * exact[0].sum()
    return np.append(z_of(mass, exact)[often], z_of(evidence, exact[0].sum()))


def filters(number: int, model: FiniteModel, runs: int) -> list[dict]:
    """Run all filters, schemes and triggers on one model."""
    exact, names = masses(model), tuple(resampling.SCHEMES)
    num_steps, num_states = exact.shape
    records = []
    for method, fk in methods(model).items():
        for seed, (scheme, trigger) in enumerate(product(names, TRIGGERS)):
            adaptive = any_scheme(scheme, trigger, names)
            key = jax.random.key(1000 * number + seed)
            first = scores_of(jax.random.split(key, runs), fk, adaptive, exact)
            again = np.abs(first).max() > SUSPECT
            z = first
            if again:
                z = scores_of(jax.random.split(jax.random.fold_in(key, 1), 40 * runs), fk, adaptive, exact)
            records.append(
                {
                    "states": num_states,
                    "steps": num_steps,
                    "method": method,
                    "scheme": scheme,
                    "trigger": trigger,
                    "z, evidence": float(z[-1]),
                    "largest z": float(np.abs(z).max()),
                    "runs": 40 * runs if again else runs,
                    "largest z of the first runs": float(np.abs(first).max()),
                    "comparisons": int(z.size),
                }
            )
    return records


@partial(jax.jit, static_argnames=("num_steps", "path_update"))
def chains(keys, fk, adaptive, references, num_steps: int, path_update: str):
    """Return the last paths of particle Gibbs."""
    settings = {
        "ancestor_sampling": path_update == "ancestor",
        "backward_sampling": path_update == "backward",
    }

    def one(key, reference):
        result = smc.particle_gibbs(
            key, fk, num_steps, 3, 4, reference=reference, resampling=adaptive, **settings
        )
        return result.paths[-1]

    return jax.vmap(one)(keys, references)


def gibbs(number: int, model: FiniteModel, num_chains: int) -> list[dict]:
    """Run all variants of particle Gibbs on one model, started at exact draws."""
    paths, probabilities = path_law(model)
    num_steps, num_states = model.log_potential.shape[:2]
    names, fk = tuple(resampling.CONDITIONAL), bootstrap(model)
    settings = [
        (path_update, *pair) for path_update in ("genealogy", "ancestor") for pair in product(names, TRIGGERS)
    ]
    settings += [("backward", "multinomial", trigger) for trigger in TRIGGERS]
    records = []
    for seed, (path_update, scheme, trigger) in enumerate(settings):
        drawn = np.random.default_rng([number, seed]).choice(len(probabilities), num_chains, p=probabilities)
        adaptive = any_scheme(scheme, trigger, names)
        if path_update == "backward":
            adaptive = resampling.adaptive("multinomial", TRIGGERS[trigger])
        keys = jax.random.split(jax.random.key(2000 + 100 * number + seed), num_chains)
        last = chains(keys, fk, adaptive, jnp.asarray(paths[drawn], jnp.int32), num_steps, path_update)
        records.append(
            {
                "states": num_states,
                "steps": num_steps,
                "method": f"particle Gibbs, {path_update}",
                "scheme": scheme,
                "trigger": trigger,
                "p, chi-squared": chi_squared(np.asarray(last), probabilities, num_states),
            }
        )
    return records


def same_scores(runs: int) -> list[dict]:
    """Share of the iterations that keep the reference, of four particles with identical scores."""

    def first(key):
        return jax.random.randint(key, (), 0, 2**30)

    def stay(key, x, t):
        return x

    def score(x_previous, x, t):
        return jnp.asarray([-1.6, -0.7, -0.1])[t]

    fk, scores_by_scheme = smc.FeynmanKac(first, stay, score), []
    for scheme in resampling.CONDITIONAL:
        adaptive = resampling.adaptive(scheme, resampling.always())

        def one(key, adaptive=adaptive):
            reference = jnp.full(3, -1)
            result = smc.particle_gibbs(
                key, fk, 3, 4, 1, reference=reference, ancestor_sampling=False, resampling=adaptive
            )
            return result.paths[0, -1] == -1

        ancestors = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(7), runs)))
        scores_by_scheme.append(
            {
                "scheme": scheme,
                "reference kept": float(ancestors.mean()),
                "exact": 37 / 64 if scheme == "multinomial" else 0.25,
                "its interval": [
                    float(x) for x in stats.binomtest(int(ancestors.sum()), runs).proportion_ci(0.999999)
                ],
            }
        )
    return scores_by_scheme


def distances(model: FiniteModel, sizes: tuple, runs: int) -> list[dict]:
    """Mean total variation of the path law against N, filter and smoother."""
    probabilities = path_law(model)[1]
    num_steps, num_states = model.log_potential.shape[:2]
    fk, powers = bootstrap(model), num_states ** jnp.arange(num_steps)[::-1]
    records = []
    for num in sizes:

        def filtered(key, num=num):
            result = smc.particle_filter(key, fk, num_steps, num)
            return result.paths, jax.nn.softmax(result.log_weights)

        def smoothed(key, num=num):
            drawn = smc.backward_smoother(key, fk, num_steps, num).paths
            return drawn, jnp.full(drawn.shape[0], 1 / drawn.shape[0])

        for name, method in (("filter", filtered), ("backward smoother", smoothed)):

            def one(key, method=method):
                states, weights = method(key)
                mass = jnp.zeros(len(probabilities)).at[states @ powers].add(weights)
                return jnp.sum(jnp.abs(mass - probabilities)) / 2

            values = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(num), runs)))
            records.append(
                {
                    "way": name,
                    "particles": num,
                    "distance": float(values.mean()),
                    "+-": float(values.std(ddof=1) / np.sqrt(runs)),
                }
            )
    return records


def slope(rows: list[dict]) -> float:
    """Return the slope of the log distance against log N."""
    n, d = (np.log([row[name] for row in rows]) for name in ("particles", "distance"))
    return float(np.polyfit(n, d, 1)[0])


def judged(filtered: list[dict], gibbses: list[dict]) -> dict:
    """List the results beyond their limits."""
    comparisons = sum(row["comparisons"] for row in filtered) + len(gibbses)
    level = FAMILY / comparisons
    limit = float(stats.norm.isf(level / 2))
    wrong = [row for row in filtered if row["largest z"] > limit]
    wrong += [row for row in gibbses if row["p, chi-squared"] < level]
    return {
        "comparisons": comparisons,
        "limit of z": limit,
        "largest z": max(row["largest z"] for row in filtered),
        "smallest p": min(row["p, chi-squared"] for row in gibbses),
        "p, adjusted": min(1.0, len(gibbses) * min(row["p, chi-squared"] for row in gibbses)),
        "accused": wrong,
    }


def plot(filtered: list[dict], gibbses: list[dict], curves: list[dict]) -> None:
    """Quantiles of the evidence's z, of chi-squared p-values, and distances."""
    figure, axes = common.figure(width=11, height=3.4, columns=3)
    z = np.sort([row["z, evidence"] for row in filtered])
    axes[0].plot(stats.norm.ppf((np.arange(len(z)) + 0.5) / len(z)), z, ".", markersize=3)
    axes[0].plot([-3, 3], [-3, 3], color="0.6", linewidth=0.8)
    axes[0].set(xlabel="normal quantile", ylabel="z of the evidence, filters")
    p = np.sort([row["p, chi-squared"] for row in gibbses])
    axes[1].plot((np.arange(len(p)) + 0.5) / len(p), p, ".", markersize=3)
    axes[1].plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    axes[1].set(xlabel="uniform quantile", ylabel="p of the path law, particle Gibbs")
    for name in dict.fromkeys(row["way"] for row in curves):
        rows = [row for row in curves if row["way"] == name]
        label = f"{name}: slope {slope(rows):.2f}"
        axes[2].loglog([r["particles"] for r in rows], [r["distance"] for r in rows], "o-", label=label)
    axes[2].set(xlabel="particles N", ylabel="total variation")
    axes[2].legend(frameon=False)
    common.save_figure(figure, NAME)


def main() -> None:
    """Run the benchmark, check its limits, and write the results."""
    arguments = common.parser(__doc__).parse_args()
    sizes, runs = (SIZES[:1], 500) if arguments.small else (SIZES, 5000)
    start = time.process_time()
    models = [random_model(i, *size) for i, size in enumerate(sizes)]
    filtered, gibbses = [], []
    for i, model in enumerate(models):
        filtered += filters(i, model, runs)
        gibbses += gibbs(i, model, runs)
        print(
            f"{sizes[i][0]} states, {sizes[i][1]} steps: {time.process_time() - start:.0f} CPU s", flush=True
        )
    scores = same_scores(20 * runs)
    curves = distances(random_model(9, 3, 4), (16, 64, 256, 1024), 20 if arguments.small else 200)
    verdict = judged(filtered, gibbses)
    header = ["method", "combinations", "largest |z|", "smallest p"]
    rows = []
    for method in dict.fromkeys(row["method"] for row in (*filtered, *gibbses)):
        mine = [row for row in (*filtered, *gibbses) if row["method"] == method]
        z = max((row["largest z"] for row in mine if "largest z" in row), default=None)
        p = min((row["p, chi-squared"] for row in mine if "p, chi-squared" in row), default=None)
        rows.append(
            [method, str(len(mine)), "-" if z is None else f"{z:.2f}", "-" if p is None else f"{p:.2g}"]
        )
    common.print_table("enumerated models", header, rows)
    print({name: value for name, value in verdict.items() if name != "accused"})
    print("run again:", sum(row["runs"] > runs for row in filtered), "of", len(filtered))
    print("accused:", verdict["accused"] or "none")
    for row in scores:
        low, high = row["its interval"]
        print(
            f"identical scores, {row['scheme']}: reference kept {row['reference kept']:.4f} "
            f"({low:.4f} to {high:.4f}), exact {row['exact']:.4f}"
        )
    slopes = {
        name: slope([r for r in curves if r["way"] == name]) for name in ("filter", "backward smoother")
    }
    print("total variation, slope against N:", slopes)
    if not arguments.small:
        body = {
            "filters": filtered,
            "particle Gibbs": gibbses,
            "identical scores": scores,
            "distances": curves,
        }
        common.write_results(NAME, body | {"slopes": slopes, "verdict": verdict})
        plot(filtered, gibbses, curves)


if __name__ == "__main__":
    main()
