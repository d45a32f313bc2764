"""Training of tiny models: it learns, resumes bit for bit, writes readable files, and rejects bad input."""

import dataclasses
import json
import runpy
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import Checkpoint
from probinfer.app.reasoner_training import reward_model, sampled_solutions
from probinfer.app.reasoner_training.language_model import LanguageModelSettings, train
from probinfer.app.reasoner_training.optimizer import TrainingPlan
from probinfer.app.reasoner_training.reward_model import RewardModelSettings
from probinfer.app.reasoner_training.sampled_solutions import Rollouts
from probinfer.lm.reasoner import encoding, files, task

PLAN = TrainingPlan(num_iterations=12, learning_rate=1e-2, warmup=2, evaluate_from=4, evaluate_every=4)
TINY = LanguageModelSettings(
    width=16,
    heads=2,
    kv_heads=1,
    feed_forward=32,
    layers=1,
    steps=(1, 2),
    batch=8,
    num_validation=16,
    plan=PLAN,
)
REWARD = RewardModelSettings(
    num_problems=40,
    steps=(1, 2),
    batch=8,
    num_validation=8,
    plan=TrainingPlan(num_iterations=8, learning_rate=1e-2, evaluate_every=4),
)


@pytest.fixture(scope="module")
def trained():
    return train(TINY, progress=False)


@pytest.fixture(scope="module")
def rewarded(trained):
    return reward_model.train_reward(trained[0], REWARD, progress=False)


@jax.jit
def next_token_logits(model, tokens):
    """Logits of the next token at each position."""
    return model.head(model.forward(tokens))


@jax.jit
def reward_logits(reward, tokens):
    return reward.logits(tokens)


class Interrupted(Exception):
    """The process is killed."""


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_the_loss_falls(trained):
    """By far more than batches differ, about 0.1; the same seeds give the same losses, so nothing is left to chance."""
    model, trace = trained
    assert len(trace.loss) == 12
    assert trace.loss[-1] < trace.loss[0] - 0.4
    assert np.isfinite(trace.score).tolist() == [(i + 1) % 4 == 0 for i in range(12)]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(model))


def test_an_interrupted_run_goes_on_bit_for_bit(trained, tmp_path, monkeypatch):
    """Killed in step 8 after a checkpoint at step 6; a finished run is read back without a step."""
    from probinfer.app.reasoner_training import language_model as module

    checkpoint, batch = Checkpoint(tmp_path / "run", every=3), module._batch

    def killed(settings, i):
        if i == 7:
            raise Interrupted
        return batch(settings, i)

    monkeypatch.setattr(module, "_batch", killed)
    with pytest.raises(Interrupted):
        train(TINY, checkpoint=checkpoint, progress=False)
    seen = []
    monkeypatch.setattr(module, "_batch", lambda settings, i: (seen.append(i), batch(settings, i))[1])
    for _ in range(2):
        model, trace = train(TINY, checkpoint=checkpoint, progress=False)
        assert seen == [6, 7, 8, 9, 10, 11]
        assert same(model, trained[0])
        np.testing.assert_array_equal(trace.loss, trained[1].loss)
        np.testing.assert_array_equal(trace.score, trained[1].score)
    with pytest.raises(ValueError, match="different run: seed"):
        train(dataclasses.replace(TINY, seed=1), checkpoint=checkpoint, progress=False)


def test_training_stops_at_the_target(trained, tmp_path):
    settings = dataclasses.replace(TINY, plan=dataclasses.replace(PLAN, target=0.0))
    for _ in range(2):
        _, trace = train(settings, checkpoint=Checkpoint(tmp_path / "run", every=100), progress=False)
        np.testing.assert_array_equal(trace.loss, trained[1].loss[:4])


