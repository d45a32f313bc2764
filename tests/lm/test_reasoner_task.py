"""Problems, texts, tokens and the checker, against Python's own arithmetic on the written text."""

import re

import numpy as np
import pytest

from probinfer.lm.reasoner import encoding, task

PROBLEM = task.Problem(7, "+*-", (5, 3, 2))


def oracle_results(problem):
    """Running results by Python's evaluation of the nested expression."""
    expression, results = str(problem.start), [problem.start]
    for op, number in zip(problem.operations, problem.operands, strict=True):
        expression = f"({expression}) {op} {number}"
        results.append(eval(expression) % 11)
    return results


def oracle_prefix(problem, text):
    """Whether a text of whole lines is right so far: each line is the right equation, then the answer."""
    results, lines = oracle_results(problem), text.split("\n")
    for t, line in enumerate(lines):
        if t < len(problem.operands):
            left, _, right = line.partition(" = ")
            found = re.fullmatch(r"(\d+) ([-+*]) (\d+)", left)
            if not found or not right.isdigit():
                return False
            asked = (str(results[t]), problem.operations[t], str(problem.operands[t]))
            if found.groups() != asked or str(eval(left) % 11) != right:
                return False
        elif t > len(problem.operands) or line != f"Answer: {results[-1]}":
            return False
    return True


def test_one_problem_as_text():
    assert PROBLEM.prompt == "Left to right modulo 11: 7 + 5 * 3 - 2\n"
    assert PROBLEM.solution == "7 + 5 = 1\n1 * 3 = 3\n3 - 2 = 1\nAnswer: 1"
    assert task.check(PROBLEM, PROBLEM.solution) == task.Check((True,) * 4, True)


def test_results_are_those_of_python():
    problems = task.draw(0, 300, (1, 10), "train")
    results = task.values(problems)
    for i in range(300):
        expected = oracle_results(task.pick(problems, i))
        assert results[i, : len(expected)].tolist() == expected
        assert (results[i, len(expected) :] == expected[-1]).all()


def test_draws_are_seeded_distinct_and_in_range():
    first, again = task.draw(3, 200), task.draw(3, 400)
    np.testing.assert_equal(first, task.Problems(*(leaf[:200] for leaf in again)))
    assert set(first.num_steps) == {3, 4, 5, 6, 7}
    assert len({task.pick(again, i) for i in range(400)}) == 400
    assert not np.array_equal(first.start, task.draw(4, 200).start)


def test_parts_are_disjoint():
    """Drawn from 11 * 33**2 problems of two steps, 12 000 in all: independent draws would share some."""
    nums = {"train": 6000, "validation": 500, "reward": 500, "evaluation": 500}
    drawn = {split: task.draw(0, num, (2, 2), split) for split, num in nums.items()}
    sets = {split: {task.pick(rows, i) for i in range(nums[split])} for split, rows in drawn.items()}
    assert len(set.union(*sets.values())) == sum(nums.values())


def test_a_problem_belongs_to_the_same_part_however_it_is_stored():
    rows = task.draw(0, 20, (3, 5), "evaluation")
    wide = task.stack([task.pick(rows, i) for i in range(20)], width=9)
    np.testing.assert_array_equal(task._hash(rows), task._hash(wide))


def test_tokens_are_the_text():
    problems = task.draw(1, 100, (1, 10), "train")
    prompts, lengths = encoding.prompts(problems)
    solutions, ends = encoding.solutions(problems)
    rows, inside = encoding.join(prompts, lengths, solutions, ends)
    for i in range(100):
        problem = task.pick(problems, i)
        assert encoding.text(prompts[i]) == problem.prompt
        assert encoding.text(solutions[i]) == problem.solution
        assert encoding.text(rows[i]) == problem.prompt + problem.solution
        assert solutions[i, ends[i] - 1] == encoding.END
        assert inside[i].sum() == ends[i]
        assert inside[i, lengths[i]]
        assert not inside[i, lengths[i] - 1]


