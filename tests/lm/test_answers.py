"""Answers of texts: tables of spellings, and that different values never become one."""

from fractions import Fraction

import numpy as np
import pytest

from probinfer.lm import answers

SAME = {
    "0.5": [
        "0.5",
        "0.50",
        ".5",
        "+.5",
        r"\frac12",
        r"\dfrac{1}{2}",
        r"\tfrac{2}{4}",
        "1/2",
        "$ 1/2 $",
        r"\frac 1 2",
        "0.5.",
    ],
    "1000": [
        "1000",
        "1,000",
        "1{,}000",
        r"1,000 \text{ m}",
        "1000.0",
        r"\$1,000",
        "x = 1000",
        "$1000$.",
    ],
    "-3": ["-3", "\u22123", "-3.000", r"-\frac{6}{2}", r"\frac{-3}{1}", "y=-3", "- 3"],
    "1/3": ["1/3", r"\frac{1}{3}", r"\frac{2}{6}"],
    "90": [
        "90",
        r"90^\circ",
        r"90^{\circ}",
        r"90\%",
        "90%",
        r"90 \text{ degrees}",
        "90 degrees",
        "90 cm",
        r"90\text{ cm}^2",
    ],
    "0": ["0", "-0", "0.00", "0/7", "000"],
    "(1,2)": ["(1,2)", "(1, 2)", r"\left(1,\,2\right)", "( 1 ,2 ) ."],
    r"2\sqrt{3}": [r"2\sqrt{3}", r"2 \sqrt{3}", r"2\,\sqrt{3}", r"\(2\sqrt{3}\)", r"\theta = 2\sqrt{3}"],
    "Ann and Bob": [r"\text{Ann and Bob}", "Ann  and Bob", r"\textbf{Ann and Bob}."],
}
APART = [
    "0.33",
    "1/3",
    "1/0",
    "x+1=2",
    "1,2",
    "(1,000)",
    "12 34",
    "1234",
    "x<1",
    "x",
    "cm",
    "2^2",
    "3/4/5",
    "1e3",
    "0.333333333333333",
]


@pytest.mark.parametrize("form", SAME)
def test_spellings_of_one_answer(form):
    assert {spelling: answers.canonical(spelling) for spelling in SAME[form]} == dict.fromkeys(
        SAME[form], form
    )
    assert answers.canonical(form) == form, "a canonical form stays"


def test_different_answers_stay_different():
    forms = [*map(answers.canonical, APART), *SAME]
    assert len(set(forms)) == len(forms) - 1  # 1/3 stands in both
    assert answers.canonical("3/4/5") == "3/4/5"


def test_numbers_keep_their_value_exactly():
    rng = np.random.default_rng(0)
    for _ in range(300):
        above, below = int(rng.integers(-2000, 2000)), int(rng.integers(1, 300))
        form = answers.canonical(rf"\frac{{{above}}}{{{below}}}")
        assert Fraction(form) == Fraction(above, below)
        assert answers.canonical(form) == form == answers.canonical(f"{above}/{below}")
    for _ in range(300):
        number = f"{rng.integers(-50, 50)}.{rng.integers(0, 10**6):06d}"
        assert Fraction(answers.canonical(number)) == Fraction(number)


def test_nothing_is_no_answer():
    assert [answers.canonical(empty) for empty in ("", "  ", "$$", ".", r"\text{}")] == [None] * 5
    assert answers.text(" a b\n") == "a b"
    assert answers.text("\n") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"the answer is \boxed{7}.", "7"),
        (r"\boxed{1} then \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1,2\}"),
        (r"\boxed{x \in \{1\}} and then \boxed{unfinished", r"x\in\{1\}"),
        (r"\boxed {3}", "3"),
        (r"\boxed 12 apples", "12"),
        (r"\fbox{4} or \fboxed{5}", "5"),
        (r"\boxedness{4}", None),
        (r"\boxed{}", None),
        (r"\boxed{", None),
        ("no box", None),
        (r"\boxed{a \boxed{b}}", "b"),
    ],
)
def test_last_boxed(text, answer):
    assert answers.last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7", "7"),
        ("costs $1,250.50.", "1250.5"),
        ("5-3", "3"),
        ("5 -3", "-3"),
        ("it is -12", "-12"),
        ("it is \u221212.", "-12"),
        ("(-4)", "-4"),
        ("x=-4/8", "-0.5"),
        ("3 / 9", "1/3"),
        ("in 2024, 1,234,567 people", "1234567"),
        ("1,2,3", "3"),
        (".25 of it", "0.25"),
        ("7/0", "7"),
        ("A y7", "7"),
        ("step2: done", "2"),
        ("v1.5", "1.5"),
        ("none", None),
        ("- . , /", None),
    ],
)
def test_last_number(text, answer):
    assert answers.last_number(text) == answer
