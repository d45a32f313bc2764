"""Everywhere that takes a user's function: results follow what it depends on, and equal functions compile nothing.

Each place is asked three times: with one value of what the function depends on, with another one in the *same* function
object, and with a function made anew that depends on the first value again. Results of the first and the third are
equal and the third compiles nothing; the second is another. What the right results are is tested at each place's own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.tree_util import Partial

import probinfer as pi
from probinfer import coin, gp, kernels, lm, mcmc, resampling, smc, targets
from probinfer.checks.calibration import ranks
from probinfer.core.algorithms import Algorithm
from probinfer.core.types import pytree
from probinfer.inference.posterior import Posterior
from probinfer.lm.rewards import meanings
from probinfer.numerics import optimization
from probinfer.smc.parameters import likelihood
from tests.lm import tables

KEY = jax.random.key(0)
Z = jnp.asarray([0.5, -1.0])
X, Y = jnp.linspace(0.0, 1.0, 4)[:, None], jnp.asarray([0.1, -0.2, 0.3, 0.0])
_value = jax.jit(lambda fn, *args: fn(*args))


def density(target):
    return _value(target.logdensity_fn, jax.tree.map(lambda leaf: leaf[0], target.candidates(KEY, 1)))


def of_run(**kinds):
    """A run of three steps; ``kinds`` are the parts of the run that are the function."""

    def place(fn):
        step = kinds.get("step", lambda fn: lambda key, s: (s * 0.5, ()))(fn)
        given = {name: make(fn) for name, make in kinds.items() if name != "step"}
        loop = pi.run_until if "stop_fn" in given else pi.run
        given = (
            {"stop_fn": given["stop_fn"], "max_steps": 3} if "stop_fn" in given else {"num_steps": 3} | given
        )
        state, history = loop(KEY, Algorithm(None, step), Z, progress=False, **given)
        return state, history.records

    return place


def filtered(fk):
    return smc.particle_filter(KEY, fk, 2, 4).log_evidence


def feynman_kac(fn):
    return smc.FeynmanKac(_normal, _stay, lambda before, x, t: fn(x))


def _normal(key):
    return jax.random.normal(key)


def _stay(key, x, t):
    return x


def model_of(fn):
    def model(y):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(fn(m), 1.0), obs=y)

    return targets.from_numpyro(model, Y)


@pytree
class Scaled(kernels.Kernel):
    """A user's kernel, whose method reads the function."""

    def evaluate(self, x, z):
        return jnp.exp(-jnp.sum((x - z) ** 2)) * FUNCTIONS[0](1.0) ** 2

    def gram(self, X, Z=None):
        return jax.vmap(lambda x: jax.vmap(lambda z: self.evaluate(x, z))(X if Z is None else Z))(X)

    def diag(self, X):
        return jax.vmap(lambda x: self.evaluate(x, x))(X)


@pytree
class Shifted:
    """A user's mean."""

    def __call__(self, inputs):
        return jnp.full(inputs.shape[0], FUNCTIONS[0](0.5))


FUNCTIONS: list = [None]


def of_gp(fn, make):
    """A user's class reads the function from its module."""
    FUNCTIONS[0] = fn
    return gp.condition(make(fn), X, Y, gp.Exact()).log_evidence


def expectation(fn):
    return Posterior({"m": jnp.ones((1, 4)) * Z[0]}, None).expectation(lambda draw: fn(draw["m"]))


def table_of(fn):
    theta, draws = {"m": jnp.arange(5.0)}, {"m": jnp.linspace(0.0, 4.0, 20).reshape(5, 4)}
    return ranks.rank_table(KEY, draws, theta, theta["m"], quantities=[lambda t, x: fn(t["m"])]).ranks


def svgd(fn):
    algorithm = coin.svgd(lambda z: -jnp.sum(fn(z) ** 2), kernels.RBF(), coin.Identity(), bandwidth="fixed")
    state = _value(algorithm.init, jnp.asarray([[0.0, 1.0], [1.0, 0.0], [2.0, 0.5]]))
    return _value(algorithm.step, KEY, state)[0].positions


def blackjax(fn):
    import blackjax

    engine = mcmc.Blackjax(
        lambda logdensity: blackjax.hmc(lambda z: logdensity(z) - jnp.sum(fn(z["m"]) ** 2), 0.1, jnp.ones(2), 2),
        num_draws=8, num_discard=0, num_chains=2,
    )  # fmt: skip
    with pytest.warns(pi.ConvergenceWarning):
        return pi.infer(KEY, targets.from_logdensity(_flat, {"m": Z}), engine, progress=False)["m"]


def _flat(v):
    return -0.5 * jnp.sum(v["m"] ** 2)


