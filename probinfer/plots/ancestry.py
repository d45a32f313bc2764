"""Plot of a genealogy: extinct lines are thin, surviving ones as wide as their weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from probinfer.core.errors import import_extra
from probinfer.plots.ranks import ink

__all__ = ["COLORS", "GenealogyColors", "axes_for", "draw", "size_for"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # after Okabe and Ito (2008)
_MAX_LINE_WIDTH, _MIN_LINE_WIDTH = 5.0, 0.8
_ROW_HEIGHT = 0.235  # inches, enough for a label
_CHARACTER_WIDTH = 0.062  # inches
_MAX_LABELED_ROWS = 24  # rows with labels


@runtime_checkable
class DrawableGenealogy(Protocol):
    """Attributes of a genealogy that are drawn; ``probinfer.lm.Genealogy`` documents them."""

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
    """Colors of the lines.

    Attributes:
        answers: one per answer, the most probable first; further answers have the color of ``mixed``.
        mixed: color of lines whose descendants disagree, and of text.
        extinct: color of lines without descendants.
    """

    answers: tuple[str, ...] = COLORS
    mixed: str = "#333333"
    extinct: str = "#8b929a"


def size_for(tree: DrawableGenealogy) -> tuple[float, float]:
    """Return the width and height in inches at which the labels fit."""
    num_steps, num_particles = tree.parents.shape
    longest = max((len(_single_line(step)) for step in tree.steps().ravel() if step), default=8)
    width = 1.6 + num_steps * (0.55 + _CHARACTER_WIDTH * min(longest, 24))
    return float(np.clip(width, 5.0, 13.0)), float(np.clip(0.75 + _ROW_HEIGHT * num_particles, 2.4, 9.0))


def axes_for(tree: DrawableGenealogy) -> Any:
    """Return the axes of a new figure without a window, of the size that the tree needs.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = import_extra("matplotlib.figure", "plots").Figure(figsize=size_for(tree), layout="constrained")
    return figure.subplots()


def draw(
    axes: Any,
    tree: DrawableGenealogy,
    palette: GenealogyColors | None = None,
    judge: Callable[[str], bool | None] | None = None,
) -> None:
    """Draw the lines of a genealogy, with their steps and answers if they fit.

    Args:
        axes: matplotlib axes.
        tree: genealogy from ``lm.genealogy``.
        palette: colors; None: the default colors.
        judge: text so far -> whether it is correct, which marks steps by dots or crosses, or None; None: no marks.
    """
    palette = GenealogyColors(mixed=ink()) if palette is None else palette
    colors = _colors(tree, palette)
    for (t, n), _ in np.ndenumerate(tree.parents):
        _draw_edge(axes, tree, colors, t, n)
        _draw_marker(axes, tree, colors, t, n, judge)
    if tree.parents.shape[1] <= _MAX_LABELED_ROWS:
        _draw_labels(axes, tree, colors)
    else:
        _draw_legend(axes, tree, palette)
    _draw_frame(axes, tree)


def _colors(tree: DrawableGenealogy, palette: GenealogyColors) -> np.ndarray:
    """Return the colors (T, N) by the answers of the descendants."""
    named = dict(zip(_ranked(tree), palette.answers, strict=False))
    last = [
        palette.extinct if answer is None else named.get(answer, palette.mixed) for answer in tree.answers
    ]
    colors = np.full(tree.parents.shape, palette.extinct, object)
    for t in range(len(tree.parents)):
        ends: dict[int, set[str | None]] = {}
        for leaf, node in enumerate(tree.leaves(t)):
            ends.setdefault(int(node), set()).add(tree.answers[leaf])
            colors[t, node] = last[leaf]
        for node, answers in ends.items():
            if len(answers) > 1:
                colors[t, node] = palette.mixed
    return colors


def _ranked(tree: DrawableGenealogy) -> list[str]:
    """Return the answers, the most probable first."""
    mass: dict[str, float] = {}
    for answer, weight in zip(tree.answers, tree.weight[-1], strict=True):
        if answer is not None:
            mass[answer] = mass.get(answer, 0.0) + float(weight)
    return sorted(mass, key=lambda answer: -mass[answer])


def _height(tree: DrawableGenealogy, t: int, n: int) -> float:
    """Return the height of a particle; the common root is in the middle."""
    num_particles = tree.parents.shape[1]
    return (num_particles - 1) / 2 if t < 0 else num_particles - 1 - float(tree.rank[t, n])


