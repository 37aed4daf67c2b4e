"""docs/file_formats.md says what the code does: formats, versions, entries, columns."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from moda.composition import files as composed_files
from moda.composition.compose import compose
from moda.decomposition.container import Decomposition
from moda.decomposition.files import DECOMPOSITION, load_rates
from moda.files import Format, FormatError, read_tensors, write_bytes, write_json, write_tensors
from moda.models import small_vgg
from moda.observation.taps import observe
from moda.runs import folder as runs
from moda.runs.config import TrainingConfig

PAGE = (Path(__file__).parents[2] / "docs" / "file_formats.md").read_text(encoding="utf-8")


def entries(file: str) -> set[str]:
    """First column of the table behind "`<file>`:", its names apart."""
    table = PAGE.split(f"\n`{file}`:\n", 1)[1].lstrip("\n").split("\n\n", 1)[0]
    return {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}


def masks() -> dict[str, torch.Tensor]:
    taps = observe(small_vgg(num_classes=3, width=0.25), example=torch.zeros(2, 3, 8, 8))
    return {tap: torch.ones(3, width, dtype=torch.bool) for tap, width in zip(taps.names, taps.widths, strict=True)}


def write_run(folder: Path) -> None:
    runs.RunFolder.create(folder, TrainingConfig())


def write_decomposition(folder: Path) -> None:
    Decomposition(masks()).save(folder)


def write_composed(folder: Path) -> None:
    model = small_vgg(num_classes=3, width=0.25).eval()
    composed = compose(model, Decomposition(masks()), [2, 0], example=torch.zeros(2, 3, 8, 8))
    composed_files.save_composed(composed, folder)


@pytest.mark.parametrize(
    ("file", "format", "write"),
    [
        ("config.json", runs.RUN, write_run),
        ("decomposition.json", DECOMPOSITION, write_decomposition),
        ("composed.json", composed_files.COMPOSED, write_composed),
    ],
)
def test_the_page_describes_what_is_written(tmp_path, file, format, write):
    write(tmp_path)
    description = json.loads((tmp_path / file).read_text())
    assert entries(file) == set(description)
    assert f"| `{file}` | `{format.name}` | {format.version} |" in PAGE
    assert (description["format"], description["format_version"]) == (format.name, format.version)
    assert {path.name for path in tmp_path.iterdir()} <= set(re.findall(r"^(\S+)", PAGE, re.MULTILINE))


def test_the_page_lists_the_columns_of_the_tables():
    training = pytest.importorskip("moda.training.loop")
    table = PAGE.split("| column | in | meaning |", 1)[1].split("\n\n", 1)[0]
    columns = {"both": [], "metrics": []}
    for row in table.splitlines()[2:]:
        names, where = row.split("|")[1:3]
        columns[where.strip()] += re.findall(r"`(\w+)`", names)
    assert columns["both"] == list(training.STEP_COLUMNS)
    assert columns["both"] + columns["metrics"] == list(training.EPOCH_COLUMNS)


# ---- the files' own rules --------------------------------------------------------------------------------------


def test_tensors_come_back_as_they_were(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(7), "c": torch.rand(5, dtype=torch.float64) > 0.5}
    digest = write_tensors(tmp_path / "t.safetensors", tensors)
    loaded = read_tensors(tmp_path / "t.safetensors", digest)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_description_of_a_later_version_says_who_wrote_it(tmp_path):
    write_json(tmp_path / "x.json", {"format": "moda-x", "format_version": 2, "library_version": "9.1"})
    with pytest.raises(FormatError, match=r"x\.json: expected format_version 1, got 2; .* that wrote it \(9\.1\)"):
        Format("moda-x", {}).read(tmp_path / "x.json")


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(FormatError, match=r"x: cannot be read: "):
        Format("moda-x", {}).read(tmp_path / "x")
    with pytest.raises(FormatError, match=r"x: cannot be read: "):
        read_tensors(tmp_path / "x")


def test_json_has_no_word_for_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_files_get_the_permissions_that_new_files_get(tmp_path):
    write_bytes(tmp_path / "ours", b"1")
    (tmp_path / "plain").write_bytes(b"1")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("given", [None, 3, True, [], b"x"], ids=repr)
def test_what_is_no_path_is_named(given):
    readers = (
        Decomposition.load,
        composed_files.load_composed,
        runs.RunFolder.open,
        load_rates,
        composed_files.metadata_of,
    )
    for read in readers:
        with pytest.raises(TypeError, match=rf"^(folder|path): expected a path, got {type(given).__name__}$"):
            read(given)
