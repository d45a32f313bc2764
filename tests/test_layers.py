"""Who may import whom: the imports of every file are parsed and held against one table."""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "probinfer"

# The rooms of the house from the ground up. A room may import what is in its own row and in those before it; the
# longest name decides, so that a part of a room can stand lower than the rest. A new room needs a place: the lowest
# that it can have.
ROWS = {
    "words": "core",
    "mathematics": "numerics kernels resampling betting targets",
    "running": "running plots inference.posterior inference.summary inference.arviz_export inference.diagnostics",
    "samplers": "inference mcmc vi",
    "particles": "smc coin",
    "models": "gp lm",
    "checks": "checks",
    "face": "data report app __main__",
}
ROW_OF = {room: row for row, rooms in ROWS.items() for room in rooms.split()}
ORDER = list(ROWS)
# Checks judge samplers, so they know none: they import what stands up to this row, and themselves.
BELOW_CHECKS = "running"
# One file may reach higher than its row: a model language knows no sampler, and a check of it needs a default one.
EXCEPTIONS = {("probinfer.checks.calibration.numpyro_models", "mcmc")}
STRANGERS = [("smc", "coin"), ("gp", "lm")]  # of one row, but they do not know each other
ENTRANCE = ("app", "__main__")  # what people run is imported by nothing but the entrance

# What each row may import from outside, by dotted prefix; the standard library is free.
WORDS = "jax jaxlib numpy scipy jaxtyping"
MATHEMATICS = (
    WORDS
    + " numpyro.distributions numpyro.infer numpyro.handlers numpyro.primitives optax blackjax.diagnostics"
)
RUNNING = MATHEMATICS + " rich"
SAMPLERS = RUNNING + " blackjax"
OUTSIDE = {
    "words": WORDS,
    "mathematics": MATHEMATICS,
    "running": RUNNING,
    "samplers": SAMPLERS,
    "particles": SAMPLERS,
    "models": SAMPLERS,
    "checks": RUNNING + " flax",
    "face": SAMPLERS + " flax numpyro typer",
}
OUTSIDE_ALSO = {"lm": "flax"}

# Behind extras: from "running" up, inside a function only.
OPTIONAL = (
    "arviz arviz_base arviz_stats matplotlib sklearn statsmodels pandas tokenizers safetensors IPython "
)
OPTIONAL += "jinja2 llguidance cloudpickle"


class Import(NamedTuple):
    """One imported dotted name, where it stands, and whether it stands inside a function."""

    name: str
    line: int
    lazy: bool


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a file below the package folder ``root``; a package is named after its folder."""
    parts = (root.name, *path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The module that ``from ... import`` names, relative dots resolved."""
    if not node.level:
        return node.module or ""
    base = module.split(".")
    base = base[: len(base) - node.level + is_package]
    return ".".join([*base, node.module] if node.module else base)


def names_imported(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """The dotted names that one statement imports; ``import_extra("x", ...)`` counts as an import of x."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{absolute(node, module, is_package)}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"import_extra", "import_module"}:
        return [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return []


def imports_of(path: Path, module: str) -> list[Import]:
    """Every import of a file, those inside functions included."""
    found = []

    def visit(node, lazy):
        names = names_imported(node, module, path.name == "__init__.py")
        found.extend(Import(name, node.lineno, lazy) for name in names)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text()), False)
    return found


def has_prefix(name: str, prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes.split())


def room_of(module: str) -> str | None:
    """The longest placed name that a module, without the package's name, is or lies in."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in ROW_OF), None)


def judge_inside(module: str, other: str) -> str | None:
    """Say what is wrong with an import of ``other`` by ``module``, both without the package's name, if anything."""
    room, wanted = room_of(module), room_of(other)
    top, other_top = module.split(".")[0], other.split(".")[0]
    if wanted is None:
        return f"imports the unplaced name '{other_top}'"
    row, other_row = ROW_OF[room], ROW_OF[wanted]
    below = BELOW_CHECKS if row == "checks" else row
    if other_row != row and ORDER.index(other_row) > ORDER.index(below):
        return f"({row}) may not import {wanted} ({other_row})"
    if (top, other_top) in STRANGERS or (other_top, top) in STRANGERS:
        return f"may not import {other_top}: the two do not know each other"
    if other_top == ENTRANCE[0] and top not in ENTRANCE:
        return f"may not import {other_top}: only {ENTRANCE[1]} does"
    return None


def judge_outside(module: str, item: Import) -> str | None:
    """Say what is wrong with an import from outside the package, if anything."""
    row, top = ROW_OF[room_of(module)], item.name.split(".")[0]
    if top in sys.stdlib_module_names:
        return None
    if top in OPTIONAL.split():
        if row in ("words", "mathematics"):
            return f"({row}) may not import the optional package {top}"
        return None if item.lazy else f"imports the optional package {top} outside a function"
    allowed = f"{OUTSIDE[row]} {OUTSIDE_ALSO.get(module.split('.')[0], '')}"
    return None if has_prefix(item.name, allowed) else f"({row}) may not import {item.name}"


def judge_file(path: Path, root: Path) -> list[str]:
    """Complaints about the imports of one file; the root ``__init__`` may import all of the package."""
    name = module_name(path, root)
    if name == root.name:
        return []
    module, complaints = name.removeprefix(root.name + "."), []
    if room_of(module) is None:
        room = module.split(".")[0]
        return [f"{name} has no place: add '{room}' to ROWS in tests/test_layers.py, as low as it can stand"]
    for item in imports_of(path, name):
        top, _, rest = item.name.partition(".")
        if top != root.name:
            wrong = judge_outside(module, item)
        elif not rest:
            wrong = "imports the package root: import the module that has the name"
        else:
            wrong = None if (name, rest.split(".")[0]) in EXCEPTIONS else judge_inside(module, rest)
        if wrong:
            complaints.append(f"{name}, line {item.line}: {wrong}")
    return complaints


def import_graph(root: Path) -> dict[str, set[str]]:
    """Edges between the files of the package, the root ``__init__`` left out."""
    files = {module_name(path, root): path for path in root.rglob("*.py")}
    files.pop(root.name, None)
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        targets = set()
        for item in imports_of(path, module):
            owner = item.name if item.name in files else item.name.rpartition(".")[0]
            targets |= {owner} & (files.keys() - {module})
        graph[module] = targets
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """One cycle as a list of modules, or an empty list."""
    done: set[str] = set()

    def walk(module, trail):
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if cycle := walk(other, [*trail, module]):
                return cycle
        done.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := walk(module, []))), [])


