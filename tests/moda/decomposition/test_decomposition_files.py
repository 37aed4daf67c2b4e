"""Folders of decompositions and of firing rates: they come back whole, and what is malformed is refused."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch

import moda
from moda.decomposition.container import Decomposition
from moda.decomposition.files import load_rates, rates_metadata, save_rates
from moda.decomposition.settings import FiringRule
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
    assert FiringRule.of(loaded.settings) == FiringRule(0.8, 0.01)
    assert (loaded.method, loaded.combine) == ("moda", "rows")
    assert loaded.metadata == {"class_sizes": [3, 4, 5]}
    assert repr(loaded) == (
        "Decomposition(num_classes=3, sites=2, neurons=6, method='moda', rule='firing', threshold=0.8, min_fraction=0.01)"
    )


def test_the_folder_holds_two_readable_files(tmp_path):
    example().save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decomposition.json", "masks.safetensors"]
    description = json.loads((tmp_path / "decomposition.json").read_text())
    assert description["format"] == "moda-decomposition"
    assert description["format_version"] == 2
    assert description["sites"] == [{"name": "relu2", "neurons": 4}, {"name": "relu1", "neurons": 2}]
    masks = safetensors.torch.load_file(tmp_path / "masks.safetensors")
    assert torch.equal(masks["relu1"], example().masks["relu1"])


def test_saving_again_replaces_both_files(tmp_path):
    example().save(tmp_path)
    other = Decomposition({"x": torch.tensor([[True, False]])}, settings=FiringRule(0.5).settings())
    other.save(tmp_path)
    loaded = Decomposition.load(tmp_path)
    assert list(loaded.masks) == ["x"]
    assert loaded.settings["threshold"] == 0.5


def test_a_folder_of_version_1_is_read(tmp_path):
    loaded = Decomposition.load(Path(__file__).parent / "version_1")
    assert loaded.masks["relu2"].int().tolist() == [[1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 0]]
    assert loaded.sites == ("relu2", "relu1")
    assert (loaded.method, loaded.combine) == ("moda", "rows")
    assert FiringRule.of(loaded.settings) == FiringRule(0.8, 0.01)
    assert loaded.metadata == {"class_sizes": [20, 20, 40], "empty_classes": [], "firing_threshold": 0.0}
    loaded.save(tmp_path)
    assert json.loads((tmp_path / "decomposition.json").read_text())["format_version"] == 2


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"threshold": ...}, r"decomposition\.json: entry 'threshold' is missing"),
        ({"threshold": "high"}, r"decomposition\.json: threshold: .* got str"),
        ({"min_fraction": 7}, r"decomposition\.json: min_fraction: .* got 7"),
        ({"taps": 3}, r"decomposition\.json: sites: expected a list, got int"),
    ],
)
def test_a_spoiled_folder_of_version_1_is_refused(tmp_path, entries, message):
    shutil.copytree(Path(__file__).parent / "version_1", tmp_path, dirs_exist_ok=True)
    change(tmp_path, **entries)
    with pytest.raises(FormatError, match=message):
        Decomposition.load(tmp_path)


def change(folder: Path, **entries: object) -> None:
    """Set entries of the description; a value of `...` removes the entry."""
    path = folder / "decomposition.json"
    description = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({key: value for key, value in description.items() if value is not ...}))


def set_rule(folder: Path, **entries: object) -> None:
    change(folder, settings={**example().settings, **entries})


def deep(levels: int) -> list:
    return [deep(levels - 1)] if levels else []


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
    "a later version": (lambda f: change(f, format_version=3), "expected format_version 1 or 2, got 3; .*wrote it"),
    "no version": (lambda f: change(f, format_version=...), "expected format_version 1 or 2, got None"),
    "no method": (lambda f: change(f, method=...), r"decomposition\.json: entry 'method' is missing"),
    "an unknown combination": (
        lambda f: change(f, combine="sum"),
        r"decomposition\.json: combine: expected one of rows",
    ),
    "no digest": (lambda f: change(f, masks_sha256=...), r"decomposition\.json: entry 'masks_sha256' is missing"),
    "threshold a word": (lambda f: set_rule(f, threshold="high"), r"decomposition\.json: threshold: .* got str"),
    "min_fraction too big": (lambda f: set_rule(f, min_fraction=7), r"decomposition\.json: min_fraction: .* got 7"),
    "no classes": (lambda f: change(f, num_classes=0), r"decomposition\.json: num_classes: expected at least 1, got 0"),
    "a class less than none": (lambda f: change(f, num_classes=-2), r"num_classes: expected at least 1, got -2"),
    "classes true": (lambda f: change(f, num_classes=True), r"num_classes: expected an integer, got bool"),
    "a digest too short": (lambda f: change(f, masks_sha256="0"), "masks_sha256: expected a SHA-256"),
    "deep metadata": (lambda f: change(f, metadata={"x": deep(70)}), r"metadata.*: expected at most 64 levels"),
    "infinite metadata": (
        lambda f: (f / "decomposition.json").write_text(
            (f / "decomposition.json").read_text().replace("[\n      3,", "[1e999,")
        ),
        r"metadata\['class_sizes'\]\[0\]: expected a finite number, got inf",
    ),
    "NaN": (lambda f: change(f, metadata={"x": float("nan")}), r"decomposition\.json: not JSON: NaN is no JSON number"),
    "an entry twice": (
        lambda f: (f / "decomposition.json").write_text('{"format": "a", "format": "a"}'),
        "not JSON: entry 'format' is there twice",
    ),
    "deeper than JSON's reader": (
        lambda f: (f / "decomposition.json").write_text('{"format": ' + "[" * 200_000),
        "not JSON: its lists and objects are nested too deep",
    ),
    "a number of 5000 digits": (
        lambda f: (f / "decomposition.json").write_text('{"format": ' + "9" * 5000 + "}"),
        r"decomposition\.json: not JSON",
    ),
    "an empty file": (lambda f: (f / "decomposition.json").write_bytes(b""), r"decomposition\.json: not JSON"),
    "metadata a list": (lambda f: change(f, metadata=[1]), r"decomposition\.json: metadata: expected an object, got l"),
    "taps a number": (lambda f: change(f, sites=3), r"decomposition\.json: sites: expected a list"),
    "a tap a word": (
        lambda f: change(f, sites=["relu1"]),
        r"decomposition\.json: sites\[0\]: expected an object, got str",
    ),
    "no taps": (lambda f: change(f, sites=[]), "sites: expected at least 1 entries, got 0"),
    "a site of no neurons": (
        lambda f: change(f, sites=[{"name": "relu1", "neurons": 0}]),
        r"sites\[0\]\.neurons: expected at least 1, got 0",
    ),
    "a tap twice": (
        lambda f: change(f, sites=[{"name": "relu1", "neurons": 2}] * 2),
        r"decomposition\.json: sites: expected every name once, got 'relu1' twice",
    ),
    "a tap too few": (
        lambda f: change(f, sites=[{"name": "relu1", "neurons": 2}]),
        r"masks\.safetensors: expected other tensors: missing \[\], unknown \['relu2'\]",
    ),
    "a tap too many": (
        lambda f: change(f, sites=[{"name": n, "neurons": 2} for n in ("relu1", "relu2", "relu3")]),
        r"masks\.safetensors: expected other tensors: missing \['relu3'\]",
    ),
    "other neurons": (
        lambda f: change(f, sites=[{"name": "relu2", "neurons": 5}, {"name": "relu1", "neurons": 2}]),
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


@pytest.mark.parametrize("file", [".masks.safetensors.moda-next", "decomposition.json"])
def test_an_error_while_saving_leaves_the_old_decomposition_and_no_litter(tmp_path, monkeypatch, file):
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
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert list(Decomposition.load(tmp_path).masks) == ["relu2", "relu1"]


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
        (lambda d: d.update(counts_sha256="0" * 64), "counts.safetensors: its SHA-256 is"),
        (lambda d: d["class_sizes"].__setitem__(0, -5), "rates.json: class_sizes[0]: expected at least 0, got -5"),
        (lambda d: d["class_sizes"].__setitem__(0, 1), "expected counts from 0 to the class's size, got others"),
        (lambda d: d["class_sizes"].pop(), "rates.json: class_sizes: expected one of each of 10 classes, got 9"),
        (
            lambda d: d.update(firing_threshold=-1),
            "rates.json: firing_threshold: expected a finite number of at least 0",
        ),
        (lambda d: d["taps"].append(d["taps"][0]), "rates.json: taps: expected every name once"),
        (lambda d: d["taps"].reverse(), None),
        (lambda d: d["taps"].pop(), "counts.safetensors: expected other tensors: missing []"),
    ],
)
def test_malformed_folders_are_refused(finished, tmp_path, change, message):
    save_rates(finished.rates(), tmp_path)
    path = tmp_path / "rates.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    if message is None:
        assert load_rates(tmp_path).taps == tuple(reversed(finished.taps.names))
        return
    with pytest.raises(FormatError, match=re.escape(message)):
        load_rates(tmp_path)


def test_metadata_must_be_an_object(finished, tmp_path):
    save_rates(finished.rates(), tmp_path)
    path = tmp_path / "rates.json"
    path.write_text(path.read_text().replace('"metadata": {}', '"metadata": []'))
    with pytest.raises(FormatError, match="metadata: expected an object, got list"):
        rates_metadata(tmp_path)


@pytest.mark.parametrize("again_at", [1, 2, 3, 9])
@pytest.mark.parametrize("killed_at", range(1, 5))
def test_a_kill_leaves_the_old_decomposition_or_the_new_one(tmp_path, monkeypatch, killed_at, again_at):
    """At any of its renames, files and description; what is left is whole, also by a second kill, and the next save is good."""
    old = Decomposition({"a": torch.tensor([[True, False], [True, True]])})
    new = Decomposition({"a": torch.tensor([[False, True], [True, True]])}, settings={"name": "new"})
    third = Decomposition({"a": torch.tensor([[False, True], [False, True]])}, settings={"name": "third"})
    last = Decomposition({"a": torch.tensor([[True, True], [True, True]])})
    old.save(tmp_path)
    replace, unlink = Path.replace, Path.unlink
    left = 0  # renames until the kill, behind which nothing is tidied up either

    def renamed(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left <= 0:
            raise KeyboardInterrupt
        return replace(self, target)

    def removed(self: Path, **options: bool) -> None:
        if left > 0:
            unlink(self, **options)

    for saved, at in ((new, killed_at), (third, again_at)):
        left = at
        monkeypatch.setattr(Path, "replace", renamed)
        monkeypatch.setattr(Path, "unlink", removed)
        with suppress(KeyboardInterrupt):
            saved.save(tmp_path)
        monkeypatch.undo()
        found = Decomposition.load(tmp_path)
        whole = {"": old, "new": new, "third": third}[found.settings.get("name", "")]
        assert torch.equal(found.masks["a"], whole.masks["a"])
        if saved is new:
            assert (whole is new) == (at > 2)  # the second rename puts the description in its place
    last.save(tmp_path)
    assert torch.equal(Decomposition.load(tmp_path).masks["a"], last.masks["a"])
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".moda-next")]


def test_a_file_of_another_kind_is_never_replaced(tmp_path):
    (tmp_path / "decomposition.json").write_text('{"format": "thesis", "chapters": 7}')
    with pytest.raises(ValueError, match=r"decomposition\.json: is a file of another kind \(format 'thesis'\)"):
        example().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["decomposition.json"]
