"""`moda train` in a CUDA graph ends where eager training does, and says why where it cannot be had."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from moda.data.splits import DataSplits, InMemory
from moda.runs.config import TrainingConfig
from moda.runs.metrics import read_metrics
from moda.training import graphed
from moda.training.graph import why_eager
from moda.training.loop import ModularModule, TrainingInterrupted, TrainingResult, train
from moda.training.progress import TrainingProgress
from tests.moda._helpers.tape import Tape, play_graphs

SAMPLES, CLASSES = 42, 3  # with batches of 16: three steps per epoch, the last of 10
STANDARD = {"affinity": 0.0, "dispersion": 0.0, "compactness": 0.0}


def data() -> DataSplits:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(SAMPLES) % CLASSES
    images = torch.randn(SAMPLES, 1, 4, 4, generator=generator) + labels[:, None, None, None]
    split = InMemory(images, labels)
    return DataSplits(split, split, InMemory(images[:17], labels[:17]), CLASSES, ("a", "b", "c"), (1, 4, 4))


def network() -> nn.Module:
    torch.manual_seed(11)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, CLASSES))


def config(**settings: Any) -> TrainingConfig:
    defaults = {
        "model": "tiny",
        "data": "tiny",
        "epochs": 4,
        "batch_size": 16,
        "accelerator": "cpu",
        "log_every_steps": 1,
    }
    return TrainingConfig(**{**defaults, **settings})


def trained(
    folder: Path,
    *,
    model: nn.Module | None = None,
    progress: TrainingProgress | None = None,
    resume: bool = False,
    **settings: Any,
) -> TrainingResult:
    progress = progress or TrainingProgress(shown=False)
    return train(config(**settings), folder, resume=resume, model=model or network(), data=data(), progress=progress)


def assert_alike(mine: TrainingResult, theirs: TrainingResult, tolerance: float) -> None:
    """Every step's figures, every epoch's, and the weights."""
    for path in ("steps", "metrics"):
        rows = [read_metrics(getattr(result.run, path)) for result in (mine, theirs)]
        for a, b in zip(*rows, strict=True):
            a.pop("seconds", None), b.pop("seconds", None)
            assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    for name, value in mine.model.state_dict().items():
        torch.testing.assert_close(value, theirs.model.state_dict()[name], rtol=tolerance, atol=tolerance)


def fit(module: ModularModule, **options: Any) -> None:
    """Train by a trainer of one's own, for three epochs of three steps."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=3, **quiet, **options)
    images, labels = data().train.tensors  # type: ignore[attr-defined]
    trainer.fit(module, DataLoader(TensorDataset(images, labels), 14))


def replays(tapes: list[Tape]) -> list[int]:
    return [tape.replays for tape in tapes]


@pytest.mark.parametrize(
    "settings", [{}, STANDARD, {"precision": "bf16-mixed"}], ids=["modular", "standard", "bfloat16"]
)
def test_graphed_training_is_the_eager_one(tmp_path: Path, settings: dict[str, Any], monkeypatch: Any) -> None:
    given = {"route": "grouped", **settings}  # operators that a tape sees never fuse
    eager = trained(tmp_path / "eager", graph="off", **given)
    tapes = play_graphs(monkeypatch, reading=True)
    result = trained(tmp_path / "graphed", **given)
    assert replays(tapes) == [6]  # of 12 steps three are warm-ups, and three of the rest are smaller
    assert_alike(result, eager, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("settings", [{}, STANDARD], ids=["modular", "standard"])
def test_graphed_training_on_a_gpu(tmp_path: Path, settings: dict[str, Any], precision: str, monkeypatch: Any) -> None:
    """The route is the same in both, because a graph fuses norms, which rounds otherwise."""
    given = {"accelerator": "gpu", "precision": precision, "route": "grouped", **settings}
    eager = trained(tmp_path / "eager", graph="off", **given)
    replayed = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replayed.append(1), replay(graph)))
    result = trained(tmp_path / "graphed", graph="on", **given)
    assert len(replayed) == 6
    assert_alike(result, eager, 1e-3 if precision == "32-true" else 3e-2)


