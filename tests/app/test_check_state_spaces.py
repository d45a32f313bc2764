"""`probinfer check` tests the state-space engines: correct ones pass, one with a biased likelihood fails."""

import jax
import jax.numpy as jnp
import pytest

from probinfer import smc
from probinfer.app.commands.check import FULL, QUICK
from probinfer.app.pages import engines
from probinfer.app.suite.known_states import noisy_autoregression
from probinfer.app.suite.state_space_engines import as_parameters, state_space_subjects
from probinfer.app.suite.suite import SuiteSize, run_suite

SIZE = SuiteSize(
    num_exact=1024, num_simulations=0, num_engine_simulations=0, num_lanes=0, discrepancies=("Stein", "MMD")
)


def test_every_engine_of_the_table_has_a_subject():
    subjects = state_space_subjects(64)
    assert [s.name for s in subjects] == ["PMMH", "SMC^2", "particle Gibbs"]
    assert all(s.target is noisy_autoregression().known and not s.quick for s in subjects)
    assert FULL.is_complete
    assert not QUICK.is_complete


def test_the_model_of_the_engines_is_the_known_one():
    parameters = as_parameters(noisy_autoregression())
    values = {"scale": jnp.asarray(0.7), "slope": jnp.asarray(0.8)}
    filtered = smc.particle_filter(
        jax.random.key(0), parameters.model_fn(values), parameters.num_steps, 20_000
    )
    known = noisy_autoregression().known.target
    position = jnp.asarray([jnp.log(0.7), 0.8])
    prior = (
        -0.5 * ((position[0] + 0.5) / 0.7) ** 2
        - 0.5 * ((position[1] - 0.5) / 0.5) ** 2
        - jnp.log(0.35 * 2 * jnp.pi)
    )
    # sd of the log evidence about .03 at this size: 5 sd, false alarm 6e-7
    assert float(filtered.log_evidence) == pytest.approx(
        float(known.logdensity_fn(position) - prior), abs=0.15
    )


class Biased(smc.SMC2):
    """An engine that divides each observation by three."""

    def sample(self, key, target, **settings):
        model = noisy_autoregression()
        wrong = as_parameters(model._replace(y=model.y / 3))
        return super().sample(key, wrong, **settings)


@pytest.mark.slow
def test_right_and_wrong():
    entry = next(e for e in engines.STATE_SPACE_ENGINES if e.name == "smc2")
    right = state_space_subjects(128, [entry])
    wrong = state_space_subjects(128, [entry._replace(label="biased", make=lambda draws: Biased(128))])
    results = run_suite(jax.random.key(2), [*right, *wrong], size=SIZE, level=1e-4)
    assert [f.passed for f in results] == [True, True, False, False]  # false alarm 5e-5
