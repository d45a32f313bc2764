"""Laplace, EP, VI and Hybrid: against a slow oracle and brute force, derivatives, limits, and bad data."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import gp
from probinfer.core.status import Status
from probinfer.gp.approximation.gaussian_marginals import Marginals
from probinfer.gp.approximation.objectives import Objective
from probinfer.gp.approximation.sites import Sites
from probinfer.gp.approximation.updates import first_sites, updated_sites
from tests.gp.approximate_cases import (
    LIKELIHOODS,
    METHODS,
    OUTPUTS,
    SETTING_A,
    UNUSED,
    X,
    case,
    evaluate,
    jit,
    log_gradient,
    model,
    problem,
)
from tests.params import quick
from tests.reference import gp_sites as oracle
from tests.reference.likelihoods import LOG_DENSITIES

# Uneven inputs, a prior mean, other hyperparameters than the golden rows.
X_UNEVEN = np.array([0.1, 0.25, 1.9, 2.0, 4.4])[:, None]
UNEVEN = (2.3, 1.3)
ORACLES = {
    "Laplace": lambda p: oracle.laplace(p),
    "EP": lambda p: ((sites := oracle.ep(p)), oracle.energy(p, *sites, 1.0)),
    "PEP .5": lambda p: ((sites := oracle.ep(p, 0.5)), oracle.energy(p, *sites, 0.5)),
    "VI": lambda p: ((sites := oracle.vi(p)), oracle.energy(p, *sites, 0.0)),
    "total": lambda p: ((sites := oracle.vi(p)), oracle.energy(p, *sites, 1.0)),
}


@pytest.mark.parametrize(
    ("method", "name"),
    [
        pytest.param("Laplace", "probit", marks=pytest.mark.slow),
        ("Laplace", "student"),
        ("EP", "probit"),
        pytest.param("EP", "poisson", marks=pytest.mark.slow),
        pytest.param("PEP .5", "student", marks=pytest.mark.slow),
        pytest.param("VI", "logit", marks=pytest.mark.slow),
        pytest.param("VI", "student", marks=pytest.mark.slow),
        pytest.param("total", "poisson", marks=pytest.mark.slow),
    ],
)
def test_everything_matches_the_slow_oracle(method, name):
    slow = problem(name, UNEVEN, X_UNEVEN, mean=0.4)
    solution = ORACLES[method](slow)
    (lam1, lam2), evidence = (solution[:2], solution[2]) if method == "Laplace" else solution
    mean, covariance, _ = oracle.condition(*slow[:2], lam1, lam2)
    at = model(LIKELIHOODS[name], UNEVEN, mean=0.4)
    conditioned, (new_mean, new_variance), _, _ = evaluate(METHODS[method], at, OUTPUTS[name], X_UNEVEN)
    close = {"rtol": 1e-7, "atol": 1e-7}  # the oracle's derivatives and its stopping rule
    assert conditioned.status == Status.OK
    np.testing.assert_allclose(conditioned.log_evidence, evidence, **close)
    np.testing.assert_allclose(conditioned.sites.lam1, lam1, **close)
    np.testing.assert_allclose(conditioned.sites.lam2, lam2, **close)
    np.testing.assert_allclose(conditioned.mean, mean, **close)
    np.testing.assert_allclose(conditioned.variance, np.diag(covariance), **close)
    np.testing.assert_allclose(conditioned.log_loo, oracle.cavities(slow, lam1, lam2), **close)
    cross = 2.3 * np.exp(-0.5 * ((X_UNEVEN - 0.5) / 1.3) ** 2)
    shift, new = oracle.predict(np.array([[2.3]]), cross, *slow[:2], lam1, lam2)
    np.testing.assert_allclose(new_mean, 0.4 + shift, **close)
    np.testing.assert_allclose(new_variance, np.diag(new), **close)


BIG = np.array([0.0, 10_000, 3, 120, 9_000])


@pytest.mark.parametrize("method", quick(["EP", "VI", "total"], "VI"))
def test_counts_far_from_the_prior(method):
    """Rates 9 prior standard deviations away, marginals of width .01: site equations and evidence hold."""
    at, arrays = model(LIKELIHOODS["poisson"]), (jnp.asarray(BIG), jnp.zeros(5), jnp.full(5, 1.7))
    alone = first_sites(at.likelihood, *arrays, 256)
    conditioned = evaluate(METHODS[method], at, BIG, sites=Sites(*alone))[0]
    slow, sites = (
        problem("poisson", y=BIG),
        (np.asarray(conditioned.sites.lam1), np.asarray(conditioned.sites.lam2)),
    )
    site = oracle.ep_site(1.0) if method == "EP" else oracle.vi_site
    assert (
        conditioned.residual < 1e-9
    )  # the tolerance of these cases, 1e-12, is below the rounding of such counts
    assert oracle.site_residual(slow, site, *sites) < 1e-7
    wanted = oracle.energy(slow, *sites, 0.0 if method == "VI" else 1.0, oracle.condition_without_inverse)
    np.testing.assert_allclose(conditioned.log_evidence, wanted, rtol=1e-9)
    assert wanted < 0


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_one_update_is_that_of_the_oracle(power):
    """At a fixed point any multiple of the change is zero, so an update at other sites is tested."""
    m, v = np.array([0.3, -1.4, 2.0]), np.array([0.5, 1.2, 0.3])
    lam1, lam2, y = np.array([0.1, 0.4, -0.3]), np.array([0.3, 0.2, 0.05]), np.array([2.0, 0, 11])
    unused = jnp.zeros(())
    q = Marginals(jnp.asarray(m), jnp.asarray(v), unused, unused, unused)
    sites = jnp.asarray([lam1, lam2])
    new = jit(updated_sites, static_argnums=0)(
        Objective(power, 128), LIKELIHOODS["poisson"], jnp.asarray(y), q, sites
    )
    site = oracle.ep_site(power) if power else oracle.vi_site
    for i in range(3):
        wanted = site(lambda f, i=i: LOG_DENSITIES["poisson"](y[i], f), m[i], v[i], lam1[i], lam2[i])
        np.testing.assert_allclose(new[:, i], wanted, rtol=1e-7)


@pytest.mark.slow
def test_distances_to_brute_force():
    """The evidence and leave-one-out densities of five labels by tensor quadrature; VI is a bound, EP is nearest."""
    slow = problem("probit")
    exact = oracle.log_evidence(slow, 14)
    np.testing.assert_allclose(exact, -4.2311724145, atol=1e-6)
    evidences = {
        name: float(case(name, "probit")[0].log_evidence) for name in ("Laplace", "EP", "VI", "total")
    }
    assert evidences["VI"] < exact
    assert abs(evidences["EP"] - exact) < 1e-3
    assert abs(evidences["total"] - exact) < 1e-3
    assert 0.03 < abs(evidences["Laplace"] - exact) < 0.06
    loo = oracle.leave_one_out(slow, 14)
    np.testing.assert_allclose(loo[[0, 2]], [-0.5277390568, -1.4486056210], atol=1e-5)
    for name, distance in {"EP": 0.034, "VI": 0.041, "Laplace": 0.14}.items():
        error = np.abs(case(name, "probit")[0].log_loo - loo).max()
        assert distance / 2 < error < distance


# Derivatives


def difference(fn, step=3e-3):
    """Differences of order four."""
    return (-fn(2 * step) + 8 * fn(step) - 8 * fn(-step) + fn(-2 * step)) / (12 * step)


@pytest.mark.parametrize("method", quick(["Laplace", "EP", "VI", "total"], "Laplace"))
def test_gradients_in_likelihood_mean_and_inputs(method):
    def value(scale=0.5, df=4.0, mean=0.1, x=X):
        at = model(gp.likelihoods.StudentT(scale, df), mean=mean)
        return evaluate(METHODS[method], at, OUTPUTS["student"], x)

    _, _, gradient, gradient_x = value()
    unit = np.zeros_like(X)
    unit[2] = 1.0
    wanted = [
        difference(lambda h: value(scale=0.5 + h)[0].log_evidence),
        difference(lambda h: value(df=4.0 + 10 * h)[0].log_evidence) / 10,
        difference(lambda h: value(mean=0.1 + h)[0].log_evidence),
        difference(lambda h: value(x=X + h * unit)[0].log_evidence),
    ]
    got = [gradient.likelihood.scale, gradient.likelihood.df, gradient.mean.value, gradient_x[2, 0]]
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_gradient_in_the_dispersion():
    def value(dispersion):
        return evaluate(METHODS["EP"], model(gp.likelihoods.NegativeBinomial(dispersion)), OUTPUTS["poisson"])

    wanted = difference(lambda h: value(0.5 + h)[0].log_evidence)
    np.testing.assert_allclose(value(0.5)[2].likelihood.dispersion, wanted, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name"),
    [
        pytest.param("EP", "logit", marks=pytest.mark.slow),
        ("VI", "poisson"),
        pytest.param("Laplace", "student", marks=pytest.mark.slow),
        pytest.param("total", "poisson", marks=pytest.mark.slow),
    ],
)
def test_hessians_match_differences_of_gradients(method, name):
    def build(log_parameters):
        lengthscale, variance = jnp.exp(log_parameters)
        kernel = gp.kernels.RBF(variance, lengthscale) + gp.kernels.Matern52(UNUSED, lengthscale)
        return gp.Model(kernel, LIKELIHOODS[name], gp.means.Constant(0.0))

    arrays = jnp.asarray(X), jnp.asarray(OUTPUTS[name])

    def value(log_parameters):
        return METHODS[method].condition(build(log_parameters), *arrays).log_evidence

    def gradient(log_parameters):
        at = model(LIKELIHOODS[name], (np.exp(log_parameters[1]), np.exp(log_parameters[0])))
        return log_gradient(evaluate(METHODS[method], at, OUTPUTS[name])[2], at)

    log_parameters = np.log([SETTING_A[1], SETTING_A[0]])
    hessian = jit(jax.hessian(value))(jnp.asarray(log_parameters))
    columns = [difference(lambda h, e=e: gradient(log_parameters + h * e)) for e in np.eye(2)]
    np.testing.assert_allclose(hessian, np.stack(columns, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-7)


# Limits and laws


@pytest.mark.parametrize("method", quick(["Laplace", "EP", "VI", "total"], "Laplace"))
def test_gaussian_noise_is_exact(method):
    at = model(LIKELIHOODS["gaussian"], UNEVEN, mean=0.4)
    exact = evaluate(gp.Exact(), at, OUTPUTS["gaussian"], X_UNEVEN)
    got = evaluate(METHODS[method], at, OUTPUTS["gaussian"], X_UNEVEN)
    fields = ("log_evidence", "mean", "variance", "log_loo", "alpha", "sites")
    for field in fields:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
            getattr(got[0], field),
            getattr(exact[0], field),
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8), got[1:], exact[1:])
    assert got[0].num_iterations <= 3


@pytest.mark.slow
def test_power_ep_tends_to_vi():
    """Gaps of first order in the power: about 1e-4 at 0.01."""
    small = evaluate(gp.EP(0.01, num_nodes=64), model(LIKELIHOODS["logit"]), OUTPUTS["logit"])[0]
    vi = case("VI", "logit")[0]
    assert small.status == Status.OK
    assert 0 < float(small.log_evidence - vi.log_evidence) < 1e-4
    np.testing.assert_allclose(small.sites.lam2, vi.sites.lam2, atol=5e-4)


WARM = [
    ("Laplace", "student"),
    ("EP", "probit"),
    pytest.param("EP", "student", marks=pytest.mark.slow),
    ("VI", "poisson"),
    pytest.param("total", "student", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("method", "name"), WARM)
def test_warm_starts_lead_to_the_same_answer(method, name):
    at = model(LIKELIHOODS[name], (1.7 * 1.05, 0.9 * 0.97))
    cold = evaluate(METHODS[method], at, OUTPUTS[name])
    warm = evaluate(METHODS[method], at, OUTPUTS[name], sites=case(method, name)[0].sites)
    assert warm[0].status == cold[0].status == Status.OK
    assert warm[0].num_iterations <= 5
    assert warm[0].num_iterations <= cold[0].num_iterations
    np.testing.assert_allclose(warm[0].log_evidence, cold[0].log_evidence, rtol=1e-11)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), warm[1:], cold[1:])


@pytest.mark.parametrize(("method", "name"), WARM)
def test_the_order_of_the_data_does_not_matter(method, name):
    order = np.array([3, 0, 4, 2, 1])
    straight, predicted, gradient, by_x = case(method, name)
    shuffled = evaluate(METHODS[method], model(LIKELIHOODS[name]), OUTPUTS[name][order], X[order])
    close = {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(shuffled[0].log_evidence, straight.log_evidence, **close)
    np.testing.assert_allclose(shuffled[0].sites.lam2, straight.sites.lam2[order], **close)
    np.testing.assert_allclose(shuffled[0].log_loo, straight.log_loo[order], **close)
    np.testing.assert_allclose(shuffled[3], by_x[order], **close)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), shuffled[1:3], (predicted, gradient))


def test_new_data_of_the_same_shape_compile_nothing(count_compiles):
    arrays = jnp.asarray(X), jnp.asarray(OUTPUTS["logit"])
    first = gp.condition(model(LIKELIHOODS["logit"]), *arrays, gp.EP(num_nodes=64))
    wanted = case("EP", "logit")[0]
    np.testing.assert_allclose(first.log_evidence, wanted.log_evidence, rtol=1e-8)  # jit in jit = jit alone
    others = jnp.asarray(X[::-1] + 0.1), jnp.asarray(OUTPUTS["logit"])
    with count_compiles() as counter:
        gp.condition(
            model(LIKELIHOODS["logit"], UNEVEN), *others, gp.EP(num_nodes=64)
        ).mean.block_until_ready()
    assert counter.count == 0


def test_vmap_over_hyperparameters():
    arrays = jnp.asarray(X), jnp.asarray(OUTPUTS["poisson"])
    settings = jnp.array([SETTING_A, UNEVEN, (0.3, 0.4)])
    values = jit(
        jax.vmap(lambda s: METHODS["VI"].condition(model(LIKELIHOODS["poisson"], s), *arrays).log_evidence)
    )(settings)
    for setting, value in zip(np.asarray(settings), values):
        wanted = evaluate(METHODS["VI"], model(LIKELIHOODS["poisson"], setting), OUTPUTS["poisson"])[0]
        np.testing.assert_allclose(value, wanted.log_evidence, rtol=1e-10)


def engine(method, dtype):
    """The method with a tolerance that the dtype can meet."""
    return METHODS[method] if dtype == jnp.float64 else dataclasses.replace(METHODS[method], tolerance=None)


@pytest.mark.f32
@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("Laplace", "student", -9.5149733331),
        ("EP", "probit", -4.2304234483),
        pytest.param("VI", "poisson", -10.0397449777, marks=pytest.mark.slow),
        pytest.param("total", "logit", -3.8404493175, marks=pytest.mark.slow),
    ],
)
def test_both_precisions(method, name, value, dtype):
    conditioned, predicted, gradient, _ = evaluate(
        engine(method, dtype), model(LIKELIHOODS[name]), OUTPUTS[name], dtype=dtype
    )
    assert conditioned.status == Status.OK
    np.testing.assert_allclose(conditioned.log_evidence, value, atol=2e-4)
    leaves = [leaf for leaf in jax.tree.leaves((conditioned, predicted, gradient)) if leaf.dtype.kind == "f"]
    assert {leaf.dtype for leaf in leaves} == {dtype}
    assert all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.f32
def test_failures_have_a_status(dtype):
    at = model(gp.likelihoods.Bernoulli(), (jnp.asarray(jnp.nan), 0.9))
    conditioned, _, _, _ = evaluate(engine("EP", dtype), at, OUTPUTS["probit"], dtype=dtype)
    assert conditioned.status == Status.NON_FINITE
    assert np.isnan(conditioned.log_evidence)
    indefinite = model(gp.likelihoods.Bernoulli(), (jnp.asarray(-3.0), 0.9))
    conditioned, _, _, _ = evaluate(engine("EP", dtype), indefinite, OUTPUTS["probit"], dtype=dtype)
    # The first sites are zero, where negative variances give NaN.
    assert conditioned.status in (Status.NOT_POSITIVE_DEFINITE, Status.NON_FINITE)
    assert np.isnan(conditioned.log_evidence)


# Hard data


def test_duplicate_rows_need_no_jitter():
    twice = np.array([-1.5, -1.5, 0.3, 0.3, 0.3])[:, None]
    y = np.array([0.0, 0, 1, 0, 1])
    conditioned, _, gradient, _ = evaluate(METHODS["EP"], model(LIKELIHOODS["probit"]), y, twice)
    assert conditioned.status == Status.OK
    assert conditioned.jitter == 0
    K, mean, densities = problem("probit", X=twice, y=y)
    slow = K + 1e-7 * np.eye(5), mean, densities  # the oracle inverts K
    np.testing.assert_allclose(
        conditioned.log_evidence, oracle.energy(slow, *oracle.ep(slow), 1.0), atol=1e-5
    )
    assert np.isfinite(gradient.kernel.terms[0].variance)


@pytest.mark.parametrize("method", quick(["Laplace", "EP", "VI", "total"], "EP"))
def test_separable_labels_under_a_huge_kernel_variance(method):
    """A step of labels: every method ends, reports whether it converged, and gives no evidence above log 1."""
    y = np.array([0.0, 0, 0, 1, 1])
    for variance in (1e2, 1e3, 1e6):
        at = model(LIKELIHOODS["probit"], (variance, 1.0))
        conditioned, (mean, spread), _, _ = evaluate(METHODS[method], at, y)
        assert conditioned.status == Status.OK or (
            variance > 1e4 and conditioned.status == Status.MAX_ITERATIONS
        )
        assert np.isfinite([*mean, *spread]).all()
        assert (np.sign(conditioned.mean) == 2 * y - 1).all()
        if conditioned.status == Status.OK:
            assert conditioned.log_evidence < 0
        else:  # far from a fixed point there is no evidence
            assert not conditioned.log_evidence >= 0


def test_an_outlier_far_away_under_ep():
    """A cavity may not exist during the iteration, the final precision is negative, and the result is the oracle's."""
    y = np.array([-1.2, 0.4, 0.5, 6.0, 0.9])
    at = model(gp.likelihoods.StudentT(0.3, 4.0))
    conditioned, _, _, _ = evaluate(METHODS["EP"], at, y)
    slow = problem("student", y=y, parameters=(0.3, 4.0))
    sites = oracle.ep(slow, damping=0.3)
    assert conditioned.status == Status.OK
    assert float(conditioned.sites.lam2[3]) < 0
    np.testing.assert_allclose(conditioned.sites.lam2, sites[1], rtol=1e-6)
    np.testing.assert_allclose(conditioned.log_evidence, oracle.energy(slow, *sites, 1.0), rtol=1e-8)
    far = evaluate(METHODS["EP"], at, np.array([-1.2, 0.4, 0.5, 60.0, 0.9]))[0]
    assert far.status in (Status.OK, Status.MAX_ITERATIONS)
    assert np.isfinite(far.log_evidence)
    assert abs(float(far.mean[3])) < 1.5  # the outlier is not followed


