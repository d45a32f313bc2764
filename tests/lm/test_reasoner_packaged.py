"""The weights in the package: they load, err as often as they shall, and the reward model knows more than nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import lm
from probinfer.app.reasoner_training import reward_model, sampled_solutions
from probinfer.lm.reasoner import encoding, files, load, task
from probinfer.lm.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model():
    return files.read_model(load.folder())


@pytest.fixture(scope="module")
def problems():
    return task.draw(77, 60)


def test_the_files_are_small():
    sizes = [file.stat().st_size for file in load.folder().rglob("*.safetensors")]
    assert len(sizes) == 2
    assert sum(sizes) < 8e6


def test_greedy_accuracy(model, problems):
    """Nothing is random: weights, problems and choices are fixed, up to ties of logits within rounding.

    On problems drawn anew, with the accuracy of the report, 60 problems fall outside [0.2, 0.6] with
    probability below 2e-3; this set lies inside by far more than the one or two problems that rounding may turn.
    """
    assert 0.2 <= sampled_solutions.accuracy(model, problems).mean() <= 0.6


def test_the_reward_model_tells_right_from_wrong(model, problems):
    """The rollouts are fixed by their key; on other draws of 120 the AUC has a standard error of 0.02."""
    twice = task.Problems(*(np.repeat(leaf, 2, axis=0) for leaf in problems))
    found = sampled_solutions.draw_rollouts(jax.random.key(3), model, twice)
    logits, ends = reward_model.score_rollouts(files.read_reward(load.folder()), twice, found)
    assert reward_model.auc(logits[ends], found.is_correct[ends]) > 0.75


def test_the_folder_has_the_tokenizer_of_the_texts():
    tokenizer = Tokenizer.from_folder(load.folder())
    expected = [b"", b"", *(piece.encode() for piece in encoding.TOKENS[2:])]
    assert tokenizer.token_bytes == expected
    assert tokenizer.eos_ids == (encoding.END,)
    problem = load.problems(0, 1)[0]
    ids = tokenizer.encode(problem.prompt)
    np.testing.assert_array_equal(ids, encoding.prompts(task.stack([problem]))[0][0])
    assert tokenizer.decode(tokenizer.encode(problem.solution)) == problem.solution


def test_problems_are_those_of_the_arrays():
    rows = task.draw(3, 20, (2, 4))
    assert load.problems(3, 20, (2, 4)) == [task.pick(rows, i) for i in range(20)]
    assert all(task.check(problem, problem.solution).answer for problem in load.problems(1, 20))


def test_prompts_and_answers_need_no_settings():
    """The model reads its own answers, and a task as a person writes it; what is no task is explained."""
    reasoner = lm.reasoner()
    settings = {"max_tokens": 40, "progress": False}
    found = lm.infer(jax.random.key(0), reasoner, "7+5 * 3", None, lm.Greedy(step=lm.until("\n")), **settings)
    assert found.prompt == lm.reasoner.parse("7 + 5 * 3").prompt
    assert found.extracted == [lm.reasoner.answer(found.text)]
    assert found.best is not None
    with pytest.raises(ValueError, match="the reasoner knows chains such as '7 \\+ 5 \\* 3 - 2'"):
        lm.infer(jax.random.key(0), reasoner, "What is love?", None, lm.Greedy(), **settings)


def test_missing_weights_are_said(monkeypatch, tmp_path):
    monkeypatch.setattr(load.importlib.resources, "files", lambda name: tmp_path)
    with pytest.raises(FileNotFoundError, match="reasoner_train"):
        load.folder()


@pytest.mark.slow
def test_transformers_reads_the_folders(model):
    """Both models by the library whose layout the files have: logits of language model and reward within 1e-4."""
    torch, library = pytest.importorskip("torch"), pytest.importorskip("transformers")
    problems = task.draw(8, 16, (5, 5))
    tokens, _ = encoding.join(*encoding.prompts(problems), *encoding.solutions(problems))
    reward = files.read_reward(load.folder())
    theirs = library.AutoModelForCausalLM.from_pretrained(load.folder())
    judge = library.AutoModelForTokenClassification.from_pretrained(load.folder() / "reward")
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens).long()).logits.numpy()
        values = judge.eval()(torch.tensor(tokens).long()).logits.numpy()[..., 0]
    ours = jnp.asarray(tokens)
    np.testing.assert_allclose(model.head(model.forward(ours)), logits, atol=1e-4)
    np.testing.assert_allclose(reward.logits(ours), values, atol=1e-4)
    tokenizer = library.PreTrainedTokenizerFast.from_pretrained(load.folder())
    problem = task.pick(problems, 0)
    assert tokenizer(problem.prompt + problem.solution).input_ids == tokens[0, :-1].tolist()
