"""The facade: what it refuses and how, what it survives, what it reports."""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import checks, lm
from probinfer.core.errors import ConvergenceWarning
from probinfer.core.status import Status
from probinfer.lm.rewards import calibration
from tests.lm import tables

KEY = jax.random.key(11)
SETTINGS = {"answer": lm.answers.text, "max_tokens": 4, "progress": False}
STEP = lm.every(1)


def run(reward=None, method=None, prompt="a;", model=None, **settings):
    method = lm.ParticleFilter(8, step=STEP) if method is None else method
    return lm.infer(KEY, model or tables.model(), prompt, reward, method, **SETTINGS | settings)


def test_answers_say_what_they_are():
    result = run(tables.reward("twist"))
    assert result.status == Status.OK
    assert len(result.texts) == 8
    assert sum(p for _, p in result.answers) == pytest.approx(1)
    assert result.best == result.answers[0][0]
    assert result.target == "weighted draws from the model, times the score of the whole text by PrefixScore"
    assert np.logaddexp.reduce(result.log_weights) == pytest.approx(0, abs=1e-9)
    assert result.ledger.generated == sum(len(t) for t in result.tokens) + _lost(result)
    assert result.sample(KEY) in result.texts
    assert "log evidence" in result.summary()
    assert result.ancestors.shape == result.step_lengths.shape == (4, 8)


def _lost(result):
    """Tokens of particles that were replaced."""
    kept = result.step_lengths.sum() - sum(len(t) for t in result.tokens)
    return kept


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        (lm.Proposal(temperature=0.5), "the model at temperature 0.5"),
        (lm.Proposal(top_k=2, top_p=0.9), "the model at top-k 2, top-p 0.9"),
        (lm.Proposal(temperature=2.0, correct=True), "the model"),
    ],
)
def test_targets_name_the_prior(proposal, message):
    assert run(proposal=proposal).target == f"weighted draws from {message}"


def test_a_second_prompt_and_another_reward_of_the_same_form_compile_nothing(count_compiles):
    method = lm.ParticleFilter(8, step=lm.until(";", max_tokens=2))
    run(tables.reward("odds"), method)
    score = tables.PrefixScore(jnp.asarray(tables.TABLE * 0.5, jnp.result_type(float)))
    with count_compiles() as compiles:
        again = lm.ParticleFilter(8, step=lm.until(";", max_tokens=2))
        run(lm.rewards.from_score(score, meaning="odds"), again, prompt="aa;a")
    assert compiles.count == 0


def test_new_functions_patterns_and_schemas_of_the_same_form_compile_nothing(count_compiles):
    """A program knows what runs on the host by a number: the second reward is obeyed, and nothing is compiled.

    None of 64 particles goes on with a letter of probability .2 at a rate of 6e-7 a step.
    """
    model, method = tables.model(), lm.ParticleFilter(64, step=lm.until(";", max_tokens=2))

    def python(letter):
        return lm.rewards.from_python(lambda prompt, text: 0.9 if letter in text else 0.0, workers=0)

    for first, second in (
        (lm.rewards.regex("a+"), lm.rewards.regex(";+")),
        (lm.rewards.regex("a+"), lm.rewards.grammar('start: ";" ";"*')),
        (python("a"), python(";")),
        (lm.rewards.regex("a+") + python("a"), lm.rewards.regex("[a;]+") + python(";")),
    ):
        run(first, method, model=model)
        with count_compiles() as compiles:
            found = run(second, method, model=model)
        assert compiles.count == 0
        alive = [text for text, w in zip(found.texts, found.log_weights, strict=True) if np.isfinite(w)]
        assert alive
        assert all(";" in text for text in alive)


def test_a_program_keeps_no_function_alive():
    """Compiled programs hold a number: the function and its workers go when the reward goes."""
    import gc
    import weakref

    class Judge:
        def __call__(self, prompt, text):
            return 0.5

    judge = Judge()
    gone = weakref.ref(judge)
    run(lm.rewards.from_python(judge, workers=0))
    del judge
    gc.collect()
    assert gone() is None


