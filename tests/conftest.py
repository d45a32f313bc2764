"""One process, one precision: JAX_ENABLE_X64 decides; shapes in signatures are executed, so they are true."""

import importlib.metadata
import os
import signal

os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Compiling is most of what the tests do; `make test-all` compiles as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_FASTER = "--xla_cpu_use_fusion_emitters=false"  # by a third; a newer XLA has no such flag, and ends at unknown ones
_release = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and _release < (0, 11):
    _flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = _flags if _FASTER in _flags else f"{_flags} {_FASTER}".strip()

import jaxtyping

jaxtyping.install_import_hook("probinfer", "beartype.beartype")

import jax
import jax.numpy as jnp
import pytest
from xdist.scheduler import LoadScopeScheduling

from probinfer.running import interrupts
from tests import keys


def pytest_addoption(parser):
    parser.addoption(
        "--key-offset",
        type=int,
        default=0,
        metavar="N",
        help="add N to the seed of every key that a test makes",
    )
    parser.addoption("--only-stochastic", action="store_true", help="run only what depends on such keys")
    parser.addoption("--keep-programs", action="store_true", help="keep compiled programs after a file")


def pytest_configure(config):
    # A process that a script begins in the background ignores Ctrl-C, and the tests of Ctrl-C would never end.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    keys.shift(config.getoption("--key-offset"))


def pytest_ignore_collect(collection_path):
    """Without 64-bit mode a file that marks nothing ``f32`` has nothing to run and need not be imported."""
    if (
        collection_path.suffix == ".py"
        and not jax.config.jax_enable_x64
        and b"mark.f32" not in collection_path.read_bytes()
    ):
        return True
    return None


def pytest_collection_modifyitems(config, items):
    """Without 64-bit mode only the tests marked ``f32`` are meant to run."""
    if not jax.config.jax_enable_x64:
        keep(config, items, lambda item: "f32" in item.keywords)
        for item in items:
            if item.get_closest_marker("f32").kwargs.get("slow"):
                item.add_marker(pytest.mark.slow)
    if config.getoption("--only-stochastic"):
        keep(config, items, keys.depends_on_keys)
    items.sort(key=lambda item: item.path.stem != "test_notebooks")  # they take longest


def keep(config, items, is_meant):
    """Deselect the items that are not meant to run."""
    meant = [item for item in items if is_meant(item)]
    config.hook.pytest_deselected(items=[item for item in items if not is_meant(item)])
    items[:] = meant


class FilesToWorkers(LoadScopeScheduling):
    """Tests of one file share compiled programs and stay with one worker; a notebook is a task of its own."""

    def _split_scope(self, nodeid):
        file, _ = nodeid.split("::", 1)
        return nodeid if file.endswith("test_notebooks.py") else file


def pytest_xdist_make_scheduler(config, log):
    return FilesToWorkers(config, log)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs(request):
    """Some thousand compiled programs take gigabytes, and in a process that large the compiler may crash."""
    yield
    if not request.config.getoption("--keep-programs"):
        jax.clear_caches()


@pytest.fixture
def optimized():
    """Compile as users do, for bounds in float32 that hold for the rounding of such code."""
    disabled = jax.config.values["jax_disable_most_optimizations"]
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", disabled)
    jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(20261121)


@pytest.fixture
def dtype():
    """The floating dtype of this test process."""
    return jnp.result_type(float)


@pytest.fixture
def count_compiles():
    """Return a context manager that counts the XLA compilations inside it."""
    return CompileCounter


class CompileCounter:
    """Counts backend compilations between enter and exit (``.count``)."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def _listen(self, event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)


@pytest.fixture
def press_during(monkeypatch):
    """Press Ctrl-C while the pieces of these numbers are computed, counted from one."""
    wait, calls = interrupts.wait, []

    def start(*numbers, when=lambda tree: False):
        calls.clear()

        def press_and_wait(tree):
            calls.append(None)
            if len(calls) in numbers or when(tree):
                signal.raise_signal(signal.SIGINT)
            return wait(tree)

        monkeypatch.setattr(interrupts, "wait", press_and_wait)

    return start


@pytest.fixture
def press_before(monkeypatch):
    """Press Ctrl-C before the call of this number, counted from one, of a function in a module or class."""

    def start(where, name, number):
        fn, calls = getattr(where, name), []

        def press_and_call(*args, **options):
            calls.append(None)
            if len(calls) == number:
                signal.raise_signal(signal.SIGINT)
            return fn(*args, **options)

        monkeypatch.setattr(where, name, press_and_call)

    return start
