"""Frozen norms folded into the layer in front of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moda.methods.folding import folded_norms


def used(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model, in evaluation mode and frozen, with statistics and weights that differ for each neuron."""
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for tensor in (norm.running_var, norm.running_mean, norm.weight, norm.bias):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5, generator=generator)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)),
            (5, 5),
        ),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4, affine=False), nn.Flatten()), (5,)),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), ()),
    ],
)
def test_a_norm_becomes_part_of_its_layer(make, shape: tuple[int, ...], dtype: torch.dtype):
    model, x = used(make(), dtype), torch.randn(6, 3, *shape, dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = folded_norms(model, x[:2])
    assert folded is not None
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(folded(x), model(x), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class ReadTwice(nn.Module):
    """Adds what its norm reads to what the norm gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        made: Tensor = y + self.norm(y)
        return made


@pytest.mark.parametrize(
    "model",
    [
        ReadTwice(),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()),
    ],
)
def test_a_norm_that_cannot_be_folded_stays(model: nn.Module):
    assert folded_norms(used(model), torch.randn(2, 3, 4, 4, dtype=torch.float64)) is None
