"""A function is what it computes: what its identity sees, what it shares, and that results follow it everywhere."""

import collections
import functools
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from jax import lax

from probinfer.core.algorithms import as_partial
from probinfer.core.binding import Bound, hold
from probinfer.core.identity.bytecode import reads
from probinfer.core.identity.digits import keeps_its_digits
from probinfer.running import fingerprint

pytestmark = pytest.mark.f32


def made(source, name="fn", **values):
    """A function from a text, in a name space of its own, as a notebook that runs a cell again makes it."""
    space = {"jnp": jnp, "np": np, "jax": jax, "lax": lax, "__name__": "__main__", **values}
    exec(source, space)
    return space[name]


def structure(fn, *args):
    return Bound(fn, *args).structure


# What enters: each pair of functions differs in one thing only.


def two(source, make=lambda c: c):
    """Two functions of one text, whose global C differs."""
    return [made(source, C=make(c)) for c in (2.0, 3.0)]


OWNER = "class S:\n  def __init__(s, c): s.c = c\n  def f(s, x): return x * s.c\n  __call__ = f\n"
SLOTS = OWNER.replace("\n", "\n  __slots__ = ('c',)\n", 1)
DATACLASS = "import dataclasses\n@dataclasses.dataclass\nclass S:\n  c: float\ns = S(C)\n"
PAIRS = {
    "an operation": [made(f"def fn(x): return x {op} 2.0") for op in "+-"],
    "a name": [made(f"def fn(x): return jnp.{op}(x)") for op in ("sin", "cos")],
    "a constant": [made(f"def fn(x): return x * {c}") for c in (2.0, 3.0)],
    "the type of a constant": [made(f"def fn(x): return x * {c}") for c in ("2", "2.0")],
    "a default": two("def fn(x, c=C): return x * c"),
    "a keyword default": two("def fn(x, *, c=C): return x * c"),
    "a global": two("def fn(x): return x * C"),
    "the sign of zero": [made("def fn(x): return x * C", C=c) for c in (0.0, -0.0)],
    "a closure": two("def outer(c): return lambda x: x * c\nfn = outer(C)"),
    "a helper": [made(f"def h(x): return x * {c}\ndef fn(x): return h(x)") for c in (2.0, 3.0)],
    "a global of a helper": two("def h(x): return x * C\ndef fn(x): return h(x)"),
    "a function inside": two("def fn(x):\n def h(z): return z * C\n return h(x)"),
    "an entry of a dictionary": two("def fn(x): return x * C['c']", lambda c: {"c": c}),
    "an item of a list": two("def fn(x): return x * C[0]", lambda c: [c]),
    "a long list": two("def fn(x): return x * sum(C)", lambda c: [1.0] * 100 + [c]),
    "a set": two("def fn(x): return x * sum(C)", lambda c: {1.0, c}),
    "text": two("def fn(x): return x * len(C)", lambda c: "a" * int(c)),
    "an attribute": two("def fn(x): return x * C.c", lambda c: types.SimpleNamespace(c=c)),
    "bound arguments": [functools.partial(lambda c, x: x * c, c) for c in (2.0, 3.0)],
    "bound keywords": [functools.partial(lambda x, c: x * c, c=c) for c in (2.0, 3.0)],
    "the object of a method": two(OWNER + "fn = S(C).f"),
    "a callable object": two(OWNER + "fn = S(C)"),
    "slots": two(SLOTS + "fn = S(C).f"),
    "a class": [made(f"class S:\n  c = {c}\ndef fn(x): return x * S.c") for c in (2.0, 3.0)],
    "a method of a class": two("class S:\n  def f(s, x): return x * C\ndef fn(x): return S().f(x)"),
    "a dataclass": two(DATACLASS + "def fn(x): return x * s.c"),
    "a named tuple": two("def fn(x): return x * C.c", collections.namedtuple("S", "c")),
    "a jitted helper": two("@jax.jit\ndef h(x): return x * C\ndef fn(x): return h(x)"),
    "a jitted function": [jax.jit(fn) for fn in two("def fn(x): return x * C")],
    "a function under grad": [jax.grad(fn) for fn in two("def fn(x): return x**2 * C")],
    "a function under vmap": two("def h(x): return x * C\ndef fn(x): return jax.vmap(h)(x[None])[0]"),
    "a memo": [functools.lru_cache(fn) for fn in two("def fn(x): return 1.0 * C")],
    "a custom derivative": two(
        "@jax.custom_jvp\ndef fn(x): return x * C\nfn.defjvp(lambda p, t: (fn(p[0]), C * t[0]))"
    ),
    "a scan body": two("def b(c, _): return c * C, None\ndef fn(x): return lax.scan(b, x, None, 2)[0]"),
    "a branch": two("def b(x): return x * C\ndef fn(x): return lax.cond(x > 0, b, b, x)"),
    "a table": two("def fn(x): return x * C['c'].values[0]", lambda c: pd.DataFrame({"c": [c]})),
    "a NumPy array": two("def fn(x): return x * C", lambda c: np.full(1, c)),
    "a JAX array": two("def fn(x): return x * C", lambda c: jnp.full(1, c)),
    "an array looked at": two("def fn(x): return x * float(np.asarray(C).max())", lambda c: np.full(1, c)),
    "a random generator": two(
        "def fn(x): return x * (C.bit_generator.state['state']['inc'] % 1000)",
        lambda c: np.random.default_rng(int(c)),
    ),
}
IN_SLOTS = {"a NumPy array", "a JAX array", "an array looked at"}


