"""Style of the plots: each is drawn for light and dark pages, in colors that color-blind readers can distinguish."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

from probinfer.core.errors import import_extra

__all__ = ["DARK", "LIGHT", "Picture", "Theme", "draw"]


class Theme(NamedTuple):
    """Colors of one appearance.

    Attributes:
        ink: text, axes and reference lines.
        muted: grid lines and secondary text.
        data: observations.
        held_out: observations that were held out from the model.
        series: one color per engine, after Okabe and Ito (2008), lighter on dark pages.
    """

    ink: str
    muted: str
    data: str
    held_out: str
    series: tuple[str, ...]


LIGHT = Theme(
    ink="#1f2328",
    muted="#8b929a",
    data="#1f2328",
    held_out="#b45309",
    series=("#0072B2", "#009E73", "#CC5F9B", "#D98200", "#6b7280", "#56B4E9", "#A04000"),
)
DARK = Theme(
    ink="#e6e8eb",
    muted="#7d8590",
    data="#e6e8eb",
    held_out="#f5a45c",
    series=("#58ACEB", "#3CCB9F", "#EE9AC9", "#F2B544", "#b3bac2", "#9AD7F7", "#E08A50"),
)

LINES = (
    "-",
    "-",
    "-",
    (0, (5, 2)),
    (0, (1.5, 1.5)),
    "-",
    "-",
)  # line styles of the engines, as the colors


class Picture(NamedTuple):
    """A plot as SVG text, in both appearances.

    Attributes:
        title: one line above the plot.
        caption: description of the plot, which is also its alternative text.
        light: SVG for light pages.
        dark: SVG for dark pages.
        width: width in CSS pixels at which the text of plot and page has the same size.
    """

    title: str
    caption: str
    light: str
    dark: str
    width: int


def draw(
    title: str, caption: str, fn: Callable[[Any, Theme], None], *, width: float = 4.6, height: float = 3.3
) -> Picture:
    """Draw a picture in both appearances.

    Args:
        title: one line above the picture.
        caption: description of the plot.
        fn: ``fn(axes, theme)`` draws into matplotlib axes.
        width: inches; one inch is 96 CSS pixels.
        height: inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    light, dark = (_svg(fn, theme, width, height, title) for theme in (LIGHT, DARK))
    return Picture(title=title, caption=caption, light=light, dark=dark, width=round(96 * width))


def _svg(fn, theme, width, height, salt):
    matplotlib = import_extra("matplotlib", "plots")
    figure_module = import_extra("matplotlib.figure", "plots")
    with matplotlib.rc_context({**_settings(theme), "svg.hashsalt": salt}):
        figure = figure_module.Figure(figsize=(width, height), layout="constrained")
        fn(figure.subplots(), theme)
        buffer = io.StringIO()
        # 72 points an inch in SVG, 96 CSS pixels an inch: text of 8.5 points is 11.3 pixels high.
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _settings(theme):
    cycler = import_extra("matplotlib", "plots").cycler
    return {
        "font.size": 9,
        "axes.prop_cycle": cycler(color=theme.series),
        "font.family": "DejaVu Sans",
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.ink,
        "axes.titlesize": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.muted,
        "grid.alpha": 0.22,
        "grid.linewidth": 0.6,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.color": theme.muted,
        "ytick.labelcolor": theme.ink,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.linewidth": 1.6,
        "svg.fonttype": "path",
    }
