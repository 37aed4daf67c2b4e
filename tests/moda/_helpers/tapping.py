"""Models and tools for the tests of taps."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moda.observation.taps import Taps
from moda_kernels import modular_losses


class Spy(TorchFunctionMode):
    """Keeps a copy of what each activation function gives, called by a module or not, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = function(*args, **(kwargs or {}))
        if function in (F.relu, F.hardtanh, F.relu6, F.hardswish):
            self.outputs.append(output.clone())
        return output


def spied(model: nn.Module, x: Tensor) -> list[Tensor]:
    with Spy() as spy:
        model(x)
    return spy.outputs


class Lambda(nn.Module):
    """conv -> the given function -> sum over positions."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x)).flatten(1)


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 5, 3),
        nn.Hardswish(inplace=True),
        nn.Dropout(0.5, inplace=True),
        nn.Flatten(),
        nn.Linear(5 * 4 * 4, 7),
        nn.ReLU(),
        nn.Linear(7, 4),
    )


def images(n: int = 4, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size)


class Tokens(nn.Module):
    """A block of a vision transformer: patches, norm, attention over tokens, MLP with GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.patches(x)).flatten(2).transpose(1, 2)
        z = self.norm(x)
        x = x + self.attention(z, z, z, need_weights=False)[0]
        x = F.silu(x + self.mlp(x))
        return self.head(x.mean(1))


def closed_form_loss(model: nn.Module, of: Taps, x: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), labels)
    terms = modular_losses(of.activations(), labels, backend="torch")
    return loss + terms.affinity + terms.dispersion + 0.3 * terms.compactness
