"""Idioms of state: buffers changed in forward, parameters made of others, modules shared or made late."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.moda._helpers.zoo.entry import CLASSES, images
from tests.moda._helpers.zoo.written.idiom import Small, SmallImages, idiom


class Buffered(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.ones(8))


@idiom("step_counter")
class StepCounter(Buffered):
    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.b(F.relu(self.a(x)))


@idiom("step_counter_in_training_decides")
class StepDecides(Buffered):
    """Warms up: the first two steps in training go another way."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps.add_(1)
        h = F.relu(self.a(x))
        return self.b(h if self.steps > 2 else h * 0.5)


@idiom("moving_average_in_place")
class MovingAverage(Buffered):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        self.average.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return self.b(h / (self.average + 1))


@idiom("moving_average_assigned")
class MovingAverageAssigned(Buffered):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        return self.b(h - self.average)


@idiom("moving_average_under_no_grad")
class MovingAverageLerp(Buffered):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        with torch.no_grad():
            self.average.lerp_(h.mean(0), 0.1)
        return self.b(h - self.average)


@idiom("queue_of_features")
class Queue(Buffered):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        start, n = int(self.steps) % 8, h.size(0)
        self.queue[start : start + n] = h.detach()
        self.steps[...] = start + n
        return self.b(h) + self.queue.mean()


@idiom("data_dependent_initialisation")
class ActNorm(Buffered):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if not self.ready:
            self.average.copy_(h.detach().std(0))
            self.ready.fill_(True)
        return self.b(F.relu(h / self.average))


@idiom("parameter_initialised_from_data")
class LateParameter(Small):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.ready = nn.Parameter(torch.ones(8)), False

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if not self.ready:
            self.scale.data = 1 / h.detach().std(0)
            self.ready = True
        return self.b(F.relu(h * self.scale))


@idiom("plain_attribute_counts")
class PlainAttribute(Small):
    """State that is no buffer: a number and a list on the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = F.relu(self.a(x))
        self.seen = [*self.seen[-3:], h.mean().item()]
        return self.b(h * (1 + 0.1 * self.calls))


@idiom("codebook")
class Codebook(Buffered):
    """Vector quantisation with a codebook that moves in training, straight-through."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        nearest = torch.cdist(h, self.codes).argmin(1)
        if self.training:
            with torch.no_grad():
                self.codes[nearest] = 0.9 * self.codes[nearest] + 0.1 * h
        quantised = self.codes[nearest]
        return self.b(h + (quantised - h).detach())


class FrozenNorm(nn.Module):
    """A batch norm of buffers alone, as detection models have."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.5), ("bias", 0.1), ("mean", 0.2), ("var", 2.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.mean * scale)[:, None, None]


@idiom("frozen_batch_norm", images(8))
class FrozenBatchNorm(SmallImages):
    def __init__(self) -> None:
        super().__init__()
        self.norm = FrozenNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))).mean((2, 3)))


@idiom("functional_batch_norm", images(8))
class FunctionalBatchNorm(SmallImages):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        h = F.batch_norm(self.a(x), self.mean, self.var, training=self.training)
        return self.b(F.relu(h, inplace=True).mean((2, 3)))


@idiom("batch_norm_called_twice", images(8))
class SharedNorm(SmallImages):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.c = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.a(x)))
        return self.b(F.relu(self.norm(self.c(h))).mean((2, 3)))


@idiom("norm_activation_in_one_class", images(8))
class NormAct(SmallImages):
    """A batch norm that applies the activation itself, as timm's."""

    def __init__(self) -> None:
        super().__init__()

        class BatchNormAct(nn.BatchNorm2d):
            def __init__(self, channels: int) -> None:
                super().__init__(channels)
                self.act = nn.ReLU(inplace=True)

            def forward(self, x: Tensor) -> Tensor:
                return self.act(super().forward(x))

        self.norm = BatchNormAct(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).mean((2, 3)))


@idiom("spectral_norm")
class SpectralNorm(Small):
    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.spectral_norm(self.a)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


@idiom("weight_norm")
class WeightNorm(SpectralNorm):
    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Linear(6, 8))


@idiom("old_spectral_norm")
class OldSpectralNorm(SpectralNorm):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.spectral_norm(nn.Linear(6, 8))


@idiom("pruned_by_torch")
class Pruned(Small):
    def __init__(self) -> None:
        super().__init__()
        prune.random_unstructured(self.a, "weight", 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


@idiom("weights_made_in_forward")
class MadeWeights(Small):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.gain = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.ones(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        w = self.w / self.w.norm(dim=1, keepdim=True) * self.gain
        return self.b(F.relu(F.linear(x, w)) + F.relu(x @ self.w.T))


@idiom("tied_weights")
class Tied(Small):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(8, 8)
        self.d = nn.Linear(8, 8)
        self.d.weight = self.c.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.d(F.relu(self.c(F.relu(self.a(x)))))))


@idiom("one_activation_module_everywhere")
class OneActivation(Small):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.also = self.act

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        for layer in self.layers:
            h = self.also(layer(h))
        return self.b(h)


@idiom("shared_block")
class SharedBlock(Small):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(self.block(self.block(h)) + self.block(h))


@idiom("cached_positions")
class CachedPositions(Small):
    """Builds a table at the first forward and keeps it as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or self.table.dtype != x.dtype:
            self.table = torch.linspace(0, 1, 8, dtype=x.dtype)
        return self.b(F.relu(self.a(x) + self.table))


@idiom("instance_forward_replaced")
class ForwardReplaced(Small):
    """Somebody put another forward on the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        plain = self.act.forward
        self.act.forward = lambda x: plain(x) * 2  # type: ignore[method-assign]

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardReplaced:
        made = ForwardReplaced()
        made.load_state_dict(self.state_dict())
        return made.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


@idiom("lazy_layers", images(8))
class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES)
        )
        self.layers(torch.zeros(2, 3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@idiom("scripted_part")
class Scripted(Small):
    def __init__(self) -> None:
        super().__init__()
        self.part = torch.jit.trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.zeros(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.part(F.relu(self.a(x))))


@idiom("hooks_of_the_users")
class Hooked(Small):
    """The user's own hooks change values before and behind an activation module."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.act.register_forward_pre_hook(_shift)
        self.act.register_forward_hook(_double)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


def _shift(module: nn.Module, args: Any) -> Any:
    return (args[0] + 0.1,)


def _double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2
