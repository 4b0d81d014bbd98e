"""Imports go one way, from the top of the house to the bottom, and importing the package stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "featherweight"

# Bottom to top. A room (a file or folder of the package) imports from rows above its own only, never from its own row.
LAYERS = (
    ("errors", "machine", "matching"),
    ("files", "settings"),
    ("batch", "ledger", "progress"),
    ("code", "forms", "graph"),
    ("train",),
    ("task",),
    ("edits", "score"),
    ("constant", "cost", "curvature", "layers"),
    ("mend", "snapshot", "study"),
    ("artifact", "search"),
    ("step",),
    ("layerwise", "retraining"),
    ("distill", "factorize", "prune", "quantize", "share", "tune"),  # the verb folders
    ("export", "report"),
    ("compressed", "packing"),
    ("inspection", "recipe", "sensitivity"),
    ("compact",),
    ("__init__",),
    ("cli", "__main__"),
)
HEIGHT = {room: height for height, layer in enumerate(LAYERS) for room in layer}

HEAVY = (
    "accelerate",
    "coremltools",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "executorch",
    "torchao",
    "scipy",
    "sklearn",
    "transformers",
)


def room_of(file: Path) -> str:
    """The room a file is in: its folder in the package, or the file itself."""
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def rooms_imported(source: str, room: str) -> Iterator[tuple[int, str]]:
    """Line and room of every import inside the package that runs; those for type checkers only do not."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        waiting.extend(ast.iter_child_nodes(node))
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} of {room} imports by dots: write the name out"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, inner = name.partition(".")
            if package == "featherweight":
                first = inner.split(".")[0]
                yield node.lineno, first if first in HEIGHT else "__init__"


def upward(source: str, room: str) -> list[str]:
    """The imports of a room that do not go down."""
    return [
        f"line {line}: {room} imports {other}"
        for line, other in rooms_imported(source, room)
        if other != room and HEIGHT[other] >= HEIGHT[room]
    ]


def test_every_room_has_its_place():
    rooms = {room_of(file) for file in PACKAGE.rglob("*.py")}
    assert rooms <= set(HEIGHT), f"say in LAYERS where {sorted(rooms - set(HEIGHT))} stand"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down(file):
    assert upward(file.read_text(encoding="utf-8"), room_of(file)) == []


def test_the_check_itself_sees_what_it_should():
    wrong = """
from typing import TYPE_CHECKING
import featherweight
from featherweight import errors, cost
import featherweight.search.budget as budget
if TYPE_CHECKING:
    from featherweight.recipe import Recipe
else:
    from featherweight.report import html
def later():
    from featherweight.layers import find
    from featherweight.curvature import gram
"""
    assert sorted(upward(wrong, "curvature")) == [
        "line 11: curvature imports layers",
        "line 3: curvature imports __init__",
        "line 4: curvature imports cost",
        "line 5: curvature imports search",
        "line 9: curvature imports report",
    ]


def test_importing_every_module_stays_light():
    code = (
        "import importlib, pkgutil, sys, featherweight\n"
        "for module in pkgutil.walk_packages(featherweight.__path__, 'featherweight.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [], "import these inside the functions that use them"
