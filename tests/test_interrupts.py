"""Ctrl-C, with real signals: what is finished is returned or kept, and the process stays usable."""

import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probinfer as pi
from probinfer import checks, interrupts
from probinfer.base import Algorithm, Status
from probinfer.checkpoint import Checkpoint
from probinfer.errors import ConvergenceWarning

MANY = 10_000_000


@pytest.fixture(autouse=True)
def handler_is_restored():
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def press_at(number, at):
    """Press it inside of a compiled program, when a counter comes to ``at``."""

    def look(number):
        if number == at:
            os.kill(os.getpid(), signal.SIGINT)

    jax.debug.callback(look, number)


def counting_step(key, state):
    press_at(state, 20)
    return state + 1, state


def test_a_run_returns_what_it_has():
    state, history = pi.run(jax.random.key(0), Algorithm(None, counting_step), jnp.int32(0), MANY, thin=2)
    assert history.status == Status.INTERRUPTED
    assert 20 < int(history.num_steps) < MANY
    assert int(history.num_steps) % 2 == 0
    assert state == history.num_steps
    np.testing.assert_array_equal(history.filled()[1], 2 * np.arange(int(history.num_records)) + 1)
    with pytest.raises(KeyboardInterrupt, match="steps"):
        history.check()


def plain_step(key, state):
    return state + jax.random.normal(key), state


def test_an_interrupted_run_continues_to_the_same_draws(tmp_path, monkeypatch):
    """Ctrl-C after the second chunk, and again while the interrupted run is made again."""
    call = lambda checkpoint=None: pi.run(  # noqa: E731
        jax.random.key(0), Algorithm(None, plain_step), jnp.zeros(()), 500, checkpoint=checkpoint
    )
    expected = call()
    where, wait, calls = Checkpoint(tmp_path / "run", every=100), interrupts.wait, []

    def wait_and_press(tree):
        calls.append(None)
        if len(calls) in (2, 5):
            os.kill(os.getpid(), signal.SIGINT)
        return wait(tree)

    monkeypatch.setattr(interrupts, "wait", wait_and_press)
    first, second = call(where), call(where)
    assert 0 < first[1].num_steps < second[1].num_steps < 500
    finished = call(where)
    assert finished[1].status == Status.OK
    jax.tree.map(np.testing.assert_array_equal, finished[1].records, expected[1].records)


@jax.jit
def slow(number):
    """A second or so of work in one piece."""
    x = jnp.ones((150, 150)) * number
    return jax.lax.fori_loop(0, 1500, lambda i, x: jnp.sin(x @ x) / 10, x)[0, 0]


def slow_step(key, state):
    return state + 1 + 0 * slow(state).astype(state.dtype), ()


def test_a_second_one_stops_at_once(tmp_path, monkeypatch):
    """Inside a step that has not ended, and the checkpoint is none the worse."""
    call = lambda: pi.run(  # noqa: E731
        jax.random.key(0),
        Algorithm(None, slow_step),
        jnp.zeros(()),
        MANY,
        checkpoint=Checkpoint(tmp_path / "run", every=1),
        collect=pi.record_nothing,
    )
    wait, presses, ended = interrupts.wait, [1, 2, 1], []

    def press_and_wait(tree):
        timers = [
            threading.Timer(0.1 * (i + 1), os.kill, (os.getpid(), signal.SIGINT))
            for i in range(presses.pop(0))
        ]
        for timer in timers:
            timer.start()
        try:
            return wait(tree)
        finally:
            ended.append(jax.tree.leaves(tree)[0].is_ready())
            for timer in timers:
                timer.join()

    monkeypatch.setattr(interrupts, "wait", press_and_wait)
    assert call()[1].num_steps == 1
    with pytest.raises(KeyboardInterrupt):
        call()
    _, again = call()
    assert again.status == Status.INTERRUPTED
    assert again.num_steps == 2
    assert ended == [True, False, True]


def press_and_look(flag):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)  # the handler runs between two bytecodes
    return flag is not None and flag.requested


def test_one_that_nobody_heard_is_passed_on():
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():
        press_and_look(None)
    with interrupts.deferred() as outer, interrupts.deferred() as inner:
        assert inner is outer
        assert press_and_look(inner)


def test_other_threads_and_handlers_are_left_alone():
    handlers = []
    thread = threading.Thread(target=lambda: handlers.append(interrupts.deferred().__enter__().requested))
    thread.start()
    thread.join()
    assert handlers == [False]
    for ignored in (signal.SIG_IGN, signal.SIG_DFL):
        before = signal.signal(signal.SIGINT, ignored)
        try:
            with interrupts.deferred():
                assert signal.getsignal(signal.SIGINT) is ignored
        finally:
            signal.signal(signal.SIGINT, before)


# Many posteriors


def sampler(key, x):
    press_at(x.astype(jnp.int32), 7)
    return x + jax.random.normal(key, (20,))


def some(num):
    return jax.random.split(jax.random.key(0), num), jnp.arange(float(num))


def test_run_many_returns_the_data_sets_that_are_finished(tmp_path):
    keys, x = some(40)
    with pytest.warns(ConvergenceWarning, match=r"of 40 data sets were finished; Ctrl-C"):
        found = pi.run_many(sampler, keys, x, mode="map", chunk=10)
    number = len(found.status)
    assert 8 <= number < 40
    assert found.num_missing == 40 - number
    with pytest.warns(ConvergenceWarning, match="data sets were finished"):
        kept = pi.run_many(sampler, keys, x, mode="vmap", chunk=10, path=tmp_path)
    assert len(kept.status) == 10
    whole = pi.run_many(sampler, keys, x, mode="vmap", chunk=10, path=tmp_path)
    assert whole.num_missing == 0
    np.testing.assert_array_equal(whole.draws[:number], found.draws)


def test_sbc_judges_the_simulations_that_are_finished():
    keys = iter(range(MANY))

    def infer(key, x):
        jax.debug.callback(lambda: os.kill(os.getpid(), signal.SIGINT) if next(keys) == 30 else None)
        return x / 2 + jax.random.normal(key, (15,)) / jnp.sqrt(2.0)

    with pytest.warns(ConvergenceWarning, match="of 200 data sets were finished"):
        report = checks.sbc(
            jax.random.key(1),
            jax.random.normal,
            lambda key, theta: theta + jax.random.normal(key),
            infer,
            num_simulations=200,
            chunk=20,
            mode="map",
        )
    number = len(report.posteriors.status)
    assert 30 < number < 200
    assert len(report.theta) == len(report.x) == number
