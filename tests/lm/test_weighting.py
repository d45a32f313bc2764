"""Proper weighting: on models whose texts can be enumerated every method estimates what it says, in every meaning.

For a method with weights w and evidence estimate Z, E[Z] is the evidence and E[Z sum_i W_i f(x_i)] is Z times the
posterior mean of f; for chains the means of the pooled texts converge to the posterior. All are z-tests over runs.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import lm
from probinfer.core.status import Status
from probinfer.lm.facade import run_prepared
from probinfer.lm.methods import search
from tests.lm import tables
from tests.params import quick

MEANINGS = ("none", "likelihood", "twist", "odds", "terminal")


@pytest.mark.parametrize("meaning", MEANINGS)
@pytest.mark.parametrize("size", [1, 3])
def test_enumeration_is_that_of_plain_python(meaning, size):
    method = lm.Exact(step=lm.every(size))
    token_model = tables.token_model(method, meaning)
    draws = jax.jit(method.run)(jax.random.key(0), token_model)
    posterior, log_z = tables.oracle(meaning, 4, size)
    assert float(draws.log_evidence) == pytest.approx(log_z, rel=1e-9, abs=1e-9)
    _same_posterior(draws, posterior)


def _same_posterior(draws, posterior):
    found = {}
    weights = np.exp(np.asarray(draws.log_weights) - float(draws.log_evidence))
    for row, length, weight in zip(np.asarray(draws.tokens), np.asarray(draws.length), weights, strict=True):
        if weight > 0:
            found[tuple(int(v) for v in row[:length])] = weight
    assert found.keys() == posterior.keys()
    np.testing.assert_allclose([found[t] for t in posterior], list(posterior.values()), rtol=1e-8)


def test_enumeration_with_delimiters_stop_strings_and_cut_laws():
    method = lm.Exact(step=lm.until(";", max_tokens=3))
    law = {"temperature": 0.5, "top_k": 2}
    token_model = tables.token_model(method, "likelihood", proposal=lm.Proposal(temperature=0.5, top_k=2))
    draws = jax.jit(method.run)(jax.random.key(0), token_model)
    posterior, log_z = tables.oracle("likelihood", 4, 3, ";", **law)
    assert float(draws.log_evidence) == pytest.approx(log_z, rel=1e-9)
    _same_posterior(draws, posterior)
    stopped = jax.jit(method.run)(jax.random.key(0), tables.token_model(method, "none", stop=("a;",)))
    weights = np.asarray(stopped.log_weights)
    assert np.logaddexp.reduce(weights) == pytest.approx(0, abs=1e-9)
    for row, length, weight in zip(
        np.asarray(stopped.tokens), np.asarray(stopped.length), weights, strict=True
    ):
        text = "".join(tables.SPELL[v] for v in row[:length])
        ends = text.endswith("a;") or text.endswith(".") or length == 4
        assert (weight > -np.inf) == (ends and "a;" not in text[:-1] and "." not in text[:-1])


METHODS = [
    lm.ParticleFilter(8, step=lm.every(1)),
    lm.ParticleFilter(8, "always", step=lm.every(2), resampling="multinomial"),
    lm.ParticleFilter(8, "entropic", step=lm.every(1)),
    lm.ParticleFilter(6, step=lm.until(";", max_tokens=2)),
    lm.NestedSMC(4, 3, step=lm.every(1)),
    lm.BestOfN(6, weighted=True),
]


def name_of(method):
    return f"{type(method).__name__}-{method.trigger}-{method.step}"


@pytest.mark.parametrize(("method", "meaning"), tables.pairs(METHODS[:5], MEANINGS[1:], name_of))
def test_filters_estimate_the_evidence_and_the_posterior_without_bias(method, meaning):
    draws = tables.repeated(method, tables.token_model(method, meaning), 2000)
    posterior, log_z = tables.oracle_of(meaning, method.step)
    ratio = np.exp(np.asarray(draws.log_evidence, float) - log_z)
    _unbiased(draws, ratio, posterior)


def _unbiased(draws, ratio, posterior):
    assert np.all(np.asarray(draws.status) == Status.OK)
    known = tables.truth(posterior)
    names = tables.classes(draws.tokens, draws.length)
    weights = np.exp(np.asarray(draws.log_weights, float))
    weights = ratio[:, None] * weights / weights.sum(axis=1, keepdims=True)
    estimates = np.stack([np.sum(weights * (names == name), axis=1) for name in known], axis=1)
    assert abs(tables.z_scores(ratio, 1.0)) < tables.Z_LIMIT
    assert np.all(np.abs(tables.z_scores(estimates, np.array(list(known.values())))) < tables.Z_LIMIT)
    assert np.std(ratio) > 0.01  # the estimates do vary: the test can fail


@pytest.mark.parametrize("meaning", quick(["likelihood", "odds"], "odds"))
def test_corrected_proposals_leave_the_prior_alone(meaning):
    """Tokens from another temperature, weighed by p / q: the evidence is that of the model itself."""
    method = lm.ParticleFilter(8, step=lm.every(1))
    proposal = lm.Proposal(temperature=1.7, correct=True)
    draws = tables.repeated(method, tables.token_model(method, meaning, proposal=proposal), 2000)
    posterior, log_z = tables.oracle(meaning, 4, 1)
    _unbiased(draws, np.exp(np.asarray(draws.log_evidence, float) - log_z), posterior)


def test_sums_and_powers_of_rewards():
    """Half the likelihood times the twist, against weights put together by hand."""
    method = lm.ParticleFilter(8, step=lm.every(1))
    both = 0.5 * tables.reward("likelihood") + tables.reward("twist") + lm.rewards.sharpened(1.5)
    draws = tables.repeated(method, tables.token_model(method, None, potential=both), 2000)
    whole = lm.Exact(step=lm.every(1))
    parts = {
        meaning: jax.jit(whole.run)(jax.random.key(0), tables.token_model(whole, meaning))
        for meaning in ("none", "likelihood", "twist")
    }
    prior = np.asarray(parts["none"].log_weights)
    possible = prior > -np.inf
    by_hand = 1.5 * prior[possible]
    for power, meaning in ((0.5, "likelihood"), (1.0, "twist")):
        by_hand += power * (np.asarray(parts[meaning].log_weights)[possible] - prior[possible])
    log_z = np.logaddexp.reduce(by_hand)
    assert abs(tables.z_scores(np.exp(np.asarray(draws.log_evidence) - log_z), 1.0)) < tables.Z_LIMIT


def test_baselines_choose_what_they_say():
    method = lm.BestOfN(6)
    token_model = tables.token_model(method, "twist")
    draws = tables.repeated(method, token_model, 50)
    scores = [
        [np.log(tables.score(tuple(row[:n]))) for row, n in zip(rows, lengths, strict=True)]
        for rows, lengths in zip(np.asarray(draws.tokens), np.asarray(draws.length), strict=True)
    ]
    np.testing.assert_allclose(np.asarray(draws.log_score), scores, rtol=1e-9)
    np.testing.assert_array_equal(np.argmax(draws.log_weights, axis=1), np.argmax(scores, axis=1))
    votes = tables.repeated(lm.BestOfN(6, weighted=True), token_model, 50)
    np.testing.assert_allclose(votes.log_weights, scores, rtol=1e-9)
    independent = tables.repeated(lm.MajorityVote(6), token_model, 50)
    np.testing.assert_array_equal(independent.tokens, draws.tokens)
    np.testing.assert_array_equal(independent.log_weights, np.zeros((50, 6)))


def test_greedy_takes_the_likeliest_tokens():
    model = tables.model()
    method = lm.Greedy()
    draws = jax.jit(method.run)(jax.random.key(0), tables.token_model(method, "none", language_model=model))
    logits, transitions = np.asarray(model.network.logits), np.asarray(model.network.transitions)
    state, text = 0, []
    for token in tables.PROMPT:
        state = transitions[state, token]
    while len(text) < 4 and 2 not in text:
        text.append(int(np.argmax(logits[state])))
        state = transitions[state, text[-1]]
    assert tuple(np.asarray(draws.tokens[0, : len(text)])) == tuple(text)
    assert int(draws.length[0]) == len(text)


@pytest.mark.parametrize("kind", quick([lm.BeamSearch, lm.DVTS], lm.DVTS))
def test_searches_keep_the_best(kind):
    """With many candidates of few tokens, all alike, every step takes the best prefix that goes on from the last.

    None of 96 candidates has a token of probability 1 / 3 with chance 1e-17, fewer than 3 of 288 with less.
    """
    network = tables.model().network
    uniform = lm.Model(replace(network, logits=jnp.zeros_like(network.logits)), tables.model().tokenizer)
    method = kind(288, 96, step=lm.every(1))
    draws = tables.repeated(method, tables.token_model(method, "twist", language_model=uniform), 5)
    best = ()
    while len(best) < 4 and 2 not in best:
        best = max(((*best, token) for token in range(3)), key=tables.score)
    assert np.all(np.asarray(draws.length) == len(best))
    assert np.all(np.asarray(draws.tokens)[..., : len(best)] == np.array(best))
    np.testing.assert_allclose(draws.log_score, np.log(tables.score(best)), rtol=1e-9)


def test_what_searches_keep_of_their_candidates(key):
    """The best of all, or the best of each; what has ended keeps its place, and only once."""
    scores = np.random.default_rng(0).normal(size=(3, 4))
    scores[2, 1], unused = -np.inf, jnp.zeros((3, 4))
    ended = jnp.asarray([False, True, False])
    chosen, kept = search.choose_best(key, unused, jnp.asarray(scores), ended)
    others = sorted((i for i in range(12) if i not in range(4, 8)), key=lambda i: -scores.flat[i])
    assert chosen.tolist() == [4, *others[:2]]
    assert kept.tolist() == [0.0, 0.0, 0.0]
    none_left = jnp.asarray(np.stack([scores[0], np.full(4, -np.inf)]))
    chosen, kept = search.choose_best_of_each(key, unused[:2], none_left, ended[::2])
    assert chosen.tolist() == [int(np.argmax(scores[0])), 4]
    assert kept.tolist() == [0.0, -np.inf]


def test_trees_vote_with_their_scores():
    """The same texts; each votes in proportion to its score instead of the best one alone."""
    settings = {"answer": lm.answers.text, "max_tokens": 4, "progress": False}
    args = (jax.random.key(2), tables.model(), [0, 1], tables.reward("odds"))
    best, voted = (
        lm.infer(*args, lm.DVTS(8, 2, step=lm.every(1), weighted=weighted), **settings)
        for weighted in (False, True)
    )
    assert best.texts == voted.texts
    assert best.best == best.extracted[int(np.argmax(best.log_scores))]
    known = lm.selectors.weighted_vote(voted.extracted, np.exp(voted.log_scores))
    assert {a: p for a, p in voted.answers if a is not None} == pytest.approx(dict(known.ranking))
    assert len(voted.answers) > 1
    assert "each voting with its score" in voted.target


@pytest.mark.slow
def test_all_prompts_in_one_program_are_those_one_by_one():
    """The masked loops of several prompts, of different lengths, change nothing."""
    model = tables.model()
    method = lm.ParticleGibbs(4, 2, step=lm.until(";", max_tokens=3))
    prompts = [[0, 1], [1], [0, 0, 1, 0]]
    settings = {"answer": lm.answers.text, "max_tokens": 6, "progress": False}
    reward = tables.reward("odds")
    programs = run_prepared._cache_size()
    together = lm.infer(jax.random.key(1), model, prompts, reward, method, batch=2, **settings)
    assert (
        run_prepared._cache_size() == programs + 1
    )  # the remainder of one prompt runs in the program of two
    single = lm.infer(jax.random.key(1), model, prompts, reward, method, batch=1, **settings)
    for a, b in zip(together, single, strict=True):
        assert a.texts == b.texts
        np.testing.assert_allclose(a.log_weights, b.log_weights, rtol=1e-9)
        assert a.ledger.generated == b.ledger.generated


@pytest.mark.slow
@pytest.mark.f32
def test_watched_steps_are_those_of_one_program(dtype):
    model, seen = tables.model(), []
    for method in (lm.ParticleFilter(5, step=lm.every(1)), lm.ParticleGibbs(3, 2, step=lm.every(2))):
        settings = {"answer": lm.answers.text, "max_tokens": 5, "progress": False}
        args = (jax.random.key(4), model, [0, 1], tables.reward("odds"), method)
        whole = lm.infer(*args, **settings)
        steps = lm.infer(*args, **settings, watch=seen.append)
        assert whole.texts == steps.texts
        np.testing.assert_allclose(whole.log_weights, steps.log_weights, rtol=1e-5)
        np.testing.assert_allclose(whole.ess, steps.ess, rtol=1e-5)
        assert len(seen) == (whole.num_steps if isinstance(method, lm.ParticleFilter) else 2)
        assert seen[-1].texts[-1] in whole.texts
        seen.clear()
    assert jnp.result_type(float) == dtype


def test_a_dead_end_of_a_constraint_costs_its_particles_only():
    """Tokens that lead where none may follow: the filter estimates what enumeration says, and none is NaN."""
    from probinfer.lm.rewards.allowed_tokens import allowed
    from probinfer.lm.rewards.masks import TokenMask

    table = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1]], bool)  # state 2 allows nothing
    follow = np.array([[1, 0, 0], [2, 3, 0], [0, 0, 0], [0, 0, 3]])
    reward = TokenMask(allowed(table, follow), "a path")
    token_model = tables.token_model(lm.Exact(), None, potential=reward)
    exact_z = float(jax.jit(lm.Exact().run)(jax.random.key(0), token_model).log_evidence)
    method = lm.ParticleFilter(16, step=lm.every(1))
    draws = tables.repeated(method, tables.token_model(method, None, potential=reward), 500)
    assert np.isfinite(exact_z)
    ratio = np.exp(np.asarray(draws.log_evidence, float) - exact_z)
    lost = np.where(
        ratio > 0, Status.OK, Status.DEGENERATE_WEIGHTS
    )  # of 16 texts all may end where nothing follows
    np.testing.assert_array_equal(draws.status, lost)
    assert abs(tables.z_scores(ratio, 1.0)) < tables.Z_LIMIT
    assert np.std(ratio) > 0.01