@pytest.mark.parametrize("what", PAIRS)
def test_a_digest_sees(what):
    one, other = PAIRS[what]
    assert fingerprint.digest(one) == fingerprint.digest(one)
    assert fingerprint.digest(one) != fingerprint.digest(other)


@pytest.mark.parametrize("what", PAIRS)
def test_a_structure_sees_all_but_the_values_of_arrays(what):
    one, other = PAIRS[what]
    assert structure(one) == structure(one)
    assert (structure(one) == structure(other)) == (what in IN_SLOTS)


_run = jax.jit(lambda fn, x: fn(x))


@pytest.mark.parametrize("what", [what for what in PAIRS if what != "a memo"])
def test_compiled_results_are_those_of_plain_python(what):
    """One jitted program for both functions of a pair, which in Python give two results."""
    x = jnp.asarray(1.5)
    for fn in PAIRS[what]:
        expected = np.asarray(fn(x))
        np.testing.assert_allclose(np.asarray(_run(as_partial(fn), x)), expected, rtol=1e-6)
        np.testing.assert_allclose(np.asarray(Bound(fn)(x)), expected, rtol=1e-6)


# What is shared: the same content is the same program, whatever the objects are.

ARRAYS = {
    "a global": lambda y: made("def fn(x): return jnp.sum(x * Y)", Y=y),
    "a helper's global": lambda y: made("def h(x): return x * Y\ndef fn(x): return jnp.sum(h(x))", Y=y),
    "a closure": lambda y: made("def outer(y): return lambda x: jnp.sum(x * y)\nfn = outer(Y)", Y=y),
    "a default": lambda y: made("def fn(x, y=Y): return jnp.sum(x * y)", Y=y),
    "a dictionary": lambda y: made("def fn(x): return jnp.sum(x * Y['y'])", Y={"y": y}),
    "a namespace": lambda y: made("def fn(x): return jnp.sum(x * Y.y)", Y=types.SimpleNamespace(y=y)),
    "a partial": lambda y: functools.partial(made("def fn(y, x): return jnp.sum(x * y)"), y),
    "a scan body": lambda y: made(
        "def b(c, _): return c + x0 * Y, None\nx0 = 1.0\n"
        "def fn(x): return jnp.sum(lax.scan(b, x * 0 * Y, None, length=2)[0]) / 2 * x",
        Y=y,
    ),
    "a jitted helper": lambda y: made(
        "@jax.jit\ndef h(x): return x * Y\ndef fn(x): return jnp.sum(h(x))", Y=y
    ),
    "a jax partial": lambda y: jax.tree_util.Partial(
        made("def fn(y, x): return jnp.sum(x * y)"), jnp.asarray(y)
    ),
}


@pytest.mark.parametrize("how", ARRAYS)
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_new_values_of_captured_arrays_compile_nothing(how, kind, dtype, count_compiles):
    x = jnp.asarray(2.0, dtype)
    first, second = kind(np.ones(3, dtype)), kind(np.full(3, 5.0, dtype))
    assert float(_run(as_partial(ARRAYS[how](first)), x)) == 6.0
    with count_compiles() as compiles:
        assert float(_run(as_partial(ARRAYS[how](second)), x)) == 30.0
    assert compiles.count == 0


@pytest.mark.parametrize("what", [what for what in PAIRS if what not in ("a memo", "an array looked at")])
def test_what_is_unchanged_neither_traces_nor_compiles(what, count_compiles):
    x, fn = jnp.asarray(1.5), PAIRS[what][0]
    _run(as_partial(fn), x)
    with count_compiles() as compiles:
        _run(as_partial(fn), x)
    assert compiles.count == 0


