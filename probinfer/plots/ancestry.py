"""The genealogy as a picture: lines that die out are thin, those that live on as wide as they weigh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from probinfer.core.errors import import_extra

__all__ = ["COLORS", "GenealogyColors", "axes_for", "draw", "size_for"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # after Okabe and Ito (2008)
_WIDEST, _THINNEST = 5.0, 0.8
_ROW = 0.235  # inches: what a label needs
_CHARACTER = 0.062  # inches
_MOST_LABELS = 24  # rows with labels


@runtime_checkable
class DrawableGenealogy(Protocol):
    """What is drawn of a genealogy (``probinfer.lm.Genealogy``, which says what the fields are)."""

    @property
    def parents(self) -> np.ndarray: ...
    @property
    def rank(self) -> np.ndarray: ...
    @property
    def took(self) -> np.ndarray: ...
    @property
    def weight(self) -> np.ndarray: ...
    @property
    def alive(self) -> np.ndarray: ...
    @property
    def texts(self) -> np.ndarray: ...
    @property
    def answers(self) -> list[str | None]: ...

    @property
    def coalescence(self) -> np.ndarray: ...

    def steps(self) -> np.ndarray: ...

    def leaves(self, t: int) -> np.ndarray: ...


class GenealogyColors(NamedTuple):
    """Colours.

    Attributes:
        answers: one an answer, the likeliest first; further ones get that of ``mixed``.
        mixed: lines whose descendants disagree, and text.
        gone: lines that died out.
    """

    answers: tuple[str, ...] = COLORS
    mixed: str = "#333333"
    gone: str = "#8b929a"


def size_for(tree: DrawableGenealogy) -> tuple[float, float]:
    """Width and height in inches at which the labels have room."""
    num_steps, num = tree.parents.shape
    longest = max((len(_line(step)) for step in tree.steps().ravel() if step), default=8)
    width = 1.6 + num_steps * (0.55 + _CHARACTER * min(longest, 24))
    return float(np.clip(width, 5.0, 13.0)), float(np.clip(0.75 + _ROW * num, 2.4, 9.0))


def axes_for(tree: DrawableGenealogy) -> Any:
    """Axes of a new figure that belongs to no window, as large as the tree asks for.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = import_extra("matplotlib.figure", "plots").Figure(figsize=size_for(tree), layout="constrained")
    return figure.subplots()


def draw(
    axes: Any,
    tree: DrawableGenealogy,
    look: GenealogyColors | None = None,
    judge: Callable[[str], bool | None] | None = None,
) -> None:
    """Draw the lines, their steps where there is room, and the answers they lead to.

    Args:
        axes: matplotlib axes.
        tree: of ``lm.genealogy``.
        look: colours.
        judge: text so far -> whether it is right so far: right steps get dots, wrong ones crosses. None: no verdict.
    """
    look = GenealogyColors(mixed=_ink()) if look is None else look
    colors = _colors(tree, look)
    for (t, n), _ in np.ndenumerate(tree.parents):
        _edge(axes, tree, colors, t, n)
        _mark(axes, tree, colors, t, n, judge)
    if tree.parents.shape[1] <= _MOST_LABELS:
        _label(axes, tree, colors)
    else:
        _legend(axes, tree, look)
    _frame(axes, tree)


def _ink() -> str:
    return import_extra("matplotlib", "plots").rcParams["axes.edgecolor"]


def _colors(tree: DrawableGenealogy, look: GenealogyColors) -> np.ndarray:
    """(T, N) by the answers of the descendants."""
    named = dict(zip(_ranked(tree), look.answers, strict=False))
    last = [look.gone if answer is None else named.get(answer, look.mixed) for answer in tree.answers]
    colors = np.full(tree.parents.shape, look.gone, object)
    for t in range(len(tree.parents)):
        ends: dict[int, set[str | None]] = {}
        for leaf, node in enumerate(tree.leaves(t)):
            ends.setdefault(int(node), set()).add(tree.answers[leaf])
            colors[t, node] = last[leaf]
        for node, found in ends.items():
            if len(found) > 1:
                colors[t, node] = look.mixed
    return colors


def _ranked(tree: DrawableGenealogy) -> list[str]:
    """Answers, the likeliest first."""
    mass: dict[str, float] = {}
    for answer, weight in zip(tree.answers, tree.weight[-1], strict=True):
        if answer is not None:
            mass[answer] = mass.get(answer, 0.0) + float(weight)
    return sorted(mass, key=lambda answer: -mass[answer])


