"""Training: the recipe, what is recorded, and that stopping anywhere changes nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from moda.data.batches import BatchLoader, EpochOrder, SampleBatches, epoch_order
from moda.data.splits import DataSplits, InMemory
from moda.files import FormatError, is_temporary, read_tensors
from moda.methods.contrastive import distillation_loss
from moda.observation.taps import observe, taps_of
from moda.runs.config import TrainingConfig
from moda.runs.finished import FinishedRun
from moda.runs.folder import RunFolder, create_model, load_data
from moda.runs.gated import with_gates
from moda.runs.lock import BusyError
from moda.runs.metrics import MetricsFile, read_metrics
from moda.training import loop as training
from moda.training.loop import TrainingInterrupted, TrainingResult, train
from moda.training.progress import TrainingProgress
from moda_kernels import ModularLoss
from tests.moda._helpers.processes import assert_same_weights, environment, wait_for
from tests.moda._helpers.studying import make_run

SAMPLES, CLASSES = 42, 3  # with batches of 16: three steps per epoch, the last of 10


def tiny_data() -> DataSplits:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(SAMPLES) % CLASSES
    images = torch.randn(SAMPLES, 1, 4, 4, generator=generator) + labels[:, None, None, None]
    split = InMemory(images, labels)
    return DataSplits(split, split, InMemory(images[:17], labels[:17]), CLASSES, ("a", "b", "c"), (1, 4, 4))


def tiny_model() -> nn.Module:
    """With batch norm (buffers) and dropout (random numbers), so that a resume has to bring back both."""
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES),
    )  # fmt: skip


def tiny_config(**settings: Any) -> TrainingConfig:
    defaults = {
        "model": "tiny", "data": "tiny", "epochs": 4, "batch_size": 16, "seed": 3,
        "accelerator": "cpu", "log_every_steps": 1,
    }  # fmt: skip
    return TrainingConfig(**{**defaults, **settings})


STANDARD = {"affinity": 0.0, "dispersion": 0.0, "compactness": 0.0}


def tiny_train(
    folder: Path, *, resume: bool = False, progress: TrainingProgress | None = None, **settings: Any
) -> TrainingResult:
    return train(
        tiny_config(**settings),
        folder,
        resume=resume,
        model=tiny_model(),
        data=tiny_data(),
        progress=progress or TrainingProgress(shown=False),
    )


class StopAfter(TrainingProgress):
    """Presses Ctrl-C after some steps."""

    def __init__(self, steps: int) -> None:
        super().__init__(shown=False)
        self.left = steps

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def weights(result: TrainingResult) -> dict[str, Tensor]:
    return result.model.state_dict()


def without_seconds(path: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_metrics(path)]


# ---- the recipe ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, STANDARD], ids=["modular", "standard"])
def test_training_is_the_plain_loop(tmp_path: Path, settings: dict[str, float]) -> None:
    """Bitwise the weights of the paper's recipe written out: batches, SGD, cosine per epoch, terms and weights."""
    result = tiny_train(tmp_path / "run", **settings)
    config = tiny_config(**settings)
    data, model = tiny_data(), tiny_model()
    images, labels = data.train.tensors  # type: ignore[attr-defined]
    taps = observe(model, route="grouped") if config.modular else None
    modular_loss = ModularLoss(1.0, 1.0, 0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    torch.manual_seed(config.seed)  # dropout: the model is given, so nothing else draws
    for epoch in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2
        for chosen in epoch_order(SAMPLES, config.seed, epoch).split(16):
            logits = model(images[chosen])
            loss = F.cross_entropy(logits, labels[chosen])
            if taps is not None:
                loss = loss + modular_loss(taps.activations(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in weights(result).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_standard_training_observes_nothing(tmp_path: Path) -> None:
    result = tiny_train(tmp_path / "run", **STANDARD)
    assert taps_of(result.model) is None
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert all("affinity" not in row and row["loss"] == row["cross_entropy"] for row in rows)


def test_metrics_are_those_of_the_model(tmp_path: Path) -> None:
    result = tiny_train(tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    cosine = [0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert [row["learning_rate"] for row in rows] == pytest.approx(cosine)
    for row in rows:
        terms = row["affinity"] + row["dispersion"] + 0.3 * row["compactness"]
        assert row["loss"] == pytest.approx(row["cross_entropy"] + terms, rel=1e-6)
    images, labels = tiny_data().test.tensors  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = result.model.eval()(images)
    assert rows[-1]["test_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()), abs=1e-7)
    assert rows[-1]["test_cross_entropy"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_epoch_means_weigh_batches_by_samples(tmp_path: Path) -> None:
    tiny_train(tmp_path / "run", epochs=1)
    steps = read_metrics(tmp_path / "run" / "steps.csv")
    epoch = read_metrics(tmp_path / "run" / "metrics.csv")[0]
    for name in ("loss", "dispersion", "train_accuracy"):
        expected = sum(row[name] * size for row, size in zip(steps, (16, 16, 10), strict=True)) / SAMPLES
        assert epoch[name] == pytest.approx(expected, rel=1e-6)


def test_backends_train_alike(tmp_path: Path) -> None:
    reference = tiny_train(tmp_path / "reference", backend="reference")
    closed_form = tiny_train(tmp_path / "torch", backend="torch")
    for name, value in weights(reference).items():
        torch.testing.assert_close(value, weights(closed_form)[name], rtol=1e-4, atol=1e-5)


def test_routes_train_alike(tmp_path: Path) -> None:
    grouped = tiny_train(tmp_path / "grouped", route="grouped")
    fused = tiny_train(tmp_path / "fused", route="fused")
    for name, value in weights(grouped).items():
        torch.testing.assert_close(value, weights(fused)[name], rtol=1e-4, atol=1e-5)


def test_mixed_precision_starts_like_full_precision(tmp_path: Path) -> None:
    full = tiny_train(tmp_path / "full", epochs=1)
    mixed = tiny_train(tmp_path / "mixed", epochs=1, precision="bf16-mixed")
    first = [read_metrics(result.run.steps)[0] for result in (full, mixed)]
    for name in ("cross_entropy", "affinity", "dispersion", "compactness"):
        assert first[1][name] == pytest.approx(first[0][name], rel=0.03)
        assert first[1][name] != first[0][name]
    assert weights(mixed)["0.weight"].dtype == torch.float32


def test_kept_weights_and_tensorboard(tmp_path: Path) -> None:
    result = tiny_train(tmp_path / "run", epochs=3, keep_every_epochs=3, tensorboard=True)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["epoch-0003.safetensors", "last.ckpt"]
    assert read_tensors(tmp_path / "run" / "checkpoints" / kept[0]).keys() == weights(result).keys()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"loss", "test_accuracy", "step/dispersion"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("loss")) == 3
    assert len(events.Scalars("step/loss")) == 9


def test_run_folder_holds_plain_weights(tmp_path: Path) -> None:
    result = tiny_train(tmp_path / "run", epochs=1)
    assert result.run.load_weights().keys() == tiny_model().state_dict().keys()
    assert_same_weights(result.run.load_weights(), weights(result))
    assert RunFolder.open(tmp_path / "run").config == tiny_config(epochs=1)


# ---- order --------------------------------------------------------------------------------------------------------


def test_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {(seed, epoch): epoch_order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    torch.manual_seed(99)
    assert epoch_order(50, 1, 1).tolist() == orders[1, 1]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_each_batch(world_size: int) -> None:
    whole = list(EpochOrder(46, 16, 7))  # batches of 16, 16, 14
    shares = [list(EpochOrder(46, 16, 7, rank, world_size)) for rank in range(world_size)]
    for index, (epoch, indices) in enumerate(whole):
        parts = [share[index] for share in shares]
        assert all(part[0] == epoch for part in parts)
        assert sorted(index for part in parts for index in part[1]) == sorted(indices)
        assert max(len(part[1]) for part in parts) - min(len(part[1]) for part in parts) <= 1


def test_last_batch_too_small_for_all_processes() -> None:
    training_share = [EpochOrder(34, 16, 7, rank, 4) for rank in range(4)]  # batches of 16, 16, 2
    assert [len(order) for order in training_share] == [2, 2, 2, 2]
    testing_share = [EpochOrder(34, 16, None, rank, 4) for rank in range(4)]
    assert [[len(part) for _, part in order] for order in testing_share] == [[4, 5], [4, 5], [4, 4], [4, 4]]
    assert sorted(index for order in testing_share for _, part in order for index in part) == list(range(34))


class Noisy(Dataset[Any]):
    """Augments at random."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(2) + index, index % 2


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentation_depends_on_seed_epoch_and_sample_alone(workers: int) -> None:
    def batches(epoch: int, start: int) -> list[Tensor]:
        order = EpochOrder(12, 4, 5)
        order.epoch, order.start = epoch, start
        return [images for images, _ in BatchLoader(Noisy(), order, num_workers=workers)]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    whole = batches(2, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(torch.stack(batches(2, 1)), torch.stack(whole[1:]))
    inside = SampleBatches(Noisy(), 5)
    assert not torch.equal(inside[0, [3]][0], inside[1, [3]][0])


# ---- stopping and going on ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return tiny_train(tmp_path_factory.mktemp("whole") / "run", checkpoint_every_steps=2)


@pytest.mark.parametrize(
    ("stop_after", "checkpoint_step"),
    [(1, 0), (2, 0), (4, 3), (5, 4), (8, 6), (12, 10)],
    ids=["first", "before any", "next epoch", "mid-epoch", "past an epoch", "last"],
)
def test_resume_is_bit_for_bit(
    tmp_path: Path, uninterrupted: TrainingResult, stop_after: int, checkpoint_step: int
) -> None:
    """Steps 3, 6, 9 end epochs; every second step that ends none has a checkpoint of its own (2, 4, 8, 10)."""
    folder = tmp_path / "run"
    with pytest.raises(
        TrainingInterrupted, match=r"interrupted after \d of 4 epochs; go on with: moda train .* --resume"
    ):
        tiny_train(folder, progress=StopAfter(stop_after), checkpoint_every_steps=2)
    last = folder / "checkpoints" / "last.ckpt"
    step = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
    assert step == checkpoint_step
    resumed = tiny_train(folder, resume=True, checkpoint_every_steps=2)
    assert_same_weights(weights(resumed), weights(uninterrupted))
    for name in ("metrics.csv", "steps.csv"):
        assert without_seconds(folder / name) == without_seconds(uninterrupted.run.path / name)


@pytest.mark.parametrize("method", ["mwt", "nemo"])
def test_resume_with_gates_is_bit_for_bit(tmp_path: Path, method: str) -> None:
    """In the middle of an epoch and at its end; the gates' own weights come back too, dropout's random numbers included."""

    def gated_train(folder: Path, **arguments: Any) -> TrainingResult:
        torch.manual_seed(11)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(80, CLASSES),
        )  # fmt: skip
        shown = arguments.pop("progress", TrainingProgress(shown=False))
        config = tiny_config(method=method, epochs=3, checkpoint_every_steps=2)
        return train(config, folder, model=model, data=tiny_data(), progress=shown, **arguments)

    whole = gated_train(tmp_path / "whole")
    stored = whole.run.load_weights()
    assert any("mask_generator" in name for name in stored)
    for stop_after in (5, 7):
        folder = tmp_path / f"stopped-{stop_after}"
        with pytest.raises(TrainingInterrupted):
            gated_train(folder, progress=StopAfter(stop_after))
        resumed = gated_train(folder, resume=True)
        assert_same_weights(resumed.run.load_weights(), stored)
        assert without_seconds(folder / "metrics.csv") == without_seconds(whole.run.path / "metrics.csv")
    other = tiny_config(method=method).changed(method="nemo" if method == "mwt" else "mwt", epochs=3)
    with pytest.raises(ValueError, match="method"):
        train(other, tmp_path / "whole", resume=True, model=tiny_model(), data=tiny_data())


def test_a_distilled_network_learns_from_the_model_of_another_run(tmp_path: Path) -> None:
    """NeMo's DeiT: the loss of a step is the published one with the teacher's logits, and a resume goes on with it."""
    pytest.importorskip("sklearn")
    make_run(tmp_path / "teacher", decomposed=False)
    config = TrainingConfig(
        model="deit_small", width=0.125, method="nemo", teacher=str(tmp_path / "teacher"), epochs=2, batch_size=24,
        seed=0, accelerator="cpu", log_every_steps=1,
    )  # fmt: skip
    digits = load_data(config)
    split = InMemory(*(part[:48] for part in digits.train.tensors))  # type: ignore[attr-defined]
    data = dataclasses.replace(digits, train=split, train_eval=split, test=split)

    def taught(folder: Path, config: TrainingConfig = config, **arguments: Any) -> TrainingResult:
        shown = arguments.pop("progress", TrainingProgress(shown=False))
        return train(config, folder, data=data, progress=shown, **arguments)

    result = taught(tmp_path / "run")
    torch.manual_seed(0)
    student = create_model(config, data)
    gates = with_gates(config, data, student)
    chosen = epoch_order(48, 0, 0)[:24]
    images, labels = (part[chosen] for part in split.tensors)
    student.train()
    own, distilled = student(images, separate=True)
    teacher = FinishedRun.open(tmp_path / "teacher", "cpu").model
    expected = distillation_loss(own, distilled, teacher(images), labels).detach()
    gates.gates.take()
    first = read_metrics(tmp_path / "run" / "steps.csv")[0]
    assert first["cross_entropy"] == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(TrainingInterrupted):
        taught(tmp_path / "again", progress=StopAfter(3))
    assert_same_weights(taught(tmp_path / "again", resume=True).run.load_weights(), result.run.load_weights())
    for changes, message in (
        ({"method": "mwt"}, "teacher: has no meaning with the method 'mwt'"),
        ({"model": "vit_small"}, "teacher: ViT is no distilled network; take deit_small"),
        ({"teacher": str(tmp_path / "none")}, "none: no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            taught(tmp_path / "bad", config.changed(**changes))


def test_resume_twice(tmp_path: Path, uninterrupted: TrainingResult) -> None:
    for stop in (5, 4):  # in the second go the steps are counted from the checkpoint
        with pytest.raises(TrainingInterrupted):
            tiny_train(tmp_path / "run", resume=stop == 4, progress=StopAfter(stop), checkpoint_every_steps=2)
    resumed = tiny_train(tmp_path / "run", resume=True, checkpoint_every_steps=2)
    assert_same_weights(weights(resumed), weights(uninterrupted))


def test_resume_after_the_last_checkpoint(tmp_path: Path, uninterrupted: TrainingResult) -> None:
    """Killed between the last checkpoint and the final weights: nothing is left to train."""
    tiny_train(tmp_path / "run", checkpoint_every_steps=2)
    (tmp_path / "run" / "model.safetensors").unlink()
    resumed = tiny_train(tmp_path / "run", resume=True, checkpoint_every_steps=2)
    assert_same_weights(resumed.run.load_weights(), weights(uninterrupted))


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = tiny_train(tmp_path / "run", epochs=1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = tiny_train(tmp_path / "run", epochs=1, resume=True)
    assert_same_weights(weights(again), weights(first))
    assert again.metrics == first.metrics
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_interrupt_handler_is_put_back(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted):
        tiny_train(tmp_path / "run", progress=StopAfter(1))
    assert signal.getsignal(signal.SIGINT) is handler


class Terminated(TrainingProgress):
    """A scheduler ends the job in the second epoch."""

    def epoch(self, epoch: int, figures: Any) -> None:
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_stops_behind_a_checkpoint(tmp_path: Path, uninterrupted: TrainingResult) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted, match="interrupted after 1 of 4 epochs"):
        tiny_train(tmp_path / "run", progress=Terminated(shown=False), checkpoint_every_steps=2)
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed = tiny_train(tmp_path / "run", resume=True, checkpoint_every_steps=2)
    assert_same_weights(weights(resumed), weights(uninterrupted))


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_training import *
class Slow(TrainingProgress):
    def step(self):
        time.sleep(0.05)
tiny_train(Path(sys.argv[2]), progress=Slow(shown=False), checkpoint_every_steps=2, epochs=400)
"""


def test_kill_loses_at_most_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(folder)], env=environment()
    )
    try:
        wait_for(lambda: logged_steps(folder) >= 8, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = logged_steps(folder)
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert 8 - 2 <= done - 2 <= checkpoint["global_step"] <= done  # a row is written just before its checkpoint
    partial = folder / "checkpoints" / ".last.ckpt.0a1b2c3d.moda-partial"
    partial.write_bytes(b"what a kill in the middle of writing leaves")
    steps = checkpoint["global_step"] + 4
    with pytest.raises(TrainingInterrupted):
        tiny_train(folder, resume=True, progress=StopAfter(4), checkpoint_every_steps=2, epochs=400)
    assert not partial.exists()
    with pytest.raises(TrainingInterrupted):
        tiny_train(tmp_path / "whole", progress=StopAfter(steps), checkpoint_every_steps=2, epochs=400)
    assert (
        without_seconds(folder / "steps.csv")[: steps - 1]
        == without_seconds(tmp_path / "whole" / "steps.csv")[: steps - 1]
    )


def logged_steps(folder: Path) -> int:
    path = folder / "steps.csv"
    return max(0, path.read_text().count("\n") - 1) if path.exists() else 0


# ---- malformed input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs: expected at least 1, got 0"),
        ({"epochs": 2.5}, TypeError, "epochs: expected an integer, got float"),
        ({"batch_size": True}, TypeError, "batch_size: expected an integer, got bool"),
        ({"learning_rate": 0}, ValueError, "learning_rate: expected a finite number greater than 0, got 0"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate: expected a number, got str"),
        ({"momentum": 1.0}, ValueError, "momentum: expected a finite number of at least 0 and less than 1, got 1.0"),
        ({"affinity": -1}, ValueError, "affinity: expected a finite number of at least 0, got -1"),
        ({"compactness": math.nan}, ValueError, "compactness: expected a finite number of at least 0, got nan"),
        ({"precision": "8"}, ValueError, "precision: expected one of 32-true, bf16-mixed, 16-mixed, 64-true, got '8'"),
        ({"route": "best"}, ValueError, "route: expected one of auto, grouped, fused, got 'best'"),
        ({"model": ""}, ValueError, "model: expected a non-empty string"),
        ({"data_root": 3}, TypeError, "data_root: expected a string, got int"),
        ({"data_options": [1]}, TypeError, "data_options: expected a mapping, got list"),
        (
            {"data_options": {"a": []}},
            TypeError,
            r"data_options\['a'\]: expected a string, number, true, false or null",
        ),
        ({"tensorboard": 1}, TypeError, "tensorboard: expected true or false, got 1"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
    ],
)
def test_config_refuses(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        TrainingConfig(**settings)


def test_config_defaults_are_the_papers() -> None:
    config = TrainingConfig()
    assert (config.affinity, config.dispersion, config.compactness) == (1.0, 1.0, 0.3)
    assert (config.epochs, config.batch_size, config.learning_rate, config.momentum) == (200, 128, 0.05, 0.9)


def test_config_round_trip() -> None:
    config = tiny_config(width=0.5, data_options={"image_size": 32}, data_root="/data", tensorboard=True)
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="^speed: unknown setting; expected one of model, "):
        TrainingConfig.from_dict({"speed": 3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "16-mixed"}, "precision: '16-mixed' needs a GPU; on the CPU use 'bf16-mixed'"),
        ({"backend": "cuda"}, "backend: expected one of 'auto', 'reference', 'torch', 'triton', 'native', got 'cuda'"),
    ],
)
def test_impossible_settings_leave_no_folder(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        tiny_train(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^accelerator: 'gpu' asked for, but PyTorch sees no GPU \(see: moda doctor\)"
    ):
        tiny_train(tmp_path / "run", accelerator="gpu")


def test_tensorboard_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^tensorboard: the package is not installed: pip install tensorboard"):
        tiny_train(tmp_path / "run", tensorboard=True)


def test_folders_that_cannot_take_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    RunFolder.create(tmp_path / "run", tiny_config())
    for name, message in [
        ("file", "expected a folder, found a file"),
        ("full", "is not empty and holds no run; choose another folder"),
        ("run", "holds a run already; resume it, or choose another folder"),
    ]:
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            tiny_train(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json: not JSON"),
        ("[]", "config.json: expected a JSON object, got list"),
        ('{"format": "x", "format_version": 1}', 'config.json: expected "format": "moda-run", got \'x\''),
        ('{"format": "moda-run", "format_version": 9}', "config.json: expected format_version 1, got 9"),
        ('{"format": "moda-run", "format_version": 1}', 'config.json: expected an object "training", got None'),
        (
            '{"format": "moda-run", "format_version": 1, "training": {"epochs": 0}}',
            "config.json: epochs: expected at least 1, got 0",
        ),
    ],
)
def test_malformed_run_folder(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(FormatError, match=message):
        RunFolder.open(tmp_path)


def test_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="nowhere: no such folder"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"holds no run \(it has no config.json\); make one with: moda train"):
        RunFolder.open(tmp_path)
    run = RunFolder.create(tmp_path / "run", tiny_config())
    with pytest.raises(FormatError, match=r"its training is not finished .* finish it with: moda train .* --resume"):
        run.load_weights()


def test_resume_refuses_other_settings(tmp_path: Path) -> None:
    tiny_train(tmp_path / "run", epochs=1)
    with pytest.raises(ValueError, match="^learning_rate: the run to resume was started with 0.05, got 0.1"):
        tiny_train(tmp_path / "run", epochs=1, learning_rate=0.1, resume=True)


def test_checkpoint_of_another_training(tmp_path: Path) -> None:
    for name, rate in (("a", 0.05), ("b", 0.1)):
        with pytest.raises(TrainingInterrupted):
            tiny_train(tmp_path / name, learning_rate=rate, progress=StopAfter(4))
    (tmp_path / "b" / "checkpoints" / "last.ckpt").replace(tmp_path / "a" / "checkpoints" / "last.ckpt")
    with pytest.raises(FormatError, match=r"last.ckpt: its SHA-256 is .*: it was damaged or changed"):
        tiny_train(tmp_path / "a", resume=True)
    (tmp_path / "a" / "checksums.json").unlink()  # as in a folder that an earlier release made
    with pytest.raises(FormatError, match=r"last.ckpt: optimizer_states: learning rate: .* in \[0, 0.05\], got 0.08"):
        tiny_train(tmp_path / "a", resume=True)


class Exploit:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("owned"),)  # type: ignore[return-value]


@pytest.mark.parametrize("content", ["noise", "truncated", "exploit", "other"])
def test_checkpoint_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingInterrupted):
        tiny_train(tmp_path / "run", progress=StopAfter(4))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    if content == "noise":
        last.write_bytes(b"no checkpoint")
    elif content == "truncated":
        last.write_bytes(last.read_bytes()[:1000])
    elif content == "exploit":
        torch.save({"state_dict": Exploit()}, last)
    else:
        torch.save([1, 2], last)
    for message in ("last.ckpt: its SHA-256 is", "last.ckpt: (not a file of tensors alone|not a checkpoint)"):
        with pytest.raises(FormatError, match=message) as caught:
            tiny_train(tmp_path / "run", resume=True)
        assert "weights_only" not in str(caught.value)  # PyTorch advises to switch it off
        (tmp_path / "run" / "checksums.json").unlink(missing_ok=True)  # as in a folder that an earlier release made
    assert not (tmp_path / "owned").exists()


def remove(name: str) -> Callable[[dict[str, Any]], None]:
    def edit(checkpoint: dict[str, Any]) -> None:
        del checkpoint[name]

    return edit


def set_weight(value: float) -> Callable[[dict[str, Any]], None]:
    def edit(checkpoint: dict[str, Any]) -> None:
        next(iter(checkpoint["state_dict"].values())).view(-1)[0] = value

    return edit


def set_rate(checkpoint: dict[str, Any]) -> None:
    checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = 1e9


def rename_weight(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["x"] = checkpoint["state_dict"].popitem()[1]


def group(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint["optimizer_states"][0]["param_groups"][0]


def momentum(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint["optimizer_states"][0]["state"][0]


def progress(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(TrainingInterrupted):
        tiny_train(folder, progress=StopAfter(4))
    return folder


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("loops"), "entry 'loops' is missing"),
        (remove("optimizer_states"), "entry 'optimizer_states' is missing"),
        (remove("moda"), "entry 'moda' is missing"),
        (set_rate, r"learning rate: expected a finite number in \[0, 0.05\], got 1000000000"),
        (set_weight(float("nan")), "state_dict: expected finite weights"),
        (set_weight(float("inf")), "state_dict: expected finite weights"),
        (rename_weight, "state_dict: expected the weights of this run's model"),
        (lambda c: c.update(optimizer_states=[]), "last.ckpt: "),
        (lambda c: c["optimizer_states"][0].pop("param_groups"), "entry 'param_groups' is missing"),
        (lambda c: c["optimizer_states"][0]["state"].clear(), "expected a momentum of every weight, got none"),
        (lambda c: c["optimizer_states"][0].update(state=[1]), "optimizer_states: state: expected an object, got list"),
        (
            lambda c: momentum(c).update(momentum_buffer=torch.ones(7)),
            "momentum of 0: expected .*, got torch.float32 .7,.",
        ),
        (lambda c: momentum(c)["momentum_buffer"].fill_(math.nan), "momentum of 0: expected finite numbers"),
        (
            lambda c: c["optimizer_states"][0]["state"].update({99: {}}),
            "expected the weights of this run's model, got one of 99",
        ),
        (lambda c: group(c).update(lr=0.01), "learning rate: expected 0.0426777 in epoch 1, got 0.01"),
        (lambda c: group(c).update(momentum=5.0), "momentum: expected 0.9, got 5.0"),
        (lambda c: group(c).update(weight_decay=1.0), "weight_decay: expected 0, got 1.0"),
        (lambda c: c["lr_schedulers"].clear(), "lr_schedulers: expected at least 1 entries"),
        (lambda c: c["lr_schedulers"][0].update(T_max=10**9), "T_max: expected 4, got 1000000000"),
        (lambda c: c["lr_schedulers"][0].update(base_lrs=[1e9]), "base_lrs: expected .0.05., got "),
        (lambda c: c["lr_schedulers"][0].update(last_epoch=-3), "last_epoch: expected at least 0, got -3"),
        (lambda c: c["loops"].pop("fit_loop"), "loops: expected an object, got NoneType"),
        (lambda c: c["loops"]["fit_loop"].pop("epoch_progress"), "entry 'epoch_progress' is missing"),
        (lambda c: progress(c).update(completed=10**6), "epoch_progress: completed: expected at most 4"),
        (lambda c: progress(c).update(processed="1"), "processed: expected an integer, got str"),
        (lambda c: c.update(global_step=10**6), "expected as many steps as global_step, 1000000, got 3"),
        (
            lambda c: c["state_dict"].update({"model.0.weight": torch.ones(4, 1, 5, 5)}),
            "model.0.weight: expected .*, got ",
        ),
        (lambda c: c["moda"].update(format_version=9), "expected format_version 1, got 9"),
        (lambda c: c["moda"].pop("random_state"), "entry 'random_state' is missing"),
        (lambda c: c["moda"].update(random_state={"cpu": torch.ones(3)}), "expected the state of a random generator"),
        (lambda c: c["moda"].update(train_sums="x"), "train_sums: expected finite sums"),
        (lambda c: c["moda"].update(config=None), "config: expected an object, got NoneType"),
    ],
)
def test_an_edited_checkpoint_is_refused(
    tmp_path: Path, stopped: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, last)
    (tmp_path / "run" / "checksums.json").unlink()  # the edit may have been made there too
    with pytest.raises(FormatError, match=message):
        tiny_train(tmp_path / "run", resume=True)


class Slow(TrainingProgress):
    def step(self) -> None:
        time.sleep(0.04)


KILLED_OFTEN = {"checkpoint_every_steps": 1, "epochs": 25}


def kill_often(folder: Path, kills: int, seed: int) -> int:
    """Begin or resume a training by the same call so many times, each killed at a random moment; how many were."""
    moments, ended = random.Random(seed), []
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                tiny_train(folder, resume="auto", progress=Slow(shown=False), **KILLED_OFTEN)
                status = 0
            finally:
                os._exit(status)
        time.sleep(moments.uniform(0.05, 0.6))
        os.kill(child, signal.SIGKILL)
        ended.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert set(ended) <= {0, -signal.SIGKILL}
    return ended.count(-signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    """Killed at twenty random moments, it ends as one that never stopped."""
    assert kill_often(tmp_path / "run", 20, seed=0) >= 8  # on the fastest machine it is finished some time
    resumed = tiny_train(tmp_path / "run", resume="auto", **KILLED_OFTEN)
    assert_same_weights(weights(resumed), weights(tiny_train(tmp_path / "whole", **KILLED_OFTEN)))
    assert [row["step"] for row in read_metrics(resumed.run.metrics)] == list(range(3, 76, 3))
    assert not [path for path in resumed.run.path.rglob("*") if is_temporary(path)]


def test_resume_auto_begins_or_goes_on(tmp_path: Path, uninterrupted: TrainingResult) -> None:
    with pytest.raises(TrainingInterrupted):
        tiny_train(tmp_path / "run", resume="auto", progress=StopAfter(5), checkpoint_every_steps=2)
    resumed = tiny_train(tmp_path / "run", resume="auto", checkpoint_every_steps=2)
    assert_same_weights(weights(resumed), weights(uninterrupted))
    assert tiny_train(tmp_path / "run", resume="auto", checkpoint_every_steps=2).seconds == 0
    with pytest.raises(ValueError, match="resume: expected True, False or 'auto', got 'always'"):
        tiny_train(tmp_path / "other", resume="always")


def test_a_folder_that_was_killed_while_made_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.0a1b2c3d.moda-partial").write_bytes(b"{")
    assert tiny_train(tmp_path / "run", resume="auto", epochs=1).run.finished


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """Another process trains in the folder: neither a second training nor a resumed one may begin."""
    with pytest.raises(TrainingInterrupted):
        tiny_train(tmp_path / "run", progress=StopAfter(4))
    program = "import sys, time; from pathlib import Path; from moda.runs.lock import locked\n"
    program += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run")], stdout=subprocess.PIPE, env=environment()
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match=f"process {other.pid} of .* is writing there"):
            tiny_train(tmp_path / "run", resume=True)
        other.kill()
    assert tiny_train(tmp_path / "run", resume=True).run.finished  # what a killed process has left locks nothing
    assert not [path for path in (tmp_path / "run").iterdir() if is_temporary(path)]


def test_metrics_file(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.csv")
    with pytest.raises(RuntimeError, match=r"m.csv: not open"):
        file.write({"step": 1})
    file.open(["step", "loss", "extra"])
    file.write({"step": 1, "loss": 0.1})
    file.write({"step": 2, "loss": 1 / 3})
    with pytest.raises(ValueError, match="speed"):
        file.write({"step": 3, "speed": 1})
    file.close()
    with (tmp_path / "m.csv").open("a") as text:
        text.write("3,0.")  # cut off in the middle
    assert read_metrics(tmp_path / "m.csv")[:2] == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.333333333}]
    file.open(["step", "loss", "extra"], keep_until_step=5)
    file.close()
    assert [row["step"] for row in read_metrics(tmp_path / "m.csv")] == [1, 2]
    file.open(["step", "loss", "extra"], keep_until_step=1)
    file.close()
    assert [row["step"] for row in read_metrics(tmp_path / "m.csv")] == [1]
    with pytest.raises(FormatError, match="none.csv: no such file"):
        read_metrics(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("step\nx\n")
    with pytest.raises(FormatError, match="bad.csv: not a table of numbers"):
        read_metrics(tmp_path / "bad.csv")