def test_an_array_looked_at_is_static_by_its_values(count_compiles):
    """Equal values find the program, others compile again; the function may look at shapes, branches and items."""
    source = "def fn(x): return x * (2.0 if Y[0] > 0 else 3.0) * jnp.ones(int(Y.max())).size"
    fns = [made(source, Y=np.array(y)) for y in ([1, 2], [1, 2], [-1, 4])]
    x = jnp.asarray(1.0)
    assert float(_run(as_partial(fns[0]), x)) == 4.0
    _run(as_partial(fns[0]), x)
    with count_compiles() as compiles:
        assert float(_run(as_partial(fns[1]), x)) == 4.0
    assert compiles.count == 0
    assert float(_run(as_partial(fns[2]), x)) == 12.0


def test_values_looked_at_are_those_of_the_object_that_is_called():
    bound = Bound(made("def fn(x): return x * float(np.asarray(Y).max())", Y=np.array([0.5, 1.0])))
    for factor in (1.0, 3.0):
        moved = jax.tree.map(lambda array, factor=factor: factor * array, bound)
        assert float(_run(moved, jnp.asarray(2.0))) == 2.0 * factor


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        (np.array([0.1, 0.7, -2.3]), True),
        (np.array([0.5, 0.5]), True),
        (np.array([0.1, np.nan, -2.3]), True),
        (2026.0 + np.array([0.1, 0.2, 0.3]) * 1e-4, False),
        (np.array([0.1]), False),
        (np.array([1e300, -1e300]), False),
        (np.arange(10), True),
        (np.array([3 * 10**9]), False),
        (np.array([60_000]), False),
        (np.array([0.1 + 0.2j]), False),
        (np.zeros(0), True),
    ],
)
def test_captured_values_that_would_lose_digits_are_constants(values, kept):
    """With 64-bit numbers on, nothing is lost; Python's own arithmetic with the values is then that of the function."""
    kept |= jax.config.jax_enable_x64
    assert keeps_its_digits(values) == kept
    assert len(Bound(made("def fn(x): return x * C", C=values)).data) == kept


def test_years_to_the_hour_keep_their_hours():
    t = 2026.0 + np.arange(5) / 8766.0
    fn = made("def fn(x): return jnp.asarray((t - t.mean()) * 8766.0) * x", t=t)
    np.testing.assert_allclose(_run(as_partial(fn), jnp.asarray(1.0)), np.arange(5) - 2.0, atol=1e-3)


# When it is read: at the moment when the function is handed in.


def test_later_changes_do_not_reach_what_was_handed_in():
    """Not even a trace for another shape, made after the change, sees it; what is handed in again does."""
    table, settings, rate = np.ones(3), {"shift": 1.0}, 2.0
    fn = made("def fn(x): return jnp.sum(x * R) * T[0] + S['shift']", T=table, S=settings, R=rate)
    before = as_partial(fn)
    table[:], settings["shift"], fn.__globals__["R"] = 7.0, 5.0, 3.0
    for shape in [(), (2,)]:
        assert float(_run(before, jnp.ones(shape))) == 2.0 * np.prod(shape) + 1.0
        assert float(_run(as_partial(fn), jnp.ones(shape))) == 21.0 * np.prod(shape) + 5.0


def test_a_table_that_jax_could_share_is_copied():
    """`jax.device_put` takes an aligned NumPy array as it is on a CPU, and would see what is written to it later."""
    room = np.zeros(8 * 16 + 64, np.uint8)
    table = room[-room.ctypes.data % 64 :][: 8 * 16].view(np.float64)
    table[:] = 1.0
    before = as_partial(made("def fn(x): return jnp.sum(x * T)", T=table))
    table[:] = 7.0
    assert float(_run(before, jnp.asarray(1.0))) == 16.0


def test_what_a_function_writes_is_its_output():
    """Counters and memos of traces are shared with the caller and do not make another function of it."""
    calls, counts, memo, log = [], {"n": 0}, {}, collections.deque()
    fn = made(
        "number = 0\ndef fn(x):\n global number\n number += 1\n calls.append(1)\n counts['n'] += 1\n"
        " memo[1, 'a'] = 2\n log.appendleft(x.shape)\n return x * 2",
        calls=calls, counts=counts, memo=memo, log=log,
    )  # fmt: skip
    for _ in range(3):
        assert float(_run(as_partial(fn), jnp.asarray(2.0))) == 4.0
    assert (len(calls), counts["n"], memo, len(log), fn.__globals__["number"]) == (1, 1, {(1, "a"): 2}, 1, 1)


