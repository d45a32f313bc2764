"""Predictive distributions of classes, counts and heavy-tailed outputs: sums and integrals over the mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from probinfer.gp import likelihoods
from probinfer.gp.prediction import BernoulliMixture
from probinfer.gp.prediction.calibration import pit
from tests.reference.likelihoods import LOG_DENSITIES, integrals

MEANS = np.array([[0.5, -2.0, 3.0], [1.0, -1.0, 3.2]])
VARIANCES = np.array([[0.4, 1e-5, 0.02], [0.8, 0.5, 0.3]])
COUNTS = {
    "poisson": likelihoods.Poisson(),
    "negative binomial": likelihoods.NegativeBinomial(np.array([0.3, 1.2])),
}


def predictive(likelihood, dtype):
    likelihood = jax.tree.map(lambda leaf: leaf.astype(dtype), likelihood)
    return likelihood.predictive(jnp.asarray(MEANS, dtype), jnp.asarray(VARIANCES, dtype))


def log_components(name, y, m, *params):
    """The log density of each component at point m, by adaptive quadrature."""
    return np.array(
        [
            integrals(
                lambda f, s=s: LOG_DENSITIES[name](y, f, *(p[s] for p in params)),
                MEANS[s, m],
                VARIANCES[s, m],
            )[0]
            for s in range(2)
        ]
    )


# Classes


@pytest.mark.f32
@pytest.mark.parametrize("link", ["probit", "logit"])
def test_class_probabilities_are_means_over_draws(link, dtype):
    got = predictive(likelihoods.Bernoulli(link), dtype)
    wanted = [np.exp(log_components(link, 1, m)).mean() for m in range(3)]
    rtol = 1e-10 if dtype == jnp.float64 else 1e-5
    np.testing.assert_allclose(got.probability, wanted, rtol=rtol)
    np.testing.assert_allclose(got.mean, wanted, rtol=rtol)
    np.testing.assert_allclose(got.variance, np.multiply(wanted, np.subtract(1, wanted)), rtol=rtol)
    np.testing.assert_allclose(got.stddev**2, got.variance, rtol=rtol)
    np.testing.assert_allclose(got.log_prob(jnp.asarray([1, 0, 1], dtype)),
                               np.log([wanted[0], 1 - wanted[1], wanted[2]]), rtol=rtol)  # fmt: skip
    np.testing.assert_allclose(
        got.cdf(jnp.asarray([-0.5, 0.5, 1.0], dtype)), [0, 1 - wanted[1], 1], rtol=rtol
    )
    assert got.log_prob(jnp.full(3, 2.0, dtype)).tolist() == [-np.inf] * 3


def test_classes_in_the_tails(dtype):
    """Both probabilities keep their digits where the other rounds to 1."""
    means, variances = jnp.asarray([[40.0], [50.0]]), jnp.asarray([[0.5], [0.1]])
    got = likelihoods.Bernoulli().predictive(means, variances)
    components = special.log_ndtr(-np.array([40.0, 50.0]) / np.sqrt([1.5, 1.1]))
    np.testing.assert_allclose(
        got.log_prob(jnp.zeros(1)), special.logsumexp(components) - np.log(2), rtol=1e-12
    )
    np.testing.assert_allclose(got.variance, np.exp(components).mean(), rtol=1e-9)


def test_labels_have_one_meaning(dtype):
    """−1 is read as class 0 and truth values as labels; other numbers have probability 0."""
    log_zeros = jnp.log(jnp.asarray([[0.2, 0.7, 0.4, 0.5]], dtype))
    predictive = BernoulliMixture(log_zeros, jnp.log1p(-jnp.exp(log_zeros)))
    wanted = predictive.log_prob(np.array([0.0, 1, 0, 1]))
    for labels in ([-1, 1, -1, 1], [False, True, False, True], [0, 1, 0, 1]):
        np.testing.assert_array_equal(predictive.log_prob(np.array(labels)), wanted)
        values = [pit(predictive, np.array(y), jax.random.key(0)).values for y in (labels, [0, 1, 0, 1])]
        np.testing.assert_allclose(*values, rtol=1e-6)
    np.testing.assert_array_equal(predictive.log_prob(np.array([2, 0.5, -2, 3])), -np.inf)


def test_what_is_no_count_has_no_mass(tables):
    predictive = tables["poisson"][0]
    shape = predictive.means.shape[1:]
    for wrong in (0.5, -1.0, 3.2):
        np.testing.assert_array_equal(predictive.log_prob(np.full(shape, wrong)), -np.inf)
    from_integers = predictive.log_prob(np.full(shape, 3))
    np.testing.assert_array_equal(from_integers, predictive.log_prob(jnp.full(shape, 3.0)))


def test_class_samples(key):
    """4000 draws per point; frequencies within 4.5 standard errors (three tests: false-fail rate 2e-5)."""
    got = predictive(likelihoods.Bernoulli(), jnp.float64)
    frequency = got.sample(key, 4000).mean(0)
    assert np.all(np.abs(frequency - got.probability) < 4.5 * np.sqrt(got.variance / 4000))


# Counts


@pytest.fixture(scope="module")
def tables():
    """log_prob of 0..K at the three points, for a K beyond all mass that float64 resolves."""

    def table(name):
        mixture = predictive(COUNTS[name], jnp.float64)
        grid = jnp.arange(1500.0)
        return mixture, np.asarray(jax.jit(jax.vmap(lambda k: mixture.log_prob(jnp.full(3, k))))(grid))

    return {name: table(name) for name in COUNTS}


@pytest.mark.parametrize("name", COUNTS)
def test_count_probabilities_by_quadrature(name, tables):
    _, table = tables[name]
    params = [np.array([0.3, 1.2])] if name == "negative binomial" else []
    for y in (0, 7, 300):
        wanted = [np.logaddexp.reduce(log_components(name, y, m, *params)) - np.log(2) for m in range(3)]
        np.testing.assert_allclose(table[y], wanted, rtol=1e-9)


@pytest.mark.parametrize("name", COUNTS)
def test_count_moments_cdf_and_quantiles_are_sums(name, tables):
    """The mass beyond K = 1500, which the sums omit, bounds the tolerance."""
    mixture, table = tables[name]
    probability, k = np.exp(table), np.arange(len(table))[:, None]
    left = np.abs(1 - probability.sum(0))
    np.testing.assert_array_less(left, 1e-6)
    mean = (k * probability).sum(0)
    np.testing.assert_allclose(mixture.mean, mean, rtol=1e-4)
    np.testing.assert_allclose(mixture.variance, (k**2 * probability).sum(0) - mean**2, rtol=1e-2)
    np.testing.assert_allclose(mixture.mean[1], mean[1], rtol=1e-9)
    np.testing.assert_allclose(mixture.variance[1], ((k[:, 0] - mean[1]) ** 2) @ probability[:, 1], rtol=1e-6)
    cumulative = np.cumsum(probability, 0)
    for y in (0, 1, 20, 200):
        np.testing.assert_allclose(mixture.cdf(jnp.full(3, y + 0.3)), cumulative[y], rtol=1e-10, atol=1e-12)
    assert mixture.cdf(jnp.full(3, -1.0)).tolist() == [0.0] * 3
    levels = jnp.asarray([1e-3, 0.5, 0.97])
    wanted = [[np.searchsorted(cumulative[:, m], q) for m in range(3)] for q in np.asarray(levels)]
    np.testing.assert_array_equal(mixture.quantile(levels), wanted)


@pytest.mark.parametrize("name", COUNTS)
def test_count_samples(name, tables, key):
    """Randomized transforms of 2000 draws are uniform; six tests at 1e-4: false-fail rate 6e-4 (the key is fixed)."""
    mixture, table = tables[name]
    draws = np.asarray(mixture.sample(key, 2000)).astype(int)
    cumulative = np.concatenate([np.zeros((1, 3)), np.cumsum(np.exp(table), 0)])
    draws = np.minimum(draws, len(table) - 1)
    uniform = np.random.default_rng(0).uniform(size=draws.shape)
    for m in range(3):
        low, high = cumulative[draws[:, m], m], cumulative[draws[:, m] + 1, m]
        assert stats.kstest(low + uniform[:, m] * (high - low), "uniform").pvalue > 1e-4


@pytest.mark.f32
@pytest.mark.parametrize("name", COUNTS)
def test_count_cdf_with_narrow_and_wide_latents(name, dtype):
    """From a known rate to one that is known to within a factor of e⁴⁰; large counts too."""
    likelihood = COUNTS[name]
    if name == "negative binomial":
        likelihood = likelihoods.NegativeBinomial(0.3)
    likelihood = jax.tree.map(lambda leaf: leaf.astype(dtype), likelihood)
    y = np.array([0.0, 3.0, 1000.0, 3.0, 1000.0, 1000.0, 0.0])
    m = np.array([0.3, 1.0, 7.0, 2.0, 6.9, 6.8, -3.0])
    v = np.array([1e-8, 1e-3, 1e-8, 0.02, 1e-4, 0.1, 400.0])
    got = jax.jit(lambda *args: likelihood.cdf(*args))(*(jnp.asarray(a, dtype) for a in (y, m, v)))
    for i in range(len(y)):
        f = m[i] + np.sqrt(v[i]) * np.linspace(-9, 9, 200_001)
        if name == "poisson":
            conditional = special.gammaincc(y[i] + 1, np.exp(f))
        else:
            conditional = special.betainc(1 / 0.3, y[i] + 1, special.expit(-(f + np.log(0.3))))
        weight = stats.norm.pdf(np.linspace(-9, 9, 200_001))
        np.testing.assert_allclose(
            got[i], conditional @ weight / weight.sum(), rtol=1e-8 if dtype == jnp.float64 else 2e-3
        )


# Heavy tails

STUDENT = likelihoods.StudentT(np.array([0.5, 0.05]), np.array([3.0, 5.0]))


def test_student_by_quadrature():
    """Components at their own parameters; shifted and scaled outputs."""
    mixture = predictive(STUDENT, jnp.float64)
    y = np.array([4.0, -2.0, 3.1])
    params = np.array([0.5, 0.05]), np.array([3.0, 5.0])
    wanted = []
    for m in range(3):
        z = np.linspace(-14, 14, 400_001)
        terms = [
            np.exp(
                LOG_DENSITIES["student"](
                    y[m], MEANS[s, m] + np.sqrt(VARIANCES[s, m]) * z, params[0][s], params[1][s]
                )
            )
            for s in range(2)
        ]
        weight = stats.norm.pdf(z)
        wanted.append(np.log(np.mean(terms, axis=0) @ weight / weight.sum()))
    np.testing.assert_allclose(mixture.log_prob(jnp.asarray(y)), wanted, rtol=1e-9)
    moved = mixture.affine(2.0, 3.0)
    np.testing.assert_allclose(
        moved.log_prob(2 + 3 * jnp.asarray(y)), np.subtract(wanted, np.log(3)), rtol=1e-9
    )
    variance = (VARIANCES + np.array([[0.25 * 3], [0.0025 * 5 / 3]])).mean(0) + MEANS.var(0)
    np.testing.assert_allclose(mixture.mean, MEANS.mean(0), rtol=1e-12)
    np.testing.assert_allclose(mixture.variance, variance, rtol=1e-12)
    np.testing.assert_allclose(moved.mean, 2 + 3 * MEANS.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moved.stddev, 3 * np.sqrt(variance), rtol=1e-12)


@pytest.mark.f32
def test_student_cdf_is_the_integral_and_quantiles_invert_it(dtype):
    mixture = predictive(STUDENT, dtype).affine(1.0, 2.0)
    levels = 1e-3, 0.4, 0.99
    quantiles = [mixture.quantile(level) for level in levels]
    for level, row in zip(levels, quantiles):
        np.testing.assert_allclose(mixture.cdf(row), level, rtol=1e-9 if dtype == jnp.float64 else 2e-3)
    if dtype == jnp.float64:
        low, high = quantiles[0], quantiles[1]
        x, w = np.polynomial.legendre.leggauss(200)
        grid = 0.5 * (low + high) + 0.5 * (high - low) * x[:, None]
        mass = 0.5 * (high - low) * (w @ np.exp(jax.jit(jax.vmap(mixture.log_prob))(grid)))
        np.testing.assert_allclose(np.asarray(mass)[[0, 2]], 0.4 - 1e-3, rtol=1e-7)


@pytest.mark.parametrize("df", [0.6, 1.0, 4.0, 300.0])
def test_student_noise_alone_is_student(df):
    """A known latent value: scipy's Student-t, far into the tails."""
    likelihood = likelihoods.StudentT(0.7, df)
    y, zeros = jnp.asarray([0.0, -1.0, 30.0, -1e4]), jnp.zeros(4)
    reference = stats.t(df, scale=0.7)
    both = jax.jit(lambda likelihood, *args: (likelihood.log_prob(*args), likelihood.cdf(*args)))
    log_prob, cdf = both(likelihood, y, zeros, zeros + 1e-20)
    np.testing.assert_allclose(log_prob, reference.logpdf(y), rtol=1e-6 if df < 1 else 2e-8)
    np.testing.assert_allclose(cdf, reference.cdf(y), rtol=1e-6 if df < 1 else 1e-7, atol=1e-14)


