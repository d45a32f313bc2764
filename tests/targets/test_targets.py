"""Targets against NumPyro's own densities, hand formulas and enumeration; and every refusal."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen as nn
from flax import nnx
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import random_flax_module, random_nnx_module
from numpyro.distributions import constraints
from numpyro.infer import init_to_median, init_to_value
from numpyro.infer.reparam import LocScaleReparam, TransformReparam
from numpyro.infer.util import initialize_model, log_density, potential_energy
from numpyro.primitives import mutable

from probinfer import targets
from probinfer.core.binding import Bound, LogDensity, StochasticLogDensity
from probinfer.core.errors import NumericalError
from probinfer.targets import transforms
from probinfer.targets.assembly import check_scalar
from probinfer.targets.minibatches import stratified_rows
from probinfer.targets.prior_trees import same_support

SIGMA = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
EFFECT = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
GROUP = np.array([0, 0, 1, 1, 2, 2, 2])
RESPONSE = np.array([0.2, -0.4, 1.0, 1.3, -2.0, 0.1, 0.7])


def eight_schools(sigma, effect):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", sigma.shape[0]):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("effect", dist.Normal(theta, sigma), obs=effect)
    numpyro.deterministic("spread", theta.max() - theta.min())


def hierarchical(group, response, num_groups):
    rate = numpyro.sample("rate", dist.HalfNormal(2.0))
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("groups", num_groups):
        level = numpyro.sample("level", dist.Normal(0.0, 1 / rate))
    numpyro.sample("response", dist.StudentT(4.0, level[group], noise).to_event(1), obs=response)


def truncated(y):
    low = numpyro.sample("low", dist.LogNormal(0, 1))
    mid = numpyro.sample("mid", dist.Uniform(low, 2 * low + 1))  # its support depends on another site
    top = numpyro.sample("top", dist.TruncatedNormal(0.0, 2.0, low=0.5, high=4.0))
    numpyro.sample("y", dist.TruncatedNormal(mid, top, low=0.0).expand([3]), obs=y)


def shapes_change(y):
    shares = numpyro.sample("shares", dist.Dirichlet(jnp.ones(3)))
    factor = numpyro.sample("factor", dist.LKJCholesky(3, 2.0))
    cuts = numpyro.sample(
        "cuts",
        dist.TransformedDistribution(dist.Normal(0, 1).expand([2]), dist.transforms.OrderedTransform()),
    )
    numpyro.sample("y", dist.MultivariateNormal(shares * cuts.sum(), scale_tril=factor), obs=y)


def state_space(y):
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))

    def step(level, observed):
        x = numpyro.sample("x", dist.LogNormal(level, noise))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=observed)
        return jnp.log(x), None

    scan(step, 0.0, y)


def with_factor(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.factor("penalty", -(a**4))
    with handlers.scale(scale=3.0):
        numpyro.sample("y", dist.Normal(a, 1.0).expand([3]), obs=y)


Y = np.array([1.0, 2.0, 2.5])
MODELS = {
    "eight schools": (eight_schools, (SIGMA, EFFECT), {}),
    "non-centered": (
        handlers.reparam(eight_schools, config={"theta": LocScaleReparam(0)}),
        (SIGMA, EFFECT),
        {},
    ),
    "hierarchical": (hierarchical, (GROUP, RESPONSE), {"num_groups": 3}),
    "truncated": (truncated, (Y,), {}),
    "shapes change": (shapes_change, (Y,), {}),
    "scan": (state_space, (Y,), {}),
    "factor and scale": (with_factor, (Y,), {}),
    "conditioned": (handlers.condition(truncated, {"top": jnp.array(1.5)}), (Y,), {}),
    "transformed": (
        handlers.reparam(hierarchical, config={"noise": TransformReparam()}),
        (GROUP, RESPONSE, 3),
        {},
    ),
}


@functools.partial(jax.jit, static_argnames="oracle")
def everything(target, position, oracle=None):
    """All that a target says of a position, and what an oracle says of it and of its values."""
    values = target.constrain(position)
    return {
        "logdensity": target.logdensity_fn(position),
        "prior": target.prior.logdensity_fn(position),
        "likelihood": target.log_likelihood_fn(position),
        "jacobian": target.log_jacobian_fn(position),
        "values": values,
        "back": target.unconstrain(values),
        "oracle": oracle and oracle(position, values),
    }


draw = jax.jit(lambda prior, key: prior.sample(key))


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """The target of a NumPyro model, a position drawn from its prior, and what is said of it."""
    model, args, kwargs = MODELS[request.param]
    target = targets.from_numpyro(model, *args, **kwargs)

    def oracle(position, values):
        latent = {name: values[name] for name in position}
        joint, _ = log_density(model, args, kwargs, latent)
        return -potential_energy(model, args, kwargs, position), joint

    position = draw(target.prior, jax.random.key(1))
    return target, position, everything(target, position, oracle)


def close(dtype, atol=1e-10):
    return {"rtol": 1e-10, "atol": atol} if dtype == jnp.float64 else {"rtol": 2e-5, "atol": 2e-4}


# NumPyro models.


@pytest.mark.f32
def test_numpyro_density_is_numpyros(case, dtype):
    _, _, found = case
    whole, joint = found["oracle"]
    assert found["logdensity"].dtype == dtype
    np.testing.assert_allclose(found["logdensity"], whole, **close(dtype))
    np.testing.assert_allclose(joint + found["jacobian"], found["logdensity"], **close(dtype))
    np.testing.assert_allclose(found["prior"] + found["likelihood"], found["logdensity"], **close(dtype))


@pytest.mark.f32
def test_numpyro_values_go_there_and_back(case, dtype):
    target, position, found = case
    assert len(target.names) == len(jax.tree.leaves(found["values"]))
    assert found["back"].keys() == position.keys()
    for name, z in position.items():
        np.testing.assert_allclose(found["back"][name], z, **close(dtype, atol=1e-7))


def test_numpyro_jacobian_is_that_of_autodiff():
    target = targets.from_numpyro(truncated, Y)
    position = {"low": jnp.asarray(0.3), "mid": jnp.asarray(-0.4), "top": jnp.asarray(0.9)}
    jacobian, found = jax.jit(lambda t, z: (jax.jacfwd(t.constrain)(z), t.log_jacobian_fn(z)))(
        target, position
    )
    matrix = np.array([[jacobian[row][column] for column in position] for row in position])
    np.testing.assert_allclose(found, np.linalg.slogdet(matrix)[1], rtol=1e-10)


def test_numpyro_prior_sample_follows_its_density(key):
    """Mean of 4000 draws within 4.9 standard errors: two tests, false-fail rate about 2e-6."""
    target = targets.from_numpyro(hierarchical, GROUP, RESPONSE, 3)
    sample = jax.jit(jax.vmap(lambda k: target.constrain(target.prior.sample(k))))
    draws = sample(jax.random.split(key, 4000))
    for name, mean in (("rate", 2.0 * np.sqrt(2 / np.pi)), ("noise", np.exp(0.125))):
        assert abs(draws[name].mean() - mean) < 4.9 * draws[name].std() / np.sqrt(4000)


def test_prior_is_normalized():
    """Importance-free check: the unconstrained prior of one site integrates to one on a grid."""

    def model(y):
        scale = numpyro.sample("scale", dist.Gamma(3.0, 2.0))
        numpyro.sample("y", dist.Normal(0, scale), obs=y)

    target = targets.from_numpyro(model, 1.0)
    z = jnp.linspace(-12, 4, 4001)
    density = jnp.exp(jax.vmap(lambda v: target.prior.logdensity_fn({"scale": v}))(z))
    np.testing.assert_allclose(jnp.trapezoid(density, z), 1.0, rtol=1e-6)


def test_deterministic_sites_are_in_the_draws(key):
    target = targets.from_numpyro(eight_schools, SIGMA, EFFECT)
    assert target.names == ("mu", "spread", "tau", "theta")
    values = target.constrain(target.prior.sample(key))
    np.testing.assert_allclose(values["spread"], np.ptp(values["theta"]))

    def nested(y):
        a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.deterministic("b", {"twice": 2 * a, "list": [a, a]})

    assert targets.from_numpyro(nested, 0.0).names == ("a", "b.list.0", "b.list.1", "b.twice")


def test_factor_is_likelihood_and_scale_is_applied(dtype):
    target = targets.from_numpyro(with_factor, Y)
    a = jnp.asarray(0.7, dtype)
    expected = -(a**4) + 3.0 * dist.Normal(a, 1.0).log_prob(Y).sum()
    np.testing.assert_allclose(target.log_likelihood_fn({"a": a}), expected, rtol=1e-12)
    np.testing.assert_allclose(
        target.prior.logdensity_fn({"a": a}), dist.Normal(0, 1).log_prob(a), rtol=1e-12
    )


def scaled_and_masked(y):
    with handlers.scale(scale=2.0):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    with numpyro.plate("rows", 3), handlers.mask(mask=jnp.array([True, False, True])):
        share = numpyro.sample("share", dist.Beta(2.0, rate))
    with handlers.scope(prefix="in"), handlers.scale(scale=0.5):
        low = numpyro.sample("low", dist.LogNormal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(rate + share.sum(), low), obs=y)


@pytest.mark.f32
def test_scale_and_mask_act_on_constrained_latents_as_in_numpyro(dtype):
    z = {
        "rate": jnp.asarray(0.3, dtype),
        "share": jnp.asarray([0.1, 0.2, -0.5], dtype),
        "in/low": jnp.asarray(-0.2, dtype),
    }
    target = targets.from_numpyro(scaled_and_masked, Y)
    expected = -potential_energy(scaled_and_masked, (Y,), {}, z)
    np.testing.assert_allclose(target.logdensity_fn(z), expected, **close(dtype))
    np.testing.assert_allclose(sum(jax.tree.leaves(target.terms_fn(z))), target.logdensity_fn(z), rtol=1e-5)
    assert target.prior is None


def test_scale_and_mask_around_a_model_reach_the_jacobian(dtype):
    z = {"low": jnp.asarray(0.3, dtype), "mid": jnp.asarray(-0.4, dtype), "top": jnp.asarray(0.9, dtype)}
    plain = targets.from_numpyro(truncated, Y)
    scaled = targets.from_numpyro(handlers.scale(truncated, 2.0), Y)
    masked = targets.from_numpyro(handlers.mask(truncated, mask=False), Y)
    np.testing.assert_allclose(scaled.logdensity_fn(z), 2 * plain.logdensity_fn(z), rtol=1e-12)
    np.testing.assert_allclose(scaled.log_jacobian_fn(z), 2 * plain.log_jacobian_fn(z), rtol=1e-12)
    assert float(masked.logdensity_fn(z)) == 0
    assert scaled.prior is None
    assert masked.prior is None


def test_improper_priors_are_no_prior():
    def model(y):
        a = numpyro.sample("a", dist.ImproperUniform(constraints.positive, (), ()))
        numpyro.sample("y", dist.Normal(0, a), obs=y)

    target = targets.from_numpyro(model, Y)
    assert target.prior is None
    z = {"a": jnp.asarray(0.4)}
    np.testing.assert_allclose(
        target.logdensity_fn(z), dist.Normal(0, jnp.exp(0.4)).log_prob(Y).sum() + 0.4, rtol=1e-6
    )
    np.testing.assert_allclose(target.log_likelihood_fn(z) + 0.4, target.logdensity_fn(z), rtol=1e-6)


@pytest.mark.f32
def test_new_data_and_a_rebuilt_target_compile_nothing(count_compiles, key, dtype):
    first = targets.from_numpyro(eight_schools, SIGMA, EFFECT)
    position = jax.tree.map(lambda leaf: leaf[0], first.init(key, 2))
    everything(first, position)
    with count_compiles() as compiles:
        second = targets.from_numpyro(eight_schools, SIGMA + 1, EFFECT * 2)
        found = everything(second, position)
        second.init(key, 2)
    assert compiles.count == 0
    expected = -potential_energy(eight_schools, (SIGMA + 1, EFFECT * 2), {}, position)
    np.testing.assert_allclose(found["logdensity"], expected, **close(dtype))
    with count_compiles() as compiles:
        everything(targets.from_numpyro(lambda *args: eight_schools(*args), SIGMA, EFFECT), position)
    assert compiles.count > 0


@pytest.mark.parametrize("strategy", [init_to_median(num_samples=3), init_to_value(values={"mu": 3.0})])
def test_numpyros_init_strategies(strategy, key, count_compiles):
    target = targets.from_numpyro(eight_schools, SIGMA, EFFECT, init_strategy=strategy)
    position = target.init(key, 3)
    assert position["theta"].shape == (3, 8)
    assert np.all(np.isfinite(position["theta"]))
    if "values" in strategy.keywords:
        np.testing.assert_array_equal(position["mu"], 3.0)
        with count_compiles() as compiles:
            again = init_to_value(values={"mu": 4.0})
            position = targets.from_numpyro(eight_schools, SIGMA, EFFECT, init_strategy=again).init(key, 3)
        assert compiles.count == 0
        np.testing.assert_array_equal(position["mu"], 4.0)


def test_init_tries_again_until_finite(key):
    """Half of the plane has no density: every one of 16 starts lies in the other half (2^-100 to fail)."""

    def model(y):
        a = numpyro.sample("a", dist.Normal(0, 1))
        numpyro.factor("half", jnp.where(a > 0, 0.0, -jnp.inf))

    position = targets.from_numpyro(model, 0.0).init(key, 16)
    assert np.all(position["a"] > 0)


def test_a_start_without_finite_density_names_the_sites(key):
    target = targets.from_numpyro(eight_schools, SIGMA, np.where(EFFECT > 20, np.nan, EFFECT))
    with pytest.raises(NumericalError, match=r"start 1 of 2.*log density of \['effect'\].*gradient.*'theta'"):
        target.init(key, 2)
    prior = targets.from_prior({"a": dist.Normal(0, 1)}, lambda v: jnp.log(-1.0 - v["a"] ** 2))
    with pytest.raises(NumericalError, match=r"log density of \['log_likelihood_fn'\]"):
        prior.init(key, 1)
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        prior.init(key, 0)


def test_a_gradient_that_is_not_finite_is_no_start(key):
    """The density of sqrt(a) at a = 0 is finite, its gradient is not."""
    target = targets.from_logdensity(lambda v: -jnp.sqrt(jnp.abs(v["a"]) * 0.0), {"a": jnp.ones(())})
    with pytest.raises(NumericalError, match=r"gradient with respect to \['a'\]"):
        target.init(key, 1)


def discrete(y):
    k = numpyro.sample("label", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


def subsampled(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("rows", 3, subsample_size=2) as rows:
        numpyro.sample("y", dist.Normal(a, 1.0), obs=y[rows])


def parametric(y):
    numpyro.sample("y", dist.Normal(numpyro.param("loc", 0.0), 1.0), obs=y)


def with_param(y):
    spread = numpyro.param("spread", 1.5, constraint=constraints.positive)
    m = numpyro.sample("m", dist.Normal(0, spread))
    numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(4)(x)))[..., 0]


ROWS = np.random.default_rng(0).normal(size=(5, 3))


def flax_network(x):
    net = random_flax_module("net", Net(), prior=dist.Normal(0, 1), input_shape=(3,))
    numpyro.sample("y", dist.Normal(net(x), 1.0), obs=jnp.sin(x[:, 0]))


def nnx_network(x):
    net = random_nnx_module("net", nnx.Linear(3, 1, rngs=nnx.Rngs(0)), prior=dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(net(x)[..., 0], 1.0), obs=jnp.sin(x[:, 0]))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
        return nn.Dense(1)(nn.tanh(x))[..., 0]


def normed_network(x):
    """Batch statistics are a mutable site."""
    prior, shape = dist.Normal(0, 1), (5, 3)
    net = random_flax_module("net", Normed(), prior=prior, input_shape=shape, mutable=["batch_stats"])
    numpyro.sample("y", dist.Normal(net(x), 1.0), obs=jnp.sin(x[:, 0]))


def counts_its_runs(y):
    """The state of the first run stays, however often the density is computed."""
    state = mutable("state", {"runs": jnp.asarray(0.5)})
    state["runs"] = state["runs"] + 1
    m = numpyro.sample("m", dist.Normal(state["runs"], 1.0))
    numpyro.sample("y", dist.Normal(m, 1.0), obs=y)


FIXED = {
    "mutable": (counts_its_runs, (Y,)),
    "param": (with_param, (Y,)),
    "substituted": (handlers.substitute(with_param, {"spread": jnp.asarray(0.7)}), (Y,)),
    "learned centring": (
        handlers.reparam(eight_schools, config={"theta": LocScaleReparam()}),
        (SIGMA, EFFECT),
    ),
    "flax": (flax_network, (ROWS,)),
    "batch norm": (normed_network, (ROWS,)),
    "nnx": (nnx_network, (ROWS,)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "batch norm")) for name in FIXED]
)
def test_parameters_and_modules_are_what_numpyros_samplers_make_of_them(name):
    """The same sites, and the same density at the same position: NumPyro's own potential is the oracle."""
    model, args = FIXED[name]
    target = targets.from_numpyro(model, *args)
    theirs = initialize_model(jax.random.key(3), model, model_args=args)
    position = jax.tree.map(lambda leaf: jnp.asarray(leaf, float) * 0.5, theirs.param_info.z)
    density = jax.jit(lambda target, at: target.logdensity_fn(at))
    np.testing.assert_allclose(density(target, position), -theirs.potential_fn(position), rtol=1e-6)
    np.testing.assert_allclose(target.logdensity_fn(position), -theirs.potential_fn(position), rtol=1e-6)
    assert set(position) <= set(target.names)
    assert target.prior is not None


