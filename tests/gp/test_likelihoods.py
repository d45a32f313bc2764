"""Likelihoods and their moments against scipy, extended precision and the golden numbers of a separate derivation."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from scipy import special

from probinfer import gp
from probinfer.core.types import field, pytree
from probinfer.gp import likelihoods
from probinfer.gp.model.likelihoods import moments
from probinfer.gp.model.likelihoods.counts import log_gamma_ratio
from probinfer.gp.model.likelihoods.probit import (
    inverse_mills,
    log_ndtr,
    log_ndtr_derivatives,
    truncated_variance,
)
from tests.params import quick
from tests.reference.likelihoods import LOG_DENSITIES, integrals
from tests.reference.likelihoods import log_ndtr_derivatives as extended_derivatives

M = np.array([0.3, -1.4, 2.0, -6.0])
V = np.array([0.5, 1.2, 0.3, 0.8])
LAM1 = np.array([0.1, 0.4, -0.3, -0.6])
LAM2 = np.array([0.3, 0.2, -0.1, 0.05])
LABELS, COUNTS, REALS = np.array([1.0, 0, 0, 1]), np.array([2.0, 0, 11, 1]), np.array([0.1, -2.5, 2.2, -4.0])

# name: likelihood, outputs, the reference's parameters, relative tolerance of 128 nodes
CASES = {
    "probit": (likelihoods.Bernoulli(), LABELS, (), 1e-9),
    "logit": (likelihoods.Bernoulli("logit"), LABELS, (), 1e-9),
    "poisson": (likelihoods.Poisson(), COUNTS, (), 1e-9),
    "negative binomial": (likelihoods.NegativeBinomial(0.4), COUNTS, (0.4,), 1e-9),
    "student": (likelihoods.StudentT(1.3, 3.5), REALS, (1.3, 3.5), 1e-7),
    "gaussian": (likelihoods.Gaussian(0.3), REALS, (0.3,), 1e-9),
}
SMOOTH = [name for name in CASES if name != "gaussian"]


def arrays(dtype, *values):
    return [jnp.asarray(value, dtype) for value in values]


def case(name, dtype):
    likelihood, y, params, rtol = CASES[name]
    likelihood = jax.tree.map(lambda leaf: leaf.astype(dtype), likelihood)
    return likelihood, jnp.asarray(y, dtype), lambda i: lambda f: LOG_DENSITIES[name](y[i], f, *params), rtol


# The probit


@pytest.mark.parametrize(
    "z", [-1e4, -1e3, -100.0, -30.0, -10.0, -5.0, -3.01, -2.99, -1.0, 0.0, 0.7, 3.0, 6.0]
)
def test_probit_derivatives_in_extended_precision(z):
    got = moments.derivatives(likelihoods.Bernoulli(), jnp.ones(1), jnp.asarray([z]))
    np.testing.assert_allclose(got[0][0], special.log_ndtr(z), rtol=2e-15 if z < -2 else 1e-12)
    for order, wanted in enumerate(extended_derivatives(z), 1):
        np.testing.assert_allclose(got[order][0], wanted, rtol=(0, 1e-14, 1e-13, 1e-11)[order], err_msg=order)


def test_probit_to_any_order_and_beyond_the_range():
    z = jnp.asarray([-1e3, -3.1, -2.9, 1.0])
    fn = truncated_variance  # 1 + second derivative
    slope = jax.jit(jax.vmap(jax.grad(fn)))
    third, fourth = slope(z), jax.jit(jax.vmap(jax.grad(jax.grad(fn))))(z)
    step = 1e-4 * (1 + jnp.abs(z))
    difference = [slope(z + s * step) for s in (-2, -1, 1, 2)]
    wanted = (difference[0] - 8 * difference[1] + 8 * difference[2] - difference[3]) / (12 * step)
    np.testing.assert_allclose(fourth, wanted, rtol=1e-6)
    np.testing.assert_allclose(third, [extended_derivatives(float(x))[2] for x in z], rtol=1e-12)
    far = jnp.asarray([-1e8, 1e8])
    np.testing.assert_allclose(inverse_mills(far), [1e8, 0.0], rtol=1e-12)
    np.testing.assert_allclose(log_ndtr(far), [-5e15, 0.0], rtol=1e-12)
    assert np.isfinite(jax.vmap(jax.grad(fn))(far)).all()


@pytest.mark.f32
def test_derivatives_from_one_fraction_are_those_of_the_single_functions(dtype):
    """Also one order higher, from the derivative rule."""
    z = jnp.asarray([-40.0, -8.0, -3.01, -2.99, -1.01, -0.99, 0.0, 3.0, 9.0], dtype)
    one = jnp.ones_like(z)

    def chain(z):
        first = inverse_mills(z)
        second = jax.jvp(inverse_mills, (z,), (one,))[1]
        third = jax.jvp(lambda z: jax.jvp(inverse_mills, (z,), (one,))[1], (z,), (one,))[1]
        return log_ndtr(z), first, second, third

    rtol = 1e-13 if dtype == jnp.float64 else 2e-5
    both = jax.jit(lambda z: [jax.jvp(fn, (z,), (one,)) for fn in (log_ndtr_derivatives, chain)])
    (got, dgot), (wanted, dwanted) = both(z)
    for a, b in zip((*got, *dgot), (*wanted, *dwanted), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-30)


@pytest.mark.f32
def test_truncated_variance_keeps_its_digits(dtype):
    z = jnp.asarray([-1e3, -30.0, -3.0, -2.0, 0.0, 4.0], dtype)
    wanted = [1 / 1e6 * (1 - 6e-6), *(1 + extended_derivatives(float(x))[1] for x in z[1:])]
    np.testing.assert_allclose(
        jax.jit(truncated_variance)(z), wanted, rtol=1e-9 if dtype == jnp.float64 else 3e-6
    )


# Integrals


@pytest.mark.f32
@pytest.mark.parametrize("name", quick(CASES, "logit", "poisson", "student"))
def test_ratio_and_tilted_moments_by_quadrature(name, dtype):
    likelihood, y, log_density, rtol = case(name, dtype)
    data = arrays(dtype, M, V, LAM1, LAM2)
    tolerance = {"rtol": rtol, "atol": rtol} if dtype == jnp.float64 else {"rtol": 3e-5, "atol": 3e-5}

    def both(likelihood, *args):
        return [
            (
                moments.log_ratio(likelihood, *args, power, 128),
                *moments.tilted_moments(likelihood, *args, power, 128),
            )
            for power in (1.0, 0.5)
        ]

    for power, got in zip((1.0, 0.5), jax.jit(both)(likelihood, y, *data)):
        assert all(value.dtype == dtype for value in got)
        for i in range(len(M)):

            def log_weight(f, i=i, power=power):
                return power * (log_density(i)(f) - LAM1[i] * f + 0.5 * LAM2[i] * f**2)

            log_total, first, second = integrals(log_weight, M[i], V[i], [lambda f: f, lambda f: f**2])
            wanted = log_total, first, second - first**2
            np.testing.assert_allclose([value[i] for value in got], wanted, **tolerance)


def poisson_log_density(y, f):
    return y * f - jnp.exp(f) - jax.scipy.special.gammaln(y + 1)


FAR = {  # likelihood, the reference's name and parameters, outputs
    "poisson": (likelihoods.Poisson(), "poisson", (), [1e4, 0, 3, 500]),
    "own, concave": (
        likelihoods.FromLogDensity(poisson_log_density, concave=True),
        "poisson",
        (),
        [1e4, 0, 3, 500],
    ),
    "own": (likelihoods.FromLogDensity(poisson_log_density), "poisson", (), [1e4, 0, 3, 500]),
    "negative binomial": (likelihoods.NegativeBinomial(1e-4), "negative binomial", (1e-4,), [1e4, 0, 3, 500]),
    "student": (likelihoods.StudentT(0.005, 4.0), "student", (0.005, 4.0), [5.0, 0.1, -1.0, 1.3]),
}


@pytest.mark.parametrize("name", FAR)
def test_tilted_moments_far_from_the_marginal_and_narrower(name):
    """A count of 10 000 under the prior N(0, 1): 9 standard deviations away, of width .01; 48 nodes as in inference."""
    likelihood, reference, params, y = FAR[name]
    m, v, zeros = arrays(jnp.float64, [0.0, 0.0, 0.5, 1.0], [1.0, 4.0, 0.2, 1.0], [0.0] * 4)

    def both(*args):
        ratio = moments.log_ratio(likelihood, *args, 1.0, 48)
        return ratio, *moments.tilted_moments(likelihood, *args, 1.0, 48)

    got = np.asarray(jax.jit(both)(jnp.asarray(y), m, v, zeros, zeros))
    for i in range(4):
        log_total, first, second = integrals(
            lambda f, i=i: LOG_DENSITIES[reference](y[i], f, *params),
            float(m[i]),
            float(v[i]),
            [lambda f: f, lambda f: f**2],
        )
        np.testing.assert_allclose(got[:2, i], [log_total, first], rtol=1e-6, atol=1e-6, err_msg=f"{i}")
        # the reference squares first moments, which cancel
        np.testing.assert_allclose(got[2, i], second - first**2, rtol=1e-5, atol=1e-11 * first**2)


@pytest.mark.f32
@pytest.mark.parametrize("name", CASES)
def test_expected_log_density_by_quadrature(name, dtype):
    likelihood, y, log_density, rtol = case(name, dtype)
    m, v = arrays(dtype, M, V)
    average = jax.jit(lambda *args: moments.expected_log_density(likelihood, y, *args, 128))
    got = average(m, v)
    tolerance = {"rtol": rtol, "atol": rtol} if dtype == jnp.float64 else {"rtol": 3e-5, "atol": 3e-5}
    for i in range(len(M)):
        wanted = integrals(lambda f: 0 * f, M[i], V[i], [log_density(i)])[1]
        np.testing.assert_allclose(got[0][i], wanted, **tolerance)
    # Bonnet and Price: E l' and E l'' are the derivatives of E l in m and, doubled, in v.
    by_m, by_v = jax.jit(jax.grad(lambda m, v: average(m, v)[0].sum(), argnums=(0, 1)))(m, v)
    np.testing.assert_allclose(got[1], by_m, **tolerance)
    loose = {key: 30 * value for key, value in tolerance.items()}
    np.testing.assert_allclose(got[2], 2 * by_v, **loose)


@pytest.mark.parametrize("name", ["probit", "logit", "negative binomial"])
def test_expected_log_density_under_a_wide_marginal(name):
    """Latent standard deviations of 10, with the 48 nodes of inference: Gauss-Hermite has two digits there."""
    likelihood, y, log_density, _ = case(name, jnp.float64)
    m, v = jnp.asarray([0.3, 8.0, -15.0, -2.0]), jnp.full(4, 100.0)
    got = jax.jit(lambda *args: moments.expected_log_density(likelihood, y, *args, 48))(m, v)
    grid = np.linspace(-12, 12, 20_001)
    for i in range(4):
        values = log_density(i)(float(m[i]) + 10 * grid)
        wanted = np.trapezoid(values * np.exp(-0.5 * grid**2), grid) / np.sqrt(2 * np.pi)
        np.testing.assert_allclose(got[0][i], wanted, rtol=1e-7)


@pytest.mark.f32
@pytest.mark.parametrize("name", CASES)
def test_log_prob_by_quadrature_in_the_bulk_and_far_out(name, dtype):
    """Wide and narrow marginals, and outputs that the marginal makes improbable.

    In float32 the log factorial of 3000, 2e4, leaves an error of 2e-3.
    """
    likelihood, y, _, _ = case(name, dtype)
    counts = name in ("poisson", "negative binomial")
    far = {"probit": 1.0, "logit": 1.0}.get(name, 3000.0 if counts else 40.0)
    y = jnp.concatenate([y, jnp.asarray([far, far, y[1]], dtype)])
    m = jnp.asarray([*M, -5.0 if far == 1 else 0.5, 1.0, 0.0], dtype)
    v = jnp.asarray([*V, 4.0, 60.0, 1e-4], dtype)
    got = jax.jit(lambda likelihood, *args: likelihood.log_prob(*args))(likelihood, y, m, v)
    params = CASES[name][2]
    for i in range(len(m)):
        wanted = integrals(
            lambda f, i=i: LOG_DENSITIES[name](float(y[i]), f, *params), float(m[i]), float(v[i])
        )[0]
        loose = 3e-3 if y[i] == 3000 else 1e-4
        tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == jnp.float64 else {"rtol": 1e-4, "atol": loose}
        np.testing.assert_allclose(got[i], wanted, **tolerance, err_msg=f"{name} {i}")


def test_log_prob_of_a_bimodal_integrand():
    """A Student-t much narrower than the marginal, far from it: two separate peaks."""
    got = jax.jit(likelihoods.StudentT(0.01, 2.0).log_prob)(jnp.asarray([6.0]), jnp.zeros(1), jnp.ones(1))
    density = LOG_DENSITIES["student"]
    z = np.concatenate([np.linspace(-12, 5.5, 200_001), np.linspace(5.5, 6.5, 400_001)[1:]])
    terms = np.exp(density(6.0, z, 0.01, 2.0) - 0.5 * z**2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(got[0], np.log(np.trapezoid(terms, z)), rtol=1e-8)


@pytest.mark.slow
def test_the_probit_closed_form_is_the_quadrature():
    """The same likelihood without its closed forms."""
    plain = likelihoods.FromLogDensity(probit_log_density, concave=True)
    data = arrays(jnp.float64, LABELS, M, V, LAM1, LAM2)
    closed = likelihoods.Bernoulli()
    everything = jax.jit(
        lambda likelihood: (
            moments.log_ratio(likelihood, *data, 1.0, 128),
            *moments.tilted_moments(likelihood, *data, 1.0, 128),
            likelihood.log_prob(*data[:3]),
        )
    )
    np.testing.assert_allclose(everything(closed), everything(plain), rtol=1e-10)


def probit_log_density(y, f):
    return log_ndtr((2 * y - 1) * f)


def test_far_tilted_moments_do_not_cancel(dtype):
    """Label against a confident marginal: variance of a normal known to be above 0, from extended precision."""
    y, m, v, zeros = arrays(dtype, [1.0], [-4e4], [1e6], [0.0])
    variance = moments.tilted_moments(likelihoods.Bernoulli(), y, m, v, zeros, zeros, 1.0, 20)[1]
    z = -4e4 / np.sqrt(1 + 1e6)
    wanted = 1e6 - 1e12 / (1 + 1e6) * -extended_derivatives(z)[1]
    np.testing.assert_allclose(variance, wanted, rtol=1e-8)


def test_a_cavity_that_does_not_exist_is_seen():
    """lam2 v >= 1: the integral diverges, and the closed forms give NaN; the other points are not affected."""
    y, m, v, lam1, lam2 = arrays(jnp.float64, [1, 1, 1], [0.3] * 3, [1.0] * 3, [0.1] * 3, [0.5, 1.0, 1.4])
    ratio = moments.log_ratio(likelihoods.Bernoulli(), y, m, v, lam1, lam2, 1.0, 20)
    tilted = moments.tilted_moments(likelihoods.Bernoulli(), y, m, v, lam1, lam2, 1.0, 20)
    for got in (ratio, *tilted):
        assert np.isfinite(got).tolist() == [True, False, False]


# Derivatives in the parameters, transformations


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_by_differences(name):
    likelihood, y, log_density, _ = case(name, jnp.float64)
    f = jnp.asarray(M)
    got = np.asarray(jax.jit(moments.derivatives)(likelihood, y, f))
    h = 1e-3
    for i in range(len(M)):
        fn = log_density(i)
        stencil = np.array([fn(M[i] + k * h) for k in range(-3, 4)], np.longdouble)
        np.testing.assert_allclose(got[0, i], stencil[3], rtol=1e-13)
        first = stencil @ np.array([-1, 9, -45, 0, 45, -9, 1]) / (60 * h)
        second = stencil @ np.array([2, -27, 270, -490, 270, -27, 2]) / (180 * h**2)
        third = stencil @ np.array([1, -8, 13, 0, -13, 8, -1]) / (8 * h**3)
        np.testing.assert_allclose(got[1:3, i], [first, second], rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(got[3, i], third, rtol=2e-4, atol=2e-4)


def parameters(name):
    return {
        "negative binomial": (lambda t: likelihoods.NegativeBinomial(t[0]), [0.4]),
        "student": (lambda t: likelihoods.StudentT(t[0], t[1]), [1.3, 3.5]),
        "gaussian": (lambda t: likelihoods.Gaussian(t[0]), [0.3]),
    }[name]


@pytest.mark.parametrize("name", quick(["negative binomial", "student", "gaussian"], "student", "gaussian"))
def test_gradients_in_likelihood_parameters(name):
    build, start = parameters(name)
    y = jnp.asarray(CASES[name][1])
    data = arrays(jnp.float64, M, V, LAM1, LAM2)

    def everything(values):
        likelihood = build(values)
        mean, variance = moments.tilted_moments(likelihood, y, *data, 0.5, 32)
        terms = (
            moments.log_ratio(likelihood, y, *data, 1.0, 32),
            *moments.expected_log_density(likelihood, y, *data[:2], 32),
            mean,
            variance,
            likelihood.log_prob(y, *data[:2]),
        )
        return jnp.stack(terms).sum(1)

    values = jnp.asarray(start)
    both, h = jax.jit(lambda values: (everything(values), jax.jacfwd(everything)(values))), 1e-4
    forward = both(values)[1]

    def fn(values):
        return both(values)[0]

    for j in range(len(start)):
        step = h * jnp.eye(len(start))[j]
        wanted = (
            8 * (fn(values + step) - fn(values - step)) - fn(values + 2 * step) + fn(values - 2 * step)
        ) / (12 * h)
        np.testing.assert_allclose(forward[:, j], wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.f32
@pytest.mark.parametrize("name", quick(CASES, "probit", "student"))
def test_jit_vmap_and_gradients_in_the_marginals(name, dtype):
    likelihood, y, _, _ = case(name, dtype)
    data = arrays(dtype, M, V, LAM1, LAM2)

    def total(y, *data):
        mean, variance = moments.tilted_moments(likelihood, y, *data, 1.0, 64)
        return moments.log_ratio(likelihood, y, *data, 1.0, 64), mean, variance

    rows = jax.jit(jax.vmap(total))(*(jnp.stack([value, value[::-1]]) for value in (y, *data)))
    for got in rows:
        np.testing.assert_allclose(got[1, ::-1], got[0], rtol=1e-12 if dtype == jnp.float64 else 1e-5)
    if name == "poisson":
        for got, wanted in zip(rows, total(y, *data)):
            np.testing.assert_allclose(got[0], wanted, rtol=1e-12 if dtype == jnp.float64 else 1e-4)
    # d log E_q[p/t] / dm = (tilted mean − m) / v
    slope = jax.jit(jax.grad(lambda m: total(y, m, *data[1:])[0].sum()))(data[0])
    rtol = 1e-3 if dtype == jnp.float32 else 2e-5
    np.testing.assert_allclose(slope, (rows[1][0] - data[0]) / data[1], rtol=rtol, atol=rtol)


@pytest.mark.f32
def test_huge_rates_stay_finite(dtype):
    """Nodes where exp(f) is beyond the range have no weight and no derivative."""
    y, m, v, zeros = arrays(dtype, [3.0], [1.0], [2000.0], [0.0])
    for likelihood in (likelihoods.Poisson(), likelihoods.NegativeBinomial(jnp.asarray(0.5, dtype))):

        def value(m, v, likelihood=likelihood):
            return moments.log_ratio(likelihood, y, m, v, zeros, zeros, 1.0, 64)[0]

        got, slopes = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(m, v)
        assert np.isfinite(got)
        assert np.isfinite(slopes).all()


@pytest.mark.f32
@pytest.mark.parametrize("r", [0.3, 9.99, 10.01, 1e4])
def test_log_gamma_ratio(r, dtype):
    a = np.array([0.0, 0.5, 3.0, 40.0])
    wanted = [
        0.0,
        special.gammaln(r + 0.5) - special.gammaln(r) - 0.5 * np.log(r),
        *(np.log1p(np.arange(n) / r).sum() for n in (3, 40)),
    ]
    got = log_gamma_ratio(jnp.asarray(a, dtype), jnp.asarray(r, dtype))
    tolerance = (1e-11, 1e-11) if dtype == jnp.float64 else (2e-6, 3e-5)
    np.testing.assert_allclose(got, wanted, rtol=tolerance[0], atol=tolerance[1])


def test_limits_of_the_parameters(dtype):
    """Dispersion to 0 is Poisson, degrees of freedom to infinity Gaussian."""
    f = jnp.asarray(M)
    counts = likelihoods.NegativeBinomial(1e-9).log_density(jnp.asarray(COUNTS), f)
    np.testing.assert_allclose(counts, likelihoods.Poisson().log_density(jnp.asarray(COUNTS), f), rtol=1e-5)
    heavy = likelihoods.StudentT(0.5, 1e9)
    normal = likelihoods.Gaussian(0.25)
    np.testing.assert_allclose(heavy.log_density(f + 0.3, f), normal.log_density(f + 0.3, f), rtol=1e-7)
    np.testing.assert_allclose(heavy.log_prob(f + 0.3, f, f**2), normal.log_prob(f + 0.3, f, f**2), rtol=1e-7)


def test_gaussian_sites_are_the_likelihood():
    """At t = p/constant the ratio is constant and the tilted density is q, for every power."""
    y, m, v = arrays(jnp.float64, REALS, M, V)
    for likelihood in (likelihoods.Gaussian(0.3), likelihoods.KnownNoise(np.array([0.1, 0.2, 0.3, 1e-4]))):
        noise = likelihood.noise_variance(4)
        for power in (1.0, 0.5):
            ratio = moments.log_ratio(likelihood, y, m, v, y / noise, 1 / noise, power, 32)
            constant = -0.5 * (jnp.log(2 * jnp.pi * noise) + y**2 / noise)
            np.testing.assert_allclose(ratio, power * constant, rtol=1e-12)
            got = moments.tilted_moments(likelihood, y, m, v, y / noise, 1 / noise, power, 32)
            np.testing.assert_allclose(got, (m, v), rtol=1e-12)


# Golden numbers

NODES = 200


@jax.jit
def by_power(likelihood, *data):
    """Expectations, and by power the log ratio and the tilted moments: compiled once per likelihood."""
    expectations = {0: jnp.stack(moments.expected_log_density(likelihood, *data[:3], NODES))}
    for power in (1.0, 0.5):
        ratio = moments.log_ratio(likelihood, *data, power, NODES)
        expectations[power] = jnp.stack([ratio, *moments.tilted_moments(likelihood, *data, power, NODES)])
    return expectations


X = np.array([-1.5, -0.4, 0.3, 1.1, 2.0])
GOLDEN = {  # likelihood, outputs, (lengthscale, variance), EP, power EP ½, VI, energy 1 and ½ at the sites of VI
    "probit A": (
        (likelihoods.Bernoulli(), [0, 0, 1, 0, 1], (0.9, 1.7)),
        (-4.2304234483, -4.2355406876, -4.2404565854, -4.2304558419, -4.2355717452),
    ),
    "logit A": (
        (likelihoods.Bernoulli("logit"), [0, 0, 1, 0, 1], (0.9, 1.7)),
        (-3.8404488014, -3.8409264859, -3.8413836057, -3.8404493175, -3.8409268052),
    ),
    "probit B": (
        (likelihoods.Bernoulli(), [0, 0, 1, 1, 1], (1.0, 40.0)),
        (-3.0013931506, -3.1533782249, -3.3667508020, -3.0209308876, None),
    ),
    "Poisson A": (
        (likelihoods.Poisson(), [0, 2, 1, 4, 3], (0.9, 1.7)),
        (-9.9914318421, -10.0141815208, -10.0397449777, -9.9919756650, None),
    ),
    "Student-t A": (
        (likelihoods.StudentT(0.5, 4.0), [-1.2, 0.4, 0.5, 3.0, 0.9], (0.9, 1.7)),
        (-9.2499419197, -9.3045635728, -9.3487575690, -9.2525864234, None),
    ),
}


def gram(lengthscale, variance):
    return variance * np.exp(-0.5 * ((X[:, None] - X) / lengthscale) ** 2)


def posterior(K, lam1, lam2):
    """Mean and variance of q, its log normalizer and log|B|, by plain inverses."""
    B = np.eye(5) + K * lam2
    cov = np.linalg.solve(B, K)
    log_det = np.linalg.slogdet(B)[1]
    m = cov @ lam1
    return m, np.diag(cov).copy(), 0.5 * lam1 @ m - 0.5 * log_det, log_det


def energy(likelihood, y, K, lam1, lam2, power):
    """log Z_G + Σ (1/η) log E_q[(p/t)^η], and its limit η → 0, the evidence lower bound."""
    m, v, log_z, _ = posterior(K, lam1, lam2)
    if power == 0:
        site = lam1 * m - 0.5 * lam2 * (m**2 + v)
        return log_z + np.sum(by_power(likelihood, y, m, v, lam1, lam2)[0][0] - site)
    return log_z + np.sum(by_power(likelihood, y, m, v, lam1, lam2)[power][0]) / power


def sites(likelihood, y, K, power):
    """Damped updates to the fixed point: expectation propagation of a power, or with power 0 conjugate VI."""
    lam1, lam2, m, v = np.zeros(5), np.full(5, 1e-6), np.zeros(5), np.diag(K)
    for _ in range(400):
        expectations = np.asarray(by_power(likelihood, y, m, v, lam1, lam2)[power])
        if power == 0:
            _, d1, d2 = expectations
            new1, new2 = d1 - d2 * m, -d2
        else:
            _, mean, variance = expectations
            new1 = lam1 + (mean / variance - m / v) / power
            new2 = lam2 + (1 / variance - 1 / v) / power
        change = max(abs(new1 - lam1).max(), abs(new2 - lam2).max())
        lam1, lam2 = lam1 + 0.4 * (new1 - lam1), lam2 + 0.4 * (new2 - lam2)
        m, v, _, _ = posterior(K, lam1, lam2)
        if change < 1e-12:
            break
    assert change < 1e-9
    return lam1, lam2


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_energies(name):
    (likelihood, y, (lengthscale, variance)), wanted = GOLDEN[name]
    y, K = jnp.asarray(y, float), gram(lengthscale, variance)
    ep, half, vi = (sites(likelihood, y, K, power) for power in (1.0, 0.5, 0))
    got = [
        energy(likelihood, y, K, *where, power)
        for where, power in ((ep, 1.0), (half, 0.5), (vi, 0), (vi, 1.0), (vi, 0.5))
    ]
    for value, golden in zip(got, wanted):
        if golden is not None:
            assert abs(value - golden) < 1e-8, (got, wanted)


def test_golden_sites_and_prediction():
    likelihood, y, K = likelihoods.Bernoulli(), jnp.asarray([0.0, 0, 1, 0, 1]), gram(0.9, 1.7)
    vi = sites(likelihood, y, K, 0)
    lam1 = [-0.7899820552, -0.8436097122, 0.8620835329, -0.8671931538, 0.8631537976]
    lam2 = [0.3790384101, 0.4890005513, 0.6254870441, 0.6041646143, 0.5065548108]
    np.testing.assert_allclose(vi, [lam1, lam2], atol=1e-9)
    cross = 1.7 * np.exp(-0.5 * ((X - 0.5) / 0.9) ** 2)
    m, _, _, _ = posterior(K, *vi)
    mean = cross @ (vi[0] - vi[1] * m)
    variance = 1.7 - cross @ np.linalg.solve(K + np.diag(1 / vi[1]), cross)
    predictive = likelihood.predictive(*arrays(jnp.float64, [[mean]], [[variance]]))
    np.testing.assert_allclose([mean, variance], [-0.0491208217, 0.6068857556], atol=1e-9)
    np.testing.assert_allclose(predictive.probability, 0.4845448042, atol=1e-9)


def test_golden_fixed_sites_and_their_gradients():
    likelihood, y = likelihoods.Bernoulli(), jnp.asarray([0.0, 0, 1, 0, 1])
    lam1, lam2 = np.array([0.3, -0.2, 1, 0.5, -0.4]), np.array([0.5, 0.2, 0.8, 2, 0.1])
    golden = {
        1.0: (-4.0190290314, -0.5452643310, -0.2461041736),
        0.5: (-5.0859788944, -0.0613333316, -0.9689586906),
        0: (-6.2205374335, 0.5899020320, -1.8516875268),
    }
    K = gram(0.9, 1.7)
    m, v, log_z, log_det = posterior(K, lam1, lam2)
    np.testing.assert_allclose([log_det, log_z], [3.0235353788, -1.0886738051], atol=1e-10)
    squared = (X[:, None] - X) ** 2 / 0.9**2
    cov = np.linalg.solve(np.eye(5) + K * lam2, K)
    R = np.diag(lam2) - lam2[:, None] * cov * lam2
    alpha, half = lam1 - lam2 * m, np.eye(5) - cov * lam2
    for power, wanted in golden.items():
        expectations = np.asarray(by_power(likelihood, y, m, v, lam1, lam2)[power])
        if power == 0:
            _, d1, d2 = expectations
            by_m, by_v = d1 - (lam1 - lam2 * m), 0.5 * d2 + 0.5 * lam2
        else:
            _, mean, variance = expectations
            delta = mean - m
            by_m, by_v = delta / (power * v), (delta**2 + variance - v) / (2 * power * v**2)
        outer = np.outer(half.T @ np.asarray(by_m), alpha)
        gamma = 0.5 * (np.outer(alpha, alpha) - R + outer + outer.T) + half.T @ np.diag(by_v) @ half
        got = energy(likelihood, y, K, lam1, lam2, power), np.sum(gamma * K * squared), np.sum(gamma * K)
        np.testing.assert_allclose(got, wanted, atol=1e-9)


# Outputs, parameters and custom likelihoods


def test_labels_are_checked():
    labels = np.array([0.0, 1, 1])
    assert likelihoods.Bernoulli().check_outputs(labels) is labels
    with pytest.warns(UserWarning, match=r"-1 and \+1"):
        converted = likelihoods.Bernoulli().check_outputs(np.array([-1, 1, 1], np.float32))
    np.testing.assert_array_equal(converted, [0, 1, 1])
    assert converted.dtype == np.float32
    with pytest.warns(UserWarning, match="one class only"):
        likelihoods.Bernoulli().check_outputs(jnp.ones(4))
    for bad in ([0.0, 1, 2], [1.0, 2], [0.2, 1], [-1.0, 0, 1]):
        with pytest.raises(ValueError, match="labels 0 and 1, got"):
            likelihoods.Bernoulli().check_outputs(np.array(bad))


@pytest.mark.parametrize("likelihood", [likelihoods.Poisson(), likelihoods.NegativeBinomial()])
def test_counts_are_checked(likelihood):
    counts = np.array([0.0, 7, 2])
    assert likelihood.check_outputs(counts) is counts
    for bad in ([-1.0, 2], [0.5, 2]):
        with pytest.raises(ValueError, match="needs counts"):
            likelihood.check_outputs(np.array(bad))


def test_real_outputs_pass():
    for likelihood in (likelihoods.Gaussian(), likelihoods.StudentT(), likelihoods.FromLogDensity(laplace)):
        assert likelihood.check_outputs(REALS) is REALS


def laplace(y, f, log_scale=0.0):
    return -jnp.sqrt((y - f) ** 2 + 1e-2) * jnp.exp(-log_scale)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: likelihoods.Bernoulli("cloglog"), ValueError, "'probit' or 'logit'"),
        (lambda: likelihoods.FromLogDensity(3.0), TypeError, "needs a function"),
        (lambda: likelihoods.FromLogDensity(laplace, [1.0]), TypeError, "dictionary"),
        (
            lambda: likelihoods.Likelihood().log_density(*jnp.zeros(2)),
            TypeError,
            "must define log_density",
        ),
    ],
)
def test_bad_parameters(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytree
class Own(likelihoods.Likelihood):
    """A log density and nothing else."""

    width: Any = field(default=0.5, constraint=constraints.positive)
    log_concave: ClassVar[bool] = True

    def log_density(self, y, f):
        return -0.5 * jnp.log(2 * jnp.pi * self.width) - 0.5 * (y - f) ** 2 / self.width


def test_a_likelihood_of_ones_own():
    """A user's Gaussian density: all results equal the closed forms of the library."""
    custom, ours = Own(), likelihoods.Gaussian(0.5)
    y, *data = arrays(jnp.float64, REALS, M, V, LAM1, LAM2)
    assert not custom.outputs_have_unit
    everything = jax.jit(
        lambda likelihood: (
            moments.log_ratio(likelihood, y, *data, 0.7, 60),
            *moments.tilted_moments(likelihood, y, *data, 0.7, 60),
            *moments.expected_log_density(likelihood, y, *data[:2], 60),
            likelihood.log_prob(y, *data[:2]),
        )
    )
    np.testing.assert_allclose(everything(custom), everything(ours), rtol=1e-8)
    gp.Model(gp.kernels.RBF(), custom)  # a model accepts it
    priors = gp.default_prior(gp.Model(gp.kernels.RBF(), custom), np.zeros((3, 1)) + np.arange(3.0)[:, None])
    assert isinstance(priors.likelihood.width, dist.LogNormal)


