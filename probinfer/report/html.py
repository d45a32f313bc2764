"""HTML reports: self-contained pages for wide and narrow screens, in light and dark themes."""

from __future__ import annotations

import base64
import html
import importlib.resources
import os
from pathlib import Path
from typing import NamedTuple

from probinfer.plots.style import DARK, LIGHT, Picture
from probinfer.report.tables import TextTable, to_html

__all__ = ["Gallery", "Legend", "Paragraph", "Section", "check_folder", "page", "write_page"]


class Paragraph(NamedTuple):
    """A paragraph.

    Attributes:
        text: plain text.
        kind: "", "finding" (a result) or "remark" (a warning).
    """

    text: str
    kind: str = ""


class Legend(NamedTuple):
    """Names of the methods with their colors: (name, index in the palette)."""

    entries: tuple[tuple[str, int], ...]


class Gallery(NamedTuple):
    """Pictures side by side, as far as the width allows."""

    pictures: tuple[Picture, ...]


class Section(NamedTuple):
    """A heading and the blocks below it."""

    heading: str
    blocks: tuple[Paragraph | Legend | Gallery | TextTable, ...]


_STYLE = importlib.resources.files("probinfer.report").joinpath("style.css").read_text(encoding="utf-8")


def page(title: str, lead: str, sections: list[Section], facts: list[tuple[str, str]]) -> str:
    """Render a page as text.

    Args:
        title: heading of the page.
        lead: first paragraph: subject and results.
        sections: content of the page.
        facts: command, seed, versions and the like; the last section.
    """
    body = "\n".join(_section(section) for section in sections)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'
        for name, value in facts
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}{_palette()}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{html.escape(title)}</h1>\n<p class="lead">{html.escape(lead)}</p>\n{body}\n'
        f'<section>\n<h2>What was run</h2>\n<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table>'
        "</div>\n</section>\n</main>\n</body>\n</html>\n"
    )


def check_folder(folder: str | os.PathLike) -> None:
    """Check that a report can be written to a folder, before any work.

    Raises:
        ValueError: the path is a file, or is not writable.
    """
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise ValueError(f"--out {folder}: {path} is a file; pass a folder")
    if not os.access(path, os.W_OK):
        raise ValueError(f"--out {folder}: {path} is not writable; pass another folder")


def write_page(folder: str | os.PathLike, text: str, *, name: str = "index.html") -> Path:
    """Write a page into a folder, which is created if needed; the file is written atomically.

    Returns:
        The path of the file.
    """
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def _section(section):
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f"<section>\n<h2>{html.escape(section.heading)}</h2>\n{blocks}\n</section>"


def _block(block):
    if isinstance(block, Paragraph):
        css_class = f' class="{block.kind}"' if block.kind else ""
        return f"<p{css_class}>{html.escape(block.text)}</p>"
    if isinstance(block, TextTable):
        return to_html(block)
    if isinstance(block, Legend):
        items = "".join(
            f'<li><i class="s{style}"></i>{html.escape(name)}</li>' for name, style in block.entries
        )
        return f'<ul class="legend">{items}</ul>'
    return '<div class="gallery">' + "".join(map(_figure, block.pictures)) + "</div>"


def _figure(picture):
    css_class = ' class="wide"' if picture.width > 560 else ""
    title, caption = html.escape(picture.title), html.escape(picture.caption)
    return (
        f'<figure{css_class} style="width: {picture.width + 24}px"><p class="title">{title}</p>'
        '<div class="plot"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(picture.dark)}">'
        f'<img src="{_data_uri(picture.light)}" width="{picture.width}" alt="{title}: {caption}"></picture></div>'
        + (f"<figcaption>{caption}</figcaption>" if caption else "")
        + "</figure>"
    )


def _data_uri(svg):
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _palette():
    light = "".join(f".s{i} {{ --c: {color}; }} " for i, color in enumerate(LIGHT.series))
    dark = "".join(f".s{i} {{ --c: {color}; }} " for i, color in enumerate(DARK.series))
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n"
