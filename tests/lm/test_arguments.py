"""Arguments that cannot be meant are refused before a run; what goes wrong in a run is said once, with its prompts."""

import dataclasses
import inspect
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import lm
from probinfer.core.errors import ConvergenceWarning
from probinfer.core.status import Status
from probinfer.core.types import pytree
from probinfer.lm.arguments import as_count
from probinfer.lm.rewards.model import RewardModel
from tests.lm import folders, tables

KEY = jax.random.key(5)
STEP = lm.every(1)
FILTER = lm.ParticleFilter(4, step=STEP)
SETTINGS = {"answer": lm.answers.text, "max_tokens": 4, "progress": False}
infer, bounds = inspect.unwrap(lm.infer), inspect.unwrap(lm.evidence_bounds)  # without the types of the tests


def run(prompt="a;", reward=None, method=FILTER, model=None, **settings):
    return infer(
        KEY, tables.model() if model is None else model, prompt, reward, method, **SETTINGS | settings
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_steps": 0}, ValueError, "max_steps must be an int of at least 1, got 0"),
        ({"max_steps": 1.5}, TypeError, "max_steps must be an int of at least 1, got 1.5"),
        ({"max_tokens": 1.5}, TypeError, "max_tokens must be an int of at least 1, got 1.5"),
        ({"max_tokens": "8"}, TypeError, "max_tokens must be an int of at least 1, got '8'"),
        ({"proposal": 0.7}, TypeError, r"lm\.Proposal\(temperature=0\.7\)"),
        ({"proposal": "greedy"}, TypeError, r"lm\.Proposal\(temperature="),
        (
            {"method": lm.ParticleFilter},
            TypeError,
            r"class ParticleFilter itself.*lm\.ParticleFilter\(\.\.\.\)",
        ),
        ({"answer": False}, TypeError, r"lm\.answers\.last_boxed.*got False"),
        ({"answer": "boxed"}, TypeError, r"lm\.answers\.last_boxed.*got 'boxed'"),
        ({"watch": "x"}, TypeError, r"watch is a function of an lm\.Event.*'x'"),
        ({"stop": 3}, TypeError, "stop is a string or several.*got 3"),
        ({"stop": ("a", 3)}, TypeError, "stop is a string or several"),
        ({"stop": ""}, ValueError, "empty stop string"),
        ({"prompt": ["a", ""]}, ValueError, r"prompt 1 of 2 \(counted from 0\): the prompt is empty"),
        ({"prompt": ["a", 3.5]}, TypeError, r"prompt 1 of 2 \(counted from 0\): a prompt is a string"),
        (
            {"prompt": ["a", "a" * 4095]},
            ValueError,
            r"longest prompt \(1 of 2, counted from 0\) has 4095 tokens",
        ),
    ],
)
def test_bad_arguments_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        run(**settings)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "m"}, TypeError, r"expected a model of lm\.load.*'m'"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be an int of at least 1, got 0"),
        ({"max_steps": 0}, ValueError, "max_steps must be an int of at least 1, got 0"),
        ({"max_steps": 1.5}, TypeError, "max_steps must be an int"),
        ({"num_repeats": 0}, ValueError, "num_repeats must be an int of at least 1"),
        ({"proposal": 0.7}, TypeError, r"lm\.Proposal\(temperature=0\.7\)"),
        ({"method": lm.ParticleFilter}, TypeError, "class ParticleFilter itself"),
    ],
)
def test_bounds_refuse_what_infer_refuses(change, error, message):
    arguments = {
        "model": tables.model(),
        "prompt": "a;",
        "reward": None,
        "method": FILTER,
        "max_tokens": 4,
    } | change
    with pytest.raises(error, match=message):
        bounds(KEY, **arguments)


def test_a_model_has_a_tokenizer():
    with pytest.raises(TypeError, match=r"expected a tokenizer.*got None"):
        lm.Model(tables.model().network, None)
    with pytest.raises(TypeError, match="class MajorityVote itself"):
        lm.Adaptive(lm.MajorityVote)


def _made(kind, *values):
    """Without the types of the tests, as ``infer``."""
    method = object.__new__(kind)
    inspect.unwrap(kind.__init__)(method, *values)
    return method


def test_integers_of_numpy_are_counts():
    assert type(as_count("n", np.int64(3))) is int
    assert type(_made(lm.ParticleFilter, np.int64(4)).num_particles) is int
    assert type(_made(lm.BeamSearch, np.int32(8), np.int64(2)).width) is int
    assert lm.ParticleFilter(4, step=np.int64(2)).step == lm.every(np.int64(2)) == lm.every(2)
    for wrong in (True, 2.0, "4"):
        with pytest.raises(TypeError, match=f"n must be an int of at least 1, got {wrong!r}"):
            _made(lm.MajorityVote, wrong)
    sizes = {"max_tokens": np.int64(4), "max_steps": np.int32(3)}
    assert run(**sizes).texts == run(max_steps=3).texts


