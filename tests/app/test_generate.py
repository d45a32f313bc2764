"""``probinfer generate``: its numbers are those of ``lm.infer``, errors are one line, the display shows the steps."""

import dataclasses
import io
import json
import sys

import jax
import numpy as np
import pytest
import rich.console
from typer.testing import CliRunner

from probinfer import lm
from probinfer.app.command_line import app
from probinfer.app.commands import generate, live
from probinfer.lm.reasoner import load as reasoner_load
from tests.lm import folders

runner = CliRunner()
REWARD = """
def few(prompt, text):
    return 0.5 ** text.count("e")

def never(prompt, text):
    raise RuntimeError("oops")

number = 3
"""
OBJECTS = "from probinfer import lm; certain = lm.rewards.self_certainty()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("work")
    folders.lettered(where / "model")
    (where / "scores_of_tests.py").write_text(REWARD)
    (where / "objects_of_tests.py").write_text(OBJECTS)
    return where


@pytest.fixture(autouse=True)
def working_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", [*sys.path])


def run(*arguments):
    return runner.invoke(app, ["generate", *map(str, arguments)], env={"COLUMNS": "120"})


SHORT = (
    "--model",
    "model",
    "--prompt",
    "hello",
    "--answer",
    "text",
    "--max-tokens",
    6,
    "--step",
    3,
    "--n",
    4,
)


@pytest.mark.f32(slow=True)
def test_the_numbers_are_those_of_infer(folder, monkeypatch):
    calls = []

    def infer(key, *arguments, **settings):
        calls.append((key, arguments, settings, lm.infer(key, *arguments, **settings)))
        return calls[-1][-1]

    monkeypatch.setattr(generate, "infer", infer)
    result = run(*SHORT, "--reward", "scores_of_tests.py:few", "--seed", 5, "--json", "found.json")
    assert result.exit_code == 0, result.output
    record = json.loads((folder / "found.json").read_text())
    ((key, arguments, settings, answers),) = calls
    assert jax.random.key_data(key).tolist() == [0, 5]  # the key of the command, which no offset shifts
    assert arguments[1] == "hello"
    assert (settings["max_tokens"], settings["answer"]) == (6, lm.answers.text)
    expected = np.array([0.5 ** text.count("e") for text in answers.texts])
    np.testing.assert_allclose(np.exp(answers.log_scores), expected, rtol=1e-5)
    assert [text["text"] for text in record["texts"]] == answers.texts
    np.testing.assert_allclose(
        [text["weight"] for text in record["texts"]], np.exp(answers.log_weights), rtol=1e-6
    )
    assert record["answers"][0]["answer"] == answers.best
    assert record["log_evidence"] == pytest.approx(answers.log_evidence)
    assert record["target"] == answers.target
    assert record["cost"]["generated"] == answers.ledger.generated
    assert record["settings"]["seed"] == 5
    for expected_text in (
        f"target: {answers.target}",
        "step 2, ",
        f"log evidence {answers.log_evidence:.3f}",
    ):
        assert expected_text in result.output


def test_dead_particles_are_reported_and_exit_with_one():
    result = run(*SHORT, "--reward", "scores_of_tests:never", "--no-live")
    assert result.exit_code == 1
    assert "every particle died" in result.output
    assert result.output.count("oops") == 3  # the cause, then the line of the traceback and its message, once
    assert "rewards failed: RuntimeError: oops: 4 of 4 scores lost" in result.output
    assert result.output.index("rewards failed") < result.output.index("every particle died")
    assert "Answers" not in result.output


@pytest.mark.slow
def test_the_reasoner_needs_no_options(tmp_path, monkeypatch):
    stored = folders.reasoner(tmp_path)
    monkeypatch.setattr(reasoner_load, "folder", lambda: stored)
    result = run("--n", 2, "--max-tokens", 16)
    assert result.exit_code == 0, result.output
    assert lm.reasoner.problems(0, 1)[0].prompt.strip() in result.output
    assert "✗" in result.output  # the checker's word on texts that know nothing
    assert "the product of the odds" in result.output


@pytest.mark.parametrize(("num", "outside"), [(1, True), (3, False), (7, False), (8, True)])
def test_the_reasoner_warns_of_problem_sizes_that_it_was_not_trained_on(num, outside, tmp_path, capsys):
    folders.reasoner(tmp_path)
    model, options = lm.load(tmp_path), generate.GenerateOptions()
    assert generate._reasoner_task(options, model, "7" + " + 5" * num).prompt.count("+") == num
    warning = f"warning: the reasoner was trained on 3 to 7 operations, this prompt has {num}"
    output = capsys.readouterr()
    assert (warning in output.err, output.err.count("\n"), output.out) == (outside, int(outside), "")