def test_a_point_mass_is_its_value():
    def model(y):
        x = numpyro.sample("x", dist.Delta(2.0))
        z = numpyro.sample("z", dist.Delta(jnp.ones(3), log_density=-0.25).to_event(1))
        m = numpyro.sample("m", dist.Normal(x, 1.0))
        numpyro.sample("y", dist.Normal(m + z.sum(), 1.0), obs=y)

    target = targets.from_numpyro(model, Y)
    at = {"m": jnp.asarray(0.3)}
    expected = dist.Normal(2.0, 1.0).log_prob(0.3) + dist.Normal(3.3, 1.0).log_prob(Y).sum() - 0.75
    np.testing.assert_allclose(target.logdensity_fn(at), expected, rtol=1e-6)
    assert target.names == ("m", "x", "z")
    values = target.constrain(at)
    assert float(values["x"]) == 2.0
    np.testing.assert_array_equal(values["z"], 1.0)


def observed(y):
    numpyro.sample("y", dist.Normal(0, 1), obs=y)


def spherical(y):
    numpyro.sample("direction", dist.ProjectedNormal(jnp.ones(3)))


def sized_by_data(y):
    a = numpyro.sample("a", dist.Normal(0, 1).expand([int(y.max())]))
    numpyro.sample("y", dist.Normal(a[0], 1.0), obs=y)