def test_a_resumed_graphed_training_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    class StopAfter(TrainingProgress):
        left = 7

        def step(self) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    tapes = play_graphs(monkeypatch, reading=True)
    whole = trained(tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        trained(tmp_path / "run", progress=StopAfter(shown=False))
    resumed = trained(tmp_path / "run", resume=True, graph="off")
    assert_alike(resumed, whole, 1e-5)
    assert replays(tapes) == [6, 3]


def test_gradients_are_scaled_and_clipped_by_the_trainer(monkeypatch: Any) -> None:
    """In float16, where the loss is scaled in the graph, and gradients are unscaled and clipped behind it."""

    def run(graph: str) -> tuple[dict[str, Tensor], float]:
        settings = config(graph=graph, epochs=3, affinity=0.5)
        module = ModularModule(network(), settings)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
        fit(module, gradient_clip_val=0.3, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        return module.model.state_dict(), scaler.get_scale()

    eager, scale = run("off")
    tapes = play_graphs(monkeypatch, reading=True)
    graphed_weights, graphed_scale = run("auto")
    assert replays(tapes) == [6]
    assert graphed_scale == scale == 2.0**14  # nine steps
    for name, value in graphed_weights.items():
        torch.testing.assert_close(value, eager[name], rtol=1e-3, atol=1e-4)


def test_what_cannot_be_captured_is_said_once(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    class Reading(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1.0 if x.sum().item() != 0 else 0.5)

    model = nn.Sequential(Reading(), network())
    play_graphs(monkeypatch)
    trained(tmp_path / "run", model=model, progress=TrainingProgress("run"), **STANDARD)
    printed = capsys.readouterr().err
    assert printed.count("run: steps run eagerly: capturing failed: RuntimeError: operation not permitted") == 1
    module = ModularModule(model, config(graph="on", **STANDARD))
    with pytest.raises(RuntimeError, match="graph: 'on' asked for, but capturing failed"):
        fit(module)


def test_dropout_on_the_host_is_said(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    tapes = play_graphs(monkeypatch)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 3))
    trained(tmp_path / "run", model=model, progress=TrainingProgress("run"), **STANDARD)
    assert "steps run eagerly: no graph where a step draws random numbers on the host" in capsys.readouterr().err
    assert not tapes


def test_nothing_is_said_on_the_cpu_nor_where_no_graph_is_wanted(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    trained(tmp_path / "cpu", progress=TrainingProgress("run"), epochs=1)
    monkeypatch.setattr(graphed, "DEVICE", "cpu")
    trained(tmp_path / "off", progress=TrainingProgress("run"), epochs=1, graph="off")
    assert "eagerly" not in capsys.readouterr().err


def test_no_graph_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="graph: 'on' asked for, but training runs on no CUDA device"):
        trained(tmp_path / "run", graph="on")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="graph: expected one of auto, on, off, got 'yes'"):
        config(graph="yes")


def trainer(**other: Any) -> Any:
    strategy = SingleDeviceStrategy(torch.device("cuda", 0))
    given = {
        "strategy": strategy, "world_size": 1, "accumulate_grad_batches": 1, "precision": "32-true",
        "precision_plugin": Precision(), "_detect_anomaly": False,
    }  # fmt: skip
    return SimpleNamespace(**{**given, **other})


class Other(Precision):
    """Somebody's own."""


@pytest.mark.parametrize(
    ("settings", "other", "reason"),
    [
        ({}, {}, ""),
        ({"graph": "on"}, {}, ""),
        ({}, {"precision_plugin": MixedPrecision("bf16-mixed", "cuda")}, ""),
        ({"graph": "off"}, {}, "--graph off"),
        ({"method": "nemo"}, {}, "no graph with the method nemo, which trains gates"),
        ({}, {"world_size": 2}, "no graph of a training by several processes"),
        ({}, {"strategy": SingleDeviceStrategy(torch.device("cpu"))}, "no graph on a device of type 'cpu'"),
        ({}, {"accumulate_grad_batches": 4}, "no graph where gradients of several batches are added up"),
        ({}, {"precision_plugin": Other(), "precision": "odd"}, "no graph with the precision odd"),
        ({}, {"_detect_anomaly": True}, "no graph with detect_anomaly, which looks at every gradient"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_which_trainings_are_captured(settings: dict[str, Any], other: dict[str, Any], reason: str) -> None:
    assert why_eager(config(**settings), trainer(**other)) == reason


def test_a_strategy_of_several_devices_is_not_captured(monkeypatch: Any) -> None:
    monkeypatch.setattr(graphed, "DEVICE", "cpu")
    strategy = DDPStrategy(parallel_devices=[torch.device("cpu")])
    monkeypatch.setattr(DDPStrategy, "root_device", torch.device("cpu"))
    assert why_eager(config(), trainer(strategy=strategy)) == "no graph with DDPStrategy"