def test_from_a_function():
    likelihood = likelihoods.FromLogDensity(laplace, {"log_scale": 0.2})
    assert gp.leaf_names(gp.Model(gp.kernels.RBF(), likelihood))[-1] == "likelihood.params.log_scale"
    again = likelihoods.FromLogDensity(laplace, {"log_scale": 0.2})
    assert jax.tree.structure(likelihood) == jax.tree.structure(again)
    y, m, v = arrays(jnp.float64, REALS, M, V)
    got = likelihood.log_prob(y, m, v)
    for i in range(4):
        wanted = integrals(lambda f, i=i: -np.sqrt((REALS[i] - f) ** 2 + 1e-2) * np.exp(-0.2), M[i], V[i])[0]
        np.testing.assert_allclose(got[i], wanted, rtol=1e-4)


def test_default_priors_of_likelihood_parameters():
    x = np.linspace(0, 1, 5)[:, None]
    prior = gp.default_prior(gp.Model(gp.kernels.RBF(), likelihoods.StudentT()), x).likelihood
    np.testing.assert_allclose([prior.df.concentration, prior.df.rate], [2.0, 0.1])
    np.testing.assert_allclose([prior.scale.loc, prior.scale.scale], [-1.5, 1.25])
    prior = gp.default_prior(gp.Model(gp.kernels.RBF(), likelihoods.NegativeBinomial()), x).likelihood
    np.testing.assert_allclose([prior.dispersion.loc, prior.dispersion.scale], [-1.0, 1.5])