def test_the_help_states_both_defaults_and_what_is_python_only():
    text = " ".join(run("--help").output.replace("│", " ").split())
    for part in ("an empty line; for the reasoner a line", "Answer: ...", "Adaptive and Exact exist only in"):
        assert part in text


def test_the_prompt_may_come_from_a_file_or_a_pipe(tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("7 + 5")
    options = generate.GenerateOptions(prompt=f"@{tmp_path}/prompt.txt")
    assert generate._read_prompt(options) == "7 + 5"
    monkeypatch.setattr("sys.stdin", io.StringIO("7 - 5\n"))
    assert generate._read_prompt(options._replace(prompt="-")) == "7 - 5\n"


def test_a_chat_counts_the_words_of_its_template(tmp_path):
    template = "{% for message in messages %}user {{ message.content }}.{% endfor %}"
    model = lm.load(folders.lettered(tmp_path / "chat", chat=template))
    options = generate.GenerateOptions(model="chat", answer="text", chat=True)
    assert generate._checkpoint_task(options, model, "hi").max_tokens == 128 - len("user hi.")
    assert generate._checkpoint_task(options._replace(chat=False), model, "hi").max_tokens == 126


def test_methods_have_the_budget_that_was_asked_for():
    steps = {name: make(16, lm.until("\n")) for name, make in generate.METHODS.items()}
    assert repr(steps["particle-filter"]) == repr(lm.ParticleFilter(16, step="\n"))
    assert steps["entropic"].trigger == "entropic"
    assert (steps["nested"].num_particles, steps["nested"].width) == (4, 4)
    assert steps["weighted-best-of-n"].weighted
    assert all(steps[name].n == 16 for name in ("best-of-n", "majority", "beam", "dvts"))
    assert all(steps[name].num_particles == 16 for name in ("particle-gibbs", "parallel-tempering"))
    assert generate._method(generate.GenerateOptions(step="12"), "\n").step == lm.every(12)
    assert generate._method(generate.GenerateOptions(step=r"\n\n"), "\n").step == lm.until("\n\n")
    assert generate._method(generate.GenerateOptions(), "\n").step == lm.until("\n")


CHECKPOINT = ("--model", "model", "--prompt", "a")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--model", "nowhere", "--prompt", "a"), "there is no folder nowhere"),
        (("--model", "model"), "--prompt is missing"),
        (("--model", "model", "--prompt", ""), "--prompt: it is empty"),
        (("--model", "model", "--prompt", "@none"), "there is no file none"),
        (("--prompt", "7 + 99"), "the reasoner knows chains"),
        ((*CHECKPOINT, "--method", "magic"), "--method must be one of particle-filter"),
        ((*CHECKPOINT, "--answer", "all"), "--answer must be one of boxed, number, text"),
        ((*CHECKPOINT, "--meaning", "gold"), "--meaning must be one of"),
        ((*CHECKPOINT, "--meaning", "odds"), "give --reward too"),
        ((*CHECKPOINT, "--reward", "model"), "this checkpoint has no reward"),
        ((*CHECKPOINT, "--reward", "few"), "model, none, module:function"),
        ((*CHECKPOINT, "--reward", "no_such_module:few"), "importing it failed, ModuleNotFoundError"),
        ((*CHECKPOINT, "--reward", "none.py:few"), "there is no file none.py"),
        ((*CHECKPOINT, "--reward", "scores_of_tests:fewer"), "it has few, never"),
        ((*CHECKPOINT, "--reward", "scores_of_tests:number"), "must be a function"),
        (
            (*CHECKPOINT, "--reward", "objects_of_tests:certain", "--meaning", "odds"),
            "already defines its meaning",
        ),
        ((*CHECKPOINT, "--chat"), "no chat template: it may be a base model, leave out --chat"),
        (("--prompt", "7 + 5 * 3 - 2", "--chat"), "the reasoner has no chat template; leave out --chat"),
        ((*CHECKPOINT, "--stop", ""), "--stop: an empty string would end every text at once"),
        ((*CHECKPOINT, "--step", 0), "--step counts tokens and must be at least 1, got 0"),
        ((*CHECKPOINT, "--max-tokens", 500), "--max-tokens 500: after a prompt of 1 tokens, at most 127 fit"),
        (("--model", "model", "--prompt", "a" * 130), "130 tokens do not fit into the context of 128"),
        ((*CHECKPOINT, "--max-tokens", 0), "--max-tokens must be at least 1"),
        ((*CHECKPOINT, "--n", 0), "--n counts texts"),
        ((*CHECKPOINT, "--n", 1, "--method", "particle-gibbs"), "at least 2"),
        ((*CHECKPOINT, "--step", ""), "--step 1 makes steps of one token"),
        ((*CHECKPOINT, "--temperature", -1), "temperature must be finite and not negative"),
        ((*CHECKPOINT, "--json", "no/such/folder.json"), "name a file in an existing folder"),
    ],
)
def test_mistakes_in_one_line(arguments, match, tmp_path, monkeypatch):
    stored = folders.reasoner(tmp_path) if arguments[0] == "--prompt" else tmp_path
    monkeypatch.setattr(reasoner_load, "folder", lambda: stored)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error: "), result.output
    assert len(result.output.strip().splitlines()) == 1
    assert match in result.output