def test_all_weights_zero_is_an_effective_sample_size_of_zero():
    reward = lm.rewards.from_python(lambda prompt, text: 1 / 0, workers=0)
    with pytest.warns(ConvergenceWarning) as caught:
        found = run(reward)
    assert found.status == Status.DEGENERATE_WEIGHTS
    assert "every weight is zero: effective sample size 0" in found.summary()
    assert float(found.ess[-1]) == 0
    [warning] = [w for w in caught if w.category is ConvergenceWarning]  # one cause, one warning
    assert "ZeroDivisionError" in str(warning.message)
    assert "every particle died" in str(warning.message)


@pytest.mark.slow
def test_methods_that_ask_no_reward_say_what_of_it_counts():
    vote = lm.MajorityVote(4, step=STEP)
    assert run(None, vote).target.endswith("one vote each")
    assert run(tables.reward("odds"), vote).target.endswith("one vote each; the reward is not used")
    masked = run(lm.rewards.regex("[a;]*"), vote)
    assert masked.target.endswith("one vote each; of the reward only the potentials of tokens are used")
    assert run(None, lm.Greedy(step=STEP)).target == "the text of the likeliest tokens, a choice"


def test_reasons_why_texts_end():
    model = tables.model()
    result = run(stop=("aa",), model=model, method=lm.MajorityVote(64, step=STEP))
    for text, end, tokens in zip(result.texts, result.ended, result.tokens, strict=True):
        spelled = "".join(tables.SPELL[t] for t in tokens)
        finished = tokens[-1] == 2 or spelled.endswith("aa")
        assert end == (lm.End.FINISHED if finished else lm.End.MAX_TOKENS)
        assert "aa" not in spelled[:-1]
        assert text == spelled.replace(".", "")  # the end token is no text
    short = run(max_steps=2, method=lm.MajorityVote(64, step=STEP))
    assert set(np.unique(short.ended)) <= {lm.End.FINISHED, lm.End.MAX_STEPS}
    assert max(map(len, short.tokens)) == 2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"prompt": ""}, ValueError, "empty"),
        ({"prompt": []}, ValueError, "no prompt"),
        ({"prompt": [[0, 7]]}, ValueError, "tokens must be in 0 ... 2"),
        ({"prompt": np.zeros((2, 2), int)}, TypeError, "one vector of integers"),
        ({"prompt": 3.5}, TypeError, "a prompt is a string"),
        ({"prompt": [{"role": "user", "content": "a"}]}, TypeError, "chat=True"),
        ({"max_tokens": 0}, ValueError, "max_tokens"),
        ({"batch": 0}, ValueError, "batch must be an int of at least 1"),
        ({"max_tokens": 5000}, ValueError, "max_tokens=4094 fits"),
        ({"prompt": np.zeros(4096, int)}, ValueError, "shorten the prompt"),
        ({"method": "filter"}, TypeError, "ParticleFilter"),
        ({"reward": len}, TypeError, "from_python"),
        ({"reward": 3}, TypeError, "lm.rewards"),
        ({"model": 3}, TypeError, r"lm\.load"),
        ({"method": lm.Exact(), "max_tokens": 40}, ValueError, "lower max_tokens"),
        ({"chat": True}, ValueError, "template"),
    ],
)
def test_bad_input_is_refused_in_words(settings, error, message):
    with pytest.raises(error, match=message):
        run(**settings)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: lm.ParticleFilter(0), ValueError),
        (lambda: lm.ParticleFilter(2.5), TypeError),
        (lambda: lm.ParticleFilter(4, "sometimes"), ValueError),
        (lambda: lm.ParticleFilter(4, resampling="fair"), ValueError),
        (lambda: lm.ParticleFilter(4, step=2.5), TypeError),
        (lambda: lm.ParticleGibbs(1, 4), ValueError),
        (lambda: lm.ParticleGibbs(4, 4, burn_in=4), ValueError),
        (lambda: lm.ParticleGibbs(4, 4, resampling="residual"), ValueError),
        (lambda: lm.ParallelTempering(4, 4, powers=(0.5, 1.0)), ValueError),
        (lambda: lm.BestOfN(4, aggregate="mean"), ValueError),
        (lambda: lm.Adaptive(lm.MajorityVote(2), confidence=1.5), ValueError),
        (lambda: lm.Adaptive("vote"), TypeError),
        (lambda: lm.until(), ValueError),
        (lambda: lm.until(""), ValueError),
        (lambda: lm.until(3), TypeError),
        (lambda: lm.every(0), ValueError),
        (lambda: lm.every(1.5), TypeError),
        (lambda: lm.Proposal(temperature=-1.0), ValueError),
        (lambda: lm.Proposal(top_p=0.0), ValueError),
        (lambda: lm.Proposal(top_k=0), ValueError),
        (lambda: lm.Proposal(top_k=2, correct=True), ValueError),
        (lambda: lm.rewards.from_python(3), TypeError),
        (lambda: lm.rewards.from_python(len, meaning="truth"), ValueError),
        (lambda: lm.rewards.from_score(3), TypeError),
        (lambda: tables.reward("odds") + 3, TypeError),
        (lambda: tables.reward("odds") * "2", TypeError),
        (lambda: tables.reward("odds") * -1, ValueError),
        (lambda: lm.Tabular(np.zeros((2, 3)), np.zeros((2, 2), int)), ValueError),
        (lambda: lm.Tabular(np.zeros((2, 3)), np.full((2, 3), 2)), ValueError),
        (lambda: lm.Tabular(np.full((2, 3), -np.inf), np.zeros((2, 3), int)), ValueError),
        (lambda: lm.Model(tables.model().network, lm.Vocabulary("abcd")), ValueError),
        (lambda: lm.Model(3, lm.Vocabulary("abcd")), TypeError),
    ],
)
def test_bad_settings_are_refused(make, error):
    with pytest.raises(error):
        make()


