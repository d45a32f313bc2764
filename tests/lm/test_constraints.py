"""Masks against what they promise: a token is allowed where a text of the language goes on with it, and only there."""

import json
import re
from itertools import product

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

from probinfer.lm import tokens
from probinfer.lm.models.base import Context
from probinfer.lm.rewards import constraints
from probinfer.lm.rewards.allowed_tokens import allowed

WORDS = tokens.Vocabulary(("a", "b", "ab", "ba", "1", "<e>", "é"), eos="<e>")
END = WORDS.eos_ids[0]
CONTEXT = Context(jnp.zeros(4, jnp.int32), jnp.int32(1))


@jax.jit
def rows(constraint, array, length):
    return constraint.mask(constraint.init(CONTEXT, array.shape[0]), array, length)


def masks(constraint, prefixes):
    """Rows (M, V) of prefixes that are lists of ids."""
    width = max(1, *map(len, prefixes))
    array = np.array([[*prefix, *[3] * (width - len(prefix))] for prefix in prefixes], np.int32)
    return np.asarray(
        rows(constraint, jnp.asarray(array), jnp.asarray([len(p) for p in prefixes], jnp.int32))
    )


def all_prefixes(vocab_size, longest):
    return [list(p) for size in range(longest + 1) for p in product(range(vocab_size), repeat=size)]


def language(pattern, letters, longest):
    """Every text up to a length that a pattern matches."""
    texts = ("".join(t) for size in range(longest + 1) for t in product(letters, repeat=size))
    return [text for text in texts if re.fullmatch(pattern, text)]


@pytest.mark.parametrize(
    "pattern", ["(ab)+1?", "a*b*", "[ab]{2,4}", "(a|ba)1(a|b)", "1|ab(1|é)*", "a.b", "", "(aa|b)*1"]
)
def test_regular_expressions_over_every_short_prefix(pattern):
    matched = language(pattern, "ab1é", 7)
    beginnings = {text[:n] for text in matched for n in range(len(text) + 1)}
    prefixes = [p for p in all_prefixes(7, 3) if END not in p and len(WORDS.decode(p)) <= 3]
    found = masks(constraints.regex(pattern).follow(WORDS), prefixes)
    for prefix, row in zip(prefixes, found, strict=True):
        text = WORDS.decode(prefix)
        expected = [text + token in beginnings for token in WORDS.tokens]
        expected[END] = re.fullmatch(pattern, text) is not None
        if "." in pattern:  # any character, so texts go on with letters that are no tokens
            assert text not in beginnings or row.tolist() == expected
        else:
            assert row.tolist() == expected, (pattern, text)
    assert not found.all(axis=1).any()


def test_characters_that_mean_something_in_grammars():
    letters = tokens.Vocabulary((*'/"\n\\a%', "<e>"), eos="<e>")
    for pattern, text in (
        ("/a/", "/a/"),
        ('"%a"', '"%a"'),
        ("a\n/", "a\n/"),
        (r"\\a", "\\a"),
        (r"a\n", "a\n"),
    ):
        ids = [*letters.encode(text), 6]
        found = masks(constraints.regex(pattern).follow(letters), [ids[:n] for n in range(len(ids))])
        assert np.argwhere(found).tolist() == [[n, i] for n, i in enumerate(ids)], pattern


def test_options_of_a_grammar_are_kept():
    found = masks(
        constraints.grammar('%llguidance {"allow_initial_skip": true}\n%ignore "b"\nstart: "a" "a"').follow(
            WORDS
        ),
        [[]],
    )
    assert np.flatnonzero(found).tolist() == [0, 1, 2, 3]
    strict = masks(constraints.grammar('%ignore "b"\nstart: "a" "a"').follow(WORDS), [[]])
    assert np.flatnonzero(strict).tolist() == [0, 2]


def test_prefixes_that_ended_or_died():
    constraint = constraints.regex("ab?").follow(WORDS)
    ended, early, dead, behind, outside = masks(constraint, [[0, END], [1, END], [1], [0, END, 1], [0, 99]])
    assert np.flatnonzero(ended).tolist() == [END], "a text that has ended may only end"
    assert not early.any()
    assert not dead.any()
    assert not behind.any()
    assert not outside.any()
    assert masks(constraint, [[0, 1]])[0].tolist() == [i == END for i in range(7)], (
        "complete, nothing may follow"
    )


