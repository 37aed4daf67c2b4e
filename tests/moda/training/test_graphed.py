"""A step in a CUDA graph trains as the eager one does; on the CPU it is the eager one."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import moda
from moda.training.graphed import CHECKPOINTING, GraphedStep
from moda_kernels import ModularLoss
from tests.moda._helpers.tape import play_graphs

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STEPS = 9


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*layers, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 4))


def batches(device: str, sizes: tuple[int, ...] = (12,) * STEPS):
    generator = torch.Generator().manual_seed(3)
    for size in sizes:
        x = torch.randn(size, 3, 8, 8, generator=generator)
        yield x.to(device), torch.randint(4, (size,), generator=generator).to(device)


class Training:
    """A model, its loss and its optimiser; deterministic convolutions, so that two of them agree."""

    def __init__(self, device: str, modular: bool, momentum: float = 0.9) -> None:
        torch.backends.cudnn.deterministic = True
        self.model = network().to(device)
        self.taps = moda.observe(self.model, fuse_norms=False) if modular else None
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=momentum)
        self.modular_loss = ModularLoss()

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value = F.cross_entropy(self.model(x), y)
        return value if self.taps is None else value + self.modular_loss(self.taps.activations(), y)


def run(training: Training, step, data, scheduler=None) -> list[float]:
    values = []
    for x, y in data:
        values.append(float(step(x, y)))
        if scheduler is not None:
            scheduler.step()
    return values


def eager(training: Training, clip_norm: float | None = None):
    def step(x, y):
        training.optimizer.zero_grad()
        value = training.loss(x, y)
        value.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(training.model.parameters(), clip_norm)
        training.optimizer.step()
        return value.detach()

    return step


def assert_equal_training(mine: Training, theirs: Training, values: list[float], expected: list[float]) -> None:
    assert values == pytest.approx(expected, rel=2e-4)
    for a, b in zip(mine.model.state_dict().values(), theirs.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("modular", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_trains_as_the_eager_loop_does(device, modular, clip_norm):
    """With a schedule of the learning rate, and a shorter batch among the others."""
    sizes = (12,) * 5 + (7,) + (12,) * 3
    mine, theirs = Training(device, modular), Training(device, modular)
    step = GraphedStep(mine.model, mine.loss, mine.optimizer, clip_norm=clip_norm)
    schedule = torch.optim.lr_scheduler.ExponentialLR
    values = run(mine, step, batches(device, sizes), schedule(mine.optimizer, 0.9))
    expected = run(theirs, eager(theirs, clip_norm), batches(device, sizes), schedule(theirs.optimizer, 0.9))
    assert_equal_training(mine, theirs, values, expected)
    assert step.graphed == (device == "cuda"), step.reason


@pytest.mark.parametrize("device", DEVICES)
def test_scales_gradients(device):
    mine, theirs = Training(device, True), Training(device, True)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    step = GraphedStep(mine.model, mine.loss, mine.optimizer, scaler=scaler, clip_norm=1.0)
    assert_equal_training(
        mine, theirs, run(mine, step, batches(device)), run(theirs, eager(theirs, 1.0), batches(device))
    )


@pytest.mark.gpu
def test_evaluation_between_steps_and_a_copy_change_nothing():
    mine, theirs = Training("cuda", True), Training("cuda", True)
    step = GraphedStep(mine.model, mine.loss, mine.optimizer)
    values = []
    for index, (x, y) in enumerate(batches("cuda")):
        values.append(float(step(x, y)))
        if index == 5:
            average = copy.deepcopy(mine.model)
            mine.model.eval()
            with torch.no_grad():
                mine.model(x)
            mine.model.train()
            assert all(
                torch.equal(a, b)
                for a, b in zip(average.state_dict().values(), mine.model.state_dict().values(), strict=True)
            )
    assert_equal_training(mine, theirs, values, run(theirs, eager(theirs), batches("cuda")))


@pytest.mark.gpu
def test_a_model_that_synchronises_runs_eagerly_and_keeps_its_random_numbers():
    mine = Training("cuda", False)

    def loss(x, y):
        value = mine.loss(x, y) + 0 * F.dropout(x, 0.5).sum()
        return value * (1.0 if value.item() > -1 else 0.0)

    step = GraphedStep(mine.model, loss, mine.optimizer)
    theirs = Training("cuda", False)
    values = run(mine, step, batches("cuda"))
    assert "capturing failed" in step.reason
    assert not step.graphed
    torch.rand(3, device="cuda")
    assert_equal_training(mine, theirs, values, run(theirs, eager(theirs), batches("cuda")))


def test_why_there_is_no_graph_is_said():
    training = Training("cpu", False)
    step = GraphedStep(training.model, training.loss, training.optimizer)
    run(training, step, batches("cpu"))
    assert step.reason == "no graph on the CPU"
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(training.model)
        assert "DistributedDataParallel" in GraphedStep(wrapped, training.loss, training.optimizer).reason
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"warmups": 0}, ValueError, "warmups: .* got 0"),
        ({"warmups": 1.5}, ValueError, "warmups: expected a whole number of at least 1, got 1.5"),
        ({"clip_norm": -1.0}, ValueError, "clip_norm: .* got -1.0"),
        ({"clip_norm": "1"}, ValueError, "clip_norm: expected a number above 0 or None, got '1'"),
        ({"model": "net"}, TypeError, "model: expected a torch.nn.modules.module.Module, got str"),
        ({"loss": 3}, TypeError, "loss: expected a function of the tensors of a batch, got int"),
        ({"optimizer": None}, TypeError, "optimizer: expected a torch.optim.optimizer.Optimizer, got NoneType"),
    ],
    ids=str,
)
def test_bad_arguments(options, error, message):
    training = Training("cpu", False)
    given = {"model": training.model, "loss": training.loss, "optimizer": training.optimizer, **options}
    with pytest.raises(error, match=message):
        GraphedStep(**given)


def test_what_is_no_batch_and_no_loss():
    training = Training("cpu", False)
    with pytest.raises(TypeError, match="batch: expected tensors, got str at 1"):
        GraphedStep(training.model, training.loss, training.optimizer)(torch.ones(1, 3, 8, 8), "label")
    rows = GraphedStep(training.model, training.model, training.optimizer)
    with pytest.raises(TypeError, match=r"loss: expected a 0-d tensor, got shape \(2, 4\)"):
        rows(torch.ones(2, 3, 8, 8))


@pytest.mark.gpu
def test_a_capture_that_fails_behind_the_model_leaves_nothing_recorded():
    mine = Training("cuda", True)

    def loss(x, y):
        logits = mine.model(x)
        scale = 1.0 if logits.sum().item() else 2.0
        return scale * (F.cross_entropy(logits, y) + mine.modular_loss(mine.taps.activations(), y))

    step = GraphedStep(mine.model, loss, mine.optimizer)
    theirs = Training("cuda", True)
    values = run(mine, step, batches("cuda"))
    assert "capturing failed" in step.reason
    assert_equal_training(mine, theirs, values, run(theirs, eager(theirs), batches("cuda")))


@pytest.mark.parametrize("modular", [False, True])
def test_captures_and_replays(modular, monkeypatch):
    """A capture on the CPU: forward and backward are written down once, and the optimiser steps on their results."""
    tapes = play_graphs(monkeypatch, reading=modular)
    sizes = (12,) * 5 + (7,) + (12,) * 3
    mine, theirs = Training("cpu", modular), Training("cpu", modular)
    step = GraphedStep(mine.model, mine.loss, mine.optimizer, clip_norm=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR
    values = run(mine, step, batches("cpu", sizes), schedule(mine.optimizer, 0.9))
    expected = run(theirs, eager(theirs, 0.5), batches("cpu", sizes), schedule(theirs.optimizer, 0.9))
    assert_equal_training(mine, theirs, values, expected)
    assert step.graphed
    assert [tape.replays for tape in tapes] == [5]  # three warm-ups, and the shorter batch


def test_gives_what_else_the_loss_gives(monkeypatch):
    play_graphs(monkeypatch)
    mine = Training("cpu", False)

    def loss(x, y):
        logits = mine.model(x)
        return F.cross_entropy(logits, y), logits.argmax(1), logits

    step = GraphedStep(mine.model, loss, mine.optimizer)
    for index, (x, y) in enumerate(batches("cpu")):
        before = [parameter.clone() for parameter in mine.model.parameters()]
        value, predicted, logits = step.backward(x, y)
        assert all(map(torch.equal, before, mine.model.parameters()))  # the optimiser is the caller's
        assert not logits.requires_grad
        assert torch.equal(predicted, logits.argmax(1))
        torch.testing.assert_close(value, F.cross_entropy(logits, y))
        mine.optimizer.step()
        assert step.graphed == (index >= 3)


def test_a_model_that_was_changed_runs_eagerly(monkeypatch):
    """Frozen layers, another mode of some layers, and parameters in other memory are not what was captured."""
    tapes = play_graphs(monkeypatch)
    mine, theirs = Training("cpu", False), Training("cpu", False)
    step = GraphedStep(mine.model, mine.loss, mine.optimizer)
    data = list(batches("cpu", (12,) * 12))

    def changed(index, model):
        if index == 6:
            model[0].weight.requires_grad_(False)
        if index == 7:
            model[0].weight.requires_grad_(True)
            model[1].eval()
        if index == 8:
            model[1].train()
            model[7].bias.data = model[7].bias.data.clone()

    for index, (x, y) in enumerate(data):
        changed(index, mine.model)
        changed(index, theirs.model)
        assert float(step(x, y)) == pytest.approx(float(eager(theirs)(x, y)), rel=1e-5)
    assert tapes[0].replays == 3


def test_capturing_that_fails_is_said_and_trains_on(monkeypatch):
    play_graphs(monkeypatch)
    mine, theirs = Training("cpu", False), Training("cpu", False)

    def loss(x, y):
        value = mine.loss(x, y)
        return value if value.item() > -1 else -value

    step = GraphedStep(mine.model, loss, mine.optimizer)
    values = run(mine, step, batches("cpu"))
    assert step.reason == "capturing failed: RuntimeError: operation not permitted when stream is capturing"
    assert_equal_training(mine, theirs, values, run(theirs, eager(theirs), batches("cpu")))


HOST = {"python": random.random, "torch": lambda: torch.rand(()), "numpy": lambda: np.random.rand()}  # noqa: NPY002


@pytest.mark.parametrize("draw", HOST.values(), ids=HOST)
def test_random_numbers_of_the_host_are_seen(draw, monkeypatch):
    tapes = play_graphs(monkeypatch)
    mine = Training("cpu", False)
    step = GraphedStep(mine.model, lambda x, y: mine.loss(x, y) * (1 if draw() < 2 else 0), mine.optimizer)
    run(mine, step, batches("cpu"))
    assert step.reason == "no graph where a step draws random numbers on the host"
    assert not tapes


@pytest.mark.parametrize("name", CHECKPOINTING)
def test_gradient_checkpointing_is_seen(name):
    training = Training("cpu", False)
    setattr(training.model[3], name, True)
    assert "gradient checkpointing" in GraphedStep(training.model, training.loss, training.optimizer).reason


def test_a_tuple_that_holds_no_loss():
    training = Training("cpu", False)
    step = GraphedStep(training.model, lambda x, y: (training.loss(x, y), 3), training.optimizer)
    with pytest.raises(TypeError, match="loss: expected tensors, got Tensor, int"):
        step(*next(batches("cpu")))