@pytest.mark.parametrize(
    "inference",
    [
        pytest.param(gp.EP(max_updates=1), marks=pytest.mark.slow),
        gp.VI(max_updates=1),
        gp.Laplace(max_updates=1),
    ],
)
def test_too_few_updates_have_a_status(inference):
    def report(X, y):
        conditioned = inference.condition(model(LIKELIHOODS["poisson"]), X, y)
        return conditioned.status, conditioned.num_iterations, conditioned.residual, conditioned.log_evidence

    status, num_updates, residual, value = jit(report)(jnp.asarray(X), jnp.asarray(OUTPUTS["poisson"]))
    assert status == Status.MAX_ITERATIONS
    assert num_updates == 1
    assert residual > 1e-2
    assert np.isnan(value)  # an energy, not an evidence


# Bad input


def condition(name, y, inference=None):
    return gp.condition(model(LIKELIHOODS[name]), X, np.asarray(y, float), inference or gp.EP(num_nodes=64))


@pytest.mark.parametrize(
    ("name", "y", "message"),
    [
        ("logit", [0, 1, 2, 0, 1], "labels 0 and 1, got 0, 1, 2"),
        ("logit", [-1, 1, 0, 1, 1], "labels 0 and 1"),
        ("probit", [0.5, 1, 0, 1, 1], "labels 0 and 1"),
        ("poisson", [-1, 0, 1, 2, 3], "counts 0, 1, 2"),
        ("poisson", [0.5, 0, 1, 2, 3], "counts 0, 1, 2"),
    ],
)
def test_outputs_that_the_likelihood_cannot_give(name, y, message):
    with pytest.raises(ValueError, match=message):
        condition(name, y)