def test_student_moments_that_do_not_exist():
    mean, variance = jnp.zeros(1), jnp.ones(1)
    for df, wanted in ((0.9, (np.nan, np.nan)), (2.0, (0.0, np.inf)), (4.0, (0.0, 1 + 2 * 0.25))):
        np.testing.assert_allclose(
            np.ravel(likelihoods.StudentT(0.5, df).output_moments(mean, variance)), wanted
        )


def test_student_samples(key):
    """Transforms of 2000 draws per point are uniform; three tests at 1e-4: false-fail rate 3e-4 (the key is fixed)."""
    mixture = predictive(STUDENT, jnp.float64).affine(1.0, 2.0)
    draws = mixture.sample(key, 2000)
    assert draws.shape == (2000, 3)
    values = jax.jit(jax.vmap(mixture.cdf))(draws)
    for m in range(3):
        assert stats.kstest(np.asarray(values[:, m]), "uniform").pvalue > 1e-4


# A custom likelihood, bad input


def sech(y, f, log_scale):
    return -jnp.log(jnp.cosh((y - f) * jnp.exp(-log_scale))) - log_scale - jnp.log(jnp.pi)


def test_a_density_alone_gives_log_prob_and_says_what_is_missing():
    likelihood = likelihoods.FromLogDensity(sech, {"log_scale": jnp.asarray([0.0, 0.3])}, concave=True)
    mixture = predictive(likelihood, jnp.float64)
    y = jnp.asarray([0.0, -4.0, 3.0])
    values = mixture.log_prob(y)
    for m in range(3):
        terms = [
            integrals(
                lambda f, m=m, b=b: -np.log(np.cosh((float(y[m]) - f) * np.exp(-b))) - b - np.log(np.pi),
                mean,
                variance,
            )[0]
            for mean, variance, b in zip(MEANS[:, m], VARIANCES[:, m], (0.0, 0.3))
        ]
        np.testing.assert_allclose(values[m], np.logaddexp.reduce(terms) - np.log(2), rtol=1e-8)
    for use, name in (
        (lambda: mixture.mean, "output_moments"),
        (lambda: mixture.stddev, "output_moments"),
        (lambda: mixture.cdf(y), "cdf"),
        (lambda: mixture.quantile(0.5), "cdf"),
        (lambda: mixture.sample(jax.random.key(0), 2), "sample"),
        (lambda: pit(mixture, y), "cdf"),
    ):
        with pytest.raises(TypeError, match=f"has no {name}; define it"):
            use()


@pytest.mark.parametrize(
    "likelihood",
    [
        likelihoods.Bernoulli(),
        likelihoods.Poisson(),
        STUDENT,
        likelihoods.FromLogDensity(sech),
        likelihoods.Gaussian(),
    ],
)
def test_noise_variance_is_refused(likelihood):
    with pytest.raises(ValueError, match="KnownNoise only"):
        likelihood.predictive(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones(2))


@pytest.mark.parametrize("likelihood", [likelihoods.Poisson(), STUDENT])
def test_bad_levels(likelihood):
    for q in (0.0, 1.0, -0.1, [0.5, 1.5], np.nan):
        with pytest.raises(ValueError, match="0 < q < 1"):
            predictive(likelihood, jnp.float64).quantile(q)
