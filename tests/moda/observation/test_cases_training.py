"""Observed models in training: gradients are those of one plain model, under checkpoints and over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import moda
from moda_kernels import ModularLoss, modular_losses
from tests.moda_kernels._helpers.rank_pool import RankPool

IMAGES = torch.linspace(-1, 1, 6 * 3 * 64, dtype=torch.float64).view(6, 3, 8, 8).mul(50).sin()
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).double()  # fmt: skip


def oracle(images: Tensor, labels: Tensor) -> list[Tensor]:
    """Gradients of the task's and the modular loss, with activations read off by hand."""
    model, seen, x = network(), [], images
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.ReLU | nn.GELU):
            seen.append(x)
    terms = modular_losses(seen, labels, backend="torch")
    loss = F.cross_entropy(x, labels) + terms.affinity + terms.dispersion + 0.3 * terms.compactness
    return list(torch.autograd.grad(loss, list(model.parameters())))


def check_gradients(model: nn.Module, wanted: list[Tensor]) -> None:
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradient, rtol=1e-8, atol=1e-10)


def around(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


class Within(nn.Module):
    """Checkpoints its parts itself."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for start in (0, 2):
            x = checkpoint(self.layers[start : start + 2], x, use_reentrant=False)
        return self.layers[4:](x)


@pytest.mark.parametrize("route", ["auto", "grouped", "fused"])
@pytest.mark.parametrize("kind", ["none", "around", "within"])
def test_checkpoints_change_no_gradient(kind: str, route: Any) -> None:
    model: nn.Module = Within(network()) if kind == "within" else network()
    taps = moda.observe(model, route=route)
    for _ in range(2):  # the probe may itself be checkpointed
        model.zero_grad(set_to_none=True)
        outputs = around(model, IMAGES) if kind == "around" else model(IMAGES)
        activations = taps.activations()
        assert len(activations) == 2
        (F.cross_entropy(outputs, LABELS) + ModularLoss()(activations, LABELS)).backward()
        check_gradients(model, oracle(IMAGES, LABELS))


class Reentrant(Within):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=True)


@pytest.mark.parametrize("kind", ["around", "within"])
def test_a_reentrant_checkpoint_is_named(kind: str) -> None:
    model, x = network(), IMAGES.clone().requires_grad_()
    within = Reentrant(model)
    taps = moda.observe(within if kind == "within" else model)
    if kind == "within":
        within(x)
    else:
        model(x), taps.activations()
        checkpoint(model, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        taps.activations()


# -- over ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    pool = RankPool(2, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


def train_on_a_rank(rank: int, shares: list[int], wrapper: str, route: Any) -> list[Tensor]:
    """Gradients of a rank's share of the batch; the task's loss is weighted so that ranks add up to the batch's mean."""
    model = network()
    taps = moda.observe(model, route=route)
    runner: nn.Module = model
    if wrapper == "ddp":
        runner = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,))).set_force_sum_reduction_for_comms(True)
    images, labels = IMAGES.split(shares)[rank], LABELS.split(shares)[rank]
    outputs = runner(images)
    task = F.cross_entropy(outputs, labels, reduction="sum") / len(LABELS) * 2  # the wrappers take the mean over ranks
    loss = task + ModularLoss(group="world", num_classes=3)(taps.activations(), labels)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]  # type: ignore[union-attr, misc]


@pytest.mark.parametrize("route", ["auto", "grouped"])
@pytest.mark.parametrize("shares", [[3, 3], [5, 1], [6, 0]])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_ranks_train_as_one_process_over_the_whole_batch(
    ranks: RankPool, wrapper: str, shares: list[int], route: Any
) -> None:
    wanted = oracle(IMAGES, LABELS)
    for gradients in ranks(train_on_a_rank, shares, wrapper, route):
        for got, gradient in zip(gradients, wanted, strict=True):
            assert torch.allclose(got, gradient, rtol=1e-8, atol=1e-10)