def complaints_of(root: Path) -> list[str]:
    """Everything that is wrong with the imports of a package."""
    found = [line for path in sorted(root.rglob("*.py")) for line in judge_file(path, root)]
    cycle = find_cycle(import_graph(root))
    return found + ([f"import cycle: {' -> '.join(cycle)}"] if cycle else [])


def test_layers():
    assert complaints_of(PACKAGE) == []


def plant(tmp_path: Path, files: dict[str, str]) -> list[str]:
    root = tmp_path / "probinfer"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return complaints_of(root)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"numerics/weights.py": "from probinfer.running.driver import run"}, "may not import running"),
        ({"core/types.py": "def f():\n    from probinfer import running"}, "may not import running"),
        ({"kernels/base.py": "from ..gp import fit"}, "may not import gp"),
        ({"smc/fusion.py": "import probinfer.coin.cloud"}, "do not know each other"),
        ({"checks/evidence.py": "from probinfer import mcmc"}, "may not import mcmc"),
        ({"checks/evidence.py": "from probinfer.inference.engine import Engine"}, "may not import inference"),
        (
            {"inference/summary.py": "from probinfer.inference import engine"},
            "may not import inference (samplers)",
        ),
        ({"gp/fitted.py": "from probinfer.report import page"}, "may not import report"),
        ({"report/html.py": "from probinfer.app.pages import units"}, "only __main__ does"),
        ({"running/loop.py": "import probinfer as pi"}, "package root"),
        ({"running/loop.py": "import blackjax"}, "may not import blackjax"),
        ({"inference/diagnostics/chains.py": "from blackjax import nuts"}, "may not import blackjax.nuts"),
        ({"gp/fitted.py": "import flax"}, "may not import flax"),
        ({"inference/posterior.py": "import arviz"}, "outside a function"),
        ({"core/errors.py": "def f():\n    import arviz"}, "optional package arviz"),
        ({"fancy.py": "import jax"}, "add 'fancy' to ROWS"),
        (
            {
                "running/loop.py": "import probinfer.running.progress",
                "running/progress.py": "from probinfer.running.loop import advance",
            },
            "import cycle",
        ),
    ],
)
def test_a_planted_violation_is_caught(tmp_path, files, complaint):
    found = plant(tmp_path, files)
    assert len(found) == 1
    assert complaint in found[0]


def test_what_is_allowed_passes(tmp_path):
    files = {
        "__init__.py": "from probinfer.running.driver import run",
        "core/status.py": "import enum, jax.numpy as jnp",
        "inference/diagnostics/chains.py": (
            "from blackjax.diagnostics import effective_sample_size\nfrom numpyro import handlers"
        ),
        "inference/posterior.py": "def f():\n    import arviz\n    az = import_extra('matplotlib', 'plots')",
        "inference/engine.py": "from probinfer.inference.posterior import Posterior",
        "running/driver.py": "from ..core import status\nfrom probinfer.running import loop",
        "running/loop.py": "",
        "checks/evidence.py": "from probinfer.inference.posterior import Posterior\nimport flax",
        "lm/models/base.py": "from flax import nnx",
        "__main__.py": "from probinfer.app import command_line",
        "app/command_line.py": "import typer\nfrom probinfer import gp, lm",
        "gp/__init__.py": "from probinfer.gp.fitted import Fit",
        "gp/fitted.py": "from probinfer.coin.cloud import particles",
    }
    assert plant(tmp_path, files) == []


def folders():
    """Every folder of code in the package but the top, with what it holds."""
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}):
        yield folder, [entry for entry in folder.iterdir() if entry.name != "__pycache__"]


def test_the_top_holds_rooms_alone():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_rooms_are_small_and_say_what_they_hold():
    for folder, entries in folders():
        assert 3 <= len(entries) <= 15, f"{folder} holds {len(entries)} entries"
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        assert len(text.split()) >= 8, f"{folder}/__init__.py must say what lives there and where to start"