@pytest.mark.slow
def test_the_reward_model_learns_and_resumes(trained, rewarded, tmp_path, monkeypatch):
    from probinfer.app.reasoner_training import optimizer

    append = optimizer.checkpoints.append

    def killed(*args):
        append(*args)
        raise Interrupted

    checkpoint = Checkpoint(tmp_path / "run", every=4)
    monkeypatch.setattr(optimizer.checkpoints, "append", killed)
    with pytest.raises(Interrupted):
        reward_model.train_reward(trained[0], REWARD, checkpoint=checkpoint, progress=False)
    monkeypatch.setattr(optimizer.checkpoints, "append", append)
    reward, trace = reward_model.train_reward(trained[0], REWARD, checkpoint=checkpoint, progress=False)
    assert same(reward, rewarded[0])
    assert trace.loss[0] >= np.log(2) * (1 - 1e-5)  # a head of zeros, and the likelihood beside it
    assert trace.loss[-1] < trace.loss[0]


def test_rollouts_match_full_passes(trained):
    """Greedy: every token is the likeliest after the tokens before it, by a pass without a cache; ties aside."""
    model, problems = trained[0], task.draw(1, 20, (1, 2))
    rollouts = sampled_solutions.draw_rollouts(jax.random.key(0), model, problems, temperature=0.0, batch=8)
    prompts, lengths = encoding.prompts(problems)
    tokens, inside = encoding.join(prompts, lengths, rollouts.tokens, rollouts.length)
    logits = np.asarray(next_token_logits(model, jnp.asarray(tokens)))
    chosen = np.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
    assert (chosen >= logits[:, :-1].max(axis=2) - 1e-4)[inside[:, 1:]].all()
    ended = np.take_along_axis(rollouts.tokens, rollouts.length[:, None] - 1, axis=1)[:, 0] == encoding.END
    assert (ended | (rollouts.length == rollouts.tokens.shape[1])).all()


def test_rollouts_are_drawn_from_the_model(trained):
    """First token of 4000 rollouts of one prompt against its probabilities: z-tests at 6 (2e-9) of 20 tokens, 4e-8."""
    model, one = trained[0], task.stack([task.Problem(3, "+", (4,))])
    problems = task.Problems(*(np.repeat(leaf, 4000, axis=0) for leaf in one))
    prompts, lengths = encoding.prompts(problems)
    lengths = lengths.astype(np.int32)
    tokens, _ = sampled_solutions.sample_continuations(
        jax.random.key(5), model, jnp.asarray(prompts), jnp.asarray(lengths), 1.0, 1
    )
    probability = np.asarray(
        jax.nn.softmax(next_token_logits(model, jnp.asarray(prompts[:1]))[0, lengths[0] - 1]), float
    )
    count = np.bincount(np.asarray(tokens)[:, 0], minlength=len(probability))
    assert (
        np.abs(count - 4000 * probability) <= 6 * np.sqrt(4000 * probability * (1 - probability)) + 3
    ).all()


def test_greedy_accuracy_asks_for_every_step_and_the_end(monkeypatch):
    problems = task.draw(0, 4, (2, 2))
    tokens, length = encoding.solutions(problems)
    length = length.copy()
    tokens[1, 4] = 3 + (tokens[1, 4] - 2) % 11  # a wrong step, the right answer
    length[2] -= 1  # cut before the end
    right = encoding.right_so_far(problems, tokens, length)
    rollouts = Rollouts(tokens, length, right, np.ones(4, bool))
    monkeypatch.setattr(sampled_solutions, "draw_rollouts", lambda *args, **kwargs: rollouts)
    assert sampled_solutions.accuracy(None, problems).tolist() == [1, 0, 0, 1]


def test_examples_are_labeled_by_the_checker():
    problems = task.draw(0, 30, (2, 4), "reward")
    tokens, length = encoding.solutions(problems)
    tokens[::2, 10] = 3 + (tokens[::2, 10] - 2) % 11
    right = encoding.right_so_far(problems, tokens, length)
    rows = reward_model.make_examples(
        problems, Rollouts(tokens, length, right, right.any(axis=1)), inner=0.25
    )
    prompts = encoding.prompts(problems)[1]
    for i in range(30):
        solution = slice(prompts[i], prompts[i] + length[i])
        assert rows.labels[i, solution].tolist() == right[i, : length[i]].tolist()
        assert (rows.weights[i, solution] == 1).sum() == problems.num_steps[i] + 1
        assert set(rows.weights[i, solution]) == {0.25, 1.0}
        assert rows.weights[i].sum() == rows.weights[i, solution].sum()
        assert rows.labels[i, solution].all() == bool(i % 2)