def _resampled(adaptive):
    return adaptive(KEY, jnp.zeros(3), 3, 0)


def scheme(fn):
    def choose(key, log_weights, num):
        rows = jnp.arange(num, dtype=jnp.int32)
        return rows, jnp.zeros(num, log_weights.dtype) + fn(1.0)

    adaptive = resampling.adaptive(choose, lambda log_weights, t: fn(1.0) > 0)
    return _value(Partial(_resampled), adaptive)


def in_run_many(fn):
    keys = jax.random.split(KEY, 3)
    return pi.run_many(lambda key, x: (fn(x) * jnp.ones(2), None), keys, np.arange(3.0), progress=False).draws


def sbc(**kinds):
    """Simulations of which one part is the function; ranks of the draws themselves."""

    def place(fn):
        def prior(key):
            return kinds.get("prior", lambda fn: lambda z: z)(fn)(jax.random.normal(key))

        def simulate(key, theta):
            return kinds.get("simulate", lambda fn: lambda z: z)(fn)(theta + jax.random.normal(key))

        def infer(key, x):
            return kinds.get("infer", lambda fn: lambda z: z)(fn)(x / 2 + jax.random.normal(key, (7,)))

        report = pi.checks.sbc(KEY, prior, simulate, infer, num_simulations=8, mode="vmap", progress=False)
        return report.theta, report.x, report.posteriors.draws

    return place


def posterior_sbc(fn):
    report = pi.checks.posterior_sbc(
        KEY,
        jax.random.normal(KEY, (2, 16)),
        lambda key, theta: fn(theta + jax.random.normal(key)),
        lambda key, x: fn(x / 2 + jax.random.normal(key, (7,))),
        num_simulations=8,
        mode="vmap",
        progress=False,
    )
    return report.x, report.posteriors.draws


def particles(algorithm, *more):
    start = jnp.asarray([[0.0, 1.0], [1.0, 0.0], [2.0, 0.5]])
    state = _value(algorithm.init, start, *more)
    return _value(algorithm.step, KEY, state)[0].positions


def em(fn):
    algorithm = coin.em(lambda z, parameters: -jnp.sum((fn(z) - parameters) ** 2), geometry=coin.Identity())
    return particles(algorithm, jnp.zeros(()))


def mied(fn):
    return particles(coin.mied(lambda z: -jnp.sum(fn(z) ** 2), lambda z: z[0] - 3.0))


def mied_inside(fn):
    return particles(coin.mied(lambda z: -jnp.sum(z**2), lambda z: fn(z)[0] - 0.4))


def scores(fn):
    diffusion = smc.VarianceExploding(0.1, 10.0)
    return smc.sample_composed(
        KEY, diffusion, [lambda x, t: -fn(x) / (1 + t**2)], [1.0], (2,), 3, 4
    ).particles


def parameters_of(fn):
    def model(theta):
        return smc.FeynmanKac(_normal, _stay, lambda before, x, t: fn(x) * theta["a"])

    made = smc.Parameters({"a": dist.Normal(0.0, 1.0)}, model, 2)
    return likelihood.estimate_likelihood(KEY, made, jnp.ones(1), 4).log_evidence


@pytree
class Read(meanings.Score):
    """A user's reward, which reads the function from its module."""

    scale = "logit"

    def step(self, state, view):
        return state, FUNCTIONS[0](0.1 * view.length)


def rewarded(fn):
    FUNCTIONS[0] = fn
    reward = lm.rewards.from_score(Read(), meaning="likelihood")
    method = lm.ParticleFilter(4, step=lm.every(1))
    found = lm.infer(
        KEY, tables.model(), "a;", reward, method, answer=lm.answers.text, max_tokens=4, progress=False
    )
    return found.log_evidence, found.log_weights


