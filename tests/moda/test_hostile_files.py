"""Files that anybody may have made: 2,000 seeded mutations of all that we read, pipes, endless files, and sizes.

Every reader gives what it always gives, or raises a FormatError that names the file; it hangs on nothing, and takes no memory
that the file does not.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moda
from moda.composition.export import EXPORT, read_provenance
from moda.composition.files import load_composed, save_composed
from moda.data.imagefolder import read_class_list
from moda.decomposition.container import Decomposition
from moda.decomposition.files import load_rates, rates_metadata, save_rates
from moda.decomposition.rule import decompose
from moda.files import FormatError, read_bytes, sha256_of
from moda.runs.config import TrainingConfig
from moda.runs.folder import RunFolder, create_model, load_data
from moda.runs.metrics import MetricsFile, read_metrics
from moda.runs.published import load_published_weights
from moda.study.analysis_files import read_analysis, write_analysis
from moda.study.digits import DESCRIPTION, STUDY
from moda.study.replacement import ReplacementResult, read_replacements, write_replacements
from moda.study.results_file import ResultsFile, read_note
from moda.study.reuse import COLUMNS, ReuseResult, read_results, to_row
from moda.study.reuse_run import KIND
from moda.study.sweep import COLUMNS as SWEEP_COLUMNS
from moda.study.sweep import read_sweep
from tests.moda._helpers.decomposing import example, rates_of

MUTATIONS = 2000
HASH = "ab" * 32


def write_everything(folder: Path) -> None:
    run = RunFolder.create(folder / "run", TrainingConfig(epochs=1))
    run.save_weights({"fc.weight": torch.rand(3, 4), "fc.bias": torch.rand(3)})
    metrics = MetricsFile(run.metrics)
    metrics.open(["epoch", "step", "loss", "test_accuracy"])
    metrics.write({"epoch": 1, "step": 3, "loss": 0.5, "test_accuracy": 0.75})
    metrics.close()
    example().save(folder / "decomposition")
    rates = rates_of({"a": torch.tensor([[1.0, 0.5], [0.0, 0.8]])}, [10, 10])
    save_rates(rates, folder / "rates", {"augmented": False})
    write_analysis(folder / "analysis.json", {
        "source": {"threshold": 0.9}, "class_names": ["x", "y"], "mean_size": 0.5, "mean_overlap": 0.25,
        "mean_overlap_parameters": 0.25, "sizes": [0.5, 0.5], "overlaps": [[0.5, 0.25], [0.25, 0.5]],
        "layers": [{"tap": "a", "neurons": 2, "dead": 0, "shared_by_all": 1, "module_share": 0.5, "overlap": 0.5, "jaccard": 0.5}],
        "similarity": {"a": [[1.0, 0.5], [0.5, 1.0]]},
    })  # fmt: skip
    table = ResultsFile.open(folder / "reuse.csv", KIND, COLUMNS, {"weights_sha256": HASH})
    table.append(to_row(ReuseResult((0, 1), 0.9, 0.95, None, 0.4, 0.5)))
    sweep = ResultsFile.open(folder / "sweep.csv", "moda-sweep", SWEEP_COLUMNS, {"parameter": "threshold"})
    sweep.append(dict.fromkeys(SWEEP_COLUMNS, 0.5) | {"tasks": 3})
    result = ReplacementResult("a", "b", "calibrate", 1, "1", 5, "final", (0.5, 1.0), (0.5, 0.0), HASH, HASH, HASH)
    write_replacements(folder / "replacement.json", [result])
    runs = [{"model": "lenet5", "seed": 0, "modular": "lenet5/seed-0/modular", "standard": "lenet5/seed-0/standard"}]
    STUDY.write(
        folder / DESCRIPTION, {"epochs": 1, "batch_size": 8, "per_size": None, "runs": runs, "replacements": []}
    )


READERS: dict[str, Callable[[Path], Any]] = {
    "run/config.json": lambda folder: RunFolder.open(folder / "run"),
    "run/model.safetensors": lambda folder: RunFolder.open(folder / "run").load_weights(),
    "run/checksums.json": lambda folder: RunFolder.open(folder / "run").load_weights(),
    "run/metrics.csv": lambda folder: read_metrics(folder / "run" / "metrics.csv"),
    "decomposition/decomposition.json": lambda folder: Decomposition.load(folder / "decomposition"),
    "decomposition/masks.safetensors": lambda folder: Decomposition.load(folder / "decomposition"),
    "rates/rates.json": lambda folder: (load_rates(folder / "rates"), rates_metadata(folder / "rates")),
    "rates/counts.safetensors": lambda folder: load_rates(folder / "rates"),
    "analysis.json": lambda folder: read_analysis(folder / "analysis.json"),
    "reuse.csv": lambda folder: read_results(folder / "reuse.csv"),
    "reuse.json": lambda folder: read_note(folder / "reuse.csv", KIND),
    "sweep.csv": lambda folder: read_sweep(folder / "sweep.csv"),
    "replacement.json": lambda folder: read_replacements(folder / "replacement.json"),
    "study.json": lambda folder: STUDY.read(folder / "study.json"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_everything(folder)
    for read in READERS.values():
        read(folder)
    return folder


WORDS: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, -5, 10, 2**70, "", "x" * 70_000, "\ud800", "../..", [], {}, [[]], float("nan"), float("inf"), "1e999"
)  # fmt: skip


def mutate(data: bytes, random_: random.Random) -> bytes:
    """One of: a flipped bit, bytes lost, doubled, swapped or put in, another encoding, or another value somewhere in JSON."""
    kind = random_.randrange(9)
    place = random_.randrange(len(data) + 1)
    other = random_.randrange(len(data) + 1)
    if kind == 0 and data:
        changed = bytearray(data)
        changed[place % len(data)] ^= 1 << random_.randrange(8)
        return bytes(changed)
    if kind == 1:
        return data[: min(place, other)] + data[max(place, other) :]
    if kind == 2:
        return data[:place] + data[min(place, other) : max(place, other)] + data[place:]
    if kind == 3:
        return data[:place] + random_.randbytes(random_.randrange(1, 40)) + data[place:]
    if kind == 4:
        return data[place:] + data[:place]
    if kind == 5:
        return random_.choice([b"", b"\0" * len(data), b"\xff\xfe" + data, b"[" * 100_000, b"9" * 5000, data * 3])
    return mutate_value(data, random_)


def mutate_value(data: bytes, random_: random.Random) -> bytes:
    """Another value at a random place of a JSON object, or one entry less, or in a table another cell."""
    word = random_.choice(WORDS)
    try:
        value = json.loads(data)
    except ValueError:
        cells = data.split(b",")
        cells[random_.randrange(len(cells))] = str(word).encode(errors="replace")
        return b",".join(cells)
    holder = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = random_.choice(keys)
        if not (isinstance(holder[key], dict | list) and holder[key]) or random_.random() < 0.3:
            break
        holder = holder[key]
    if random_.random() < 0.2:
        del holder[key]
    else:
        holder[key] = word
    return json.dumps(value).encode(errors="replace")


def refusal(read: Callable[[], Any]) -> str | None:
    """The message of the FormatError that it raises, if any; another exception fails the test."""
    try:
        read()
    except FormatError as error:
        return str(error)
    return None


def mutate_often(folder: Path, name: str, count: int, seed: str) -> int:
    """Read so many mutations of a file; how many were refused, each by a FormatError that names the folder."""
    original, random_ = (folder / name).read_bytes(), random.Random(seed)
    refused = 0
    for _ in range(count):
        changed = mutate(original, random_)
        (folder / name).write_bytes(changed)
        error = refusal(lambda: READERS[name](folder))
        if error is None:  # of files that have a digest any change is seen
            assert changed == original or not name.endswith(".safetensors")
        else:
            refused += 1
            assert str(folder) in error
            assert len(error) < 1100
    (folder / name).write_bytes(original)
    return refused


@pytest.mark.parametrize("name", READERS)
def test_mutated_files_are_read_or_refused_by_name(written, tmp_path, name):
    shutil.copytree(written, tmp_path / "folder")
    assert mutate_often(tmp_path / "folder", name, MUTATIONS // len(READERS) + 1, name) > 40


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_a_folder_and_an_endless_file_are_refused(written, tmp_path, name):
    folder = tmp_path / "folder"
    shutil.copytree(written, folder)
    path = folder / name

    def put(make: Callable[[], object]) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make()
        with pytest.raises(FormatError, match=rf"{path.name}.*(cannot be read|no such file)|{path.parent.name}"):
            READERS[name](folder)

    put(lambda: os.mkfifo(path))
    put(path.mkdir)
    put(lambda: path.symlink_to("/dev/zero"))


def test_what_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no space on the disk
    for read in (lambda: read_bytes(path, 1 << 20), lambda: sha256_of(path)):
        with pytest.raises(FormatError, match="sparse: expected at most [0-9]+ bytes, got 1099511627776"):
            read()


def test_masks_larger_than_described_are_not_read(tmp_path):
    example().save(tmp_path)
    with (tmp_path / "masks.safetensors").open("ab") as file:
        file.truncate(1 << 33)
    with pytest.raises(FormatError, match=r"masks\.safetensors: expected at most [0-9]+ bytes, got 8589934592"):
        Decomposition.load(tmp_path)


def test_a_width_that_would_take_all_memory_is_refused_before_it_does(tmp_path):
    """The settings say 200 times as wide; the weights are those of the model as it was."""
    run = RunFolder.create(tmp_path / "run", TrainingConfig())
    data = moda.data.load("digits")
    run.save_weights(moda.models.create("small_vgg", image_size=8).state_dict())
    run.load_model(data)
    config = json.loads((run.path / "config.json").read_text())
    config["training"]["width"] = 200.0
    (run.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"config\.json: width: expected a model of at most .* got 200\.0"):
        RunFolder.open(run.path).load_model(data)


def test_values_that_cannot_be_are_refused(written, tmp_path):
    shutil.copytree(written, tmp_path / "x")
    folder = tmp_path / "x"
    table = (folder / "reuse.csv").read_text()
    for cell, message in (
        ("10", r"composed: .* in \[0, 1\], got 10"),
        ("nan", "composed: .*finite"),
        ("-1", "composed"),
    ):
        (folder / "reuse.csv").write_text(table.replace("0.9,", f"{cell},", 1))
        with pytest.raises(FormatError, match=message):
            read_results(folder / "reuse.csv")


CELLS = {  # file, what is there, what is put in its place, what the error says
    "a digit of another script": ("reuse.csv", "0.9,", "\u0660.\u0669,", "composed: expected a number, got"),
    "an underscore": ("reuse.csv", "0 1,", "0 1_0,", "classes: expected an integer, got '1_0'"),
    "a class twice": ("reuse.csv", "0 1,", "1 1,", "classes: expected each once"),
    "blanks": ("sweep.csv", "0.5,", " 0.5,", "value: expected a number, got ' 0.5'"),
    "a share of 10": ("run/metrics.csv", "0.75", "10", r"test_accuracy: .* in \[0, 1\], got 10"),
    "a column twice": ("run/metrics.csv", "epoch,step", "step,step", "a column is there twice"),
}


@pytest.mark.parametrize("kind", CELLS)
def test_cells_that_are_no_numbers_are_refused(written, tmp_path, kind):
    name, old, new, message = CELLS[kind]
    shutil.copytree(written, tmp_path / "x")
    path = tmp_path / "x" / name
    path.write_text(path.read_text().replace(old, new, 1), encoding="utf-8")
    with pytest.raises(FormatError, match=rf"{path.name}: .*{message}"):
        READERS[name](tmp_path / "x")


ENTRIES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "a row too few": ("analysis.json", lambda x: x["overlaps"].pop(), "overlaps: expected 2 lists of 2 numbers"),
    "a cosine of 2": ("analysis.json", lambda x: x["similarity"]["a"][0].__setitem__(1, 2), r"similarity\['a'\]\[0\]\[1\]"),
    "a size too many": ("analysis.json", lambda x: x["sizes"].append(0.5), "sizes: expected 2 numbers"),
    "a tap twice": ("analysis.json", lambda x: x["layers"].append(x["layers"][0]), "layers: expected every tap once"),
    "more dead than there are": ("analysis.json", lambda x: x["layers"][0].update(dead=3), r"layers\[0\].dead: expected at most 2"),
    "a mean of 10": ("replacement.json", lambda x: x["results"][0].update(target_before=10), "target_before"),
    "an accuracy too few": ("replacement.json", lambda x: x["results"][0].update(after=[0.5, 0.5, 0.5]), "after: expected 2 acc"),
    "a version that is none": ("run/config.json", lambda x: x.update(library_version=[1]), "library_version: expected a string"),
    "a long version": ("rates/rates.json", lambda x: x.update(library_version="1" * 999), "library_version: expected at most"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENTRIES)
def test_entries_that_no_writer_would_write_are_refused(written, tmp_path, kind):
    name, change, message = ENTRIES[kind]
    shutil.copytree(written, tmp_path / "x")
    path = tmp_path / "x" / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(FormatError, match=rf"{path.name}: .*{message}"):
        READERS[name](tmp_path / "x")


@pytest.fixture(scope="module")
def composed_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("composed")
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)).eval()
    modules = Decomposition({"1": torch.tensor([[True, False, True, True]] * 3)})
    save_composed(moda.compose(model, modules, [0, 2], example=torch.randn(4, 5)), folder)
    return folder


ROUTES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an argument with a key": (lambda x: x["routes"]["eval"]["inputs"].update(keys=["a", "b"]), "has 2 keys and 2 parts"),
    "no arguments by keyword": (lambda x: x["routes"]["eval"]["inputs"]["parts"].pop(), "routes: inputs: expected a list"),
    "keys that are no list": (lambda x: x["routes"]["eval"]["outputs"].update(keys=""), "is not plain"),
    "a tensor with a class": (lambda x: x["routes"]["eval"]["outputs"].update(type="os:path"), "and the type 'os:path'"),
    "a tensor with a value": (lambda x: x["routes"]["eval"]["outputs"].update(value=1), "has the value 1"),
    "no condition": (lambda x: x["routes"]["eval"].update(conditions=["a"]), "'a': no condition on sizes"),
    "a deep condition": (lambda x: x["routes"]["eval"].update(conditions=["-" * 60_000 + "1"]), "no condition on sizes"),
    "a size of no input": (lambda x: x["routes"]["eval"].update(conditions=["L['inputs'][7].size()[0] > 1"]), "no condition"),
    "a tensor twice": (lambda x: x["tensors"].append(x["tensors"][0]), "tensors: expected every name once"),
    "another mode's graph": (lambda x: x["routes"].pop("eval"), "routes: expected 'eval', the mode that the model is in"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROUTES)
def test_graphs_that_no_writer_would_write_are_refused_when_they_are_read(composed_folder, tmp_path, kind):
    change, message = ROUTES[kind]
    shutil.copytree(composed_folder, tmp_path / "x")
    path = tmp_path / "x" / "composed.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(FormatError, match=rf"composed\.json: .*{message}"):
        load_composed(tmp_path / "x")


def test_further_entries_are_let_through(composed_folder, tmp_path):
    shutil.copytree(composed_folder, tmp_path / "x")
    path = tmp_path / "x" / "composed.json"
    value = json.loads(path.read_text())
    for holder in (value, value["layers"][0], value["taps"][0], value["tensors"][0]):
        holder["of a later release"] = 1
    path.write_text(json.dumps(value))
    assert load_composed(tmp_path / "x").classes == (0, 2)


def test_a_composed_folder_is_refused_by_name_too(tmp_path):
    model = moda.models.create("small_vgg", num_classes=3, width=0.25, image_size=8).eval()
    taps = moda.observe(model, example=torch.randn(2, 3, 8, 8))
    widths = dict(zip(taps.names, taps.widths, strict=True))
    rates = rates_of({tap: torch.rand(3, width) for tap, width in widths.items()}, [10, 10, 10])
    save_composed(moda.compose(model, decompose(rates), [2, 0]), tmp_path)
    load_composed(tmp_path)
    random_ = random.Random(0)
    for name in ("composed.json", "masks.safetensors", "model.safetensors"):
        original = (tmp_path / name).read_bytes()
        for _ in range(20):
            changed = mutate(original, random_)
            (tmp_path / name).write_bytes(changed)
            error = refusal(lambda: load_composed(tmp_path))
            if error is None:
                assert changed == original or name == "composed.json"
            else:
                assert str(tmp_path) in error
        (tmp_path / name).write_bytes(original)


def test_tensors_that_repeat_a_few_numbers_are_refused(tmp_path):
    """2 KB that would become gigabytes."""
    path = tmp_path / "model.pt"
    torch.save({"fc.weight": torch.zeros(1).expand(1 << 20, 1 << 10)}, path)
    assert path.stat().st_size < 3000
    with pytest.raises(
        FormatError,
        match=r"model\.pt: not a file of tensors alone, and so not read: its tensors have 4294967296 bytes, of which 4 are",
    ):
        load_published_weights(path)
    shared = torch.rand(3)
    torch.save({"a": shared, "b": shared, "c": shared[:2]}, path)
    assert torch.equal(load_published_weights(path)["b"], shared)


def test_compressed_entries_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(
        FormatError, match=r"bomb\.pt: not a file of tensors alone, and so not read: it holds compressed entries"
    ):
        load_published_weights(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt2", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("x/moda.json", b" " * (1 << 24))
    with pytest.raises(FormatError, match=r"bomb\.pt2: expected a note of at most 1048576 bytes"):
        read_provenance(tmp_path / "bomb.pt2")


def test_lists_that_hold_themselves_are_no_trap(tmp_path):
    endless: list[Any] = [torch.zeros(2)]
    endless.append(endless)
    torch.save(endless, tmp_path / "model.pt")
    with pytest.raises(FormatError, match="expected a state_dict"):
        load_published_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_mutated_archives_are_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save({"fc.weight": torch.rand(3, 4)}, path)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            entries = {"classes": [1], "class_names": ["b"], "input_shape": [3, 8, 8], "source_run": "r", "source": {}}
            archive.writestr("m/moda.json", EXPORT.to_bytes(entries))
    original, random_ = path.read_bytes(), random.Random(suffix)
    read = load_published_weights if suffix == ".pt" else read_provenance
    read(path)
    for _ in range(150):
        path.write_bytes(mutate(original, random_))
        error = refusal(lambda: read(path))
        assert error is None or str(path) in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "vgg16", "width": 200.0, "data_options": {"image_size": 32}}, "width: expected a model of at most"),
        ({"width": 1e300}, "width: expected a model of at most"),
        ({"data_options": {"image_size": 10**6}}, "image_size: expected images of at most"),
        ({"data_options": {"channels": 10**9}}, "image_size: expected images of at most"),
    ],
)
def test_sizes_that_would_take_all_memory_are_refused(tmp_path, settings, message):
    """The settings of a run, or of a composed model, may be those of a stranger."""
    config = TrainingConfig(**settings)
    with pytest.raises(ValueError, match=message):
        create_model(config, load_data(config))


def test_a_list_of_classes_that_never_ends_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match="class_list: .* cannot be read"):
            read_class_list(path)
    for name in ("..", "../other", "a/b", "a\0b"):
        (tmp_path / "list").write_text(f"{name} cats")
        with pytest.raises(ValueError, match="class_list: .*, line 1: expected the name of a folder"):
            read_class_list(tmp_path / "list")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="class_list: .* is no list of classes"):
        read_class_list(tmp_path / "bytes")
