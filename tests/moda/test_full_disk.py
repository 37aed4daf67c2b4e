"""Every kind of file on a disk that is full: the error names the file meant, what was there stays, nothing is left."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import moda
from moda.bench import results as benchmarks
from moda.composition import export
from moda.composition.ensemble import Ensemble
from moda.composition.source import to_source
from moda.decomposition.container import Decomposition
from moda.decomposition.files import save_rates
from moda.decomposition.rates import FiringRates
from moda.demo.folder import replaced
from moda.demo.results import DEMO
from moda.files import PARTIAL, write_bytes
from moda.models import small_vgg
from moda.observation.taps import observe
from moda.runs.config import TrainingConfig
from moda.runs.folder import RunFolder
from moda.runs.lock import locked
from moda.runs.metrics import MetricsFile
from moda.study.comparison import COMPARISON
from moda.study.digits import STUDY
from moda.study.replacement import write_replacements
from moda.study.results_file import ResultsFile
from tests.moda._helpers.study_folders import write_analyses

EXAMPLE = torch.zeros(2, 3, 8, 8)
MASKS = {tap: torch.ones(3, 8, dtype=torch.bool) for tap in ("a", "b")}


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file grows beyond `room` bytes: the system stops a write there as it does on a full disk, with another errno."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(left: dict[str, bytes], before: dict[str, bytes]) -> None:
    """The list of digests may name one more beside the old one: whatever a kill leaves must fit it."""
    noted = [json.loads(files.pop("checksums.json", b'{"files": {}}'))["files"] for files in (left, before)]
    assert left == before
    assert all(set(digests) <= set(noted[0][name]) for name, digests in noted[1].items())


# ---- what writes, told by a seed ----------------------------------------------------------------------------------


def plain(folder: Path, seed: int) -> None:
    write_bytes(folder / "any.bin", random.Random(seed).randbytes(4000))


def run(folder: Path, seed: int) -> None:
    """config.json; a run is never written over, so that there is none the first time."""
    if seed:
        RunFolder.create(folder / "run", TrainingConfig(data_root="x" * 4000))


def weights(folder: Path, seed: int) -> None:
    RunFolder(folder, TrainingConfig()).save_weights({"w": torch.full((1000,), float(seed))})


def kept_weights(folder: Path, seed: int) -> None:
    own = RunFolder(folder, TrainingConfig())
    own.checkpoints.mkdir(exist_ok=True)
    own.save_weights({"w": torch.full((1000,), float(seed))}, own.checkpoints / "epoch-0001.safetensors")


def checkpoint(folder: Path, seed: int) -> None:
    io = pytest.importorskip("moda.training.checkpoint").SafeCheckpointIO(RunFolder(folder, TrainingConfig()))
    io.save_checkpoint({"w": torch.full((1000,), float(seed))}, folder / "checkpoints" / "last.ckpt")


def metrics(folder: Path, seed: int) -> None:
    file = MetricsFile(folder / "metrics.csv")
    file.open([f"column {number} {seed}" for number in range(300)])
    file.close()


def decomposition(folder: Path, seed: int) -> None:
    masks = {"a": torch.full((3, 8), bool(seed % 2))}
    Decomposition(masks, settings={"seed": str(seed) * 4000}).save(folder / "decomposition")


def decomposition_with_large_masks(folder: Path, seed: int) -> None:
    Decomposition({"a": torch.full((3, 2000), bool(seed % 2))}).save(folder / "decomposition")


def rates(folder: Path, seed: int) -> None:
    counts, sizes = torch.full((3, 2000), seed), torch.full((3,), 8)
    save_rates(FiringRates(("a",), {"a": counts / 8}, {"a": counts}, sizes), folder / "rates")


def composed(folder: Path, seed: int) -> None:
    moda.save_composed(_composed(seed), folder / "composed")


def ensemble(folder: Path, seed: int) -> None:
    model = _composed(seed)
    moda.save_composed(Ensemble([model, model], [], [0, 1], 3), folder / "ensemble")


def source(folder: Path, seed: int) -> None:
    to_source(_composed(seed), folder / "source")


def exported(folder: Path, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:  # what PyTorch's exporter writes is not the matter here, and takes long
        patch.setattr(export, "_to_pt2", lambda *_: random.Random(seed).randbytes(4000))
        patch.setattr(export, "_run_pt2", lambda *_: [_composed(seed)(EXAMPLE).detach()])
        export.export(_composed(seed), EXAMPLE, folder / "model.pt2")


def table(folder: Path, seed: int) -> None:
    ResultsFile.open(folder / "reuse.csv", "moda-reuse", ["a"], {"seed": "x" * 4000, "n": seed}, force=True)


def analysis(folder: Path, seed: int) -> None:
    own = RunFolder(folder, TrainingConfig())
    if not (folder / "config.json").exists():
        RunFolder.create(folder, TrainingConfig())
    write_analyses(own.path, masks=f"{seed:064x}")


def replacement(folder: Path, seed: int) -> None:
    write_replacements(folder / "replacement.json", [_result(seed)] * 20)


def study(folder: Path, seed: int) -> None:
    entries = {"epochs": 1, "batch_size": 1, "per_size": None, "runs": [], "replacements": [f"x{seed}"] * 500}
    STUDY.write(folder / "study.json", entries)


def comparison(folder: Path, seed: int) -> None:
    COMPARISON.write_with(folder / "c.json", {"methods": []}, {"c.html": random.Random(seed).randbytes(4000)})


def bench(folder: Path, seed: int) -> None:
    benchmarks.write(benchmarks.Results({"device": "x", "seed": seed, "y": "z" * 4000}, {}, True, ()), folder)


def demo(folder: Path, seed: int) -> None:
    with replaced(folder / "demo") as making:
        DEMO.write(making / "results.json", {})
        write_bytes(making / "demo.html", random.Random(seed).randbytes(4000))


_MODELS: dict[int, Any] = {}


def _composed(seed: int) -> Any:
    if seed not in _MODELS:
        torch.manual_seed(seed)
        model = small_vgg(num_classes=3, width=0.25).eval()
        with observe(model, example=EXAMPLE) as taps:
            masks = {
                t: torch.ones(3, width, dtype=torch.bool) for t, width in zip(taps.names, taps.widths, strict=True)
            }
        _MODELS[seed] = moda.compose(model, Decomposition(masks), [2, 0], example=EXAMPLE)
    return _MODELS[seed]


def _result(seed: int) -> Any:
    from moda.study.replacement import ReplacementResult

    return ReplacementResult(
        "small_vgg", "lenet5", "calibrate", seed, "c", 4, "final", (0.9, 0.8), (0.9, 0.8), "a" * 64, "b" * 64, "d" * 64
    )


Writer = Callable[[Path, int], None]
WRITERS: dict[Writer, str] = {
    plain: "any.bin",
    run: "run/config.json",
    weights: "model.safetensors",
    kept_weights: "checkpoints/epoch-0001.safetensors",
    checkpoint: "checkpoints/last.ckpt",
    metrics: "metrics.csv",
    decomposition: "decomposition/decomposition.json",
    decomposition_with_large_masks: "decomposition/masks.safetensors",
    rates: "rates/counts.safetensors",
    composed: "composed/model.safetensors",
    ensemble: "ensemble/module-0/model.safetensors",
    source: "source/model.safetensors",
    exported: "model.pt2",
    table: "reuse.json",
    analysis: "analysis.json",
    replacement: "replacement.json",
    study: "study.json",
    comparison: "c.html",
    bench: "x.json",
    demo: "demo/demo.html",
}
"""What each writes that is too large."""


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_full_disk(tmp_path: Path, write: Writer) -> None:
    write(tmp_path, 0)
    before = contents(tmp_path)
    with pytest.raises(OSError, match=f"{WRITERS[write]}'$") as raised, full_disk(1000):
        write(tmp_path, 1)
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(tmp_path / WRITERS[write]))
    assert_same(contents(tmp_path), before)
    write(tmp_path, 1)
    assert contents(tmp_path) != before


def test_a_row_for_which_there_is_no_room(tmp_path: Path) -> None:
    """It is lost, those before it are not, and the file is named; what closes the file names it too."""
    results = ResultsFile.open(tmp_path / "reuse.csv", "moda-reuse", ["a"], {})
    results.append({"a": 1})
    with pytest.raises(OSError, match=r"reuse\.csv'$"), full_disk(6):
        results.append({"a": "x" * 99})
    assert ResultsFile.open(tmp_path / "reuse.csv", "moda-reuse", ["a"], {}).rows == [{"a": "1"}]
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.open(["step", "loss"])
    metrics.write({"step": 1, "loss": 2.0})
    with full_disk(15):
        for act in (lambda: metrics.write({"step": 2, "loss": 3.0}), metrics.close):
            with pytest.raises(OSError, match=r"metrics\.csv'$"):
                act()
    metrics.close()
    again = MetricsFile(tmp_path / "metrics.csv")
    again.open(["step", "loss"], keep_until_step=2)
    again.close()
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n1,2\n"


def test_no_room_for_a_lock(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"{tmp_path}'$"), full_disk(0), locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_folders_in_which_nothing_can_be_made(tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without the right to write there, which a test that runs as root cannot take away."""
    write(tmp_path, 0)
    before = contents(tmp_path)

    opened = os.open

    def refused(path: Any, flags: int, *mode: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *mode, **options)

    monkeypatch.setattr("os.open", refused)
    with pytest.raises(PermissionError) as raised:
        write(tmp_path, 1)
    monkeypatch.undo()
    assert ".moda-" not in str(raised.value)
    assert raised.value.filename.startswith(str(tmp_path))
    assert_same(contents(tmp_path), before)


def test_long_names_have_room_for_what_is_added(tmp_path: Path) -> None:
    """A name may have 255 bytes; that of the file beside it, which is renamed, has more characters."""
    for name in ("x" * 250, "\N{SNOWMAN}" * 83):
        write_bytes(tmp_path / name, b"1")
        assert (tmp_path / name).read_bytes() == b"1"
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(PARTIAL)]
