"""Ctrl-C, with real signals: what is finished is returned or kept, and the process stays usable."""

import contextlib
import gc
import os
import signal
import threading
import time
import warnings

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import probinfer as pi
from probinfer import checks
from probinfer.core.algorithms import Algorithm
from probinfer.core.errors import ConvergenceWarning
from probinfer.core.status import Status
from probinfer.lm.rewards.host import workers
from probinfer.running import interrupts
from probinfer.running.checkpoint import Checkpoint
from tests.lm import tables

MANY = 10_000_000
KEY = jax.random.key(2)


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


def test_an_interrupted_run_continues_to_the_same_draws(tmp_path, press_during):
    """Ctrl-C in the second piece, and again while the interrupted run is made again."""
    call = lambda checkpoint=None: pi.run(  # noqa: E731
        jax.random.key(0), Algorithm(None, plain_step), jnp.zeros(()), 500, checkpoint=checkpoint
    )
    expected = call()
    where = Checkpoint(tmp_path / "run", every=100)
    press_during(2, 5)
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
    signal.raise_signal(signal.SIGINT)
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
        found = pi.run_many(sampler, keys, x, mode="map", batch_size=10)
    number = len(found.status)
    assert 8 <= number < 40
    assert found.num_missing == 40 - number
    with pytest.warns(ConvergenceWarning, match="data sets were finished"):
        kept = pi.run_many(sampler, keys, x, mode="vmap", batch_size=10, checkpoint=pi.Checkpoint(tmp_path))
    assert len(kept.status) == 10
    whole = pi.run_many(sampler, keys, x, mode="vmap", batch_size=10, checkpoint=pi.Checkpoint(tmp_path))
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
            batch_size=20,
            mode="map",
        )
    number = len(report.posteriors.status)
    assert 30 < number < 200
    assert len(report.theta) == len(report.x) == number


# Engines


def quadratic(values):
    return -0.5 * jnp.sum(values["x"] ** 2 / jnp.array([1.0, 4.0]))


def target():
    return pi.targets.from_logdensity(quadratic, {"x": jnp.zeros(2)})


def part_of(engine, of=None):
    with pytest.warns(ConvergenceWarning, match="Ctrl-C ended the work early"):
        posterior = pi.infer(KEY, target() if of is None else of, engine)
    assert int(posterior.info.status) == Status.INTERRUPTED
    assert np.isfinite(posterior.draws["x"]).all()
    return posterior


NUTS = pi.mcmc.NUTS(num_warmup=200, num_draws=200, num_chains=2, metric="diagonal")


def test_nuts_returns_the_draws_so_far(press_during):
    press_during(when=lambda tree: 0 < int(tree[0].state.remaining) < 200)
    posterior = part_of(NUTS)
    assert 1 <= posterior.num_draws < 200
    press_during()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 200 draws are few
        whole = pi.infer(KEY, target(), NUTS)
    np.testing.assert_array_equal(whole.draws["x"][:, : posterior.num_draws], posterior.draws["x"])


def test_a_blackjax_algorithm_returns_the_draws_so_far(press_during):
    """Its first piece is one step; the first draws are discarded here too."""
    engine = pi.mcmc.Blackjax(
        lambda fn: blackjax.nuts(fn, 0.5, jnp.ones(2)), num_discard=3, num_draws=5000, num_chains=2
    )
    press_during(3)
    posterior = part_of(engine)
    assert 1 <= posterior.num_draws < 5000
    press_during(1)
    with pytest.raises(KeyboardInterrupt):
        pi.infer(KEY, target(), engine)


def test_a_warm_up_leaves_no_draws(press_during):
    press_during(1)
    with pytest.raises(KeyboardInterrupt, match="steps"):
        pi.infer(KEY, target(), NUTS)


def test_particles_are_returned_where_they_are(press_during):
    press_during(3)
    posterior = part_of(pi.coin.SVGD(num_particles=8))
    assert int(posterior.info.num_steps) < 50


def bent(values):
    """A curved valley, which takes the search some tens of evaluations."""
    x, y = values["x"]
    return -100 * (y - x**2) ** 2 - (1 - x) ** 2


def test_a_mode_search_returns_the_best_so_far(press_during):
    valley = pi.targets.from_logdensity(bent, {"x": jnp.zeros(2)})
    press_during(1)
    posterior = part_of(pi.vi.MAP(num_restarts=2), valley)
    assert Status.INTERRUPTED in posterior.info.statuses
    press_during()
    whole = pi.infer(KEY, valley, pi.vi.MAP(num_restarts=2))
    assert whole.info.status == Status.OK
    assert whole.info.log_density > posterior.info.log_density