PLACES = {
    "run: step": of_run(step=lambda fn: lambda key, s: (fn(s), ())),
    "run: collect": of_run(collect=lambda fn: lambda s, info: fn(s)),
    "run_until: stop_fn": of_run(stop_fn=lambda fn: lambda s, info: fn(s)[0] < 0.2),
    "run_many": in_run_many,
    "from_logdensity": lambda fn: density(targets.from_logdensity(lambda v: jnp.sum(fn(v)), Z)),
    "from_prior": lambda fn: density(targets.from_prior({"m": dist.Normal(0.0, 1.0)}, lambda v: fn(v["m"]))),
    "from_numpyro": lambda fn: density(model_of(fn)),
    "minibatch": lambda fn: _value(
        targets.minibatch(
            lambda v: -jnp.sum(v**2), lambda v, rows: fn(rows) * v[0], Y, 2, example=Z
        ).logdensity_fn,
        KEY,
        Z,
    ),
    "expectation": expectation,
    "minimize": lambda fn: optimization.minimize(lambda z: jnp.sum((z - fn(1.0)) ** 2), Z).position,
    "svgd": svgd,
    "Blackjax": blackjax,
    "FeynmanKac": lambda fn: filtered(feynman_kac(fn)),
    "state_space": lambda fn: filtered(
        smc.state_space(
            dist.Normal(0.0, 1.0), lambda x, t: dist.Normal(fn(x), 1.0), lambda x, t: dist.Normal(x), Y
        )
    ),
    "host_potential": lambda fn: filtered(
        smc.FeynmanKac(_normal, _stay, smc.host_potential(lambda before, x, t: np.asarray(fn(x))))
    ),
    "a resampling scheme": scheme,
    "Parameters": parameters_of,
    "scores": scores,
    "em": em,
    "mied": mied,
    "mied: a constraint": mied_inside,
    "sbc: the prior": sbc(prior=lambda fn: fn),
    "sbc: the simulator": sbc(simulate=lambda fn: fn),
    "sbc: the inference": sbc(infer=lambda fn: fn),
    "posterior_sbc": posterior_sbc,
    "lm: a reward": rewarded,
    "ranks": table_of,
    "gp: a kernel": lambda fn: of_gp(fn, lambda fn: gp.Model(Scaled())),
    "gp: a mean": lambda fn: of_gp(fn, lambda fn: gp.Model(kernels.RBF(), mean=Shifted())),
    "gp: Warped": lambda fn: of_gp(fn, lambda fn: gp.Model(kernels.Warped(kernels.RBF(), lambda X: fn(X)))),
    "gp: FromLogDensity": lambda fn: (
        gp.condition(
            gp.Model(
                kernels.RBF(), gp.likelihoods.FromLogDensity(lambda y, f: -((y - fn(f)) ** 2), {}, True)
            ),
            X,
            Y,
            gp.Laplace(),
        ).log_evidence
    ),
}
SOURCE = "def h(x): return x * C['c']\ndef fn(x): return h(x)"
MONOTONE = {"ranks": -1.0}  # ranks see the order of values only


def made(c):
    space = {"C": {"c": c}, "__name__": "__main__"}
    exec(SOURCE, space)
    return space["fn"]


SLOW = {"Blackjax", "minimize", "state_space", "em", "mied", "mied: a constraint", "scores", "posterior_sbc"}
SLOW |= {
    "lm: a reward",
    "sbc: the prior",
    "sbc: the simulator",
}  # seconds to compile; others are of their kind


@pytest.mark.parametrize(
    "where", [pytest.param(where, marks=[pytest.mark.slow] * (where in SLOW)) for where in PLACES]
)
def test_results_follow_the_function(where, count_compiles):
    place, fn = PLACES[where], made(1.5)
    first = jax.device_get(place(fn))
    fn.__globals__["C"]["c"] = MONOTONE.get(where, 0.25)
    other = jax.device_get(place(fn))
    with count_compiles() as compiles:
        again = jax.device_get(place(made(1.5)))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), first, again))
    assert not jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), first, other))
    assert compiles.count == 0 or where.startswith(("gp: a ", "lm: a ")), "an equal function compiled again"


def stored_run(fn, folder):
    algorithm = Algorithm(None, lambda key, s: (fn(s), ()))
    return pi.run(KEY, algorithm, Z, 2, checkpoint=pi.Checkpoint(folder, every=1), progress=False)[0]


def stored_posteriors(fn, folder):
    keys = jax.random.split(KEY, 2)
    data = np.arange(2.0)
    return pi.run_many(
        lambda key, x: (fn(x) * jnp.ones(2), None),
        keys,
        data,
        checkpoint=pi.Checkpoint(folder),
        progress=False,
    ).draws


@pytest.mark.parametrize(
    ("place", "what"), [(stored_run, "algorithm"), (stored_posteriors, "infer_fn")], ids=["run", "run_many"]
)
def test_stores_take_an_equal_function_and_refuse_another(place, what, tmp_path):
    """Names, globals of helpers, defaults and code: each alone makes another function, and the message says where."""
    first = place(made(1.5), tmp_path)
    assert np.array_equal(first, place(made(1.5), tmp_path))
    others = [made(0.25)]
    for old, new in (("x * C", "x + C"), ("return h(x)", "return h(h(x))"), ("def fn(x)", "def fn(x, y=1)")):
        space = {"C": {"c": 1.5}, "__name__": "__main__"}
        exec(SOURCE.replace(old, new), space)
        others.append(space["fn"])
    for other in others:
        with pytest.raises(ValueError, match=f"different run: {what} is"):
            place(other, tmp_path)
