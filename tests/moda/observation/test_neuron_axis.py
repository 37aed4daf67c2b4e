"""The axis of neurons is that of the layer that made them, whatever moved it since."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda.observation.taps import observe


class Chain(nn.Module):
    def __init__(self, first: nn.Module, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.between = first, between

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.between(self.first(x)))


AXES: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor], tuple[int, ...], int]] = {
    "linear on tokens": (nn.Linear(5, 7), lambda x: x, (2, 3, 5), -1),
    "behind dropout and scaling": (nn.Linear(5, 7), lambda x: F.dropout(x, 0.5, False) * 2 + 1, (2, 3, 5), -1),
    "layer norm": (nn.LayerNorm(5), lambda x: x, (2, 3, 5), -1),
    "layer norm over everything": (nn.Sequential(nn.Conv1d(3, 7, 1), nn.LayerNorm((7, 5))), lambda x: x, (2, 3, 5), 1),
    "functional layer norm": (nn.Identity(), lambda x: F.layer_norm(x, (5,)), (2, 3, 5), -1),
    "rms norm": (nn.RMSNorm(5), lambda x: x, (2, 3, 5), -1),
    "linear, function": (nn.Identity(), lambda x: F.linear(x, torch.ones(7, 5)), (2, 3, 5), -1),
    "conv1d": (nn.Conv1d(3, 7, 1), lambda x: x, (2, 3, 5), 1),
    "conv1d to tokens": (nn.Conv1d(3, 7, 1), lambda x: x.transpose(1, 2), (2, 3, 5), -1),
    "tokens to channels": (nn.Linear(5, 7), lambda x: x.transpose(-1, -2), (2, 3, 5), 1),
    "tokens to channels, function": (nn.Linear(5, 7), lambda x: torch.transpose(x, 1, 2), (2, 3, 5), 1),
    "permuted to channels last": (nn.Conv2d(3, 7, 1), lambda x: x.permute(0, 2, 3, 1), (2, 3, 5, 4), -1),
    "permuted twice": (
        nn.Conv2d(3, 7, 1),
        lambda x: x.permute((0, 2, 3, 1)).permute(0, 3, 1, 2),
        (2, 3, 5, 4),
        1,
    ),
    "batch norm": (nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(3)), lambda x: x, (2, 3, 5), 1),
    "flattened": (nn.Linear(5, 7), lambda x: x.flatten(1), (2, 3, 5), 1),
    "sum with an embedding": (nn.Linear(5, 7), lambda x: torch.ones(1, 3, 7) + x, (2, 3, 5), -1),
}


@pytest.mark.parametrize("case", AXES)
def test_the_axis_follows_from_the_producer(case: str) -> None:
    first, between, shape, dim = AXES[case]
    model = Chain(first, between)
    taps = observe(model)
    y = model(torch.randn(shape))
    (seen,) = taps.activations()
    assert torch.equal(seen, y if dim == 1 else y.movedim(-1, 1))
    assert seen._base is not None or seen is y or dim == 1  # a view, not a copy


def encoder() -> nn.Module:
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), 2, enable_nested_tensor=False
    )


def rotated(x: Tensor) -> Tensor:
    turned = torch.view_as_complex(torch.stack((x, x), -1)) * torch.ones((), dtype=torch.complex64)
    return torch.view_as_real(turned.conj_physical())[..., 1]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Chain(nn.Sequential(nn.Linear(5, 6), encoder()), lambda x: x + 1), (2, 3, 5)),
        (Chain(nn.Linear(5, 6), rotated), (2, 3, 5)),
    ],
    ids=["layers that are left whole", "complex numbers"],
)
def test_the_axes_are_known_behind(model: nn.Module, shape: tuple[int, ...]) -> None:
    taps = observe(model.eval())
    y = model(torch.randn(shape))
    (seen,) = taps.activations()
    assert torch.equal(seen, y.movedim(-1, 1))
