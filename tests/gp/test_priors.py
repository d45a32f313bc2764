"""Prior trees: defaults, replacement, fixed and tied leaves, and priors that do not fit."""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from probinfer import gp
from probinfer.gp.hyperparameters.posterior import FreeHyperparameters, free_hyperparameters, rebuild
from probinfer.gp.model.leaves import get_leaf, leaf_names

X = np.random.default_rng(0).normal(size=(20, 3)) * np.array([1.0, 10.0, 0.1])
Y = np.sin(X[:, 0])


def model():
    kernel = gp.kernels.RBF(1.0, jnp.ones(3)) + gp.kernels.Periodic() * gp.kernels.Linear()
    return gp.Model(kernel, gp.likelihoods.Gaussian(0.1), gp.means.Constant(0.0))


def test_names_are_dotted_paths_in_the_order_of_the_leaves():
    names = leaf_names(gp.Model(gp.kernels.RBF(1.0, jnp.ones(3))))
    assert set(names) == {"kernel.variance", "kernel.lengthscale", "likelihood.variance"}


def test_every_hyperparameter_has_a_default_prior_with_its_shape_and_support():
    prior = gp.default_prior(model(), X)
    free, priors = free_hyperparameters(model(), prior)
    assert set(free.names) == set(leaf_names(model()))
    for name, value in free.values(model()).items():
        assert priors[name].batch_shape == np.shape(value)


def test_lengthscale_prior_follows_dimension_and_spread():
    """Median of LogNormal(√2 + ½ log D + log sd)."""
    prior = gp.default_prior(gp.Model(gp.kernels.RBF(1.0, jnp.ones(3))), X)
    median = np.exp(np.asarray(prior.kernel.lengthscale.loc))
    np.testing.assert_allclose(median, np.exp(np.sqrt(2)) * np.sqrt(3) * X.std(0), rtol=1e-6)
    shared = gp.default_prior(gp.Model(gp.kernels.RBF(1.0, 1.0)), X)
    np.testing.assert_allclose(
        np.exp(np.asarray(shared.kernel.lengthscale.loc)),
        np.exp(np.sqrt(2) + np.log(X.std(0)).mean()) * np.sqrt(3),
    )


def test_replace_leaves_the_rest_and_names_what_is_there():
    prior = gp.default_prior(model(), X)
    changed = gp.replace(prior, {"likelihood.variance": dist.Gamma(2.0, 3.0), "mean.value": gp.fixed})
    assert isinstance(changed.likelihood.variance, dist.Gamma)
    assert changed.mean.value is gp.fixed
    assert isinstance(prior.likelihood.variance, dist.LogNormal)
    with pytest.raises(KeyError, match=r"has variance and not 'varience'"):
        gp.replace(prior, {"likelihood.varience": gp.fixed})


def test_fixed_and_tied_leaves_are_not_free():
    prior = gp.replace(gp.default_prior(model(), X), {"mean.value": gp.fixed})
    names = [name for name in leaf_names(model()) if name.endswith("variance") and name.startswith("kernel")]
    prior = gp.tie(prior, names[0], names[1])
    free, _ = free_hyperparameters(model(), prior)
    assert names[1] not in free.names
    assert "mean.value" not in free.names
    values = {name: jnp.full(np.shape(get_leaf(model(), name)), 7.0) for name in free.names}
    rebuilt = rebuild(free, model(), values)
    assert get_leaf(rebuilt, names[0]) == get_leaf(rebuilt, names[1]) == 7.0
    assert rebuilt.mean.value == 0.0


def test_rebuild_inverts_values():
    free = FreeHyperparameters(leaf_names(model()))
    rebuilt = rebuild(free, model(), free.values(model()))
    for name in free.names:
        np.testing.assert_array_equal(get_leaf(rebuilt, name), get_leaf(model(), name))


def test_target_is_evidence_times_prior():
    free, target = gp.hyper_posterior(
        model(), gp.default_prior(model(), X), jnp.asarray(X), jnp.asarray(Y), gp.Exact()
    )
    position = target.unconstrain(free.values(model()))
    prior = gp.default_prior(model(), X)
    log_prior = sum(jnp.sum(get_leaf(prior, name).log_prob(get_leaf(model(), name))) for name in free.names)
    wanted = (
        gp.log_evidence(model(), jnp.asarray(X), jnp.asarray(Y))
        + log_prior
        + target.log_jacobian_fn(position)
    )
    np.testing.assert_allclose(target.logdensity_fn(position), wanted, rtol=1e-10)


def bad(**changes):
    return gp.replace(
        gp.default_prior(model(), X), {name.replace("__", "."): value for name, value in changes.items()}
    )


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        (
            lambda: bad(likelihood__variance=dist.Normal(0.0, 1.0)),
            ValueError,
            "LogNormal, Gamma or HalfNormal",
        ),
        (lambda: bad(likelihood__variance=dist.Poisson(3.0)), ValueError, "discrete"),
        (lambda: bad(likelihood__variance=dist.Uniform(1.0, 2.0)), ValueError, "outside the support"),
        (lambda: bad(likelihood__variance=dist.LogNormal(np.zeros(2), 1.0)), ValueError, r"shape \(2,\)"),
        (lambda: bad(likelihood__variance=3.0), TypeError, "got ArrayImpl|got float"),
        (lambda: gp.default_prior(gp.Model(gp.kernels.RBF(1.0, 1.0)), X), ValueError, "nothing for"),
        (lambda: gp.tie(gp.default_prior(model(), X), "mean.value"), ValueError, "at least one other"),
        (
            lambda: gp.tie(bad(mean__value=gp.fixed), "mean.value", "likelihood.variance"),
            ValueError,
            "has a distribution",
        ),
        (
            lambda: gp.tie(gp.default_prior(model(), X), "kernel.terms.0.lengthscale", "mean.value"),
            ValueError,
            "shapes differ",
        ),
    ],
)
def test_priors_that_do_not_fit(prior, error, message):
    with pytest.raises(error, match=message):
        free_hyperparameters(model(), prior())


def test_nothing_to_learn():
    simple = gp.Model(gp.kernels.RBF())
    prior = gp.replace(gp.default_prior(simple, X), dict.fromkeys(leaf_names(simple), gp.fixed))
    with pytest.raises(ValueError, match="nothing is left to learn"):
        free_hyperparameters(simple, prior)