def test_several_end_tokens_and_tokens_without_bytes():
    words = tokens.Vocabulary(("a", "<e>", "<f>"), eos=("<e>", "<f>"))
    assert masks(constraints.regex("a").follow(words), [[], [0]]).tolist() == [
        [True, False, False],
        [False, True, True],
    ]

    class Padded:
        token_bytes = (b"a", b"", b"", b"b")
        eos_ids = (1,)

    tokenizer = Padded()
    assert masks(constraints.regex("a.*").follow(tokenizer), [[], [0], [0, 2]]).tolist() == [
        [True, False, False, False],
        [True, True, False, True],
        [False] * 4,
    ]


def test_a_character_cut_in_bytes():
    class Bytes:
        token_bytes = ("é".encode()[:1], "é".encode()[1:], b"e", b"")
        eos_ids = (3,)

    constraint = constraints.regex("é+").follow(Bytes())
    assert masks(constraint, [[], [0], [0, 1]]).tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [True, False, False, True],
    ]


def test_a_context_free_grammar():
    constraint = constraints.grammar('start: "a" start "b" | "1"').follow(WORDS)

    def beginning(text):
        return any(f"{'a' * n}1{'b' * n}".startswith(text) for n in range(8))

    prefixes = [p for p in all_prefixes(7, 3) if END not in p]
    for prefix, row in zip(prefixes, masks(constraint, prefixes), strict=True):
        text = WORDS.decode(prefix)
        expected = [beginning(text + token) for token in WORDS.tokens]
        depth = len(text) // 2
        expected[END] = text == f"{'a' * depth}1{'b' * depth}"
        assert row.tolist() == expected, text