def corrupted(seed, num):
    """Right solutions with a few tokens replaced, and cut at random places."""
    rng = np.random.default_rng(seed)
    problems = task.draw(seed, num, (1, 6), "reward")
    tokens, length = encoding.solutions(problems)
    for i in range(num):
        for place in rng.integers(0, length[i] - 1, rng.integers(0, 3)):
            kind = tokens[i, place]
            number = 3 <= kind < 14
            tokens[i, place] = rng.integers(3, 14) if number else rng.integers(2, len(encoding.TOKENS))
    return problems, tokens, np.where(rng.random(num) < 0.3, rng.integers(1, length), length)


def test_checker_against_the_oracle():
    problems, tokens, length = corrupted(5, 400)
    right, ends = encoding.right_so_far(problems, tokens, length), encoding.step_ends(tokens, length)
    answers, verdicts = encoding.answers(tokens, length), []
    for i in range(400):
        problem, text = task.pick(problems, i), encoding.text(tokens[i, : length[i]])
        lines = text.split("\n")
        whole = [
            n for n in range(1, len(lines) + 1) if n < len(lines) or tokens[i, length[i] - 1] == encoding.END
        ]
        expected = tuple(oracle_prefix(problem, "\n".join(lines[:n])) for n in whole if "".join(lines[:n]))
        found = task.check(problem, text)
        assert found.steps[: len(expected)] == expected
        by_token = [right[i, t] for t in np.flatnonzero(ends[i])]
        assert by_token[: len(expected)] == list(expected)
        assert str(answers[i]) == (task.answer(text) or "-1")
        assert found.answer == (task.answer(text) == str(oracle_results(problem)[-1]))
        verdicts += expected
    assert 100 < sum(verdicts) < len(verdicts) - 100


@pytest.mark.parametrize(
    ("text", "steps", "answer"),
    [
        ("", (), False),
        ("7 + 5 = 1", (True,), False),  # begins the right text
        ("7 + 5 = 1\n1 * 3 = 4\n4 - 2 = 2\nAnswer: 1", (True, False, False, False), True),  # right by luck
        ("Answer: 1", (False,), True),
        (
            "7 + 5 = 1\n1 * 3 = 3\n3 - 2 = 1\nAnswer: 1\n",
            (True, True, True, False),
            True,
        ),  # one line too many
        ("Answer: 1\nAnswer: 2", (False, False), False),  # the last one counts
        ("It is Answer: 1", (False,), False),
    ],
)
def test_checker_by_hand(text, steps, answer):
    assert task.check(PROBLEM, text) == task.Check(steps, answer)


def test_tokenizer_file_says_the_same(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    encoding.write_tokenizer(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    problems = task.draw(2, 50, (1, 10), "train")
    prompts, lengths = encoding.prompts(problems)
    solutions, ends = encoding.solutions(problems)
    for i in range(50):
        problem = task.pick(problems, i)
        assert tokenizer.encode(problem.prompt).ids == prompts[i, : lengths[i]].tolist()
        assert tokenizer.encode(problem.solution + "<end>").ids == solutions[i, : ends[i]].tolist()
        assert tokenizer.decode(solutions[i, : ends[i]]) == problem.solution
    with pytest.raises(Exception, match=r"(?i)unk"):
        tokenizer.encode("What is love?")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: task.draw(0, 5, split="test"), ValueError, "split must be one of train"),
        (lambda: task.draw(0, 0), ValueError, "at least 1 problem"),
        (lambda: task.draw(0, 5, (3, 11)), ValueError, "steps must be"),
        (lambda: task.draw(0, 5, (4, 3)), ValueError, "steps must be"),
        (lambda: task.draw(0, 300, (1, 1)), ValueError, "fewer than 300 different"),
        (lambda: task.check("7 + 5", "1"), TypeError, "expected a Problem"),
        (lambda: task.check(PROBLEM, None), TypeError, "must be a string"),
        (lambda: task.stack([task.Problem(11, "+", (1,))]), ValueError, "numbers are 0 ... 10"),
        (lambda: task.stack([task.Problem(1, "/", (1,))]), ValueError, "operations are"),
        (lambda: task.stack([task.Problem(1, "++", (1,))]), ValueError, "one operand for each"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
