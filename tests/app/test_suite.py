"""The suite: the targets are correct, correct engines pass, wrong engines fail, and limitations are considered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from probinfer.app.suite import known_targets, trials
from probinfer.app.suite.suite import CheckResult, Subject, SuiteSize, Transition, run_suite, unexpected
from probinfer.checks import stein_identity
from probinfer.core.errors import NumericalError
from probinfer.core.status import Status
from probinfer.inference.posterior import Posterior

SIZE = SuiteSize(
    num_exact=400, num_simulations=0, num_engine_simulations=0, num_lanes=0, discrepancies=("Stein", "MMD")
)
TARGETS = {
    "correlated normal": known_targets.correlated_normal(),
    "skewed, badly scaled": known_targets.skewed(),
}


def make_posterior(draws):
    return Posterior(draws, unconstrained=draws)


def exact_draws(key, target):
    """Exact draws of the known target that has the same log density."""
    known = min(TARGETS.values(), key=lambda known_target: _distance(known_target.target, target))
    return make_posterior(known.exact(key, 400)[None])


def _distance(one, other):
    point = jnp.array([-1.0, 0.5, 0.3])
    return abs(float(one.logdensity_fn(point) - other.logdensity_fn(point)))


def uncorrelated(key, target):
    """Correct marginals of each target, without the correlation."""
    draws = exact_draws(key, target).unconstrained[0]
    keys = jax.random.split(key, 3)
    columns = [jax.random.permutation(k, column) for k, column in zip(keys, draws.T)]
    return make_posterior(jnp.stack(columns, axis=1)[None])


def shifted(key, target):
    draws = exact_draws(key, target).unconstrained
    return make_posterior(draws + jnp.std(draws, axis=1, keepdims=True))


def broken(key, target):
    raise NumericalError("no start", Status.NON_FINITE)


def too_few(key, target):
    return make_posterior(exact_draws(key, target).unconstrained[:, :5])


# Targets


def test_evidence_of_the_normal():
    target = TARGETS["correlated normal"]
    covariance = (0.8 + 0.2 * np.eye(3)) * np.outer([0.1, 1, 30], [0.1, 1, 30])
    u = np.array([0.05, -0.7, 12.0])
    log_q = stats.multivariate_normal(np.zeros(3), covariance).logpdf(u)
    assert float(target.target.logdensity_fn(jnp.asarray(u))) - log_q == pytest.approx(
        target.log_evidence, rel=1e-4
    )


def test_evidence_of_the_skewed():
    shapes, rates = (1.0, 2.0, 5.0), (50.0, 1.0, 0.01)

    def mass(shape, rate):
        mode = np.log(shape / rate)
        return integrate.quad(lambda u: np.exp(shape * u - rate * np.exp(u)), mode - 30, mode + 5)[0]

    total = sum(np.log(mass(shape, rate)) for shape, rate in zip(shapes, rates))
    assert TARGETS["skewed, badly scaled"].log_evidence == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("name", TARGETS)
def test_exact_draws_fit_their_density(key, name):
    target = TARGETS[name]
    report = stein_identity(target.exact(key, 2000), target.target.logdensity_fn, level=1e-4)
    assert report.passed  # fixed key; false alarm 1e-4


def test_the_posterior_of_the_regression_is_prior_times_likelihood(key):
    model = known_targets.linear_regression()
    keys = jax.random.split(key, 3)
    x = model.simulate(keys[0], model.prior_sample(keys[1]))
    target = model.target_fn(x)
    gaps = [
        float(target.logdensity_fn(u) - model.log_joint(u, x)) for u in jax.random.normal(keys[2], (3, 3))
    ]
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-5)


def test_prior_of_eight_schools_is_the_one_simulated(key):
    """The density of log tau integrates to what its draws say: P(tau < 5) is one half for a half-Cauchy(5)."""
    model = known_targets.eight_schools()
    rest = {"mu": jnp.zeros(()), "z": jnp.zeros(8)}
    grid = jnp.linspace(np.log(5) - 25, np.log(5) + 25, 4001)
    mass = np.exp(jax.vmap(lambda t: model.log_prior_fn({"log_tau": t, **rest}))(grid))
    assert (mass[:2000].sum() + mass[2000] / 2) / mass.sum() == pytest.approx(0.5, abs=1e-3)
    draws = jax.vmap(model.prior_sample)(jax.random.split(key, 4000))
    # 5 standard errors of a share of one half: false alarm 6e-7.
    assert np.mean(draws["log_tau"] < np.log(5)) == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(4000))


# Verdicts


@pytest.fixture(scope="module")
def results():
    limitations = {known_targets.CORRELATED: "ignores correlations"}
    subjects = [
        Subject("exact", exact_draws),
        Subject("marginals", uncorrelated, limitations),
        Subject("shifted", shifted),
        Subject("broken", broken),
        Subject("few", too_few),
    ]
    started, done = [], []
    returned = run_suite(
        jax.random.key(0),
        subjects,
        size=SIZE,
        started=lambda number, total, what: started.append((number, total)),
        done=done.append,
    )
    assert started == [(i, len(returned)) for i in range(len(returned))]
    assert done == returned
    return returned


def short_verdicts(results, subject, check=None):
    return {f.target: f.short_verdict for f in results if f.subject == subject and check in (None, f.check)}


def test_right_and_wrong_engines(results):
    alarms = [f for f in results if f.subject == "exact" and f.short_verdict != "passes"]
    assert len(alarms) <= 2  # each of four has a level of .0125 at most: three have a rate of 8e-6
    assert set(short_verdicts(results, "shifted", "MMD").values()) == {"fails"}
    assert short_verdicts(results, "marginals", "MMD") == {
        "correlated normal": "fails as expected",
        "skewed, badly scaled": "passes",
    }
    assert all(f.verdict and f.report is not None for f in results if f.subject == "exact")


def test_engines_that_fail_and_checks_that_refuse(results):
    assert set(short_verdicts(results, "broken").values()) == {"fails"}
    assert "no start" in next(f.verdict for f in results if f.subject == "broken")
    assert set(short_verdicts(results, "few").values()) == {"cannot tell"}
    assert all("cannot tell" in f.verdict for f in results if f.subject == "few")


def test_what_is_unexpected(results):
    sentences = unexpected([f for f in results if f.subject in ("exact", "marginals", "few")])
    assert sentences == []
    sentences = unexpected(results)
    assert any(sentence.startswith("shifted on correlated normal fails MMD") for sentence in sentences)
    blind = CheckResult(
        subject="a",
        target="t",
        check="Stein",
        report=None,
        passed=True,
        verdict="no fault seen",
        reason="ignores correlations",
    )
    assert blind.short_verdict == "not detected"
    assert unexpected([blind]) == ["no check detected what is wrong with a on t: it ignores correlations"]
    assert unexpected([blind, blind._replace(check="MMD", passed=False)]) == []


@pytest.mark.slow
def test_calibration_loops_and_evidence(key):
    """An engine for the conjugate model: its exact posterior, and one with half the standard deviations."""
    design = jnp.asarray([[2.0, 2, 0], [2, 1.5, 0.5], [1.5, 2, 1], [2, 2.5, -1], [2, 2, 0.5]])
    root = jnp.linalg.cholesky(jnp.linalg.inv(jnp.eye(3) + design.T @ design))

    def sample(key, target, width=1.0):
        mean = root @ root.T @ jax.grad(target.logdensity_fn)(jnp.zeros(3))
        return make_posterior((mean + width * jax.random.normal(key, (100, 3)) @ root.T)[None])

    def narrow(key, target):
        return sample(key, target, 0.5)

    size = SIZE._replace(num_engine_simulations=150, discrepancies=())
    results = run_suite(key, [Subject("right", sample), Subject("narrow", narrow)], size=size, level=1e-4)
    assert [(f.subject, f.check, f.passed is not False) for f in results] == [  # a rate of 1e-4
        ("right", "SBC", True),
        ("right", "TARP", True),
        ("narrow", "SBC", False),
        ("narrow", "TARP", False),
    ]


def weighted(key, target):
    """Four chains of 100; the first halves have weight zero, the last chain has double weight."""
    draws = jnp.arange(4 * 100 * 3.0).reshape(4, 100, 3)
    log_weights = jnp.where(jnp.arange(100) < 50, -jnp.inf, 0.0) + jnp.log(jnp.array([1.0, 1, 1, 2]))[:, None]
    return Posterior(draws, log_weights=log_weights, unconstrained=draws)


def test_weighted_draws_are_resampled_in_their_order(key):
    subject = Subject("weighted", weighted)
    posterior, draws, remark = trials.sample(subject, key, None)
    assert draws.shape == (4, 100, 3)
    assert remark == ""
    rows = np.asarray(draws.reshape(-1, 3)[:, 0]).astype(int) // 3
    assert np.all(np.diff(rows) >= 0)
    assert np.all(rows % 100 >= 50)
    # 200 draws of weight 1 and 2 in 250: systematic resampling gives each 400 w / 250, rounded up or down
    copies = np.bincount(rows, minlength=400).reshape(4, 100)[:, 50:]
    assert set(np.unique(copies[:3])) <= {1, 2}
    assert set(np.unique(copies[3])) <= {3, 4}
    plain = Posterior(posterior.draws, unconstrained=posterior.draws)
    assert trials.equally_weighted(key, plain) is plain.unconstrained


@pytest.mark.parametrize(
    ("below", "above", "right"),
    [(-0.1, 0.1, True), (-0.5, -0.3, False), (0.3, 0.5, False), (0.4, -0.4, False)],
)
def test_an_evidence_is_bounded_by_what_the_engine_gives(key, below, above, right):
    target, spread = TARGETS["correlated normal"], 0.01 * np.linspace(-1, 1, 20)

    posterior = make_posterior(jnp.zeros((1, 2, 3)))

    def bounds(key, given_posterior, given_target, exact):
        assert given_posterior is posterior
        assert given_target is target.target
        return target.log_evidence + below + spread, target.log_evidence + above + spread

    subject = Subject("s", exact_draws, evidence_fn=bounds, log_density_fn=lambda posterior: None)
    assert subject.bounds_fn is bounds
    subject_draws = trials.SubjectDraws(posterior, posterior.unconstrained, "")
    report, passed, verdict = trials.evidence(bounds, lambda: subject_draws, target, None, key, 0.05)
    assert passed is right
    assert report.lower == pytest.approx(target.log_evidence + below)
    assert f"exact value {target.log_evidence:.4g}" in verdict
    assert Subject("s", exact_draws).bounds_fn is None


@pytest.mark.slow
def test_transitions(key):
    """A random walk with a dictionary as state, correct and with a wrong acceptance ratio."""

    def make_transition(name, temperature):
        def step(logdensity_fn, key, state):
            key_move, key_accept = jax.random.split(key)
            new = state["position"] + 0.5 * jax.random.normal(key_move, state["position"].shape)
            log_ratio = temperature * (logdensity_fn(new) - logdensity_fn(state["position"]))
            accepted = jnp.log(jax.random.uniform(key_accept)) < log_ratio
            return {"position": jnp.where(accepted, new, state["position"])}, {"accepted": accepted}

        return Transition(
            name, lambda f, position: {"position": position}, step, lambda state: state["position"]
        )

    transitions = [make_transition("right", 1.0), make_transition("hot", 0.4)]
    key = jax.random.fold_in(key, 1)
    results = run_suite(key, [], transitions=transitions, size=SIZE._replace(num_lanes=400), level=1e-4)
    assert [(f.subject, f.passed) for f in results] == [("right", True), ("hot", False)]  # false alarm 1e-4


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"key": 3}, TypeError, "key"),
        ({"level": 0.7}, ValueError, "false alarm"),
        ({"subjects": []}, ValueError, "nothing to check"),
    ],
)
def test_bad_input(change, error, match):
    arguments = {"key": jax.random.key(0), "subjects": [Subject("exact", exact_draws)], "size": SIZE} | change
    with pytest.raises(error, match=match):
        run_suite(arguments.pop("key"), arguments.pop("subjects"), **arguments)