def test_what_does_not_fit_in_memory_is_one_line(monkeypatch):
    def refuse(*arguments, **settings):
        raise MemoryError("the caches need 9 TiB; use fewer particles")

    monkeypatch.setattr(generate, "infer", refuse)
    result = run(*SHORT, "--no-live")
    assert result.exit_code == 2
    assert "error: the caches need 9 TiB" in result.output


def test_rewards_of_all_kinds():
    model = dataclasses.replace(lm.load("model"), reward=lm.rewards.self_certainty().score)
    assert generate.load_reward(None, None, dataclasses.replace(model, reward=None)) is None
    assert isinstance(generate.load_reward(None, None, model), lm.rewards.LogOdds)
    assert isinstance(generate.load_reward("model", "twist", model), lm.rewards.PrefixTwist)
    reward = generate.load_reward("objects_of_tests:certain", None, model)
    assert isinstance(reward, lm.rewards.LogOdds)


def event(step, texts, weights, ancestors, ended=None):
    num = len(texts)
    ended = np.zeros(num, int) if ended is None else np.asarray(ended)
    scores = np.log(np.asarray(weights, float))
    ancestors = None if ancestors is None else np.asarray(ancestors)
    return lm.Event(step, texts, np.asarray(weights), scores, ended, ancestors, step > 0, 1.5, -2.0)


def test_rows_say_what_is_new():
    tracker = live.TextTracker(lambda text: "x" not in text)
    tracker.rows(event(0, ["ab", "cx"], [0.5, 0.5], [0, 1]))
    rows = tracker.rows(event(1, ["ab\nd", "abe"], [0.75, 0.25], [0, 0], [0, lm.End.FINISHED]))
    assert [row.step for row in rows] == ["d", "e"]
    assert [row.parent for row in rows] == [0, 0]
    assert [row.state for row in rows] == ["", "ended"]
    assert [row.is_correct for row in rows] == [True, True]
    beams = tracker.rows(
        event(2, ["abef", "ab\ndx"], [0.5, 0.5], [0, 1])
    )  # parents that a pass does not know
    assert [(row.parent, row.step, row.is_correct) for row in beams] == [(1, "f", True), (0, "x", False)]
    all_rows = tracker.rows(event(3, ["new", "texts"], [0.5, 0.5], None))
    assert [(row.parent, row.step) for row in all_rows] == [(None, "new"), (None, "texts")]


def test_a_step_in_one_line_joins_equal_ones():
    now = event(0, ["a", "b", "a", "c", "d"], [0.3, 0.35, 0.25, 0.06, 0.04], range(5))
    text = live.step_line(now, live.TextTracker().rows(now))
    assert text == "step 1, 1.5 of 5 effective, log evidence -2.00: 55% 2 x a | 35% b | 6% c | 1 more"


def shown(table, width=70):
    console = rich.console.Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_the_table_fits_the_terminal():
    weights = np.arange(1, 31) / 465
    now = event(1, [f"[b]text{i}" for i in range(30)], weights, [0] * 30, [0] * 29 + [lm.End.MAX_TOKENS])
    tracker = live.TextTracker(lambda text: text.endswith("29"))
    rows = tracker.rows(now)
    text = shown(live.particle_table(now, rows, seconds=1.0, height=20))
    assert "step 2, 1.5 of 30 effective, resampled" in text
    assert "18 particles of smaller weight are not shown" in text
    assert "✓ [b]text29 (cut)" in text  # text is text, never markup
    assert "✗ [b]text18" in text
    assert "text17" not in text
    all_rows = shown(live.particle_table(now, rows, seconds=1.0))
    assert all(f"text{i}" in all_rows for i in range(30))


def test_bars():
    assert live.share_bar(0.5, 4) == "██    50%"
    assert live.share_bar(0.25, 4, max_share=0.5) == "██    25%"
    assert live.share_bar(1.2, 2) == "██ 120%"
    assert live.share_bar(1 / 16, 2) == "▏    6%"


def test_the_screen_redraws_on_a_terminal():
    console = rich.console.Console(width=80, height=30, force_terminal=True, file=io.StringIO())
    with live.StepDisplay(console, redraw=True) as display:
        assert display(event(0, ["one", "two"], [0.9, 0.1], [0, 1])) is False
        display(event(1, ["one more", "one less"], [0.9, 0.1], [0, 0]))
    output = console.file.getvalue()
    assert "compiling" in output
    assert "more" in output
    assert "less" in output