@pytest.mark.slow
def test_a_variational_search_returns_the_gaussian_where_it_was(press_during):
    """Piece 1 makes the first frame; the search stops in the second, whose Gaussian the weights still mend."""
    engine = pi.vi.FullRank(num_draws=100)
    whole = pi.infer(KEY, target(), engine)
    press_during(2)
    posterior = part_of(engine)
    assert posterior.info.num_gradients <= whole.info.num_gradients
    assert posterior.draws["x"].shape == (1, 100, 2)
    np.testing.assert_allclose(posterior.expectation(lambda x: x["x"] ** 2), [1, 4], rtol=0.9)  # 6 errors


def test_a_fit_of_a_gaussian_process_is_returned_as_far_as_it_came(press_during):
    X = np.linspace(0, 1, 12)[:, None]
    press_during(2)
    with pytest.warns(ConvergenceWarning, match="restarts had ended; Ctrl-C"):
        fit = pi.gp.fit(jax.random.key(0), pi.gp.Model(pi.kernels.RBF()), X, np.sin(6 * X[:, 0]))
    assert int(fit.info.status) == Status.INTERRUPTED
    assert np.isfinite(fit.predict(X)[0]).all()


# Language models

LM_SETTINGS = {"answer": pi.lm.answers.text, "max_tokens": 4, "progress": False}


def sample_texts(prompt, reward=None, method=None, **settings):
    method = pi.lm.ParticleFilter(4, step=pi.lm.every(1)) if method is None else method
    return pi.lm.infer(KEY, tables.model(), prompt, reward, method, **LM_SETTINGS | settings)


def test_prompts_that_were_finished_are_answered(press_during):
    press_during(2)
    with pytest.warns(ConvergenceWarning, match="2 of 3 prompts were begun"):
        found = sample_texts(["a;", "a", "a;a"])
    assert [answers.status for answers in found] == [Status.OK] * 2
    press_during(1)
    with pytest.warns(ConvergenceWarning, match="Ctrl-C ended the work early"):
        found = sample_texts("a;", method=pi.lm.Adaptive(pi.lm.ParticleFilter(4, step=pi.lm.every(1)), 0.999))
    assert found.status == Status.INTERRUPTED
    assert len(found.texts) == 4


def test_watched_texts_are_returned_as_far_as_they_came():
    events = []

    def press(event):
        events.append(event)
        if len(events) == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.warns(ConvergenceWarning, match="Ctrl-C ended the work early"):
        found = sample_texts("a;", watch=press)
    assert found.status == Status.INTERRUPTED
    assert len(events) == 1
    assert sample_texts("a;").status == Status.OK


def hang(prompt, text):
    time.sleep(60)
    return 0.5


def test_workers_end_with_an_interrupted_run(monkeypatch):
    """Both presses come while a function hangs: the run ends at once, its processes too."""
    reward, before = pi.lm.rewards.from_python(hang, workers=1, timeout=None), children()
    process, timers, called = workers._Process.call, [], []

    def press_and_call(self, arguments, timeout):
        if not timers:
            called.append(time.monotonic())
            timers.extend(
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)) for delay in (0.3, 0.6)
            )
            for timer in timers:
                timer.start()
        return process(self, arguments, timeout)

    monkeypatch.setattr(workers._Process, "call", press_and_call)
    with pytest.raises(KeyboardInterrupt):
        sample_texts("a;", reward)
    assert time.monotonic() - called[0] < 40  # a call would have taken 60 s
    assert children() <= before


def children():
    """Processes that this one has started."""
    found = set()
    for task in os.listdir(f"/proc/{os.getpid()}/task"):
        with contextlib.suppress(OSError), open(f"/proc/{os.getpid()}/task/{task}/children") as file:
            found |= set(file.read().split())
    return found


def test_new_functions_leave_no_workers_and_no_descriptors():
    def run(i):
        reward = pi.lm.rewards.from_python(lambda prompt, text: 0.5 + 0 * i, workers=1)
        return sample_texts("a;", reward)

    run(0)
    gc.collect()
    open_before = len(os.listdir("/proc/self/fd"))
    running_before = children()
    for i in range(3):
        assert run(i).status == Status.OK
    gc.collect()
    assert children() <= running_before
    assert len(os.listdir("/proc/self/fd")) <= open_before