def selects_rows(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(a, 1.0), obs=y[y > 1])


def unique_rows(y):
    a = numpyro.sample("a", dist.Normal(0, 1).expand([len(np.unique(y))]))
    numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (discrete, "site 'label' is a discrete latent variable.*MixtureSameFamily.*enumerating"),
        (subsampled, "plate 'rows' draws a new subsample.*targets.minibatch"),
        (parametric, "no latent site"),
        (observed, "no latent site"),
        (spherical, "spherical sample site 'direction'"),
        (sized_by_data, r"looks at the values of its array arguments.*np\.asarray"),
        (selects_rows, "looks at the values of its array arguments"),
        (unique_rows, "looks at the values of its array arguments"),
        (handlers.seed(with_factor, 0), "wrapped in handlers.seed"),
    ],
)
def test_models_that_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        targets.from_numpyro(model, jnp.asarray(Y))


@pytest.mark.parametrize("model", [sized_by_data, selects_rows, unique_rows])
def test_numpy_arrays_may_be_looked_at_and_new_values_are_seen(model):
    """Their values belong to the model: the density is NumPyro's for each of two data sets of one shape."""
    for y in (Y, Y[::-1] * 2.0):
        target = targets.from_numpyro(model, y)
        z = jax.tree.map(jnp.zeros_like, target.prior.sample(jax.random.key(0)))
        expected, _ = log_density(model, (y,), {}, z)
        assert float(jax.jit(lambda fn, at: fn(at))(target.logdensity_fn, z)) == pytest.approx(
            float(expected)
        )