def test_what_a_method_writes_is_its_output():
    class Counter:
        def __init__(self):
            self.calls, self.log, self.scale = 0, [], 2.0

        def __call__(self, x):
            self.calls += 1
            self.note(x)
            return x * self.scale

        def note(self, x):
            self.log.append(x.shape)

    counter = Counter()
    for fn in (counter, counter.__call__):
        for _ in range(3):
            assert float(_run(as_partial(fn), jnp.asarray(2.0))) == 4.0
    assert counter.calls == len(counter.log) == 2
    counter.scale = 3.0
    assert float(_run(as_partial(counter), jnp.asarray(2.0))) == 6.0


def test_what_a_function_writes_to_objects_and_to_itself():
    """An attribute of the same name on an object of its own is no output: what it reads there is seen."""
    state, settings = types.SimpleNamespace(calls=0, log=[], scale=2.0), types.SimpleNamespace(scale=1.0)
    source = (
        "def fn(x):\n fn.calls = getattr(fn, 'calls', 0) + 1\n state.calls += 1\n state.log.append(x.shape)\n"
        " own = Space()\n own.scale = 5.0\n return x * state.scale * settings.scale"
    )
    fn = made(source, state=state, settings=settings, Space=types.SimpleNamespace)

    def closed(x):
        state.calls += 1
        state.log.append(x.shape)
        own = types.SimpleNamespace()
        own.scale = 5.0
        return x * state.scale * settings.scale

    for f in (fn, closed):
        state.calls, state.scale, settings.scale = 0, 2.0, 1.0
        for _ in range(3):
            assert float(_run(as_partial(f), jnp.asarray(1.0))) == 2.0
        assert state.calls == 1
        settings.scale = 4.0
        assert float(_run(as_partial(f), jnp.asarray(1.0))) == 8.0
        state.scale = 3.0
        assert float(_run(as_partial(f), jnp.asarray(1.0))) == 12.0
    assert fn.calls == 3
    assert len(state.log) == 6


OUTPUTS = {
    "a list": ("calls = []\ndef fn(x):\n calls.append(1)\n return x", lambda space: len(space["calls"])),
    "a global": ("n = 0\ndef fn(x):\n global n\n n += 1\n return x", lambda space: space["n"]),
    "itself": ("def fn(x):\n fn.n += 1\n return x\nfn.n = 0", lambda space: space["fn"].n),
    "an object": ("class S: n = 0\ns = S()\ndef fn(x):\n s.n += 1\n return x", lambda space: space["s"].n),
    "its owner": (
        "class S:\n n = 0\n def f(s, x):\n  s.n += 1\n  return x\ns = S()\nfn = s.f",
        lambda space: space["s"].n,
    ),
    "the object called": (
        "class S:\n n = 0\n def __call__(s, x):\n  s.n += 1\n  return x\nfn = S()",
        lambda space: space["fn"].n,
    ),
    "a closure": (
        "def outer():\n calls = []\n def fn(x):\n  calls.append(1)\n  return x\n return fn, calls\nfn, calls = outer()",
        lambda space: len(space["calls"]),
    ),
    "a rebound closure": (
        "def outer():\n n = 0\n def fn(x):\n  nonlocal n\n  n += 1\n  return x\n"
        " return fn, lambda: n\nfn, read = outer()",
        lambda space: space["read"](),
    ),
}


@pytest.mark.parametrize("where", OUTPUTS)
def test_a_function_that_is_defined_again_writes_to_what_is_its_own(where):
    """A notebook cell that is run twice: the same code with a list or a counter of its own, called from the device."""
    source, written = OUTPUTS[where]
    for _ in range(2):
        space = {"__name__": "__main__"}
        exec(source, space)
        fn = space["fn"]

        def calls_python(x, fn=fn):
            return jax.pure_callback(fn, jax.ShapeDtypeStruct((), x.dtype), x)

        for runs in (1, 2):
            assert float(_run(as_partial(calls_python), jnp.asarray(2.0))) == 2.0
            assert written(space) == runs


@pytest.mark.parametrize("draws", [np.random.default_rng, np.random.RandomState])
def test_a_generator_that_is_made_again_starts_anew(draws):
    """Not where an older one in the same state has come to since: a cell that is run twice gives the same numbers."""

    def first_draw():
        rng = draws(0)

        def fn(x):
            return x + jax.pure_callback(
                lambda x: rng.normal() * np.ones_like(x), jax.ShapeDtypeStruct((), x.dtype), x
            )

        return float(_run(as_partial(fn), jnp.asarray(0.0)))

    assert first_draw() == first_draw()