def _place(tree: DrawableGenealogy, t: int, n: int) -> float:
    """Height of a particle; they all come from one point in the middle."""
    num = tree.parents.shape[1]
    return (num - 1) / 2 if t < 0 else num - 1 - float(tree.rank[t, n])


def _edge(axes: Any, tree: DrawableGenealogy, colors: np.ndarray, t: int, n: int) -> None:
    """From the parent in a bend, then level to the particle: there its step is written."""
    start, end = _place(tree, t - 1, int(tree.parents[t, n])), _place(tree, t, n)
    x = np.linspace(0, 1, 24)
    bend = start + (end - start) * (3 * x**2 - 2 * x**3)
    alive = tree.alive[t, n]
    axes.plot(
        [*(t + 0.4 * x), t + 1],
        [*bend, end],
        color=colors[t, n],
        linewidth=_THINNEST + (_WIDEST - _THINNEST) * tree.weight[t, n] if alive else 0.6,
        alpha=1.0 if alive else 0.55,
        linestyle="-" if tree.took[t, n] else ":",
        solid_capstyle="round",
        zorder=2 + tree.weight[t, n],
    )


def _mark(axes: Any, tree: DrawableGenealogy, colors: np.ndarray, t: int, n: int, judge: Any) -> None:
    """A dot; with a judge, a cross where the text so far is wrong."""
    text = tree.texts[t, n]
    if not tree.took[t, n]:
        return
    right = None if judge is None or text is None else judge(text)
    marker, size = ("X", 6.0) if right is False else ("o", 4.5 if right else 3.0)
    if right is None and not tree.alive[t, n]:
        size = 1.8
    axes.plot(
        [t + 1],
        [_place(tree, t, n)],
        marker,
        color=colors[t, n],
        markersize=size,
        markeredgewidth=0,
        zorder=4,
        alpha=1.0 if tree.alive[t, n] else 0.7,
    )


def _label(axes: Any, tree: DrawableGenealogy, colors: np.ndarray) -> None:
    """Steps above their lines, answers at the end."""
    room = int(float(axes.figure.get_size_inches()[0]) / (len(tree.parents) + 1) * 0.62 / _CHARACTER)
    for (t, n), step in np.ndenumerate(tree.steps()):
        if step and _line(step):
            axes.annotate(
                _short(_line(step), max(room, 5)),
                (t + 0.95, _place(tree, t, n)),
                (0, 1.5),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=6.5,
                color=colors[t, n],
                alpha=1.0 if tree.alive[t, n] else 0.8,
                parse_math=False,
            )
    last = len(tree.parents) - 1
    for n, answer in enumerate(tree.answers):
        words = "no answer" if answer is None else _short(answer, 14)
        axes.annotate(
            f"{words}  {tree.weight[last, n]:.0%}",
            (last + 1, _place(tree, last, n)),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=colors[last, n],
            parse_math=False,
        )


def _legend(axes: Any, tree: DrawableGenealogy, look: GenealogyColors) -> None:
    """Answers by colour, where there is no room for words."""
    for answer, color in zip(_ranked(tree), look.answers, strict=False):
        share = sum(w for a, w in zip(tree.answers, tree.weight[-1], strict=True) if a == answer)
        axes.plot(
            [], [], color=color, linewidth=3, label=f"{_short(answer, 24)}  {share:.0%}".replace("$", r"\$")
        )
    if _ranked(tree):
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _frame(axes: Any, tree: DrawableGenealogy) -> None:
    """Steps below, with how many of their particles live on."""
    num_steps, num = tree.parents.shape
    every = max(1, num_steps // 16)
    shown = [*range(every - 1, num_steps, every)]
    axes.set_xticks([t + 1 for t in shown], [f"{t + 1}\n{tree.coalescence[t]}" for t in shown])
    axes.set_yticks([])
    axes.grid(False)
    for side in ("left", "top", "right"):
        axes.spines[side].set_visible(False)
    wide = num <= _MOST_LABELS
    axes.set(
        xlim=(-0.05, num_steps + (0.35 + 0.12 * num_steps**0.5 if wide else 0.1)),
        ylim=(-0.7, num - 0.2),
        xlabel="step, and how many of its particles live on to the end",
    )


def _line(step: str) -> str:
    """A step on one line."""
    return " ".join(step.split())


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
