"""How good is coin betting without a unit, against Adam at the best of 13 rates? Loss after 100, 300, 1000 steps.

Methods: ``betting.coin()`` elementwise and one bet a leaf (``norm="block"``), ``betting.kt()``, ``betting.fuse()``, the
published coin (``betting.coin(unit=0.5)``), and Adam with the best rate of 1e-5 ... 10 (two a decade) in hindsight, for
every problem and number of steps on its own.

Problems on which the constants of the restarts were chosen: |x - b|²/c² in ten dimensions from zero, b of length c
sqrt(10), c = 1e-6 ... 1e6, without noise and with gradient noise of one standard deviation a coordinate (root mean
square error in units of c); logistic regression on the bundled breast-cancer data in batches of 57 and without
batches. Held out: the noisy quadratic with curvatures 1e-2 ... 1e2, the same noise from 1000 c away, Rosenbrock's
function, and a small neural network on synthetic data in batches of 32. Loss less its minimum (of the network: the
mean squared error). 10 seeds, medians.
"""

from __future__ import annotations

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

from probinfer import betting, data
from probinfer.numerics import optimization

NAME = "betting"
SEEDS, MARKS = 10, (100, 300, 1000)
RATES = 10.0 ** np.arange(-5, 1.1, 0.5)
WAYS = {
    "coin()": betting.coin(),
    'coin(norm="block")': betting.coin(norm="block"),
    "kt()": betting.kt(),
    "fuse()": betting.fuse(),
    "coin(unit=0.5)": betting.coin(unit=0.5),
}


def quadratic(c=1.0, noise=0.0, start=0.0, scales=1.0):
    """Return the loss, its noisy gradient, and the initial point."""
    b = c * jnp.asarray(np.random.default_rng(0).normal(size=10))

    def fn(x):
        return jnp.sum(((x - b) / c * scales) ** 2)

    def gradient(key, x):
        return jax.grad(fn)(x) + noise * jax.random.normal(key, x.shape) / c

    return lambda x: jnp.sqrt(fn(x) / 10), gradient, jnp.full(10, start)


def logistic(batch):
    """Regularized logistic regression on standardized inputs, with an intercept."""
    table = data.breast_cancer()
    X = np.asarray(table.X, float)
    X = jnp.asarray(np.c_[(X - X.mean(0)) / X.std(0), np.ones(len(X))])
    y = jnp.where(jnp.asarray(table.y) > 0, 1.0, -1.0)

    def fn(x, X=X, y=y):
        return jnp.mean(jnp.logaddexp(0, -y * (X @ x))) + 0.5 * jnp.sum(x**2) / 569

    def gradient(key, x):
        chosen = jax.random.randint(key, (batch,), 0, len(y)) if batch else slice(None)
        return jax.grad(fn)(x, X[chosen], y[chosen])

    start = jnp.zeros(X.shape[1])
    minimum = optimization.minimize(fn, start).value
    return lambda x: fn(x) - minimum, gradient, start


def rosenbrock():
    def fn(x):
        return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    return fn, lambda key, x: jax.grad(fn)(x), jnp.array([-1.2, 1.0])


def network():
    """A network with twenty hidden units for a smooth function of six inputs."""
    rng = np.random.default_rng(1)
    X = jnp.asarray(rng.normal(size=(300, 6)))
    y = jnp.sin(2 * X[:, 0]) + X[:, 1] * X[:, 2] + 0.1 * jnp.asarray(rng.normal(size=300))
    start = {
        "w": jnp.asarray(rng.normal(size=(6, 20))) / 6**0.5,
        "b": jnp.zeros(20),
        "v": jnp.asarray(rng.normal(size=20)) / 20**0.5,
    }

    def fn(p, X=X, y=y):
        return jnp.mean((jnp.tanh(X @ p["w"] + p["b"]) @ p["v"] - y) ** 2)

    def gradient(key, p):
        chosen = jax.random.randint(key, (32,), 0, 300)
        return jax.grad(fn)(p, X[chosen], y[chosen])

    return fn, gradient, start


def problems() -> dict:
    """Return the problems on which the constants were chosen, then the others."""
    chosen = {f"quadratic, c = {c:g}": quadratic(c) for c in (1e-6, 1e-3, 1.0, 1e3, 1e6)}
    chosen |= {"noisy quadratic": quadratic(noise=1.0), "noisy quadratic, c = 1e-3": quadratic(1e-3, 1.0)}
    chosen |= {"logistic, batches": logistic(57), "logistic": logistic(0)}
    held_out = {
        "held out: noisy, curvatures": quadratic(noise=1.0, scales=jnp.logspace(-1, 1, 10)),
        "held out: noisy, 1000 c away": quadratic(1e-3, 1.0, 1.0),
        "held out: Rosenbrock": rosenbrock(),
        "held out: network": network(),
    }
    return chosen | held_out


def losses(problem, optimizer, key, marks):
    """Return the loss at each recorded step."""
    fn, gradient, x = problem

    def step(carry, key):
        x, state = carry
        updates, state = optimizer.update(gradient(key, x), state, x)
        return (optax.apply_updates(x, updates), state), None

    keys, recorded, carry = jax.random.split(key, marks[-1]), [], (x, optimizer.init(x))
    for before, mark in zip((0, *marks), marks, strict=False):
        carry, _ = jax.lax.scan(step, carry, keys[before:mark])
        recorded.append(fn(carry[0]))
    return jnp.stack(recorded)


def main() -> None:
    """Run the benchmark, print the tables, and write the results."""
    small = common.parser(__doc__).parse_args().small
    seeds, marks = (2, (10, 20)) if small else (SEEDS, MARKS)
    keys, records = jax.random.split(jax.random.key(0), seeds), []
    for name, problem in problems().items():
        losses_by_method = {
            method: np.median(
                jax.jit(lambda k, p=problem, o=o: jax.vmap(lambda s: losses(p, o, s, marks))(k))(keys), 0
            )
            for method, o in WAYS.items()
        }

        def rated(rate, key, p=problem):
            return losses(p, optax.adam(rate), key, marks)

        grid = jax.jit(jax.vmap(jax.vmap(rated, (None, 0)), (0, None)))(jnp.asarray(RATES), keys)
        grid = np.median(np.where(np.isfinite(grid), grid, np.inf), 1)
        losses_by_method["Adam, best rate"] = grid.min(0)
        losses_by_method["its rate"] = RATES[grid.argmin(0)]
        records += [
            {"problem": name, "way": method, "loss": values} for method, values in losses_by_method.items()
        ]
    header = ["problem", "", *(f"after {mark}" for mark in marks)]
    rows = [[r["problem"], r["way"], *(f"{v:.2g}" for v in r["loss"])] for r in records]
    common.print_table("bets of a single iterate", header, rows)
    if not small:
        common.write_results(NAME, {"marks": marks, "records": records})


if __name__ == "__main__":
    main()