def two_means(y, *, sizes=(1, 2)):
    a = numpyro.sample("a", dist.Normal(0, 1).expand([sizes[1]]))
    numpyro.sample("y", dist.Normal(a[0], 1.0), obs=y)


def test_a_list_of_floating_numbers_is_an_array_and_one_of_sizes_a_list():
    position = {"a": jnp.asarray([0.3, -0.2])}
    for listed, array in (
        ([0.1, 0.2], np.array([0.1, 0.2])),
        ([[0.1, 2], [3, 4.0]], np.array([[0.1, 2], [3, 4.0]])),
    ):
        listed, array = (targets.from_numpyro(two_means, y=y, sizes=[1, 2]) for y in (listed, array))
        assert listed.logdensity_fn(position) == array.logdensity_fn(position)
        assert jax.tree.structure(listed) == jax.tree.structure(array)


def test_a_target_is_one_line():
    target = targets.from_numpyro(two_means, Y)
    assert repr(target) == "Target(a: log density, prior, likelihood)"
    many = targets.from_logdensity(
        lambda v: sum(jnp.sum(x) for x in v.values()), {f"x{i}": 0.0 for i in range(20)}
    )
    assert repr(many).endswith("x14, x15, ... (20 in all): log density)")


def test_bound_arrays_may_be_looked_at(key):
    target = targets.from_numpyro(functools.partial(sized_by_data, Y))
    assert target.prior.sample(key)["a"].shape == (2,)