def test_the_loss_of_the_reward_model(rewarded):
    """By hand: cross entropy of the verdicts by weight, and of the tokens of the right solutions."""
    reward, problems = rewarded[0], task.draw(2, 6, (1, 2), "reward")
    tokens, length = encoding.solutions(problems)
    right = encoding.right_so_far(problems, tokens, length) & (np.arange(tokens.shape[1]) < 9)
    rows = reward_model.make_examples(problems, Rollouts(tokens, length, right, right.any(axis=1)), inner=0.5)
    verdicts = np.asarray(reward_logits(reward, jnp.asarray(rows.tokens)), float)
    logits = np.asarray(next_token_logits(reward.trunk, jnp.asarray(rows.tokens)), float)
    probability = 1 / (1 + np.exp(-verdicts))
    of_labels = np.average(-np.log(np.where(rows.labels, probability, 1 - probability)), weights=rows.weights)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    picked = np.take_along_axis(log_probabilities[:, :-1], rows.tokens[:, 1:, None], axis=2)[..., 0]
    inside = rows.weights > 0
    batch = ((rows.tokens, rows.labels, rows.weights), (rows.tokens, inside))
    loss = jax.jit(partial(reward_model._loss, 0.3))(reward, jax.tree.map(jnp.asarray, batch))
    assert loss == pytest.approx(of_labels - 0.3 * picked[inside[:, 1:]].mean(), rel=1e-5)


def test_added_layers_do_not_change_the_function(trained):
    model, tokens = trained[0], jnp.asarray(encoding.prompts(task.draw(0, 4))[0])
    extended = reward_model.add_layers(jax.random.key(1), model, 2)
    assert extended.config.num_layers == 3
    np.testing.assert_allclose(
        next_token_logits(extended, tokens), next_token_logits(model, tokens), rtol=1e-4, atol=1e-5
    )


def test_rollouts_are_scored_at_the_tokens_of_the_solution(rewarded):
    reward, problems = rewarded[0], task.draw(1, 10, (1, 2))
    rollouts = sampled_solutions.draw_rollouts(jax.random.key(0), reward.trunk, problems)
    logits, ends = reward_model.score_rollouts(reward, problems, rollouts, batch=4)
    prompts, lengths = encoding.prompts(problems)
    rows = np.zeros((10, 40), np.int32)
    for i in range(10):
        row = np.concatenate([prompts[i, : lengths[i]], rollouts.tokens[i, : rollouts.length[i]]])
        rows[i, : len(row)] = row
    all_logits = np.asarray(reward_logits(reward, jnp.asarray(rows)))
    for i in range(10):
        expected = all_logits[i, lengths[i] : lengths[i] + rollouts.length[i]]
        np.testing.assert_allclose(logits[i, : rollouts.length[i]], expected, atol=1e-5)
        assert ends[i, rollouts.length[i] - 1]


def test_files_are_read_back(trained, rewarded, tmp_path):
    files.write_model(tmp_path, trained[0])
    files.write_reward(tmp_path, rewarded[0])
    assert same(files.read_model(tmp_path), trained[0])
    assert same(files.read_reward(tmp_path), rewarded[0])
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    names = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {file.name for file in tmp_path.iterdir()} == names | {"reward"}
    assert {file.name for file in (tmp_path / "reward").iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_iterations": 0}, "num_iterations"), ({"learning_rate": 0.0}, "learning_rate must be positive")],
)
def test_bad_plans_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAN, **settings)


@pytest.mark.slow
def test_the_script_runs(monkeypatch, capsys):
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(sys, "argv", ["reasoner_train.py", "--small"])
    runpy.run_path(str(folder / "reasoner_train.py"), run_name="__main__")
    assert "AUC of the reward model" in capsys.readouterr().out
