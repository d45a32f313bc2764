"""The automaton of delimiters against `delimiter in text`, over all short sequences of tokens."""

import time
from itertools import pairwise, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probinfer.lm import tokens

SMALL = [b"a", b"b", b"ab", b"ba", b"", b"aab"]


@jax.jit
def scanned(automaton, sequences):

    def follow(state, token):
        state = automaton.step(state, token)
        return state, automaton.hit(state)

    return jax.lax.scan(follow, automaton.start(len(sequences)), sequences.T)[1].T


def run(automaton, sequences):
    """Hits after each token (M, T) of sequences (M, T), inside jit."""
    return np.asarray(scanned(automaton, jnp.asarray(sequences)))


@pytest.mark.f32
@pytest.mark.parametrize(
    "strings",
    [
        ("a",),
        ("aa",),
        ("aba",),
        ("abab", "ba"),
        ("aab", "ab"),
        ("bb", "abba", "aaa"),
        ("aabaab",),
        ("b", "bb"),
        (),
    ],
)
def test_every_sequence_of_a_small_vocabulary(strings):
    automaton = tokens.build(strings, SMALL)
    sequences = np.array(list(product(range(len(SMALL)), repeat=4)))
    hits = run(automaton, sequences)
    for sequence, hit in zip(sequences, hits, strict=True):
        text = b""
        for token, said in zip(sequence, hit, strict=True):
            text += SMALL[token]
            assert said == any(s.encode() in text for s in strings), (strings, text)


def test_random_vocabularies_and_characters_of_several_bytes():
    rng = np.random.default_rng(0)
    for _ in range(6):
        pieces = ["x", "é", "漢", "\n", " "]
        encoded = "".join(rng.choice(pieces, 40)).encode()
        cuts = np.sort(rng.choice(np.arange(1, len(encoded)), 8, replace=False))  # also inside characters
        vocabulary = [encoded[a:b] for a, b in pairwise(cuts)]
        strings = tuple("".join(rng.choice(pieces, 2)) for _ in range(2))
        automaton = tokens.build(strings, vocabulary)
        sequences = rng.integers(len(vocabulary), size=(200, 6))
        hits = run(automaton, sequences)[:, -1]
        texts = [b"".join(vocabulary[i] for i in row) for row in sequences]
        assert hits.tolist() == [any(s.encode() in text for s in strings) for text in texts]
        assert hits.sum() > 0


def test_a_hit_stays_until_a_new_start_and_the_table_is_small():
    automaton = tokens.build(("\n\n",), [b"a", b"\n", b".\n\nb", b""])
    assert automaton.table.dtype == jnp.uint8
    assert automaton.table.shape == (3, 4)
    assert run(automaton, np.array([[1, 1, 0, 0], [2, 0, 0, 0], [1, 0, 1, 1], [1, 3, 1, 0]])).tolist() == [
        [False, True, True, True],
        [True, True, True, True],
        [False, False, False, True],
        [False, False, True, True],
    ]
    assert not automaton.hit(automaton.start())


def test_many_states_take_wider_integers():
    automaton = tokens.build(("ab" * 200,), [b"ab", b"a"])
    assert automaton.table.dtype == jnp.uint16
    assert run(automaton, np.zeros((1, 200), int))[0].tolist() == [False] * 199 + [True]


def test_a_large_vocabulary_takes_less_than_a_second():
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.geometric(0.15, 150_000), 128)
    letters = rng.integers(256, size=lengths.sum()).astype(np.uint8).tobytes()
    ends = np.cumsum(lengths)
    vocabulary = [letters[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    start = time.process_time()
    automaton = tokens.build(("\n\n", "\\boxed"), vocabulary)
    assert time.process_time() - start < 1.0
    some = rng.choice(150_000, 3000)
    assert np.asarray(automaton.table)[0, some].tolist() == [
        reference_state(vocabulary[i], (b"\n\n", b"\\boxed")) for i in some
    ]


def reference_state(text, strings):
    """States are numbered as prefixes are met: '' 0, newline 1, then those of the second string, then found."""
    if any(s in text for s in strings):
        return 7
    ends = [s[:n] for s in strings for n in range(1, len(s)) if text.endswith(s[:n])]
    longest = max(ends, key=len, default=b"")
    return 0 if not longest else 1 if longest == b"\n" else 1 + len(longest)


def test_no_retrace_and_vmap():
    automaton = tokens.build(("ab",), SMALL)
    traces = []

    @jax.jit
    def step(automaton, state, token):
        traces.append(1)
        return automaton.step(state, token)

    other = tokens.build(("bb",), SMALL)
    state = automaton.start(3)
    step(automaton, state, jnp.array([0, 1, 2]))
    step(other, state, jnp.array([2, 1, 2]))
    assert len(traces) == 1
    batched = jax.vmap(automaton.step)(automaton.start(2, 3), jnp.array([[0, 1, 2], [3, 4, 5]]))
    assert batched.tolist() == [automaton.step(state, jnp.array(t)).tolist() for t in ([0, 1, 2], [3, 4, 5])]


def test_bad_delimiters_are_refused_in_words():
    with pytest.raises(TypeError, match="a tuple of strings, got '"):
        tokens.build("\n\n", SMALL)
    with pytest.raises(TypeError, match="a tuple of strings"):
        tokens.build((3,), SMALL)
    with pytest.raises(ValueError, match="must not be empty"):
        tokens.build(("a", ""), SMALL)
    with pytest.raises(ValueError, match="vocabulary is empty"):
        tokens.build(("a",), [])
