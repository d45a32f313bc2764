"""Genealogies: what the final texts say of the past is what was seen of it, and drawings show it."""

import io
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer import lm
from probinfer.core.errors import MissingExtraError
from probinfer.plots import ancestry as picture
from probinfer.smc import coalescence
from tests.lm import tables

SETTINGS = {"answer": lm.answers.text, "max_tokens": 6, "progress": False}
ALWAYS = lm.ParticleFilter(8, trigger="always", step=lm.every(2), resampling="multinomial")


def run(method=ALWAYS, **settings):
    events = []
    watch = {"watch": lambda event: bool(events.append(event))}
    model = tables.model(vocab=6)
    found = lm.infer(
        jax.random.key(3), model, "a;", tables.reward("odds"), method, **SETTINGS | watch | settings
    )
    return found, events


@pytest.fixture(scope="module")
def seen():
    return run()


def test_texts_of_survivors_are_those_that_were_seen(seen):
    found, events = seen
    tree, watched = lm.genealogy(found), lm.genealogy(found, events)
    assert tree.alive.sum() < tree.alive.size  # something died out, or there is nothing to test
    for (t, n), alive in np.ndenumerate(tree.alive):
        assert watched.texts[t, n] == events[t].texts[n]
        assert tree.texts[t, n] == (events[t].texts[n] if alive else None)


def test_descent_by_brute_force(seen):
    found, _ = seen
    tree = lm.genealogy(found)
    weights = np.exp(found.log_weights)
    for t in range(found.num_steps):
        share = np.zeros(8)
        for leaf in range(8):
            node = leaf
            for later in range(found.num_steps - 1, t, -1):
                node = found.ancestors[later][node]
            assert tree.leaves(t)[leaf] == node
            share[node] += weights[leaf]
        np.testing.assert_allclose(tree.weight[t], share, atol=1e-12)
        np.testing.assert_array_equal(tree.alive[t], np.isin(np.arange(8), tree.leaves(t)))
    counts = np.asarray(coalescence(jnp.asarray(found.ancestors)[: found.num_steps]))
    np.testing.assert_array_equal(tree.coalescence, counts)


def test_lines_do_not_cross_and_steps_make_the_texts(seen):
    found, events = seen
    tree = lm.genealogy(found, events)
    for t in range(found.num_steps):
        np.testing.assert_array_equal(np.sort(tree.rank[t]), np.arange(8))
        if t:
            above = tree.rank[t - 1, tree.parents[t]]
            assert (np.diff(above[np.argsort(tree.rank[t])]) >= 0).all()
    steps = tree.steps()
    for leaf, text in enumerate(found.texts):
        path = [tree.leaves(t)[leaf] for t in range(found.num_steps)]
        assert "".join(steps[t, n] for t, n in enumerate(path)) == text


@pytest.mark.slow
def test_particle_gibbs_shows_its_last_pass():
    method = lm.ParticleGibbs(4, 3, ancestor_sampling=False, step=lm.every(3))
    found = run(method, watch=None)[0]
    tree = lm.genealogy(found)
    assert len(found.texts) == 12
    assert [tree.texts[-1, n] for n in range(4)] == found.texts[-4:]


def test_what_has_no_genealogy(seen):
    found, events = seen
    with pytest.raises(ValueError, match=r"BeamSearch.*keeps no genealogy"):
        lm.genealogy(run(lm.BeamSearch(4, width=2, step=lm.every(2)), watch=None)[0])
    with pytest.raises(ValueError, match="events are of another run"):
        lm.genealogy(found, events[:1])


def drawn(axes):
    return {text.get_text() for text in axes.texts}


def test_the_picture_shows_lines_steps_and_answers(seen):
    found, events = seen
    tree = lm.genealogy(found, events)
    taken = [tree.texts[i] for i in np.ndindex(tree.texts.shape) if tree.texts[i] and tree.took[i]]
    first = taken[0][0]  # whichever letter it is: some texts are wrong under every key
    axes = found.plot_genealogy(events=events, judge=lambda text: not text.startswith(first))
    edges = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert len(edges) == tree.parents.size
    alive = [line.get_linewidth() for line, one in zip(edges, tree.alive.ravel(), strict=True) if one]
    expected = 0.8 + 4.2 * tree.weight[tree.alive]
    np.testing.assert_allclose(alive, expected)
    crosses = sum(line.get_marker() == "X" for line in axes.lines)
    assert crosses == sum(text.startswith(first) for text in taken) > 0
    words = drawn(axes)
    assert {step for step in tree.steps().ravel() if step} <= words
    assert any(word.startswith(f"{found.best}  ") for word in words)
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks == [f"{t + 1}\n{count}" for t, count in enumerate(tree.coalescence)]


def test_one_answer_one_color(seen):
    tree = lm.genealogy(seen[0])
    palette = picture.GenealogyColors()
    colors = picture._colors(tree, palette)
    by_answer = {}
    for answer, color in zip(tree.answers, colors[-1], strict=True):
        by_answer.setdefault(answer, set()).add(color)
    assert all(len(found) == 1 for found in by_answer.values())
    assert (colors[~tree.alive] == palette.extinct).all()


def invented(texts):
    """Particles of one step."""
    num = len(texts)
    return SimpleNamespace(
        ancestors=np.zeros((1, num), int),
        step_lengths=np.ones((1, num), int),
        num_steps=1,
        log_weights=np.full(num, -np.log(num)),
        tokens=[np.array([i]) for i in range(num)],
        decode=lambda ids: texts[int(ids[0])],
        extracted=texts,
        method=None,
    )


def test_many_particles_get_a_legend():
    tree = lm.genealogy(invented(["a"] * 30 + ["$b"] * 10))
    axes = picture.axes_for(tree)
    picture.draw(axes, tree)
    assert not axes.texts
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a  75%", r"\$b  25%"]


def test_dollars_are_no_formulas():
    """Such answers are text, not broken mathematics, which drawing would refuse."""
    tree = lm.genealogy(invented(["$5", "$x_$^$"]))
    axes = picture.axes_for(tree)
    picture.draw(axes, tree)
    axes.figure.savefig(io.BytesIO(), format="png")
    assert {"$5", "$x_$^$"} <= drawn(axes)


def test_matplotlib_is_an_extra(seen, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"probinfer\[plots\]"):
        seen[0].plot_genealogy()
