r"""Extract the answer of a text, with the same spelling for all texts that mean the same: votes count equal strings.

Only what cannot change the meaning is normalized, so two spellings of one answer may still count as two (``2\sqrt3``
and ``\sqrt{12}``), but two answers never count as one, with the exceptions that ``canonical`` names.
"""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["canonical", "last_boxed", "last_number", "text"]

_DECIMALS = 12  # maximum number of decimals of a fraction that is written as a decimal number
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?"
_LAST = re.compile(
    rf"(?<![\w.])(-?(?=[\d.]){_NUMBER})(?:\s*/\s*(\d+)(?![\d.]))?|(?<=[^\W\d_])({_NUMBER})(?=\d|\b)"
)
_VALUE = re.compile(rf"([+-]?)(?=[\d.]){_NUMBER}")
_RATIO = re.compile(r"([+-]?)(?:\\frac\{([+-]?\d+)\}\{([+-]?\d+)\}|(\d+)/(\d+))")
_SPACES = re.compile(r"\\[,;:! ]|\\q?quad(?![A-Za-z])|~")
_WORDS = r"\\(?:text|mathrm|textrm|textbf|textit|mathbf|mbox|rm)\s*\{([^{}]*)\}"
_UNIT = (
    "(?:mm|cm|m|km|in|inch|inches|ft|foot|feet|yd|yards|mi|miles?|mg|g|grams?|kg|s|sec|seconds?|min|minutes?|h|hours?"
    "|days?|meters?|metres?|dollars?|cents?|degrees?|units?|square|cubic|percent)"
)
_PLAIN_UNIT = re.compile(rf"(?<=\d)\s+{_UNIT}(?:\s+{_UNIT})*(?:\s*\^\s*\{{?[23]\}}?)?$")


def text(text: str) -> str | None:
    """Return the whole text without surrounding space; None if it is empty."""
    return text.strip() or None


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` whose braces close, as ``canonical`` writes it; None without one.

    Example:
        >>> from probinfer.lm import answers
        >>> answers.last_boxed(r"so \boxed{3}, no: \boxed{\dfrac{1}{\sqrt{2}}}.")
        '\\frac{1}{\\sqrt{2}}'
    """
    for match in reversed(list(re.finditer(r"\\f?boxed(?![A-Za-z])\s*", text))):
        content = _braces(text, match.end())
        if content is not None:
            return canonical(content)
    return None


def last_number(text: str) -> str | None:
    """Return the last number of a text, in the form of ``canonical``; None without one.

    Numbers are whole, decimal, with commas between thousands, or fractions a/b; a minus sign belongs to a number unless
    it follows a letter or digit (the last number of ``5-3`` is 3).

    Example:
        >>> from probinfer.lm import answers
        >>> answers.last_number("3 apples cost $1,250.50."), answers.last_number("x = -4/8")
        ('1250.5', '-0.5')
    """
    last = None
    for match in _LAST.finditer(text.replace("\u2212", "-")):
        standalone, denominator, glued = match.groups()
        number = standalone if standalone not in (None, "", "-") else glued
        if number:
            is_fraction = denominator and int(denominator) and "." not in number
            last = f"{number}/{denominator}" if is_fraction else number
    return None if last is None else canonical(last.replace(",", ""))


def canonical(text: str) -> str | None:
    r"""Return the canonical spelling of an answer; None for an empty one.

    Removed are: dollar signs and ``\( \)`` around it, ``\left`` and ``\right``, small spaces, space that separates no
    words, periods and commas at the end, units and degrees behind it (``\text{cm}^2``, ``^\circ``, plain units after a
    number), commas between thousands, the letter of ``x = ...``. Rewritten are: ``\dfrac`` and ``\tfrac`` to ``\frac``,
    ``\frac12`` to ``\frac{1}{2}``, ``\text{yes}`` to ``yes``. Numbers get one form: whole, decimal if the decimals end
    within twelve digits, else a fraction in lowest terms (``0.50``, ``.5``, ``1/2``, ``\frac{2}{4}`` are all ``0.5``;
    ``0.33`` is not ``1/3``). So answers that differ only in their unit (also 50 and 50\%) count as one, and so do those
    that differ only in the letter before an equals sign.

    Example:
        >>> from probinfer.lm import answers
        >>> answers.canonical(r" $\left( 1 ,\, \tfrac{2}{6}\right)$. "), answers.canonical(r"x = 1{,}000\text{ cm}^2")
        ('(1,\\frac{2}{6})', '1000')
    """
    text = _unwrapped(text.replace("\u2212", "-"))
    text = _SPACES.sub(" ", re.sub(r"\\(?:left|right)(?![A-Za-z])\s*", "", text.replace("{,}", ",")))
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d|\{[^{}]*\})\s*(\d|\{[^{}]*\})", _fraction, text)
    text = _without_unit(text.strip())
    text = re.sub(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])", "", re.sub(r"\s+", " ", text))
    named = re.fullmatch(r"(?:[A-Za-z]|\\[a-z]+)=([^=<>]+)", text)
    return _number(named[1] if named else text) or None


def _braces(text: str, start: int) -> str | None:
    """Return the content of the balanced braces at a position, or the word there if there are no braces."""
    if text[start : start + 1] != "{":
        word = re.match(r"[^\s{}$\\]+", text[start:])
        return word[0] if word else None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth and match[0] == "}":
            return text[start + 1 : start + match.start()]
    return None


def _unwrapped(text: str) -> str:
    """Remove signs of mathematics around a text and punctuation behind it."""
    before = None
    while before != text:
        before = text = text.strip()
        text = text.rstrip(".,;:") if not text.endswith("\\,") else text[:-2]
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            if text.startswith(left) and text.endswith(right) and len(text) >= len(left + right):
                text = text[len(left) : len(text) - len(right)]
                break
    return re.sub(r"^\\?\$\s*", "", text)


def _fraction(match: re.Match[str]) -> str:
    """Put numerator and denominator into braces."""
    numerator, denominator = (part if part.startswith("{") else f"{{{part}}}" for part in match.groups())
    return rf"\frac{numerator}{denominator}"


def _without_unit(text: str) -> str:
    """Remove degrees, percent and units behind a value; words alone lose only their command."""
    before = None
    while before != text:
        before = text
        text = re.sub(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|\\?%|\u00b0)$", "", text)
        text = re.sub(rf"(?<=[^\s{{(\[,])\s*{_WORDS}(?:\s*\^\s*\{{?[23]\}}?)?$", "", text)
        text = _PLAIN_UNIT.sub("", text)
    return re.sub(_WORDS, lambda match: match[1], text).strip()


def _number(text: str) -> str:
    """Return the canonical form of a number, and any other text unchanged."""
    ratio = _RATIO.fullmatch(text)
    if ratio:
        numerator, denominator = int(ratio[2] or ratio[4]), int(ratio[3] or ratio[5])
        sign = -1 if ratio[1] == "-" else 1
        return _format_fraction(sign * Fraction(numerator, denominator)) if denominator else text
    return _format_fraction(Fraction(text.replace(",", ""))) if _VALUE.fullmatch(text) else text


def _format_fraction(value: Fraction) -> str:
    """Write a number: whole, as a short exact decimal, or else as a fraction."""
    if value.denominator == 1:
        return str(value.numerator)
    if 10**_DECIMALS % value.denominator:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**_DECIMALS // value.denominator).rjust(_DECIMALS + 1, "0")
    decimal = f"{digits[:-_DECIMALS]}.{digits[-_DECIMALS:]}".rstrip("0")
    return ("-" if value < 0 else "") + decimal