JSON = tokens.Vocabulary(
    (*'{}[]",:-0123456789 ', "name", "age", "tags", "x", "y", '":', '","', "true", "<e>"), eos="<e>"
)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["x", "xy", "yx"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_sampled_texts_are_valid_under_the_schema():
    constraint = constraints.json_schema(json.dumps(SCHEMA), whitespace=False).follow(JSON)
    rng = np.random.default_rng(5)
    array, length = np.zeros((24, 64), np.int32), np.zeros(24, np.int32)
    for _ in range(64):
        found = np.asarray(rows(constraint, jnp.asarray(array), jnp.asarray(length)))
        assert found.any(axis=1).all(), "the language always goes on or ends"
        for n, row in enumerate(found):
            if length[n] == 0 or array[n, length[n] - 1] != JSON.eos_ids[0]:
                array[n, length[n]] = rng.choice(np.flatnonzero(row))
                length[n] += 1
    texts = [JSON.decode(row[:size]) for row, size in zip(array, length, strict=True)]
    assert all(row[size - 1] == JSON.eos_ids[0] for row, size in zip(array, length, strict=True))
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 12
    assert any("tags" in text for text in texts)


@pytest.mark.parametrize("whitespace", [True, False])
def test_valid_documents_are_allowed(whitespace):
    constraint = constraints.json_schema(SCHEMA, whitespace=whitespace).follow(JSON)
    for document in (
        {"name": "x", "age": 0},
        {"name": "yx", "age": 120, "tags": [True]},
        {"name": "xy", "age": 7},
    ):
        separators = (", ", ": ") if whitespace else (",", ":")
        ids = [*JSON.encode(json.dumps(document, separators=separators)), JSON.eos_ids[0]]
        found = masks(constraint, [ids[:n] for n in range(len(ids))])
        assert found[np.arange(len(ids)), ids].all()
    wrong = JSON.encode('{"name":"x","age":121')
    assert not masks(constraint, [wrong.tolist()])[0].any()


def test_a_new_token_is_one_step_and_a_fork_costs_nothing():
    constraint = constraints.regex("[ab1]{3,40}").follow(WORDS)
    host = constraint.host
    masks(constraint, [[0]] * 5)
    assert host.num_consumed == 1
    masks(constraint, [[0, 0], [0, 1], [0, 1], [0, 0]])
    assert host.num_consumed == 3
    masks(constraint, [[0, 1, 2, 3]])
    assert host.num_consumed == 5, "from the longest beginning that is known"
    masks(constraint, [[0, 1], [0, 0], [0]])
    assert host.num_consumed == 5


def test_masks_do_not_depend_on_what_is_remembered():
    prefixes = [p for p in all_prefixes(7, 3) if END not in p]
    order = np.random.default_rng(0).permutation(len(prefixes))
    large, small = (constraints.regex("(ab)*(1|ba)+").follow(WORDS, memory=m) for m in (1000, 2))
    shuffled = masks(small, [prefixes[i] for i in order])
    assert (masks(large, prefixes)[order] == shuffled).all()
    assert len(small.host._nodes) == 2


def test_several_prompts_and_no_retrace(count_compiles):
    constraint = constraints.regex("(ab)+1?").follow(WORDS)
    array = jnp.asarray([[[0, 1], [2, 4]], [[0, 0], [1, 1]], [[2, 2], [4, 4]]], jnp.int32)
    length = jnp.asarray([[2, 1], [1, 0], [2, 1]], jnp.int32)
    single = np.stack([rows(constraint, a, n) for a, n in zip(array, length, strict=True)])
    many = jax.jit(jax.vmap(lambda a, n: rows(constraint, a, n)))
    np.testing.assert_array_equal(many(array, length), single)
    np.testing.assert_array_equal(
        jax.vmap(jax.vmap(lambda n: rows(constraint, array[0], n)[0]))(length[None])[0, 0], single[0, 0]
    )
    array, length = array[::-1], length[::-1]
    with count_compiles() as compiled:
        many(array, length)
    assert compiled.count == 0


@pytest.mark.f32
def test_tables_follow_their_states():
    table = np.array([[True, True, False], [False, True, True], [False, False, True]])
    following = np.array([[0, 1, 0], [0, 1, 2], [2, 2, 2]])
    constraint = allowed(table, following)

    @jax.jit
    def run(constraint, array):
        def step(state, token):
            row = constraint.mask(state, array, jnp.zeros(array.shape[0], jnp.int32))
            return constraint.advance(state, token, token >= 0), row

        return jax.lax.scan(step, constraint.init(CONTEXT, array.shape[0]), array.T)

    array = np.random.default_rng(0).integers(-1, 3, size=(20, 6))  # -1 for particles that wait
    state, found = run(constraint, jnp.asarray(array, jnp.int32))
    for n, row in enumerate(array):
        own = 0
        for t, token in enumerate(row):
            assert found[t, n].tolist() == table[own].tolist()
            own = own if token < 0 else following[own, token]
        assert state[n] == own
    assert constraint.gather(state, jnp.array([3, 3])).tolist() == [state[3]] * 2
    once = allowed(np.array([True, False]))
    assert once.advance(once.init(CONTEXT, 2), jnp.array([0, 0]), jnp.array([True, True])).tolist() == [0, 0]


def test_bad_languages_are_refused_in_words():
    with pytest.raises(
        ValueError, match=r"(?s)regular expression '\(ab' cannot be followed: .*unclosed group"
    ):
        constraints.regex("(ab")
    with pytest.raises(ValueError, match="look-around"):
        constraints.regex("(?=a)b")
    with pytest.raises(ValueError, match=r"the JSON schema cannot be followed: .*Invalid type: nonsense"):
        constraints.json_schema({"type": "nonsense"})
    with pytest.raises(ValueError, match="the JSON schema is not a JSON"):
        constraints.json_schema("{type")
    for bad in ({"enum": {1, 2}}, "[1]"):
        with pytest.raises(ValueError, match="the JSON schema is not a JSON object"):
            constraints.json_schema(bad)
    with pytest.raises(ValueError, match="the grammar cannot be followed"):
        constraints.grammar('%llguidance {"no_forcing" 1}\nstart: "a"')
    with pytest.raises(TypeError, match="a JSON schema is a dictionary or its text"):
        constraints.json_schema([1])
    with pytest.raises(ValueError, match=r'the grammar cannot be followed: .*unknown name: "foo"'):
        constraints.grammar("start: foo")
    with pytest.raises(ValueError, match="memory must be at least 1"):
        constraints.regex("a").follow(WORDS, memory=0)


def test_tokenizers_that_cannot_do_it_are_refused_in_words():
    with pytest.raises(TypeError, match="needs a tokenizer with token_bytes and eos_ids"):
        constraints.regex("a").follow("tokenizer")
    with pytest.raises(ValueError, match="no end token"):
        constraints.regex("a").follow(tokens.Vocabulary("ab"))
    with pytest.raises(ValueError, match="has no bytes"):
        constraints.regex("a").follow(tokens.Vocabulary("ab", eos=("a", "b")))


def test_bad_tables_are_refused_in_words():
    with pytest.raises(TypeError, match="must be boolean, got float64"):
        allowed(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"must be \(states, vocabulary\)"):
        allowed(np.ones((2, 3, 1), bool))
    with pytest.raises(TypeError, match="transitions must be integers"):
        allowed(np.ones((2, 3), bool), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"shape \(2, 3\) of the table, got \(3, 2\)"):
        allowed(np.ones((2, 3), bool), np.zeros((3, 2), int))
    with pytest.raises(ValueError, match=r"states must be 0 \.\.\. 1, got 0 \.\.\. 2"):
        allowed(np.ones((2, 3), bool), np.full((2, 3), [0, 1, 2]))