def test_numpyro_values_that_do_not_fit_are_refused():
    target = targets.from_numpyro(eight_schools, SIGMA, EFFECT)
    values = {"mu": 0.0, "tau": 1.0, "theta": np.zeros(8)}
    with pytest.raises(ValueError, match=r"latent sites \['tau'\] are missing"):
        target.unconstrain({"mu": 0.0, "theta": np.zeros(8)})
    with pytest.raises(ValueError, match="leaf 'tau' lies on the boundary"):
        target.unconstrain(values | {"tau": 0.0})
    with pytest.raises(ValueError, match=r"site 'theta' has shape \(8,\)"):
        target.unconstrain(values | {"theta": np.zeros(7)})


# Log densities and priors.


def gamma_normal(weights, values):
    return -values["rate"] + jnp.sum(weights * values["slopes"] ** 2)


@pytest.mark.f32
def test_from_logdensity_pulls_back_once(dtype, key):
    weights = jnp.asarray([-1.0, -2.0], dtype)
    example = {"rate": jnp.ones((), dtype), "slopes": jnp.zeros(2, dtype)}
    target = targets.from_logdensity(
        LogDensity(gamma_normal, weights), example, {"rate": constraints.positive, "slopes": None}
    )
    z = {"rate": jnp.asarray(0.3, dtype), "slopes": jnp.asarray([0.5, -1.0], dtype)}
    expected = -np.exp(0.3) + 0.3 - 0.25 - 2.0
    np.testing.assert_allclose(target.logdensity_fn(z), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda t, z: t.logdensity_fn(z))(target, z), expected, rtol=1e-6)
    assert target.names == ("rate", "slopes")
    assert target.prior is None
    assert target.log_likelihood_fn is None
    assert not target.stochastic
    positions = target.init(key, 5)
    assert positions["slopes"].shape == (5, 2)
    assert positions["slopes"].dtype == dtype
    assert np.all(np.abs(positions["slopes"]) <= 2.0)
    np.testing.assert_allclose(target.constrain(target.unconstrain(example))["rate"], 1.0, rtol=1e-6)


@pytest.mark.f32
def test_targets_vmap_over_positions_and_data(dtype):
    def log_density(scale, value):
        return -scale * value**2

    z = jnp.asarray([0.1, 0.5], dtype)

    def at(scale, z):
        return targets.from_logdensity(LogDensity(log_density, scale), jnp.ones((), dtype)).logdensity_fn(z)

    found = jax.jit(jax.vmap(at))(jnp.asarray([1.0, 2.0], dtype), z)
    np.testing.assert_allclose(found, [-0.01, -0.5], rtol=1e-5)
    target = targets.from_logdensity(LogDensity(log_density, jnp.asarray(2.0, dtype)), jnp.ones((), dtype))
    np.testing.assert_allclose(jax.vmap(target.logdensity_fn)(z), [-0.02, -0.5], rtol=1e-5)
    assert target.names == ("value",)


def test_a_float32_example_stays_float32():
    """In a 64-bit process: positions, densities and prior draws keep the dtype of the example."""
    example = {"rate": jnp.ones((), jnp.float32), "shares": jnp.full(3, 1 / 3, jnp.float32)}
    prior = {"rate": dist.LogNormal(2.0, 1.0), "shares": dist.Dirichlet(np.ones(3))}

    def log_density(values):
        return -values["rate"] + jnp.sum(values["shares"] ** 2)

    target = targets.from_logdensity(log_density, example, prior=prior, log_likelihood_fn=log_density)
    z = jax.eval_shape(draw, target.prior, jax.random.key(0))
    found = jax.eval_shape(everything, target, z)
    assert {leaf.dtype for leaf in jax.tree.leaves((z, found))} == {jnp.dtype(jnp.float32)}


PRIORS = {
    "mean": dist.Normal(1.0, 2.0).expand([2]).to_event(1),
    "cov": dist.Normal(0.0, 1.0).expand([3, 1]).to_event(2),
    "scale": dist.HalfNormal(np.array([1.0, 2.0])),
    "order": dist.TransformedDistribution(dist.Normal(0, 1).expand([3]), dist.transforms.OrderedTransform()),
    "window": dist.Uniform(-1.0, 3.0),
}


def log_likelihood(data, values):
    return jnp.sum(data * values["mean"]) + values["window"] * values["cov"][2, 0] - values["scale"].sum()


