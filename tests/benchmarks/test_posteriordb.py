"""Ported posteriordb models against slow NumPy densities, planted faults, and the data files."""

import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import posteriordb_data
import pytest
from posteriordb_models import PORTS, find_port

from probinfer import targets
from probinfer.checks import stein_identity
from tests.reference.posteriordb import ORACLES, gp_regr, made_up_data

DATA = made_up_data(np.random.default_rng(4))
OF_MODEL = [port for port in PORTS if port.name != "sblri-blr"]  # the same port as sblrc-blr


def positions(target, num):
    """Unconstrained positions, standard normal, leading axis ``num``."""
    one = jax.eval_shape(target.draw_fn, jax.random.key(0), jnp.int32(0))
    rng = np.random.default_rng(8)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(num, *leaf.shape))), one)


def evaluate(target, many):
    both = jax.jit(jax.vmap(lambda z: (target.constrain_fn(z), target.logdensity_fn(z))))
    return jax.tree.map(np.asarray, both(many))


@pytest.mark.parametrize("port", OF_MODEL, ids=lambda port: port.name)
def test_log_densities_are_those_of_the_oracle(port):
    """Normalized priors on both sides, so that the values are equal, not only their differences."""
    target = port.target(DATA[port.data])
    many = positions(target, 3)
    values, log_p = evaluate(target, many)
    for i in range(3):
        z = {name: np.asarray(leaf[i]) for name, leaf in many.items()}
        expected_values, expected = ORACLES[port.name](z, DATA[port.data])
        np.testing.assert_allclose(log_p[i], expected, rtol=1e-10)
        assert expected_values.keys() == values.keys()
        for name, value in expected_values.items():
            np.testing.assert_allclose(values[name][i], value, rtol=1e-12)


def test_noise_of_the_gaussian_process_is_a_variance():
    """The oracle test above would not pass with sigma squared in its place."""
    z = {"rho": 0.3, "alpha": -0.2, "sigma": 0.7}
    data = DATA["gp_pois_regr"]
    assert abs(gp_regr(z, data)[1] - gp_regr(z, data, noise_power=2)[1]) > 0.1


@pytest.mark.parametrize("port", PORTS, ids=lambda port: port.name)
def test_stored_draws_find_their_positions(port):
    """What a draws file stores of a position leads back to the position."""
    target = port.target(DATA[port.data])
    many = positions(target, 2)
    values = jax.vmap(target.constrain_fn)(many)
    values.pop("z", None)  # of the eight schools; posteriordb stores theta
    stored = {name: np.asarray(value)[None] for name, value in values.items()}
    recovered = port.positions(target, stored)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-9, atol=1e-9), recovered, many)


@pytest.fixture(scope="module")
def exact():
    """The survey regression with flat priors, and 10 000 independent draws of its posterior."""
    port, data = find_port("nes2000"), DATA["nes2000"]
    X, y = (np.asarray(port.arguments(data)[name]) for name in ("X", "y"))
    rng, (n, p) = np.random.default_rng(11), X.shape
    best = np.linalg.lstsq(X, y, rcond=None)[0]
    # sigma^2 is inverse gamma with shape (n - p - 1) / 2 and scale RSS / 2, beta normal given sigma
    rss = np.sum((y - X @ best) ** 2)
    sigma = np.sqrt(rss / 2 / rng.gamma((n - p - 1) / 2, size=10_000))
    root = np.linalg.cholesky(np.linalg.inv(X.T @ X))
    beta = best + sigma[:, None] * (rng.normal(size=(10_000, p)) @ root.T)
    target = port.target(data)
    draws = port.positions(target, {"beta": beta[None], "sigma": sigma[None]})
    return target, port.arguments(data), draws


def test_exact_draws_satisfy_the_stein_identity(exact):
    target, _, draws = exact
    report = stein_identity(draws, target.logdensity_fn)
    assert report.pvalue > 1e-3  # false-fail rate 1e-3, Bonferroni over 20 z-scores


