"""Problems and solutions as tokens, and the checker on tokens, vectorized over a batch, in NumPy.

A token is a number, an operation with the spaces around it, or another piece of the text; the pieces joined are the
text. A step is ``a op b = y`` and the end of the line, six tokens; the last step is ``Answer:``, a number and the end
of the text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from probinfer.core.errors import import_extra
from probinfer.lm.reasoner.task import HEADER, MODULUS, OPERATIONS, Problems, values

__all__ = [
    "END",
    "NEWLINE",
    "PAD",
    "TOKENS",
    "answers",
    "join",
    "prompts",
    "right_so_far",
    "solutions",
    "step_ends",
    "text",
    "write_tokenizer",
]

NUMBERS = tuple(str(number) for number in range(MODULUS))
TOKENS = ("<pad>", "<end>", HEADER, *NUMBERS, *(f" {op} " for op in OPERATIONS), " = ", "\n", "Answer: ")
PAD, END = 0, 1
FIRST_NUMBER = TOKENS.index("0")
FIRST_OPERATION = TOKENS.index(" + ")
EQUALS, NEWLINE, ANSWER = (TOKENS.index(piece) for piece in (" = ", "\n", "Answer: "))
STEP = 6  # tokens of a step


def prompts(problems: Problems) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, "B"]]:
    """Return the tokens of the questions, padded on the right, and their number."""
    num, width = problems.operations.shape
    tokens = np.full((num, 2 * width + 3), PAD, np.int32)
    tokens[:, 0] = TOKENS.index(HEADER)
    tokens[:, 1] = FIRST_NUMBER + problems.start
    tokens[:, 2:-1:2] = FIRST_OPERATION + problems.operations
    tokens[:, 3::2] = FIRST_NUMBER + problems.operands
    length = 2 * problems.num_steps + 3
    return _finish(tokens, length, [NEWLINE]), length


def solutions(problems: Problems) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Return the tokens of the right solutions, the end token included, padded on the right, and their number."""
    num, width = problems.operations.shape
    results = FIRST_NUMBER + values(problems)
    steps = np.empty((num, width, STEP), np.int32)
    steps[:, :, 0], steps[:, :, 1] = results[:, :-1], FIRST_OPERATION + problems.operations
    steps[:, :, 2], steps[:, :, 3] = FIRST_NUMBER + problems.operands, EQUALS
    steps[:, :, 4], steps[:, :, 5] = results[:, 1:], NEWLINE
    tokens = np.concatenate([steps.reshape(num, width * STEP), np.full((num, 3), PAD, np.int32)], axis=1)
    length = STEP * problems.num_steps + 3
    return _finish(tokens, length, [ANSWER, results[:, -1], END]), length


def join(
    prompt: Int[np.ndarray, "B P"],
    prompt_length: Int[np.ndarray, "B"],
    tokens: Int[np.ndarray, "B T"],
    length: Int[np.ndarray, "B"],
) -> tuple[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
    """Join prompt and continuation without a gap, L = P + T.

    Returns:
        The rows, and whether each position is in the continuation.
    """
    position = np.arange(prompt.shape[1] + tokens.shape[1])
    inside = (position >= prompt_length[:, None]) & (position < (prompt_length + length)[:, None])
    index = np.clip(position - prompt_length[:, None], 0, tokens.shape[1] - 1)
    continuation = np.where(inside, np.take_along_axis(tokens, index, 1), PAD)
    padded = np.pad(prompt, ((0, 0), (0, tokens.shape[1])))
    return np.where(position < prompt_length[:, None], padded, continuation).astype(np.int32), inside


def right_so_far(
    problems: Problems, tokens: Int[np.ndarray, "B T"], length: Int[np.ndarray, "B"]
) -> Bool[np.ndarray, "B T"]:
    """Return whether the tokens up to each position begin the right solution; ``False`` from ``length`` on."""
    truth, true_length = solutions(problems)
    width = max(truth.shape[1], tokens.shape[1])
    truth, padded = (np.pad(rows, ((0, 0), (0, width - rows.shape[1]))) for rows in (truth, tokens))
    same = (padded == truth) & (np.arange(width) < np.minimum(length, true_length)[:, None])
    return np.logical_and.accumulate(same, axis=1)[:, : tokens.shape[1]]


def step_ends(tokens: Int[np.ndarray, "B T"], length: Int[np.ndarray, "B"]) -> Bool[np.ndarray, "B T"]:
    """Return whether a step ends at each position: at the end of a line, at the end token, and at the last token."""
    position = np.arange(tokens.shape[1])
    last = position == (length - 1)[:, None]
    return (last | (tokens == NEWLINE) | (tokens == END)) & (position < length[:, None])


def answers(tokens: Int[np.ndarray, "B T"], length: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
    """Return the number on the last complete line ``Answer: ...`` of each row, -1 if there is none."""
    inside = np.arange(tokens.shape[1]) < length[:, None]
    padded = np.where(inside, tokens, END)  # the end of the text ends the line
    padded = np.pad(padded, ((0, 0), (1, 2)), constant_values=((0, 0), (NEWLINE, END)))
    before, current, number, after = (padded[:, i : i + tokens.shape[1]] for i in range(4))
    is_number = (number >= FIRST_NUMBER) & (number < FIRST_NUMBER + MODULUS)
    hit = (before == NEWLINE) & (current == ANSWER) & is_number & ((after == NEWLINE) | (after == END))
    last = hit.shape[1] - 1 - np.argmax(hit[:, ::-1], axis=1)
    return np.where(hit.any(1), number[np.arange(len(tokens)), last] - FIRST_NUMBER, -1)


def text(tokens: Int[np.ndarray, "T"]) -> str:
    """Join the pieces, without padding and end token."""
    return "".join(TOKENS[token] for token in tokens if token not in (PAD, END))


def write_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``: one word for each piece, nothing for unknown text.

    Raises:
        MissingExtraError: the package ``tokenizers`` is not installed.
    """
    library = import_extra("tokenizers", "lm")
    vocabulary = {piece: number for number, piece in enumerate(TOKENS)}
    tokenizer = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token="<none>"))
    pieces = sorted(TOKENS[END + 1 :], key=len, reverse=True)
    pattern = library.Regex("|".join(re.escape(piece) for piece in pieces))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Split(pattern, "isolated")
    tokenizer.decoder = library.decoders.Fuse()
    tokenizer.add_special_tokens([TOKENS[PAD], TOKENS[END]])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "eos_token": TOKENS[END],
        "pad_token": TOKENS[PAD],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _finish(
    tokens: Int[np.ndarray, "B T"], length: Int[np.ndarray, "B"], ending: list
) -> Int[np.ndarray, "B T"]:
    """Cut each row at its length, and replace its last tokens by the ending."""
    tokens = np.where(np.arange(tokens.shape[1]) < length[:, None], tokens, PAD).astype(np.int32)
    rows = np.arange(len(tokens))
    for i, piece in enumerate(ending):
        tokens[rows, length - len(ending) + i] = piece
    return tokens