@pytest.mark.parametrize("kind", ["dead", "nan"])
def test_dead_and_broken_rewards_keep_the_last_state(kind):
    """All weights zero, or NaN, from the third token on: a status, a warning, and the texts before."""
    value = -jnp.inf if kind == "dead" else jnp.nan
    reward = lm.rewards.from_score(_Failing(jnp.asarray(value)), meaning="likelihood")
    with pytest.warns(ConvergenceWarning, match="every particle died" if kind == "dead" else "NaN"):
        result = run(reward, model=_endless())
    assert result.status == (Status.DEGENERATE_WEIGHTS if kind == "dead" else Status.NON_FINITE)
    assert np.all(np.isfinite(result.log_weights))
    assert all(len(tokens) == 3 for tokens in result.tokens)
    assert result.sample(KEY) in result.texts
    assert result.log_evidence == -np.inf if kind == "dead" else np.isnan(result.log_evidence)


def _endless():
    model = tables.model()
    logits = np.asarray(model.network.logits).copy()
    logits[:, 2] = -np.inf
    return lm.Model(lm.Tabular(logits, np.asarray(model.network.transitions)), model.tokenizer)


class _Base(lm.rewards.Score):
    scale = "log"

    def step(self, state, view):
        return state, jnp.where(view.length >= 3, self.value, 0.0) * jnp.ones_like(view.step_log_prob)


from probinfer.core.types import pytree  # noqa: E402


@pytree
class _Failing(_Base):
    value: object


