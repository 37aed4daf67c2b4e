"""The laws of the house: no circle of imports, no import upwards, and imports at the top of a file.

Imports are read from the source, those inside functions and those for type checkers included.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"moda": ROOT / "python" / "moda", "moda_kernels": ROOT / "moda_kernels"}

# A room may import from itself and from the rooms before it. The files that lie in python/moda itself come first; the
# package's own __init__ and __main__ see everything, and nothing may import them.
ROOMS = (
    "ground", "models", "data", "observation", "decomposition", "composition", "methods", "runs", "training", "hf", "study", "report",
    "demo", "bench", "cli", "top",
)  # fmt: skip
TOP = frozenset({"moda", "moda.__main__"})

# A function may import a package that need not be installed.
OPTIONAL = frozenset(
    {
        "jinja2", "lightning", "matplotlib", "onnx", "onnxruntime", "onnxscript", "PIL", "pyarrow", "scipy", "sklearn", "tensorboard",
        "timm", "torchvision", "transformers", "triton",
    }
)  # fmt: skip
# And rooms of ours that import one at their top.
NEED_EXTRAS = ("moda.training", "moda.hf", "moda.report", "moda.demo", "moda_kernels.triton_kernels")


@dataclass(frozen=True)
class Import:
    """An import of `module` by `importer`."""

    importer: str
    module: str
    line: int
    inside_function: bool


def name_of(path: Path, package: str) -> str:
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join([package, *(part for part in parts if part != "__init__")])


SOURCES = {name_of(path, package): path for package, root in PACKAGES.items() for path in sorted(root.rglob("*.py"))}


def imports_of(importer: str, tree: ast.Module, modules: Mapping[str, object]) -> Iterator[Import]:
    """Every import in a file; of `from package import name` the module of that name, if there is one."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}:{node.lineno}: expected an absolute import"
            source = str(node.module)
            named = [f"{source}.{a.name}" if f"{source}.{a.name}" in modules else source for a in node.names]
        else:
            continue
        for module in dict.fromkeys(named):
            yield Import(importer, module, node.lineno, id(node) in inside)


IMPORTS = [
    found
    for name, path in SOURCES.items()
    for found in imports_of(name, ast.parse(path.read_text(encoding="utf-8")), SOURCES)
]


def room_of(module: str) -> str:
    if module in TOP:
        return "top"
    parts = module.split(".")
    return parts[1] if (PACKAGES["moda"] / parts[1]).is_dir() else "ground"


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Every circle that a walk along the edges runs into."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> None:
        if module in way:
            found.append([*way[way.index(module) :], module])
            return
        if module in done:
            return
        for following in sorted(edges.get(module, ())):
            walk(following, [*way, module])
        done.add(module)

    for module in sorted(edges):
        walk(module, [])
    return found


def edges_of(imports: list[Import]) -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for found in imports:
        if found.module in SOURCES and found.module != found.importer:
            edges.setdefault(found.importer, set()).add(found.module)
    return edges


def upwards(imports: list[Import]) -> list[str]:
    """The imports of a room that comes later."""
    return [
        f"{found.importer}:{found.line} imports {found.module}"
        for found in imports
        if found.importer.split(".")[0] == found.module.split(".")[0] == "moda"
        and ROOMS.index(room_of(found.module)) > ROOMS.index(room_of(found.importer))
    ]


def hidden(imports: list[Import]) -> list[str]:
    """The imports inside functions that no optional package explains."""
    return [
        f"{found.importer}:{found.line} imports {found.module}"
        for found in imports
        if found.inside_function
        and found.module.split(".")[0] not in OPTIONAL
        and not any(found.module == room or found.module.startswith(f"{room}.") for room in NEED_EXTRAS)
    ]


def test_no_circle() -> None:
    assert circles(edges_of(IMPORTS)) == []


def test_no_import_upwards() -> None:
    assert upwards(IMPORTS) == []


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in PACKAGES["moda"].iterdir() if (path / "__init__.py").exists()}
    assert folders <= set(ROOMS)


def test_kernels_never_import_moda() -> None:
    assert [f"{i.importer}:{i.line}" for i in IMPORTS if i.importer.startswith("moda_kernels") and i.module.split(".")[0] == "moda"] == []  # fmt: skip


def test_imports_stand_at_the_top() -> None:
    assert hidden(IMPORTS) == []


@pytest.mark.parametrize("room", NEED_EXTRAS)
def test_rooms_that_need_extras_import_one(room: str) -> None:
    """Else their imports would have to stand at the top too."""
    names = {i.module.split(".")[0] for i in IMPORTS if i.importer.startswith(room) and not i.inside_function}
    reached = {i.module for i in IMPORTS if i.importer.startswith(room)}
    assert names & OPTIONAL or any(module.startswith(NEED_EXTRAS) for module in reached)


# ---- the reader itself ------------------------------------------------------------------------------------------------


def read(importer: str, source: str) -> list[Import]:
    return list(imports_of(importer, ast.parse(source), SOURCES))


def test_reader_sees_every_import() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "import moda.cli.app as app\n"
        "if TYPE_CHECKING:\n    from moda.study import sweep\n"
        "class A:\n    def f(self):\n        from moda.files import FormatError\n        import torch, lightning\n"
    )
    found = read("moda.runs.config", source)
    assert [(i.module, i.line, i.inside_function) for i in found] == [
        ("typing", 1, False), ("moda.cli.app", 2, False), ("moda.study.sweep", 4, False), ("moda.files", 7, True),
        ("torch", 8, True), ("lightning", 8, True),
    ]  # fmt: skip
    assert upwards(found) == [
        "moda.runs.config:2 imports moda.cli.app", "moda.runs.config:4 imports moda.study.sweep",
    ]  # fmt: skip
    assert hidden(found) == ["moda.runs.config:7 imports moda.files", "moda.runs.config:8 imports torch"]
    assert upwards(read("moda.files", "from moda import compose\n")) == ["moda.files:1 imports moda"]
    assert upwards(read("moda.files", "from moda import models\n")) == ["moda.files:1 imports moda.models"]


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}}) == [["a", "b", "c", "a"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
