"""Who may import whom: the imports of every file are parsed and held against one table."""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "probinfer"

# Layer of each module or sub-package. A new module needs one line here: choose the lowest layer that can do its work.
LAYERS = {
    "L0": "types identity logdensity base errors interrupts",
    "L1": "transforms targets linalg semidefinite "
    "quadrature weights resampling importance diagnostics linesearch optimize kernels stein tiles betting",
    "L2a": "run loop history progress checkpoint fingerprint posterior summary arviz_export "
    "store sealed run_many many_posteriors lanes",
    "L2b": "engine findings tails mcmc vi infer",
    "L2c": "smc coin",
    "L3": "gp lm",
    "L4": "checks",
    "L5": "cli report data __main__",
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names.split()}

# What each layer may import from inside the package, itself included.
INSIDE = {
    "L0": "L0",
    "L1": "L0 L1",
    "L2a": "L0 L1 L2a",
    "L2b": "L0 L1 L2a L2b",
    "L2c": "L0 L1 L2a L2b L2c",
    "L3": "L0 L1 L2a L2b L2c L3",
    "L4": "L0 L1 L2a L4",
    "L5": "L0 L1 L2a L2b L2c L3 L4 L5",
}
# One file may reach higher than its layer: a model language knows no sampler, and a check of it needs a default one.
EXCEPTIONS = {("probinfer.checks.sbc_numpyro", "mcmc")}
STRANGERS = [("smc", "coin"), ("gp", "lm")]  # of one layer, but they do not know each other

# What each layer may import from outside, by dotted prefix; the standard library is free.
WORDS = "jax jaxlib numpy scipy jaxtyping"
MATHEMATICS = (
    WORDS
    + " numpyro.distributions numpyro.infer numpyro.handlers numpyro.primitives optax blackjax.diagnostics"
)
RUNNING = MATHEMATICS + " rich"
SAMPLERS = RUNNING + " blackjax"
OUTSIDE = {
    "L0": WORDS,
    "L1": MATHEMATICS,
    "L2a": RUNNING,
    "L2b": SAMPLERS,
    "L2c": SAMPLERS,
    "L3": SAMPLERS,
    "L4": RUNNING + " flax",
    "L5": SAMPLERS + " flax numpyro typer",
}
OUTSIDE_ALSO = {"lm": "flax"}

# Behind extras: from L2a up, inside a function only.
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


def judge_inside(part: str, other: str) -> str | None:
    """Say what is wrong with an import of the package's ``other`` by its ``part``, if anything."""
    if other not in LAYER_OF:
        return (
            None if (PACKAGE.name, other) == ("probinfer", part) else f"imports the unplaced name '{other}'"
        )
    if LAYER_OF[other] not in INSIDE[LAYER_OF[part]].split():
        return f"({LAYER_OF[part]}) may not import {other} ({LAYER_OF[other]})"
    if (part, other) in STRANGERS or (other, part) in STRANGERS:
        return f"may not import {other}: the two do not know each other"
    return None


def judge_outside(part: str, item: Import) -> str | None:
    """Say what is wrong with an import from outside the package, if anything."""
    layer, top = LAYER_OF[part], item.name.split(".")[0]
    if top in sys.stdlib_module_names:
        return None
    if top in OPTIONAL.split():
        if layer in ("L0", "L1"):
            return f"({layer}) may not import the optional package {top}"
        return None if item.lazy else f"imports the optional package {top} outside a function"
    allowed = f"{OUTSIDE[layer]} {OUTSIDE_ALSO.get(part, '')}"
    return None if has_prefix(item.name, allowed) else f"({layer}) may not import {item.name}"


def judge_file(path: Path, root: Path) -> list[str]:
    """Complaints about the imports of one file; the root ``__init__`` may import all of the package."""
    module = module_name(path, root)
    if module == root.name:
        return []
    part, complaints = module.split(".")[1], []
    if part not in LAYER_OF:
        return [
            f"{module} has no layer: add '{part}' to LAYERS in tests/test_layers.py, as low as it can stand"
        ]
    for item in imports_of(path, module):
        pieces = item.name.split(".")
        if pieces[0] != root.name:
            wrong = judge_outside(part, item)
        elif len(pieces) == 1:
            wrong = "imports the package root: import the module that has the name"
        else:
            wrong = None if (module, pieces[1]) in EXCEPTIONS else judge_inside(part, pieces[1])
        if wrong:
            complaints.append(f"{module}, line {item.line}: {wrong}")
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
        ({"weights.py": "from probinfer.run import run"}, "may not import run"),
        ({"weights.py": "def f():\n    from probinfer import run"}, "may not import run"),
        ({"kernels/base.py": "from ..gp import fit"}, "may not import gp"),
        ({"smc/filter.py": "import probinfer.coin.svgd"}, "do not know each other"),
        ({"checks/sbc.py": "from probinfer import mcmc"}, "may not import mcmc"),
        ({"gp/fit.py": "from probinfer.report import page"}, "may not import report"),
        ({"run.py": "import probinfer as pi"}, "package root"),
        ({"run.py": "import blackjax"}, "may not import blackjax"),
        ({"diagnostics.py": "from blackjax import nuts"}, "may not import blackjax.nuts"),
        ({"gp/fit.py": "import flax"}, "may not import flax"),
        ({"posterior.py": "import arviz"}, "outside a function"),
        ({"errors.py": "def f():\n    import arviz"}, "optional package arviz"),
        ({"fancy.py": "import jax"}, "add 'fancy' to LAYERS"),
        (
            {"run.py": "import probinfer.progress", "progress.py": "from probinfer.run import run"},
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
        "__init__.py": "from probinfer.run import run",
        "base.py": "import enum, jax.numpy as jnp",
        "diagnostics.py": "from blackjax.diagnostics import effective_sample_size\nfrom numpyro import handlers",
        "posterior.py": "def f():\n    import arviz\n    az = import_extra('matplotlib', 'plots')",
        "run.py": "from . import base, posterior",
        "lm/base.py": "from flax import nnx",
        "cli.py": "import typer\nfrom probinfer import gp, lm",
        "gp/__init__.py": "from probinfer.gp.fit import fit",
        "gp/fit.py": "from probinfer.coin import svgd",
    }
    assert plant(tmp_path, files) == []