@pytest.mark.f32
def test_from_prior_is_prior_plus_likelihood(dtype, key):
    data = jnp.asarray([0.3, 0.4], dtype)
    target = targets.from_prior(PRIORS, LogDensity(log_likelihood, data))
    assert target.names == ("cov", "mean", "order", "scale", "window")
    z = draw(target.prior, key)

    def log_prior(values):
        return sum(PRIORS[name].log_prob(values[name]).sum() for name in PRIORS)

    def oracle(position, values):
        return log_prior(values), log_likelihood(data, values)

    found = everything(target, z, oracle)
    assert found["logdensity"].dtype == dtype
    prior, likelihood = found["oracle"]
    np.testing.assert_allclose(found["prior"], prior + found["jacobian"], **close(dtype))
    np.testing.assert_allclose(found["likelihood"], likelihood, **close(dtype))
    np.testing.assert_allclose(found["prior"] + found["likelihood"], found["logdensity"], **close(dtype))
    whole = targets.from_logdensity(
        lambda values: log_prior(values) + log_likelihood(data, values),
        found["values"],
        prior=PRIORS,
        log_likelihood_fn=LogDensity(log_likelihood, data),
    )
    again = everything(whole, z)
    for name in ("logdensity", "prior", "likelihood", "jacobian"):
        np.testing.assert_allclose(again[name], found[name], **close(dtype))


def test_new_hyperparameters_of_the_prior_compile_nothing(count_compiles, key):
    def likelihood(values):
        return -values["a"]

    def target(loc):
        return targets.from_prior({"a": dist.LogNormal(loc, 1.0)}, likelihood)

    position = target(0.3).prior.sample(key)
    everything(target(0.3), position)
    with count_compiles() as compiles:
        found = everything(target(0.7), position)
    assert compiles.count == 0
    np.testing.assert_allclose(found["prior"], dist.Normal(0.7, 1.0).log_prob(position["a"]), rtol=1e-12)


@pytest.mark.f32
def test_prior_draws_on_the_boundary_are_finite(dtype, key):
    """Gamma(1e-3) variates underflow to zero, whose logarithm is minus infinity."""
    target = targets.from_prior(dist.Gamma(1e-3, 1.0).expand([50]), lambda v: -v.sum())
    position = draw(target.prior, key)
    assert np.all(np.isfinite(position))
    assert np.isfinite(jax.jit(lambda prior, z: prior.logdensity_fn(z))(target.prior, position))


def test_improper_trees_have_no_prior(key):
    target = targets.from_prior(
        {"a": dist.ImproperUniform(constraints.positive, (), (2,)), "b": dist.Normal(0, 1)},
        lambda v: -jnp.sum(v["a"]),
    )
    assert target.prior is None
    z = {"a": jnp.asarray([0.1, 0.2]), "b": jnp.zeros(())}
    expected = -np.exp([0.1, 0.2]).sum() + 0.3 + dist.Normal(0, 1).log_prob(0.0)
    np.testing.assert_allclose(target.logdensity_fn(z), expected, rtol=1e-6)
    assert target.init(key, 2)["a"].shape == (2, 2)


def test_a_prior_may_be_given_on_unconstrained_space(key):
    def sample(key):
        return {"a": jax.random.normal(key)}

    def log_prior(position):
        return dist.Normal(0, 1).log_prob(position["a"])

    def build(prior):
        return targets.from_logdensity(
            lambda v: -v["a"], {"a": 1.0}, {"a": constraints.positive}, prior=prior
        )

    target = build(targets.Prior(sample, log_prior))
    position = jax.jit(lambda t, k: t.prior.sample(k))(target, key)
    np.testing.assert_allclose(target.prior.logdensity_fn(position), log_prior(position))
    with pytest.raises(ValueError, match="unconstrained position with the structure"):
        build(targets.Prior(lambda key: {"b": jax.random.normal(key)}, log_prior))


def minus_sum(values):
    return -sum(jnp.sum(leaf) for leaf in jax.tree.leaves(values))


ONE = {"a": np.ones(2)}


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"example": {"a": np.ones(2, int)}}, TypeError, "leaf 'a' of the example must be floating point"),
        ({"example": {"a": np.array([1.0, np.inf])}}, ValueError, r"leaf 'a' of the example has 1 entries"),
        ({"example": {}}, ValueError, "nothing to infer"),
        (
            {"example": {"a": -np.ones(2)}, "constraints": {"a": constraints.positive}},
            ValueError,
            "leaf 'a' is outside",
        ),
        ({"constraints": {"b": None}}, ValueError, "structure of the example"),
        (
            {"constraints": {"a": constraints.greater_than(np.zeros((3, 2)))}},
            ValueError,
            r"constraint has \(3, 2\)",
        ),
        ({"logdensity_fn": lambda v: v["a"]}, ValueError, r"logdensity_fn must return one floating number"),
        ({"logdensity_fn": lambda v: 1}, ValueError, r"logdensity_fn must return one floating number"),
        (
            {"log_likelihood_fn": lambda v: v["a"]},
            ValueError,
            "log_likelihood_fn must return one floating number",
        ),
        ({"prior": {"a": dist.Normal(0, 1)}}, ValueError, r"leaf 'a' has shape \(2,\).*expand\(\(2,\)\)"),
        ({"prior": {"b": dist.Normal(0, 1)}}, ValueError, "priors do not fit the example"),
        ({"prior": {"a": 1.0}}, TypeError, "leaf 'a' of the priors must be a numpyro distribution"),
        ({"prior": {"a": dist.Poisson(1.0).expand([2])}}, ValueError, "leaf 'a': the support .* is discrete"),
        (
            {"constraints": {"a": constraints.positive}, "prior": {"a": dist.Normal(0, 1).expand([2])}},
            ValueError,
            "leaf 'a' is constrained to .*the support Real.*LogNormal, Gamma or HalfNormal",
        ),
    ],
)
def test_bad_input_of_from_logdensity(kwargs, error, message):
    given = {"logdensity_fn": minus_sum, "example": ONE} | kwargs
    with pytest.raises(error, match=message):
        targets.from_logdensity(**given)