def test_labels_of_minus_one_and_one_are_taken_and_said():
    with pytest.warns(UserWarning, match="-1 and \\+1"):
        got = condition("logit", 2 * OUTPUTS["logit"] - 1)
    np.testing.assert_allclose(
        got.log_evidence, condition("logit", OUTPUTS["logit"]).log_evidence, rtol=1e-12
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("logit", bool), ("logit", int), pytest.param("poisson", np.int32, marks=pytest.mark.slow)],
)
def test_classes_and_counts_may_be_integers(name, kind):
    from_integers = gp.condition(model(LIKELIHOODS[name]), X, OUTPUTS[name].astype(kind), gp.EP(num_nodes=64))
    np.testing.assert_array_equal(from_integers.log_evidence, condition(name, OUTPUTS[name]).log_evidence)


def test_integers_must_fit_into_the_dtype_and_real_outputs_are_floating():
    X = np.zeros((2, 1), np.float32)
    with pytest.raises(ValueError, match="cannot represent exactly"):
        gp.condition(gp.Model(gp.kernels.RBF(), gp.likelihoods.Poisson()), X, np.array([2**24 + 1, 0]))
    with pytest.raises(TypeError, match="y must be floating point, got dtype int"):
        gp.condition(gp.Model(gp.kernels.RBF()), X, np.array([1, 0]))


def test_one_class_only_is_said():
    with pytest.warns(UserWarning, match="all labels are 1"):
        got = condition("logit", np.ones(5))
    assert got.status == Status.OK
    assert (got.mean > 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: inspect.unwrap(gp.EP)(power=0.0), r"\(0, 1\], got 0.0; for the limit 0 use gp.VI"),
        (lambda: gp.EP(power=1.5), "power must be in"),
        (lambda: gp.EP(num_nodes=1), "num_nodes >= 2"),
        (lambda: gp.VI(max_updates=0), "max_updates >= 1"),
        (lambda: gp.VI(tolerance=0.0), "tolerance must be positive"),
        (lambda: gp.Hybrid("half"), "'total' or 'partial', got 'half'"),
        (lambda: gp.Hybrid(tolerance=-1.0), "tolerance must be positive"),
        (lambda: gp.Laplace(num_nodes=0), "num_nodes >= 2"),
        (lambda: gp.Laplace(tolerance=0.0), "tolerance must be positive"),
        (lambda: condition("probit", OUTPUTS["probit"], gp.Exact()), r"gp.EP\(\)"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
