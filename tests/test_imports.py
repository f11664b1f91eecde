"""The order of imports between subpackages: only downward, in annotations too."""

import ast
from pathlib import Path

import networkx as nx
import pytest

PACKAGE = Path(__file__).parent.parent / "moe_rewrite"
FLOORS = [
    {"cli"}, {"demo"}, {"continual"}, {"convert", "onnx"}, {"converted"}, {"serve"}, {"passes"}, {"experts"},
    {"analysis"}, {"frontend"}, {"routing"}, {"config", "ir"}, {"kernels"},
    {"models", "utils"}, {"errors"},
]  # fmt: skip
FLOOR = {room: len(FLOORS) - i for i, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(module):
    """The first part of a module's name below the package."""
    return module.split(".")[1] if "." in module else ""


def imported(file):
    """Dotted names of this package's modules that a file imports, wherever it does."""
    own = ("moe_rewrite", *file.relative_to(PACKAGE).with_suffix("").parts)
    package = own[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            target = ".".join([*base, *filter(None, [node.module])])
            names = [f"{target}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "moe_rewrite")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_run_downward(file):
    if file == PACKAGE / "__init__.py":
        return  # the package's interface, which imports from every level
    mine = room(".".join(("moe_rewrite", *file.relative_to(PACKAGE).with_suffix("").parts)))
    for name in imported(file):
        other = room(name)
        if other not in FLOOR:  # a name in the package's __init__, like MoEModel
            assert mine in ("cli", "demo"), f"{file.name} imports {name} from the package's face"
        elif other != mine:
            assert FLOOR[other] < FLOOR[mine], f"{file.name} in {mine} imports {name} of {other}"


def test_no_file_imports_itself_by_way_of_others():
    names = {".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts): f for f in FILES}
    graph = nx.DiGraph()
    for name, file in names.items():
        for target in imported(file):
            found = [t for t in (target, target.rpartition(".")[0]) if t in names]
            graph.add_edges_from((name, t) for t in found[:1] if t != name)
    circles = [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1]
    assert not circles and graph.number_of_edges() > 500


def test_every_room_has_a_floor_and_four_files_lie_loose():
    inside = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    loose = {p.stem for p in PACKAGE.glob("*.py")}
    assert loose == {"__init__", "convert", "config", "errors"}
    assert inside | loose == {*FLOOR, "__init__"}


def test_no_file_is_long():
    lengths = {f: len(f.read_text().splitlines()) for f in FILES}
    assert not [f"{f.name}: {n}" for f, n in lengths.items() if n > 350]
    assert sum(n < 200 for n in lengths.values()) > 0.8 * len(FILES)
