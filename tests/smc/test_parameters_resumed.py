"""Engines for parameters of state-space models, killed and resumed."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest

import probinfer as pi
from probinfer import smc
from probinfer.core.errors import ConvergenceWarning
from probinfer.core.status import Status
from tests.smc import parameter_cases as cases

SHORT = {
    "PMMH": smc.PMMH(num_draws=40, num_chains=2, num_warmup=20),
    "SMC2": smc.SMC2(num_parameters=32, num_islands=2),
    "ParticleGibbs": smc.ParticleGibbs(num_draws=20, num_chains=2, num_warmup=20),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    target = cases.target(cases.observations(0))

    def run(checkpoint=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return SHORT[name].sample(jax.random.key(5), target, progress=False, checkpoint=checkpoint)

    checkpoint = pi.Checkpoint(tmp_path / "run", every=5)
    plain, checkpointed = run(), run(checkpoint)
    steps = list((tmp_path / "run").rglob("step_*.part"))
    runs = {path.parent for path in steps}
    assert len(runs) >= 2
    removed = 0
    for folder in runs:  # as if killed before the last one was written
        written = sorted(path for path in steps if path.parent == folder)
        if len(written) > 1:
            written[-1].unlink()
            removed += 1
    assert removed > 0
    for posterior in (checkpointed, run(checkpoint)):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(posterior), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PMMH", "ParticleGibbs"])
def test_what_was_drawn_before_ctrl_c_is_returned(name, press_during):
    """The draws are the first of those of the uninterrupted run."""
    target = cases.target(cases.observations(0))
    engine = dataclasses.replace(SHORT[name], num_draws=100)

    def run(press):
        press_during(**({"when": press} if press else {}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            posterior = engine.sample(jax.random.key(5), target, progress=False)
        return posterior, " ".join(str(warning.message) for warning in caught)

    uninterrupted, _ = run(None)
    after, total = engine.num_warmup, engine.num_warmup + engine.num_draws
    part, message = run(lambda tree: isinstance(tree, tuple) and after < getattr(tree[0], "step", 0) < total)
    assert "Ctrl-C ended the work early" in message
    assert part.info.status == Status.INTERRUPTED
    assert 1 <= part.num_draws < uninterrupted.num_draws
    for name, leaf in part.draws.items():
        np.testing.assert_array_equal(leaf, uninterrupted.draws[name][:, : part.num_draws])