def test_a_counter_in_a_closure():
    number = 0

    def fn(x):
        nonlocal number
        number += 1
        return x * 2

    for _ in range(3):
        _run(as_partial(fn), jnp.asarray(2.0))
    assert number == 1


def test_a_class_that_changes_is_traced_again():
    """Its methods read the globals of their module when traced, and JAX keeps the trace of a scan body."""
    source = (
        "def body(c, _): return c * RATE, None\n"
        "class S:\n  def run(s, x): return lax.scan(body, x, None, length=3)[0]\n"
        "s = S()\ndef fn(x): return s.run(x)"
    )
    fn = made(source, RATE=2.0)
    assert float(_run(as_partial(fn), jnp.asarray(1.0))) == 8.0
    fn.__globals__["RATE"] = 3.0
    assert float(_run(as_partial(fn), jnp.asarray(1.0))) == 27.0
    held = as_partial(fn)
    fn.__globals__["RATE"] = 4.0
    with pytest.raises(RuntimeError, match="was changed after it was handed in"):
        _run(held, jnp.ones(2))


def test_an_exception_of_the_function_is_its_own():
    def fn(x):
        raise ArithmeticError("not today")

    with pytest.raises(ArithmeticError, match="not today"):
        Bound(fn)(1.0)


# Under the user's own transformations.


def test_captured_tracers_under_jit_vmap_and_grad():
    def value(y):
        return Bound(lambda x: jnp.sum(x * y) + as_partial(lambda z: jnp.sum(z * y))(x))(jnp.asarray(3.0))

    y = jnp.arange(3.0)
    assert float(jax.jit(value)(y)) == float(value(y)) == 18.0
    np.testing.assert_array_equal(jax.vmap(value)(y), 6.0 * y)
    np.testing.assert_array_equal(jax.grad(value)(y), np.full(3, 6.0))
    assert float(jax.jit(lambda y: _run(as_partial(lambda x: jnp.sum(x * y)), jnp.asarray(2.0)))(y)) == 6.0


def test_recursion_and_cycles():
    fn = made("def fn(x, n=3): return x if n == 0 else 2.0 * fn(x, n - 1)")
    assert float(_run(as_partial(fn), jnp.asarray(1.0))) == 8.0
    loop: list = [2.0]
    loop.append(loop)
    assert float(_run(as_partial(made("def fn(x): return x * L[1][1][0]", L=loop)), jnp.asarray(1.0))) == 2.0


def test_values_held_once_stand_for_themselves():
    held = hold(({"y": np.ones(3)}, "text", 4))
    fn = Bound(lambda given, x: jnp.sum(given[0]["y"]) * x + given[2] + len(given[1]), held)
    assert float(_run(fn, jnp.asarray(2.0))) == 14.0
    assert len(jax.tree.leaves(fn)) == 1


# What cannot be seen is said.


def test_what_cannot_be_read_is_known_by_its_object_and_said():
    locks = threading.Lock(), threading.Lock()
    one, other = (made("def fn(x): return x if L else -x", L=lock) for lock in locks)
    assert structure(one) == structure(one) != structure(other)
    assert fingerprint.digest(one) == fingerprint.digest(other)
    assert fingerprint.unseen(one) == ["an object of _thread.lock, which cannot be read"]
    assert fingerprint.unseen(made("def fn(x): return x")) == []
    assert fingerprint.unseen(made("def fn(x): return x * globals()['C']")) == ["what fn finds by globals()"]
    about = fingerprint.describe(jax.random.key(0), as_partial(one), jnp.ones(2), 1, 1)
    assert about["not seen"] == fingerprint.unseen(one)


def test_reads_of_a_function():
    code = made(
        "def fn(self, x):\n global G\n import os.path\n from math import sin, cos\n G = 1\n"
        " calls.append(1); count['n'] += 1; cache[x, 1] = np.linalg.norm(x); self.log.append(2); self.n += 1\n"
        " return [R for _ in T], cache.get(1)"
    ).__code__
    found = reads(code)
    assert dict(found.names)["np"] == (("linalg", "norm"),)
    assert {"R", "T", "calls", "count", "cache"} <= set(dict(found.names))
    assert dict(found.imports) == {"os.path": (), "math": ("cos", "sin")}
    assert found.rebound == {"G"}
    assert found.changed == {"calls", "count", "cache"}
    assert (found.assigned, found.filled) == ({("self", "n")}, {("self", "log")})