def test_what_is_not_a_function_is_refused():
    with pytest.raises(TypeError, match="log_likelihood_fn must be a function"):
        check_scalar("log_likelihood_fn", np.ones(2), ONE)
    with pytest.raises(TypeError, match="first argument must be a function"):
        LogDensity(np.ones(2))


def test_priors_on_the_constrained_set_pass():
    prior = {"a": dist.HalfNormal(1.0).expand([2])}
    target = targets.from_logdensity(minus_sum, ONE, {"a": constraints.positive}, prior=prior)
    z = {"a": jnp.zeros(2)}
    expected = 2 * dist.HalfNormal(1.0).log_prob(1.0)
    np.testing.assert_allclose(target.prior.logdensity_fn(z), expected, rtol=1e-6)


def test_values_of_the_wrong_shape_are_refused():
    target = targets.from_logdensity(minus_sum, ONE, {"a": constraints.positive})
    with pytest.raises(ValueError, match=r"leaf 'a' gives an unconstrained position of shape \(3,\)"):
        target.unconstrain({"a": np.ones(3)})
    with pytest.raises(ValueError, match="the trees differ"):
        target.unconstrain({"b": np.ones(2)})


@pytest.mark.parametrize(
    ("first", "second", "shape", "same"),
    [
        (constraints.positive, constraints.nonnegative, (2,), True),
        (constraints.positive, constraints.greater_than(0.0), (2,), True),
        (constraints.positive, constraints.softplus_positive, (2,), True),
        (constraints.unit_interval, constraints.interval(0.0, 1.0), (), True),
        (constraints.real, constraints.independent(constraints.real, 1), (2,), True),
        (constraints.interval(0.0, 2.0), constraints.interval(0.0, 2.0), (), True),
        (constraints.positive, constraints.real, (2,), False),
        (constraints.real, constraints.positive, (2,), False),
        (constraints.interval(0.0, 2.0), constraints.interval(0.0, 1.5), (), False),
        (constraints.simplex, constraints.unit_interval, (3,), False),
        (constraints.simplex, constraints.simplex, (3,), True),
        (constraints.corr_cholesky, constraints.lower_cholesky, (3, 3), False),
    ],
)
def test_supports_are_compared_as_sets(first, second, shape, same):
    assert same_support(transforms.bijector(first), transforms.bijector(second), shape) is same


# The target and the bound functions as pytrees.


def test_targets_are_pytrees_and_replaceable(key):
    target = targets.from_prior({"a": dist.LogNormal(0.0, 1.0)}, minus_sum)
    rebuilt = jax.tree.unflatten(jax.tree.structure(target), jax.tree.leaves(target))
    z = {"a": jnp.asarray(0.2)}
    assert rebuilt.logdensity_fn(z) == target.logdensity_fn(z)
    assert rebuilt.names == ("a",)
    doubled = dataclasses.replace(target, logdensity_fn=LogDensity(lambda z: 2.0 * z["a"]))
    assert doubled.logdensity_fn(z) == 0.4
    assert all(leaf is not None for leaf in jax.tree.leaves(jax.tree.map(lambda _: object(), target)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.names = ("b",)


def test_a_preferred_start_comes_first(key):
    target = targets.from_prior({"a": dist.LogNormal(0.0, 1.0)}, minus_sum)
    start = target.unconstrain({"a": 3.0})
    positions = dataclasses.replace(target, start=start).init(key, 3)
    np.testing.assert_allclose(positions["a"][0], np.log(3.0))
    assert len(set(np.asarray(positions["a"]).tolist())) == 3
    candidates = dataclasses.replace(target, start=start).candidates(key, 3)
    np.testing.assert_allclose(candidates["a"][0], np.log(3.0))
    assert len(set(np.asarray(candidates["a"]).tolist())) == 3
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        target.candidates(key, 0)


def test_init_under_jit_returns_without_raising(key):
    target = targets.from_prior({"a": dist.Normal(0.0, 1.0)}, lambda v: jnp.log(-1.0 - v["a"] ** 2))
    positions = jax.jit(lambda t, k: t.init(k, 2))(target, key)
    assert positions["a"].shape == (2,)


def scaled(weights, options, value, *, shift=0.0):
    return jnp.sum(weights * value) * options["power"] + shift


@pytest.mark.f32
def test_bound_arrays_are_data_and_the_rest_is_static(count_compiles, dtype):
    run = jax.jit(lambda fn, value: fn(value))
    value = jnp.asarray([1.0, 2.0], dtype)

    def build(weights, power, shift):
        return LogDensity(
            scaled, jnp.asarray(weights, dtype), {"power": power}, shift=np.asarray(shift, dtype)
        )

    first = build([1.0, 1.0], 2, 0.0)
    assert len(jax.tree.leaves(first)) == 2
    assert run(first, value) == 6.0
    with count_compiles() as compiles:
        assert run(build([2.0, 0.0], 2, 5.0), value) == 9.0
    assert compiles.count == 0
    with count_compiles() as compiles:
        assert run(build([1.0, 1.0], 3, 0.0), value) == 9.0
    assert compiles.count > 0
    with count_compiles() as compiles:
        run(LogDensity(lambda *args: scaled(*args), jnp.ones(2, dtype), {"power": 2}), value)
    assert compiles.count > 0


def test_static_leaves_compare_by_type_and_value():
    def structure(*args):
        return jax.tree.structure(Bound(minus_sum, *args))

    assert structure({1, 2}) == structure({2, 1}) != structure({1, 3})
    assert structure(iter(())) != structure(
        x for x in ()
    )  # a generator cannot be read: it is known by its object
    assert structure(x for x in ()) != structure(x for x in ())
    assert structure("a", 1) == structure("a", 1)
    assert structure(1) != structure(1.0)
    assert structure(1) != structure(True)
    assert hash(structure("a")) == hash(structure("a"))


def test_bound_functions_nest_and_keep_python_sizes():
    inner = LogDensity(lambda data, value: jnp.sum(data) * value, jnp.ones(3))
    outer = LogDensity(lambda fn, size, value: fn(value) * jnp.zeros(size).size, inner, np.int64(4))
    assert len(jax.tree.leaves(outer)) == 1
    assert jax.jit(lambda fn, value: fn(value))(outer, 2.0) == 24.0
    partial = jax.tree_util.Partial(lambda data, value: jnp.sum(data) * value, jnp.ones(3))
    assert len(jax.tree.leaves(Bound(partial))) == 1


# Minibatches.

ROWS = {"x": np.linspace(-1, 1, 7), "y": np.array([0.1, 2.0, -1.0, 0.4, 0.9, -3.0, 1.1])}


def log_prior(values):
    return dist.LogNormal(0.0, 1.0).log_prob(values["scale"])


def row_log_likelihood(values, rows):
    return dist.Normal(rows["x"], values["scale"]).log_prob(rows["y"])


def minibatch(batch_size, rows=ROWS, fn=row_log_likelihood):
    example = {"scale": jnp.ones(())}
    return targets.minibatch(
        log_prior, fn, rows, batch_size, example=example, constraints={"scale": constraints.positive}
    )


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7])
def test_every_row_is_drawn_equally_often(batch_size):
    """By enumeration of the uniform integer of every stratum: the mean count of each row is exactly b / n."""
    rows = [stratified_rows(jnp.full(batch_size, r, jnp.int32), 7) for r in range(7)]
    counts = np.bincount(np.concatenate(rows), minlength=7)
    np.testing.assert_array_equal(counts, batch_size)


