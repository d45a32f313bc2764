"""Chains over texts: a pass leaves exact draws exact, a whole chain samples the posterior, and costs are counted.

The texts of the models can be enumerated; every comparison states its false-fail rate (see ``tables.Z_LIMIT``).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from probinfer import lm
from probinfer.core.status import Status
from probinfer.lm.generation.token_model import init_particles, log_target
from probinfer.lm.methods import exact, gibbs
from tests.lm import tables
from tests.params import quick


def exact_paths(token_model, num, key):
    """Draws from the posterior by enumeration, as records (num, T, ...)."""
    tokens, length = exact._all_sequences(3, 4, 10_000)
    records = exact._cut_into_steps(token_model, jnp.asarray(tokens), jnp.asarray(length))
    log_weights, _ = log_target(token_model, init_particles(token_model, len(tokens)), records, jnp.int32(0))
    chosen = jax.random.categorical(key, log_weights, shape=(num,))
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf[:, chosen], 1, 0), records)


def _law(paths):
    """Classes of paths (..., T, K): first token and length."""
    return np.asarray(paths.tokens)[..., 0, 0] * 100 + np.asarray(paths.length).sum(axis=-1)


CHAINS = [
    lm.ParticleGibbs(3, 1, step=lm.every(1)),
    lm.ParticleGibbs(
        3, 1, step=lm.every(1), ancestor_sampling=False, trigger="always", resampling="multinomial"
    ),
    lm.ParticleGibbs(3, 1, step=lm.until(";", max_tokens=2)),
    lm.ParticleGibbs(3, 1, trigger="entropic", step=1),
]


def name_of(method):
    return f"{method.ancestor_sampling}-{method.trigger}-{method.step}"


@pytest.mark.parametrize(
    ("method", "meaning"), tables.pairs(CHAINS, ["likelihood", "twist", "odds"], name_of, 2)
)
def test_particle_gibbs_leaves_the_posterior_as_it_is(method, meaning):
    """From exact draws one pass gives exact draws, and it moves: 3000 chains, binomial tests of each class."""
    num, token_model = 3000, tables.token_model(method, meaning)
    keys = jax.random.split(jax.random.key(5), num)
    starts = exact_paths(token_model, num, jax.random.key(6))
    after, draws = jax.jit(jax.vmap(lambda key, path: gibbs._iterate(method, token_model, path, key)))(
        keys, starts
    )
    posterior, _ = tables.oracle_of(meaning, method.step)
    known = tables.truth(posterior)
    for paths in (starts, after):
        for name, p in known.items():
            assert stats.binomtest(int(np.sum(_law(paths) == name)), num, p).pvalue > 1e-10
    assert np.mean(_law(after) != _law(starts)) > 0.1
    inverse = np.exp(tables.oracle_of(meaning, method.step)[1] - np.asarray(draws.log_evidence, float))
    assert abs(tables.z_scores(inverse, 1.0)) < tables.Z_LIMIT  # E[1 / Zhat] = 1 / Z


@pytest.mark.slow
def test_tempered_chains_leave_their_posteriors_as_they_are():
    """Passes and exchanges, from exact draws of each power."""
    num, powers = 2000, (1.0, 0.3)
    method = lm.ParallelTempering(3, 1, powers=powers, step=lm.every(2))
    token_model = tables.token_model(method, "odds")
    parts = [gibbs._temper_model(token_model, jnp.asarray(power)) for power in powers]
    starts = [exact_paths(part, num, jax.random.key(7 + i)) for i, part in enumerate(parts)]
    starts = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *starts)
    keys = jax.random.split(jax.random.key(9), num)
    after, _ = jax.jit(jax.vmap(lambda key, path: gibbs._iterate_all(method, token_model, path, key)))(
        keys, starts
    )
    many = [exact_paths(part, 200_000, jax.random.key(17 + i)) for i, part in enumerate(parts)]
    for k in range(2):
        names, counts = np.unique(_law(many[k]), return_counts=True)
        names, counts = (
            names[counts > tables.RARE * counts.sum()],
            counts[counts > tables.RARE * counts.sum()],
        )
        shares = np.stack([_law(after)[:, k] == name for name in names], axis=1).astype(float)
        known = counts / len(_law(many[k]))
        error = np.sqrt(known * (1 - known) * (1 / num + 1 / len(_law(many[k]))))
        assert np.all(np.abs(shares.mean(axis=0) - known) < tables.Z_LIMIT * error)
    swapped = np.mean(_law(after)[:, 0] != _law(starts)[:, 0])
    assert swapped > 0.1


def test_a_whole_chain_samples_the_posterior():
    """A short burn-in leaves a bias below the noise of 400 runs: the chain mixes in a few iterations here."""
    method, meaning = lm.ParticleGibbs(4, 12, step=lm.every(1), burn_in=2), "twist"
    draws = tables.repeated(method, tables.token_model(method, meaning), 400)
    posterior, _ = tables.oracle_of(meaning, method.step)
    assert np.all(np.asarray(draws.status) == Status.OK)
    known = tables.truth(posterior)
    names = tables.classes(draws.tokens, draws.length)
    weights = np.exp(np.asarray(draws.log_weights, float))
    weights /= weights.sum(axis=1, keepdims=True)
    estimates = np.stack([np.sum(weights * (names == name), axis=1) for name in known], axis=1)
    assert np.all(np.abs(tables.z_scores(estimates, np.array(list(known.values())))) < tables.Z_LIMIT)


@pytest.mark.slow
@pytest.mark.parametrize("ancestor_sampling", quick([True, False], True))
def test_particle_gibbs_counts_what_it_reads_again(ancestor_sampling):
    """Before step t the rest of the reference is read after all N particles, and their reward asked about it."""
    method = lm.ParticleGibbs(3, 1, step=lm.every(1), ancestor_sampling=ancestor_sampling)
    token_model = tables.token_model(method, "odds")
    paths = exact_paths(token_model, 50, jax.random.key(3))
    longest = int(np.argmax(np.asarray(paths.length).sum(axis=1)))
    path = jax.tree.map(lambda leaf: leaf[longest], paths)
    _, draws = jax.jit(lambda key: gibbs._iterate(method, token_model, path, key))(jax.random.key(1))
    lengths, steps = np.asarray(path.length), int(draws.num_steps)
    rest = [lengths[t:] for t in range(1, steps)] if ancestor_sampling else []
    assert int(draws.ledger.rescored) == 3 * sum(map(sum, rest))
    asked = 3 * sum(int(np.sum(part > 0)) for part in rest)
    assert int(draws.ledger.scored) - asked == int(np.sum(np.asarray(draws.step_lengths) > 0))
    assert not ancestor_sampling or (steps > 2 and asked)
