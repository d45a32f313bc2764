"""Figures of the package's structure: sizes of rooms and files, records, comments, class names with two meanings.

python -m tests.structure            of this checkout
python -m tests.structure FOLDER     of another one
"""

import ast
import collections
import io
import statistics
import sys
import tokenize
from pathlib import Path

LARGE_RECORD = 5  # fields from which on a record is built by keyword
MANY_PARAMETERS = 8


def main() -> None:
    """Print the figures of one checkout."""
    root = (Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]) / "probinfer"
    texts = {path: path.read_text() for path in sorted(root.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    print_sizes(root, texts)
    print_records(trees)
    print_comments(texts, trees)


def print_sizes(root: Path, texts: dict[Path, str]) -> None:
    """Files and lines of each room, the largest folders, and the median and largest file."""
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    rooms: dict[str, list[int]] = collections.defaultdict(list)
    for path, count in lines.items():
        rooms[path.relative_to(root).parts[0]].append(count)
    for room, counts in sorted(rooms.items()):
        print(f"{room:20} {len(counts):4} files {sum(counts):6} lines")
    largest = max(lines, key=lambda path: lines[path])
    print(f"{'all':20} {len(lines):4} files {sum(lines.values()):6} lines")
    print(
        f"median file {statistics.median(lines.values())} lines, largest {lines[largest]}: {largest.relative_to(root)}"
    )
    folders = {path.parent for path in lines}
    entries = {folder: sum(entry.name != "__pycache__" for entry in folder.iterdir()) for folder in folders}
    for folder in sorted(entries, key=lambda folder: -entries[folder])[:5]:
        print(f"{entries[folder]} entries in {folder.relative_to(root.parent)}")


def print_records(trees: dict[Path, ast.Module]) -> None:
    """Fields of named tuples that are bare ``Any``, records built by position, class names used twice."""
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    records = {
        node.name: [item for item in node.body if isinstance(item, ast.AnnAssign)]
        for node in classes
        if any(getattr(base, "id", "") == "NamedTuple" for base in node.bases)
    }
    fields = [ast.unparse(field.annotation) for record in records.values() for field in record]
    bare = fields.count("Any")
    print(f"fields of named tuples that are bare Any: {bare} of {len(fields)} ({bare / len(fields):.1%})")
    by_position = sum(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and len(records.get(node.func.id, ())) >= LARGE_RECORD
        and sum(not isinstance(arg, ast.Starred) for arg in node.args) >= LARGE_RECORD
        for node in nodes
    )
    print(f"records of {LARGE_RECORD} fields and more that are built by position: {by_position}")
    counts = collections.Counter(node.name for node in classes)
    print(f"class names used twice or more: {sorted(name for name, count in counts.items() if count > 1)}")
    long = sum(
        len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]) > MANY_PARAMETERS
        for node in nodes
        if isinstance(node, ast.FunctionDef)
    )
    print(f"functions of more than {MANY_PARAMETERS} parameters: {long}")


def print_comments(texts: dict[Path, str], trees: dict[Path, ast.Module]) -> None:
    """Comments per 100 lines of code, docstrings and blank lines left out."""
    comments = code = 0
    for path, text in texts.items():
        described = set()
        for node in ast.walk(trees[path]):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                described |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            comments += token.type == tokenize.COMMENT and not token.string.startswith(("# type", "# noqa"))
        code += sum(
            bool(line.strip()) and not line.strip().startswith("#") and number not in described
            for number, line in enumerate(text.splitlines(), 1)
        )
    print(f"comments per 100 lines of code: {100 * comments / code:.2f}")


if __name__ == "__main__":
    main()