def test_rows_of_large_data_do_not_overflow():
    num_rows = 2**30
    last = stratified_rows(jnp.full(1000, num_rows - 1, jnp.int32), num_rows)
    first = stratified_rows(jnp.zeros(1000, jnp.int32), num_rows)
    assert last[-1] == num_rows - 1
    assert first[0] == 0
    assert np.all(last >= first)
    assert np.all(first[1:] >= last[:-1])


@pytest.mark.f32
def test_minibatch_is_unbiased(key, dtype):
    """Mean of 20000 estimates within 4.9 standard errors of the full sum: false-fail rate 1e-6."""
    target = minibatch(3, jax.tree.map(lambda leaf: leaf.astype(dtype), ROWS))
    assert target.stochastic
    assert isinstance(target.logdensity_fn, StochasticLogDensity)
    z = {"scale": jnp.asarray(0.2, dtype)}
    estimates = jax.jit(jax.vmap(target.logdensity_fn, (0, None)))(jax.random.split(key, 20000), z)
    expected = minibatch(7).logdensity_fn(key, {"scale": jnp.asarray(0.2)})
    estimates = np.asarray(estimates, np.float64)
    assert estimates.std() > 0
    assert abs(estimates.mean() - expected) < 4.9 * estimates.std() / np.sqrt(len(estimates))


def test_all_rows_are_the_exact_log_density(key, count_compiles):
    target = minibatch(7)
    exact = targets.from_logdensity(
        lambda v: log_prior(v) + row_log_likelihood(v, ROWS).sum(),
        {"scale": 1.0},
        {"scale": constraints.positive},
    )
    z = {"scale": jnp.asarray(0.2)}
    np.testing.assert_allclose(target.logdensity_fn(key, z), exact.logdensity_fn(z), rtol=1e-12)
    summed = minibatch(7, fn=lambda values, rows: row_log_likelihood(values, rows).sum())
    np.testing.assert_allclose(summed.logdensity_fn(key, z), exact.logdensity_fn(z), rtol=1e-12)
    run = jax.jit(lambda t, k, z: t.logdensity_fn(k, z))
    run(target, key, z)
    with count_compiles() as compiles:
        run(minibatch(7, {"x": ROWS["x"] + 1, "y": ROWS["y"]}), key, z)
    assert compiles.count == 0
    assert np.all(np.isfinite(target.init(key, 2)["scale"]))


@pytest.mark.parametrize(
    ("batch_size", "rows", "fn", "error", "message"),
    [
        (0, ROWS, row_log_likelihood, ValueError, "between 1 and the number of rows 7, got 0"),
        (8, ROWS, row_log_likelihood, ValueError, "between 1 and the number of rows 7, got 8"),
        (2.5, ROWS, row_log_likelihood, TypeError, "int"),
        (2, {"x": np.ones(3), "y": np.ones(4)}, row_log_likelihood, ValueError, "share one leading axis"),
        (2, {"x": np.float64(1.0)}, row_log_likelihood, ValueError, "share one leading axis"),
        (2, ROWS, lambda v, rows: jnp.ones((2, 2)), ValueError, r"log likelihoods of the rows, shape \(2,\)"),
    ],
)
def test_bad_input_of_minibatch(batch_size, rows, fn, error, message):
    with pytest.raises(error, match=message):
        minibatch(batch_size, rows, fn)