def _draw_edge(axes: Any, tree: DrawableGenealogy, colors: np.ndarray, t: int, n: int) -> None:
    """Draw a curve from the parent, then a horizontal line to the particle, which carries its step."""
    start, end = _height(tree, t - 1, int(tree.parents[t, n])), _height(tree, t, n)
    x = np.linspace(0, 1, 24)
    curve = start + (end - start) * (3 * x**2 - 2 * x**3)
    alive = tree.alive[t, n]
    axes.plot(
        [*(t + 0.4 * x), t + 1],
        [*curve, end],
        color=colors[t, n],
        linewidth=_MIN_LINE_WIDTH + (_MAX_LINE_WIDTH - _MIN_LINE_WIDTH) * tree.weight[t, n] if alive else 0.6,
        alpha=1.0 if alive else 0.55,
        linestyle="-" if tree.took[t, n] else ":",
        solid_capstyle="round",
        zorder=2 + tree.weight[t, n],
    )


def _draw_marker(axes: Any, tree: DrawableGenealogy, colors: np.ndarray, t: int, n: int, judge: Any) -> None:
    """Draw a dot; with a judge, a cross if the text so far is wrong."""
    text = tree.texts[t, n]
    if not tree.took[t, n]:
        return
    right = None if judge is None or text is None else judge(text)
    marker, size = ("X", 6.0) if right is False else ("o", 4.5 if right else 3.0)
    if right is None and not tree.alive[t, n]:
        size = 1.8
    axes.plot(
        [t + 1],
        [_height(tree, t, n)],
        marker,
        color=colors[t, n],
        markersize=size,
        markeredgewidth=0,
        zorder=4,
        alpha=1.0 if tree.alive[t, n] else 0.7,
    )


def _draw_labels(axes: Any, tree: DrawableGenealogy, colors: np.ndarray) -> None:
    """Write the steps above their lines, and the answers at the end."""
    width = float(axes.figure.get_size_inches()[0])
    max_characters = int(width / (len(tree.parents) + 1) * 0.62 / _CHARACTER_WIDTH)
    for (t, n), step in np.ndenumerate(tree.steps()):
        if step and _single_line(step):
            axes.annotate(
                _shortened(_single_line(step), max(max_characters, 5)),
                (t + 0.95, _height(tree, t, n)),
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
        label = "no answer" if answer is None else _shortened(answer, 14)
        axes.annotate(
            f"{label}  {tree.weight[last, n]:.0%}",
            (last + 1, _height(tree, last, n)),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=colors[last, n],
            parse_math=False,
        )


def _draw_legend(axes: Any, tree: DrawableGenealogy, palette: GenealogyColors) -> None:
    """List the answers by color, if there is no room for labels."""
    for answer, color in zip(_ranked(tree), palette.answers, strict=False):
        share = sum(w for a, w in zip(tree.answers, tree.weight[-1], strict=True) if a == answer)
        axes.plot(
            [],
            [],
            color=color,
            linewidth=3,
            label=f"{_shortened(answer, 24)}  {share:.0%}".replace("$", r"\$"),
        )
    if _ranked(tree):
        axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_frame(axes: Any, tree: DrawableGenealogy) -> None:
    """Label the steps with the numbers of their surviving particles."""
    num_steps, num_particles = tree.parents.shape
    stride = max(1, num_steps // 16)
    ticks = [*range(stride - 1, num_steps, stride)]
    axes.set_xticks([t + 1 for t in ticks], [f"{t + 1}\n{tree.coalescence[t]}" for t in ticks])
    axes.set_yticks([])
    axes.grid(False)
    for side in ("left", "top", "right"):
        axes.spines[side].set_visible(False)
    labeled = num_particles <= _MAX_LABELED_ROWS
    axes.set(
        xlim=(-0.05, num_steps + (0.35 + 0.12 * num_steps**0.5 if labeled else 0.1)),
        ylim=(-0.7, num_particles - 0.2),
        xlabel="step, and how many of its particles survive to the end",
    )


def _single_line(step: str) -> str:
    """Return a step on one line."""
    return " ".join(step.split())


def _shortened(text: str, max_length: int) -> str:
    return text if len(text) <= max_length else f"{text[: max_length - 1]}…"
