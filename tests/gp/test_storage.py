"""Fits on disk: a loaded fit predicts the same, and files that are not fits are refused."""

import dataclasses
import importlib
import pkgutil
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import gp, mcmc, targets, vi
from probinfer.core.types import pytree
from probinfer.gp import storage
from probinfer.gp.fitted import Fit
from probinfer.gp.model.scaling import standardization
from probinfer.inference.posterior import Posterior

X = np.random.default_rng(0).normal(size=(15, 2))
Y = X[:, 0] ** 2


@pytree
class Shift:
    by: object

    def __call__(self, X):
        return X + self.by


def make(kernel=None, posterior=None):
    kernel = kernel or gp.kernels.RBF(1.0, jnp.ones(2)) + 0.5 * gp.kernels.Linear().on((1,))
    model = gp.Model(kernel, gp.likelihoods.Gaussian(0.1), gp.means.Constant(0.2))
    scaling = standardization(X, Y, outputs=True)
    return Fit(
        models=jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf]), model),
        posterior=posterior,
        log_evidence=jnp.asarray(-3.0),
        info=None,
        inference=gp.Exact(),
        scaling=scaling,
        X=scaling.inputs(jnp.asarray(X)),
        y=scaling.outputs(jnp.asarray(Y)),
        is_point=posterior is None,
    )


def test_round_trip(tmp_path):
    posterior = Posterior({"kernel.variance": jnp.ones((2, 3))}, log_weights=jnp.zeros((2, 3)))
    fit = make(posterior=posterior)
    fit.save(tmp_path / "fit.npz")
    back = gp.load(tmp_path / "fit.npz")
    assert jax.tree.structure(back) == jax.tree.structure(fit)
    for new, old in zip(back.predict(X[:4]), fit.predict(X[:4])):
        np.testing.assert_array_equal(new, old)
    np.testing.assert_array_equal(back.posterior.draws["kernel.variance"], posterior.draws["kernel.variance"])


def normal_density(values):
    return -0.5 * jnp.sum((values["kernel.variance"] - 1) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(
            mcmc.NUTS(num_warmup=20, num_draws=8, num_chains=1, metric="low-rank"), marks=pytest.mark.slow
        ),
        pytest.param(
            mcmc.NUTS(num_warmup=20, num_draws=8, num_chains=1, metric="diagonal"), marks=pytest.mark.slow
        ),
        pytest.param(vi.FullRank(num_draws=20, max_samples=16), marks=pytest.mark.slow),
        vi.MeanField(num_draws=20, max_samples=16),
        gp.MAP(num_restarts=1),
    ],
    ids=["low-rank", "diagonal", "full-rank", "mean-field", "map"],
)
def test_reports_of_every_engine_come_back(engine, tmp_path):
    target = targets.from_logdensity(normal_density, {"kernel.variance": jnp.ones(2)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the engines warn about so little work
        posterior = engine.sample(jax.random.key(0), target, progress=False)
    fit = dataclasses.replace(make(posterior=posterior), info=posterior.info)
    fit.save(tmp_path / "fit.npz")
    back = gp.load(tmp_path / "fit.npz")
    assert type(back.info) is type(posterior.info)
    assert jax.tree.structure(back) == jax.tree.structure(fit)
    jax.tree.map(np.testing.assert_array_equal, back, fit)


def test_classes_of_a_user_are_named(tmp_path):
    fit = make(gp.kernels.Warped(gp.kernels.RBF(), Shift(jnp.asarray(0.5))))
    fit.save(tmp_path / "fit.npz")
    with pytest.raises(ValueError, match=r"classes=\[...\]"):
        gp.load(tmp_path / "fit.npz")
    back = gp.load(tmp_path / "fit.npz", classes=[Shift])
    np.testing.assert_array_equal(back.predict(X)[0], fit.predict(X)[0])


def test_a_lambda_cannot_be_written_and_no_file_is_left(tmp_path):
    with pytest.raises(TypeError, match=r"fit.models.kernel.fn .* registered class"):
        make(gp.kernels.Warped(gp.kernels.RBF(), lambda X: 2 * X)).save(tmp_path / "fit.npz")
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("other.npz", "text.npz"):
        with pytest.raises(ValueError, match="not a fit"):
            gp.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        gp.load(tmp_path / "missing.npz")


def stored(path):
    """The arrays of a file, and the text of its structure."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, arrays.pop("structure").tobytes().decode()


@pytest.mark.parametrize(
    "name", ["os:PathLike", "probinfer.app:Problem", "probinfer.gp:jax", "probinfer.gp:None"]
)
def test_a_file_cannot_name_foreign_code(tmp_path, name):
    make().save(tmp_path / "fit.npz")
    arrays, text = stored(tmp_path / "fit.npz")
    text = text.replace("probinfer.gp:Exact", name)
    np.savez(tmp_path / "evil.npz", structure=np.frombuffer(text.encode(), np.uint8), **arrays)
    with pytest.raises(ValueError, match=name):
        gp.load(tmp_path / "evil.npz")
    assert dataclasses.is_dataclass(gp.load(tmp_path / "fit.npz"))


def test_classes_are_named_by_their_package(tmp_path):
    make().save(tmp_path / "fit.npz")
    _, text = stored(tmp_path / "fit.npz")
    names = set(re.findall(r'"class": "(probinfer[^"]*):', text))
    assert "probinfer.gp" in names
    assert names <= set(storage._PACKAGES)


@pytest.mark.parametrize("package", storage._PACKAGES)
def test_a_name_means_one_class_of_its_package(package):
    root = importlib.import_module(package)
    modules = [
        importlib.import_module(item.name) for item in pkgutil.walk_packages(root.__path__, f"{package}.")
    ]
    classes = [
        value.__qualname__
        for module in [root, *modules]
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and value.__name__[0] != "_"
    ]
    assert sorted(classes) == sorted(set(classes))