def squared(X, y, coefficient_scale, noise):
    """The fault: sigma squared where sigma belongs."""
    beta = numpyro.sample("beta", dist.Normal(0.0, 1e6).expand([X.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", noise)
    numpyro.sample("y", dist.Normal(X @ beta, sigma**2), obs=y)


def without_jacobian(target, z):
    return target.logdensity_fn(z) - target.log_jacobian_fn(z)


def test_wrong_ports_do_not(exact):
    """Expected z-scores: above 100, and 10 for the Jacobian; the test fails where one is below 5.8, at rate 1e-5."""
    target, arguments, draws = exact
    wrong = targets.from_numpyro(squared, **arguments)
    assert stein_identity(draws, wrong.logdensity_fn).pvalue < 1e-6
    wrong = jax.tree_util.Partial(without_jacobian, target)
    assert stein_identity(draws, wrong).pvalue < 1e-6


def test_find_port():
    assert find_port("kidiq").name == "kidiq-kidscore_momhsiq"
    assert len({port.name for port in PORTS}) == len(PORTS) == 11
    with pytest.raises(ValueError, match=r"2 ported posteriors .* begins with 'sbl'"):
        find_port("sbl")
    with pytest.raises(ValueError, match="there is arK-arK"):
        find_port("nothing")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of measurement data, and how to put a zipped file into it."""
    monkeypatch.setenv("PROBINFER_DATA", str(tmp_path))

    def put(relative, *contents):
        path = tmp_path / "posteriordb" / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for i, content in enumerate(contents):
                archive.writestr(f"{i}.json", content)

    return put


def test_files(folder):
    folder("data/toy.json.zip", json.dumps({"N": 2, "y": [1, 2.5]}))
    assert posteriordb_data.read_data("toy") == {"N": 2, "y": [1, 2.5]}
    names = ["sigma", *(f"beta[{i}]" for i in range(1, 12))]
    values = np.random.default_rng(0).normal(size=(2, 3, len(names)))
    chains = [dict(zip(names, chain.T.tolist(), strict=True)) for chain in values]
    folder("draws/toy-m.json.zip", json.dumps(chains))
    draws = posteriordb_data.read_draws("toy-m")
    assert draws.keys() == {"sigma", "beta"}
    np.testing.assert_array_equal(draws["sigma"], values[..., 0])
    np.testing.assert_array_equal(draws["beta"], values[..., 1:])  # beta[11] after beta[9]


def test_bad_files(folder, monkeypatch, tmp_path):
    folder("draws/short.json.zip", '[{"a": [1, 2]}, {"a": [1]}]')
    folder("draws/names.json.zip", '[{"a": [1, 2]}, {"b": [1, 2]}]')
    folder("draws/nan.json.zip", '[{"a": [1, NaN]}]')
    folder("data/two.json.zip", "{}", "{}")
    folder("data/text.json.zip", "no json")
    for name in ("short", "names"):
        with pytest.raises(ValueError, match=f"draws of {name} should be chains of equal length"):
            posteriordb_data.read_draws(name)
    with pytest.raises(ValueError, match="draws of nan for a are not finite"):
        posteriordb_data.read_draws("nan")
    for name in ("two", "text"):
        with pytest.raises(ValueError, match="should be a zip archive with one JSON file"):
            posteriordb_data.read_data(name)
    with pytest.raises(FileNotFoundError, match="has no file posteriordb/data/none"):
        posteriordb_data.read_data("none")
    monkeypatch.setenv("PROBINFER_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="which is not a folder"):
        posteriordb_data.read_data("toy")
    monkeypatch.delenv("PROBINFER_DATA")
    with pytest.raises(FileNotFoundError, match="set the environment variable PROBINFER_DATA"):
        posteriordb_data.read_draws("toy")


def test_ports_are_made_of_their_data():
    """New data of the same shapes: the same structure, so nothing compiles again."""
    port = find_port("nes2000")
    other = {
        name: np.asarray(value)[::-1].tolist() if name != "N" else value
        for name, value in DATA["nes2000"].items()
    }
    structures = [jax.tree.structure(port.target(data).logdensity_fn) for data in (DATA["nes2000"], other)]
    assert structures[0] == structures[1]