def test_python_rewards_that_fail_cost_their_particle_only():
    """A function that raises and hangs for some texts: weight zero for those, counted, everything else goes on.

    Votes do not steer, so the texts are known beforehand. The two commonest have probability .54: 24 texts are of fewer
    than three kinds at a rate below 1e-5.
    """
    model = tables.model()
    harmless = lm.rewards.from_python(lambda prompt, text: 0.5, meaning="terminal", workers=0)
    texts = run(harmless, lm.MajorityVote(24, step=STEP), model=model, max_tokens=2).texts
    endless, unclear, _ = sorted(set(texts), key=texts.count)[:3]  # rare ones: they are waited for

    def judge(prompt, text):
        if text == unclear:
            raise RuntimeError("no idea")
        if text == endless:
            time.sleep(60)
        return 0.5

    reward = lm.rewards.from_python(judge, meaning="terminal", timeout=1.0, workers=1)
    with pytest.warns(ConvergenceWarning, match="1 by time-out|by exception"):
        result = run(reward, lm.MajorityVote(24, step=STEP), model=model, max_tokens=2)
    assert "exception" in result.faults
    weights = run(reward, lm.BestOfN(24, weighted=True, step=STEP), model=model, max_tokens=2).log_weights
    assert result.texts == texts
    lost = [text in (unclear, endless) for text in result.texts]
    np.testing.assert_array_equal(np.isfinite(weights), ~np.array(lost))


def test_python_rewards_weigh_like_scores_of_arrays():
    """The same numbers from Python in a worker and from a compiled score: the same run."""

    def judge(prompt, text):
        import numpy as np

        table = np.random.default_rng(3).normal(size=97) * 2.0
        found = 0
        for token in text:
            found = (found * 5 + "a;.".index(token) + 1) % 97
        return 1 / (1 + np.exp(-table[found]))

    model = _endless()
    compiled = run(tables.reward("odds"), model=model)
    host = run(lm.rewards.from_python(judge, meaning="odds", workers=1), model=model)
    assert compiled.texts == host.texts
    np.testing.assert_allclose(compiled.log_weights, host.log_weights, rtol=1e-6, atol=1e-9)
    assert host.ledger.reward_calls == 8 * 4


def test_calibrated_scores_are_mapped():
    """The map slope * logit + offset in front of a score: its odds are the mapped ones."""
    score = tables.PrefixScore(jnp.asarray(tables.TABLE, jnp.result_type(float)))
    halved = tables.PrefixScore(jnp.asarray(0.5 * tables.TABLE - 1, jnp.result_type(float)))
    slope = calibration.Affine(jnp.asarray(0.5), jnp.asarray(-1.0))
    mapped = run(lm.rewards.from_score(lm.rewards.calibrated(score, slope)), lm.Exact(step=STEP))
    known = run(lm.rewards.from_score(halved), lm.Exact(step=STEP))
    assert mapped.log_evidence == pytest.approx(known.log_evidence, rel=1e-9)
    with pytest.raises(TypeError, match="a score and a map"):
        lm.rewards.calibrated(3, slope)
    with pytest.raises(ValueError, match="scale"):
        lm.rewards.calibrated(_Failing(jnp.asarray(0.0)), slope)


def test_streams_yield_steps_and_the_result():
    events = list(lm.stream(KEY, tables.model(), "a;", None, lm.ParticleFilter(4, step=STEP), **SETTINGS))
    assert all(isinstance(event, lm.Event) for event in events[:-1])
    assert isinstance(events[-1], lm.Answers)
    assert [event.step for event in events[:-1]] == list(range(len(events) - 1))
    first = list(
        itertools.islice(lm.stream(KEY, tables.model(), "a;", None, lm.MajorityVote(2), **SETTINGS), 1)
    )
    assert len(first) == 1
    with pytest.raises(TypeError, match="watch"):
        next(lm.stream(KEY, tables.model(), "a;", watch=print))
    with pytest.raises(ValueError, match="empty"):
        list(lm.stream(KEY, tables.model(), "", **SETTINGS))


def test_watchers_can_end_a_run():
    result = run(
        watch=lambda event: event.step == 1, method=lm.ParticleFilter(4, step=STEP), model=_endless()
    )
    assert result.num_steps == 2
    assert all(len(tokens) == 2 for tokens in result.tokens)


