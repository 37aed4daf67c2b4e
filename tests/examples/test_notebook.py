"""The notebook runs from top to bottom, and what is committed of it is what such a run gives: figures in place, no error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.moda._helpers.processes import environment

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_hour.ipynb"
FIGURES = 3


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def figures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_it_runs(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    (short,) = [cell for cell in notebook.cells if "EPOCHS = 20" in cell.source]
    short.source = short.source.replace("EPOCHS = 20", "EPOCHS = 2")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert figures(notebook) == FIGURES
    assert "modular: a module takes " in "".join(output.get("text", "") for output in outputs(notebook))


def test_what_is_committed_was_run(notebook: Any) -> None:
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert figures(notebook) == FIGURES
    assert all(output.output_type in {"stream", "display_data"} for output in outputs(notebook))
    assert not any(output.get("name") == "stderr" for output in outputs(notebook))


def test_links_lead_to_pages(notebook: Any) -> None:
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for link in (part.partition(")")[0] for part in text.split("](")[1:]):
        assert (NOTEBOOK.parent / link).exists(), link
