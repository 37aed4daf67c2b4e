"""`import moda` and `import moda_kernels` give every name that README and docs mention, and nothing optional with them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moda
from tests.moda._helpers.processes import environment

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
NAME = re.compile(r"(?<![\w/.\-])moda(?:_kernels)?(?:\.[A-Za-z_]\w*)+")
FILE = re.compile(r"\.(json|html|py|md)$")


def names_in(page: Path) -> list[str]:
    return sorted({name for name in NAME.findall(page.read_text(encoding="utf-8")) if not FILE.search(name)})


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    return done.stdout


def test_every_name_in_the_docs_is_there() -> None:
    names = sorted({name for page in PAGES for name in names_in(page)})
    assert len(names) > 20
    program = (
        "import moda, moda_kernels\nmissing = []\n"
        f"for name in {names}:\n    try:\n        eval(name)\n    except AttributeError as error:\n"
        "        missing.append(f'{name}: {error}')\nprint(*missing, sep='\\n')"
    )
    assert run(program).split("\n") == ["", ""]


def test_readers_take_strings_and_paths() -> None:
    """Those that the page of file formats names, and the public ones."""
    page = (ROOT / "docs" / "file_formats.md").read_text(encoding="utf-8")
    names = sorted(
        set(re.findall(r"`(moda\.[\w.]*\b(?:read|load|open)\w*)`", page))
        | {"moda.data.load", "moda.bench.results.read"}
    )
    assert len(names) > 10
    for name in names:
        parameters = inspect.signature(eval(name, {"moda": moda})).parameters.values()
        path = next(each for each in parameters if each.name in {"path", "folder", "root"})
        assert path.annotation == "str | Path", name


def test_import_brings_nothing_optional() -> None:
    program = "import sys, moda, moda_kernels\nprint(sorted({'lightning', 'matplotlib', 'jinja2', 'torchvision', 'sklearn', 'onnx'} & set(sys.modules)))"
    assert run(program) == "[]\n"


def test_all_is_there() -> None:
    for name in moda.__all__:
        assert getattr(moda, name) is not None, name
    assert set(moda.__all__) <= set(dir(moda))


@pytest.mark.parametrize(
    "name", ["moda.nothing", "moda.study.nothing", "moda.composition.nothing.at_all", "moda._private"]
)
def test_unknown_names_are_attribute_errors(name: str) -> None:
    package, _, last = name.split(".at_all")[0].rpartition(".")
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute '{last}'"):
        eval(name, {"moda": moda})