def test_adaptive_votes_stop_when_they_are_decided():
    """A model that nearly always says the same needs one or two batches, a fair coin needs them all."""
    logits = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 8.0, -9.0], [-20.0, -20.0, 20.0]])
    transitions = np.array([[1] * 3, [2] * 3, [3] * 3, [3] * 3])  # the prompt, one letter, the end
    sure = lm.Model(lm.Tabular(logits, transitions), lm.Vocabulary("a;.", eos="."))
    fair = lm.Model(lm.Tabular(np.where(logits == 8, 0, logits), transitions), sure.tokenizer)
    method = lm.Adaptive(lm.MajorityVote(8, step=STEP), confidence=0.99, max_rounds=6)
    assert len(run(method=method, model=sure).texts) <= 16
    undecided = run(method=method, model=fair)
    assert len(undecided.texts) == undecided.ledger.samples == 48
    beams = lm.Adaptive(lm.BeamSearch(8, width=4, step=STEP), confidence=0.999, max_rounds=2)
    assert run(tables.reward("odds"), beams).ledger.samples == 16  # of which 2 a batch are texts in the end
    pooled = run(tables.reward("twist"), lm.Adaptive(lm.ParticleFilter(4, step=STEP), max_rounds=3))
    assert pooled.log_evidence is not None
    assert pooled.ledger.samples == len(pooled.texts)
    assert sum(p for _, p in pooled.answers) == pytest.approx(1)


@pytest.mark.slow
def test_evidence_bounds_hold_the_truth_and_close_with_particles():
    """The means of 200 log estimates: below and above to 6.5 standard errors; the gap shrinks from N = 2 to N = 16."""
    model, reward = tables.model(), tables.reward("likelihood")
    _, log_z = tables.oracle("likelihood", 4, 1)
    filters = [lm.ParticleFilter(num, step=STEP) for num in (2, 16)]
    found = lm.evidence_bounds(
        KEY, model, list(tables.PROMPT), reward, filters, num_repeats=200, max_tokens=4
    )
    for bounds in found:
        assert bounds.lower - tables.Z_LIMIT * bounds.lower_error < log_z
        assert bounds.upper + tables.Z_LIMIT * bounds.upper_error > log_z
        assert bounds.forward.shape == bounds.reverse.shape == (200,)
    assert found[1].gap < 0.5 * found[0].gap
    sandwich = checks.evidence_sandwich(bounds.forward, bounds.reverse)
    assert sandwich.gap == pytest.approx(bounds.gap)
    with pytest.raises(ValueError, match="above log_bound"):
        lm.evidence_bounds(
            KEY, model, "a;", tables.reward("odds"), lm.ParticleFilter(2, step=STEP), max_tokens=4
        )
    with pytest.raises(TypeError, match="particle filter"):
        lm.evidence_bounds(KEY, model, "a;", reward, lm.Greedy(), max_tokens=4)
    with pytest.raises(ValueError, match="same steps"):
        lm.evidence_bounds(KEY, model, "a;", reward, [filters[0], lm.ParticleFilter(2, step=2)], max_tokens=4)
    with pytest.raises(ValueError, match="empty"):
        lm.evidence_bounds(KEY, model, "a;", reward, [], max_tokens=4)


def test_masks_allow_what_they_say_and_weigh_it():
    """Texts that match a pattern only; the evidence is their probability under the model."""
    model = tables.model()
    reward = lm.rewards.regex("a+;?a?")
    exact = run(reward, lm.Exact(step=STEP), prompt=list(tables.PROMPT))
    posterior, _ = tables.oracle("none", 4, 1)
    import re

    spelled = {text: "".join(tables.SPELL[t] for t in text if t != 2) for text in posterior}
    inside = [p for t, p in posterior.items() if t[-1] == 2 and re.fullmatch("a+;?a?", spelled[t])]
    assert exact.log_evidence == pytest.approx(np.log(sum(inside)), rel=1e-6)
    filtered = run(reward, lm.ParticleFilter(64, step=STEP), prompt=list(tables.PROMPT), model=model)
    alive = np.isfinite(filtered.log_weights)
    assert alive.any()
    assert all(re.fullmatch("a+;?a?", t) for t, good in zip(filtered.texts, alive, strict=True) if good)