@pytree
class _Jealous(lm.rewards.Score):
    """Nothing for texts after a prompt of one token, NaN after one of three."""

    value: object
    scale = "log"

    def init(self, context, num):
        return jnp.broadcast_to(context.length, (num,))

    def gather(self, state, ancestors):
        return state[ancestors]

    def step(self, state, view):
        found = jnp.where(state == 1, -jnp.inf, jnp.where(state == 3, jnp.nan, self.value))
        return state, found.astype(view.step_log_prob.dtype)


HOLDERS = [float, np.float32, np.float64, np.asarray, jnp.asarray]


@pytest.mark.parametrize("hold", HOLDERS)
def test_numbers_are_judged_by_their_value_whatever_holds_them(hold):
    assert lm.Proposal(temperature=hold(0.0)).top_k == 1
    assert float(lm.Proposal(temperature=hold(0.0)).temperature) == 1
    assert lm.Proposal(temperature=hold(0.5), top_p=hold(0.25)).top_k is None
    for make, message in (
        (lambda v: lm.Proposal(temperature=v), "temperature must be finite and not negative, got -1"),
        (lambda v: lm.Proposal(top_p=v), "top_p is a probability"),
        (lambda v: lm.rewards.self_certainty() * v, "the power of a reward must be finite and not negative"),
        (lm.rewards.sharpened, "the power of the prior must be finite and not negative"),
        (lm.rewards.self_certainty, "temperature must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            make(hold(-1.0))
        with pytest.raises(ValueError, match=message.partition(", got")[0]):
            make(hold(float("nan")))
    with pytest.raises(ValueError, match="correct=True needs a proposal that can draw every token"):
        lm.Proposal(temperature=hold(0.0), correct=True)


@pytest.mark.parametrize("bad", [np.ones(2), True, np.True_, "hot", 1j, None])
def test_what_is_no_number_is_no_temperature(bad):
    with pytest.raises(TypeError, match="temperature must be a number"):
        lm.Proposal(temperature=bad)


def test_counts_of_tokens_may_be_integers_of_numpy():
    assert lm.Proposal(top_k=np.int64(3)).top_k == 3
    with pytest.raises(TypeError, match="top_k"):
        lm.Proposal(top_k=2.0)
    with pytest.raises(ValueError, match="top_k"):
        lm.Proposal(top_k=0)


def test_traced_temperatures_are_taken_as_they_are():
    logits = jnp.asarray([[0.0, 1.0]])
    found = jax.jit(lambda tau: lm.Proposal(temperature=tau).log_probs(logits))(jnp.asarray(0.5))
    np.testing.assert_allclose(found, lm.Proposal(temperature=0.5).log_probs(logits), rtol=1e-6)


def test_warnings_name_their_prompts_once():
    reward = lm.rewards.from_score(_Jealous(jnp.asarray(0.0)), meaning="likelihood")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(["a;", "a", "a;", ";", "a;a"], reward)
    assert [r.status for r in found] == [
        0,
        Status.DEGENERATE_WEIGHTS,
        0,
        Status.DEGENERATE_WEIGHTS,
        Status.NON_FINITE,
    ]
    died, broken = (str(w.message) for w in caught if w.category is ConvergenceWarning)
    assert died.startswith("prompts 1, 3 of 5 (counted from 0): every particle died")
    assert broken.startswith("prompt 4 of 5 (counted from 0): a reward became NaN")


def test_answers_that_fail_cost_no_text():
    def answer(text):
        if text.startswith("a"):
            raise KeyError("no a")
        return 3 if text.startswith(";") else text

    with pytest.warns(ConvergenceWarning, match="the answer function failed for") as caught:
        found = run(method=lm.MajorityVote(16, step=STEP), answer=answer)
    failed = [text.startswith(("a", ";")) for text in found.texts]
    assert 0 < sum(failed) < 16
    assert [answer is None for answer in found.extracted] == failed
    message = str(caught[0].message)
    assert f"for {sum(failed)} of 16 texts" in message
    first = found.texts[failed.index(True)]
    assert ("KeyError: 'no a'" if first.startswith("a") else "it returned 3") in message


def test_faults_are_those_of_the_call():
    def judge(prompt, text):
        if prompt == "a":
            raise RuntimeError("not this one")
        return 0.5

    reward = lm.rewards.from_python(judge, meaning="terminal", workers=0)
    with pytest.warns(ConvergenceWarning, match=r"rewards failed \(all prompts together\)"):
        found = run(["a", "a;"], reward, lm.MajorityVote(4, step=STEP))
    assert found[0].faults == found[1].faults
    lost, num = map(int, re.match(r"(\d+) of (\d+) scores lost: \1 by exception", found[0].faults).groups())
    assert 0 < lost < num
    assert run("a;", reward, lm.MajorityVote(4, step=STEP)).faults == ""


def test_events_say_of_which_prompt_they_are():
    *events, last = lm.stream(KEY, tables.model(), ["a;", "aa;"], None, FILTER, **SETTINGS)
    assert [type(answers) for answers in last] == [lm.Answers] * 2
    prompts = [event.prompt for event in events]
    assert prompts == [0] * last[0].num_steps + [1] * last[1].num_steps


@pytest.fixture(scope="module")
def found():
    return run(method=lm.ParticleFilter(4, step=STEP))


def test_what_failed_is_said_first(found):
    assert found == found != dataclasses.replace(found)  # identity: fields are arrays
    assert "%" in found.summary()
    dead = dataclasses.replace(found, status=Status.DEGENERATE_WEIGHTS, log_evidence=-np.inf)
    assert dead.summary().splitlines()[0] == "status: DEGENERATE_WEIGHTS"
    assert "%" not in dead.summary()


def test_rows_of_steps_that_did_not_run_are_as_documented():
    logits, transitions = np.zeros((3, 3)), np.array([[1] * 3, [2] * 3, [2] * 3])
    logits[1:] = -np.inf, -np.inf, 0  # the end, after the prompt
    short = lm.Model(lm.Tabular(logits, transitions), lm.Vocabulary("a;.", eos="."))
    result = run("a", model=short)
    assert result.num_steps == 1
    np.testing.assert_array_equal(result.ess, np.full(4, 4.0))
    np.testing.assert_array_equal(result.ancestors, np.tile(np.arange(4), (4, 1)))
    np.testing.assert_array_equal(result.step_lengths, [[1] * 4, *[[0] * 4] * 3])


def test_pictures_of_genealogies_refuse_what_they_cannot_draw(found):
    with pytest.raises(TypeError, match=r"events must be lm\.Event.*got 1"):
        lm.genealogy(found, events=[1, 2])
    with pytest.raises(TypeError, match=r"expected the lm\.Answers of one prompt, got \[\]"):
        lm.genealogy([])
    with pytest.raises(TypeError, match=r"axes must be matplotlib axes.*got 3"):
        found.plot_genealogy(axes=3)
    with pytest.raises(TypeError, match=r"judge is a function.*got 3"):
        inspect.unwrap(lm.Answers.plot_genealogy)(found, judge=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders.lettered(tmp_path_factory.mktemp("checkpoint") / "llama")


def test_models_are_one_line(folder):
    model = lm.load(folder)
    size = sum(leaf.size for leaf in jax.tree.leaves(model.network)) / 1e6
    network = f"Transformer({model.network.config.num_layers} layers, 64 tokens, {size:.2f} M parameters)"
    assert repr(model) == f"Model({network})"
    reward = RewardModel(model.network, jnp.zeros(4), 0.0)
    assert repr(reward) == f"RewardModel({network})"
    assert repr(lm.Model(model.network, model.tokenizer, reward)) == f"Model({network}; reward model)"
    assert repr(tables.model()) == "Model(Tabular(13 states, 3 tokens))"


def test_folders_and_dtypes_that_cannot_be_meant(folder, tmp_path):
    load = inspect.unwrap(lm.load)
    for wrong in (None, 3):
        with pytest.raises(TypeError, match=f"expected the path of a checkpoint folder, got {wrong}"):
            load(wrong)
    for wrong in ("bogus", jnp.int32, bool, 7):
        with pytest.raises(TypeError, match="dtype must be one of floating point"):
            load(folder, dtype=wrong)
    for i, text in enumerate(["", "{}", "[]"]):
        bad = folders.lettered(tmp_path / f"bad{i}")
        (bad / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=rf"bad{i}.tokenizer\.json is no tokenizer\.json"):
            load(bad)
    with pytest.raises(TypeError, match=r"path of a tokenizer\.json, or its text; got None"):
        lm.Tokenizer(None)
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"vocab_size": 65}))
    with pytest.raises(ValueError, match=r"bad2 has tensors of other shapes than config\.json says"):
        load(bad)


def test_weights_that_are_nan_are_suspected(folder):
    model = lm.load(folder)
    broken = lm.Model(jax.tree.map(lambda leaf: leaf * jnp.nan, model.network), model.tokenizer)
    with pytest.warns(ConvergenceWarning, match="the weights of the model, or what is computed"):
        assert run("a b", model=broken).status == Status.NON_FINITE
