"""Folders of decompositions and of firing rates: they come back whole, and what is malformed is refused."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

import moda
from moda.decomposition.container import Decomposition
from moda.decomposition.files import load_rates, rates_metadata, save_rates
from moda.files import FormatError
from tests.moda._helpers.decomposing import example
from tests.moda._helpers.studying import make_run

# ---- decompositions --------------------------------------------------------------------------------------------


def test_a_saved_decomposition_comes_back_whole(tmp_path):
    example().save(tmp_path / "deep" / "down")
    loaded = Decomposition.load(tmp_path / "deep" / "down")
    assert list(loaded.masks) == ["relu2", "relu1"]
    for tap, mask in example().masks.items():
        assert torch.equal(loaded.masks[tap], mask)
    assert (loaded.threshold, loaded.min_fraction) == (0.8, 0.01)
    assert loaded.metadata == {"class_sizes": [3, 4, 5]}
    assert repr(loaded) == "Decomposition(num_classes=3, taps=2, neurons=6, threshold=0.8, min_fraction=0.01)"


def test_the_folder_holds_two_readable_files(tmp_path):
    example().save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decomposition.json", "masks.safetensors"]
    description = json.loads((tmp_path / "decomposition.json").read_text())
    assert description["format"] == "moda-decomposition"
    assert description["format_version"] == 1
    assert description["taps"] == [{"name": "relu2", "neurons": 4}, {"name": "relu1", "neurons": 2}]
    masks = safetensors.torch.load_file(tmp_path / "masks.safetensors")
    assert torch.equal(masks["relu1"], example().masks["relu1"])


def test_saving_again_replaces_both_files(tmp_path):
    example().save(tmp_path)
    other = Decomposition({"x": torch.tensor([[True, False]])}, threshold=0.5)
    other.save(tmp_path)
    loaded = Decomposition.load(tmp_path)
    assert list(loaded.masks) == ["x"]
    assert loaded.threshold == 0.5


def change(folder: Path, **entries: object) -> None:
    """Set entries of the description; a value of `...` removes the entry."""
    path = folder / "decomposition.json"
    description = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({key: value for key, value in description.items() if value is not ...}))


def replace_masks(folder: Path, data: bytes) -> None:
    """Another masks file, with the description made to vouch for it."""
    import hashlib

    (folder / "masks.safetensors").write_bytes(data)
    change(folder, masks_sha256=hashlib.sha256(data).hexdigest())


def masks_with(**tensors: torch.Tensor) -> bytes:
    return safetensors.torch.save({**example().masks, **tensors})


def invalid_bool() -> bytes:
    data = bytearray(safetensors.torch.save(example().masks))
    data[-1] = 7
    return bytes(data)


SPOILED = {
    "no description": (lambda f: (f / "decomposition.json").unlink(), r"decomposition\.json: no such file"),
    "no masks": (lambda f: (f / "masks.safetensors").unlink(), r"masks\.safetensors: no such file"),
    "no folder": (lambda f: [path.unlink() for path in f.iterdir()] + [f.rmdir()], "no such file"),
    "no JSON": (lambda f: (f / "decomposition.json").write_text("{"), r"decomposition\.json: not JSON"),
    "no text": (lambda f: (f / "decomposition.json").write_bytes(b"\xff\xfe"), r"decomposition\.json: not JSON"),
    "a list": (lambda f: (f / "decomposition.json").write_text("[]"), "expected a JSON object, got list"),
    "another format": (lambda f: change(f, format="zip"), 'expected "format": "moda-decomposition", got \'zip\''),
    "a later version": (lambda f: change(f, format_version=2), "expected format_version 1, got 2; .*wrote it"),
    "no version": (lambda f: change(f, format_version=...), "expected format_version 1, got None"),
    "no threshold": (lambda f: change(f, threshold=...), r"decomposition\.json: entry 'threshold' is missing"),
    "no digest": (lambda f: change(f, masks_sha256=...), r"decomposition\.json: entry 'masks_sha256' is missing"),
    "threshold a word": (lambda f: change(f, threshold="high"), r"decomposition\.json: threshold: .* got str"),
    "min_fraction too big": (lambda f: change(f, min_fraction=7), r"decomposition\.json: min_fraction: .* got 7"),
    "metadata a list": (lambda f: change(f, metadata=[1]), r"decomposition\.json: metadata: expected an object, got l"),
    "taps a number": (lambda f: change(f, taps=3), r"decomposition\.json: taps: expected a list"),
    "a tap a word": (lambda f: change(f, taps=["relu1"]), r"decomposition\.json: taps: expected a list"),
    "no taps": (lambda f: change(f, taps=[]), "taps differ from decomposition.json"),
    "a tap twice": (
        lambda f: change(f, taps=[{"name": "relu1", "neurons": 2}] * 2),
        r"decomposition\.json: taps: a name occurs twice",
    ),
    "a tap too few": (
        lambda f: change(f, taps=[{"name": "relu1", "neurons": 2}]),
        r"masks\.safetensors: taps differ from decomposition\.json: missing \[\], not described \['relu2'\]",
    ),
    "a tap too many": (
        lambda f: change(f, taps=[{"name": n, "neurons": 2} for n in ("relu1", "relu2", "relu3")]),
        r"masks\.safetensors: taps differ from decomposition\.json: missing \['relu3'\]",
    ),
    "other neurons": (
        lambda f: change(f, taps=[{"name": "relu2", "neurons": 5}, {"name": "relu1", "neurons": 2}]),
        r"masks\.safetensors: relu2: expected bool \(3, 5\), got torch\.bool \(3, 4\)",
    ),
    "other classes": (lambda f: change(f, num_classes=4), r"relu2: expected bool \(4, 4\), got torch\.bool \(3, 4\)"),
    "other masks": (
        lambda f: (f / "masks.safetensors").write_bytes(masks_with(relu1=torch.ones(3, 2, dtype=torch.bool))),
        r"masks\.safetensors: its SHA-256 is .* damaged, or from another save",
    ),
    "no safetensors": (lambda f: replace_masks(f, b"PK" * 40), r"masks\.safetensors: not a safetensors file"),
    "empty masks": (lambda f: replace_masks(f, b""), r"masks\.safetensors: not a safetensors file"),
    "cut masks": (lambda f: replace_masks(f, masks_with()[:-3]), r"masks\.safetensors: not a safetensors file"),
    "float masks": (
        lambda f: replace_masks(f, masks_with(relu1=torch.ones(3, 2))),
        r"masks\.safetensors: relu1: expected bool \(3, 2\), got torch\.float32 \(3, 2\)",
    ),
    "no booleans": (lambda f: replace_masks(f, invalid_bool()), "expected bytes 0 and 1 in a bool tensor, got others"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_folder_is_refused_with_the_reason(tmp_path, what):
    folder = tmp_path / "decomposition"
    example().save(folder)
    spoil, message = SPOILED[what]
    spoil(folder)
    with pytest.raises(FormatError, match=message) as caught:
        Decomposition.load(folder)
    assert str(folder) in str(caught.value)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_opened(tmp_path):
    example().save(tmp_path)
    replace_masks(tmp_path, pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(FormatError, match="not a safetensors file"):
        Decomposition.load(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("file", ["masks.safetensors", "decomposition.json"])
def test_a_crash_while_saving_leaves_old_files_and_no_litter(tmp_path, monkeypatch, file):
    example().save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rename = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if Path(target).name == file:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        Decomposition({"x": torch.tensor([[True, False]])}).save(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / file).read_bytes() == before[file]
    assert {path.name for path in tmp_path.iterdir()} == set(before)
    if file == "masks.safetensors":
        assert list(Decomposition.load(tmp_path).masks) == ["relu2", "relu1"]
    else:  # the new masks are there, the old description is not theirs, and load sees it
        with pytest.raises(FormatError, match="from another save"):
            Decomposition.load(tmp_path)


# ---- firing rates ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def counted(finished):
    loader = finished.loader(finished.data.train_eval)
    return moda.count_firings(finished.model, loader, 10, progress=False)


def test_rates_come_back_to_the_bit(finished, tmp_path):
    rates = counted(finished)
    save_rates(rates, tmp_path, {"augmented": True})
    loaded = load_rates(tmp_path)
    assert loaded.taps == rates.taps
    assert torch.equal(loaded.class_sizes, rates.class_sizes)
    assert loaded.threshold == rates.threshold
    for tap in rates.taps:
        assert torch.equal(loaded.rates[tap], rates.rates[tap])
        assert torch.equal(loaded.counts[tap], rates.counts[tap])
    assert rates_metadata(tmp_path) == {"augmented": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("class_sizes"), "entry 'class_sizes' is missing"),
        (lambda d: d.update(class_sizes="x"), "rates.json: "),
        (lambda d: d.update(format_version=9), "expected format_version 1, got 9"),
        (lambda d: d.update(counts_sha256="0"), "counts.safetensors: its SHA-256 is"),
        (lambda d: d["taps"].reverse(), None),
        (lambda d: d["taps"].pop(), "its tensors are not those that rates.json describes"),
    ],
)
def test_malformed_folders_are_refused(finished, tmp_path, change, message):
    save_rates(finished.rates(), tmp_path)
    path = tmp_path / "rates.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    if message is None:
        assert load_rates(tmp_path).taps == tuple(reversed(finished.model.taps))
        return
    with pytest.raises(FormatError, match=re.escape(message)):
        load_rates(tmp_path)


def test_metadata_must_be_an_object(finished, tmp_path):
    save_rates(finished.rates(), tmp_path)
    path = tmp_path / "rates.json"
    path.write_text(path.read_text().replace('"metadata": {}', '"metadata": []'))
    with pytest.raises(FormatError, match='expected an object "metadata"'):
        rates_metadata(tmp_path)
