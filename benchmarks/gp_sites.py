"""What does one sweep of EP and one step of variational inference cost, as a multiple of one Cholesky factorization?

Protocol: probit classification, Matern-5/2 kernel, 8 inputs, float64, one thread, synthetic data. A sweep is what
``gp.EP`` repeats: marginals from the sites (one factorization, one inverse), tilted moments, new sites; a step is the
same for ``gp.VI`` with 20 quadrature nodes. K is given: it is built once, not in each sweep. The unit F is one LAPACK
``dpotrf`` (Fortran order, lower, clean=0) of the same size, timed in the same process between the other timings. The
peer is GPflow's natural-gradient step on ``VGP`` (20 nodes, compiled by tf.function), which is handed the same data and
builds its K itself.

Then: how many sweeps does an evaluation of EP's evidence and gradient need from the sites of nearby hyperparameters
(variance 10 % and lengthscale 5 % away, the size of a step of an optimizer near its end) to 1e-8, and from none.

Required: at most 4 F for each at n = 500, 1000 and 2000; at least 10 times faster than GPflow; at most 5 warm sweeps.
"""

from __future__ import annotations

import functools
import time

import common
import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg.lapack import dpotrf

from probinfer import gp
from probinfer.gp.approximation.gaussian_marginals import marginals_from
from probinfer.gp.approximation.objectives import Objective
from probinfer.gp.approximation.updates import updated_sites
from probinfer.gp.structure.dense import posterior_matrices

NODES = 20
LIKELIHOOD = gp.likelihoods.Bernoulli("probit")


def make_data(num: int, dims: int = 8, seed: int = 0):
    """Labels of a smooth function with noise."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(num, dims))
    y = (np.sin(2 * X[:, 0]) + 0.5 * X[:, 1] + 0.3 * rng.normal(size=num) > 0).astype(float)
    return X, y


@functools.partial(jax.jit, static_argnums=0)
def sweep(power, K, y, sites):
    """New sites."""
    q = marginals_from(posterior_matrices(K, sites[1], False), jnp.zeros_like(y), *sites)
    return updated_sites(Objective(power, NODES), LIKELIHOOD, y, q, sites)


@jax.jit
def evaluate(inference, model, X, y, sites):
    """Return the evidence, its gradient, and the number of updates."""

    def value(model):
        conditioned = inference.condition(model, X, y, sites)
        return conditioned.log_evidence, conditioned

    (_, conditioned), gradient = jax.value_and_grad(value, has_aux=True)(model)
    return conditioned.log_evidence, gradient, conditioned.num_iterations, conditioned.sites


def gpflow_step(X, y):
    """Return a compiled natural-gradient step of GPflow's VGP; None if GPflow is not installed."""
    try:
        import gpflow
        import tensorflow as tf
    except ImportError:
        return None
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    gpflow.config.set_default_float(np.float64)
    model = gpflow.models.VGP(
        (X, 2 * y[:, None] - 1),
        kernel=gpflow.kernels.Matern52(2.0, 2.0),
        likelihood=gpflow.likelihoods.Bernoulli(),
    )
    natgrad = gpflow.optimizers.NaturalGradient(gamma=0.1)

    @tf.function
    def step():
        natgrad.minimize(model.training_loss, [(model.q_mu, model.q_sqrt)])

    return step


def measure(num: int, repeats: int, peer: bool) -> dict:
    """Return the minimum CPU seconds of each function, with interleaved calls."""
    X, y = make_data(num)
    model = gp.Model(gp.kernels.Matern52(2.0, 2.0), LIKELIHOOD)
    X, y = jnp.asarray(X), jnp.asarray(y)
    K = model.kernel.gram(X)
    sites = sweep(1.0, K, y, jnp.zeros((2, num)))
    A = np.asfortranarray(np.asarray(K) + np.eye(num))
    work = {
        "EP sweep": lambda: jax.block_until_ready(sweep(1.0, K, y, sites)),
        "VI step": lambda: jax.block_until_ready(sweep(0.0, K, y, sites)),
    }
    step = gpflow_step(np.asarray(X), np.asarray(y)) if peer else None
    if step is not None:
        work["GPflow VGP natural gradient"] = step
    for fn in work.values():
        fn()
    times: dict = {"F": [], **{name: [] for name in work}}
    for repeat in range(repeats):
        factored = A.copy(order="F")
        times["F"].append(timed(lambda B=factored: dpotrf(B, lower=1, clean=0, overwrite_a=1)))
        for name, fn in work.items():
            if not name.startswith("GPflow") or repeat < max(3, repeats // 10):
                times[name].append(timed(fn))
    unit = min(times["F"])
    result = {name: min(values) / unit for name, values in times.items()}
    result["spread"] = {
        name: (np.quantile(values, [0.25, 0.75]) / unit).tolist() for name, values in times.items()
    }
    return result | {"F in ms": 1e3 * unit} | warm_sweeps(model, X, y)


def timed(fn) -> float:
    start = time.process_time()
    fn()
    return time.process_time() - start


def warm_sweeps(model, X, y) -> dict:
    """Return the numbers of updates from nearby and from flat sites, and the difference of the two results."""
    near = gp.Model(gp.kernels.Matern52(2.2, 2.1), LIKELIHOOD)
    counts = {}
    for name, inference in (("EP", gp.EP()), ("VI", gp.VI())):
        _, _, cold, sites = evaluate(inference, model, X, y, None)
        warm_value, _, warm, _ = evaluate(inference, near, X, y, sites)
        cold_value, _, _, _ = evaluate(inference, near, X, y, None)
        counts[f"{name} sweeps"] = {
            "cold": int(cold),
            "warm": int(warm),
            "difference": float(warm_value - cold_value),
        }
    return counts


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    sizes = (100,) if arguments.small else (500, 1000, 2000)
    results = {}
    for num in sizes:
        results[num] = measure(num, max(6, arguments.repeats * 500 // num), peer=not arguments.small)
        print(num, results[num], flush=True)
    names = ["EP sweep", "VI step", "GPflow VGP natural gradient"]
    rows = [
        [name, *(f"{measured[name]:.2f}" if name in measured else "" for measured in results.values())]
        for name in names
    ]
    rows += [
        [f"{name}, {start}", *(str(measured[name][start]) for measured in results.values())]
        for name in ("EP sweeps", "VI sweeps")
        for start in ("warm", "cold")
    ]
    common.print_table("in F, and numbers of sweeps", ["n", *map(str, sizes)], rows)
    if not arguments.small:
        settings = {"repeats": arguments.repeats, "nodes": NODES}
        common.write_results(
            "gp_sites", {"settings": settings, "results": results}, packages=("gpflow", "tensorflow")
        )


if __name__ == "__main__":
    main()
