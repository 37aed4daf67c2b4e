"""Idioms of control flow: blocks that change a mode, arguments with defaults, tests, loops, chance."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.moda._helpers.zoo.entry import CLASSES, Inputs, images, vectors
from tests.moda._helpers.zoo.written.idiom import Small, SmallImages, idiom

# -- blocks and decorators that change a mode


@idiom("no_grad_block")
class NoGradBlock(Small):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = F.relu(self.a(x))
        return self.b(F.relu(h + 0.1))


@idiom("no_grad_decorator")
class NoGradDecorator(Small):
    @torch.no_grad()
    def frozen(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.frozen(x)))


@idiom("set_grad_enabled_by_flag")
class SetGradEnabled(Small):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = True

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.frozen):
            h = F.relu(self.a(x))
        return self.b(F.relu(h * 2))


@idiom("inference_mode_block")
class InferenceModeBlock(Small):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            h = F.relu(self.a(x))
        return self.b(F.relu(h.clone() - 0.1))


@idiom("detached_branch")
class DetachedBranch(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h) + F.relu(self.b(h.detach()))


@idiom("enable_grad_inside_no_grad")
class EnableGradInside(Small):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.a(x)
            with torch.enable_grad():
                h = F.relu(self.a(h[:, :6]))
        return self.b(h)


@idiom("frozen_trunk_in_eval_mode", images(8))
class FrozenTrunk(SmallImages):
    """The trunk's batch norm stays in eval mode whatever `train()` says."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.norm.weight.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenTrunk:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))).mean((2, 3)))


@idiom("autocast_block", vectors(6))
class AutocastBlock(Small):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = F.relu(self.a(x))
        return self.b(h.float())


@idiom("autocast_disabled_block")
class AutocastDisabled(Small):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = F.relu(self.a(x))
            with torch.autocast("cpu", enabled=False):
                return self.b(F.relu(h.float() - 0.05))


@idiom("autocast_decorator")
class AutocastDecorator(Small):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def half(self, x: Tensor) -> Tensor:
        return F.silu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.half(x).float())


# -- arguments with defaults


@idiom("optional_mask")
class OptionalMask(Small):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = F.relu(self.a(x))
        if mask is not None:
            h = h * mask
        return self.b(h)


@idiom("optional_argument_filled_in")
class FilledIn(Small):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is None:
            scale = torch.full((8,), 2.0, dtype=x.dtype)
        return self.b(F.relu(self.a(x)) * scale)


@idiom("keyword_only_flag")
class KeywordOnly(Small):
    def forward(self, x: Tensor, *, temperature: float = 2.0, return_features: bool = False) -> Any:
        h = F.relu(self.a(x))
        logits = self.b(h) / temperature
        return (logits, h) if return_features else logits


@idiom("textual_option")
class TextualOption(Small):
    def forward(self, x: Tensor, how: str = "double") -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h * 2 if how == "double" else h)


@idiom("repeats_argument")
class Repeats(Small):
    def forward(self, x: Tensor, repeats: int = 3) -> Tensor:
        for _ in range(repeats):
            x = F.relu(self.a(x))[:, :6]
        return self.b(F.pad(x, (0, 2)))


def _with_mask(batch: int, generator: Generator) -> Inputs:
    return (torch.randn(batch, 6, generator=generator),), {"mask": torch.rand(8, generator=generator)}


idiom("optional_mask_given", _with_mask)(OptionalMask)


# -- tests on types, shapes and values


@idiom("isinstance_tests")
class IsInstance(Small):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) if isinstance(self.a, nn.Linear) else x
        h = self.act(h) if isinstance(self.act, nn.ReLU) and type(x) is Tensor else h * 0
        return self.b(h) if hasattr(self.b, "weight") else h


@idiom("type_of_own_modules")
class TypeTests(Small):
    def __init__(self) -> None:
        super().__init__()
        self.acts = nn.ModuleList([nn.ReLU(), nn.LeakyReLU(0.1)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        for act in self.acts:
            h = act(h) if act.__class__.__name__.endswith("ReLU") else h * 0
        return self.b(h)


@idiom("asserts_on_shapes", images(8))
class Asserts(SmallImages):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4, "expected images"
        _, channels, height, width = x.shape
        assert channels == 3
        torch._assert(height % 4 == 0 and width % 4 == 0, "sizes")
        y = F.relu(self.a(x))
        if y.shape[2:] != x.shape[2:]:
            raise ValueError("sizes changed")
        return self.b(y.mean((2, 3)))


@idiom("padding_by_size", images(7))
class PaddingBySize(SmallImages):
    def forward(self, x: Tensor) -> Tensor:
        missing = -x.shape[-1] % 4
        if missing:
            x = F.pad(x, (0, missing, 0, missing))
        size = int(x.shape[-1] ** 0.5)
        return self.b(F.adaptive_avg_pool2d(F.relu(self.a(x)), size).mean((2, 3)))


@idiom("value_decides")
class ValueDecides(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h) if h.sum() > 0 else -self.b(h)


@idiom("training_decides")
class TrainingDecides(Small):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if self.training:
            h = F.dropout(F.gelu(self.extra(h)), 0.3)
        return self.b(h)


@idiom("caught_exception")
class CaughtException(Small):
    def forward(self, x: Tensor) -> Tensor:
        try:
            h = F.relu(self.a(x[:, :5]))
        except RuntimeError:
            h = F.relu(self.a(x))
        return self.b(h)


# -- loops, lists


@idiom("loop_over_length")
class LoopOverLength(Small):
    def forward(self, x: Tensor) -> Tensor:
        rows = [F.relu(self.a(x[i])) for i in range(len(x))]
        return self.b(torch.stack(rows))


@idiom("loop_over_sequence", vectors(4, 6))
class LoopOverSequence(Small):
    """A recurrent cell by hand: one activation function called once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.size(0), 8)
        for step in x.unbind(1):
            state = F.relu(self.a(step) + self.again(state))
        return self.b(state)


@idiom("chunks_in_a_list", images(8))
class ChunkList(SmallImages):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()) for _ in range(2))
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = list(F.silu(self.a(x)).chunk(2, 1))
        y.extend(part(y[-1]) for part in self.parts)
        return self.b(F.silu(self.last(torch.cat(y, 1))).mean((2, 3)))


@idiom("dense_list", images(8))
class DenseList(SmallImages):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.b = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = [F.relu(self.a(x))]
        for layer in self.more:
            features.append(F.relu(layer(torch.cat(features, 1))))
        return self.b(torch.cat(features, 1).mean((2, 3)))


@idiom("while_loop")
class WhileLoop(Small):
    def forward(self, x: Tensor) -> Tensor:
        h, rounds = F.relu(self.a(x)), 0
        while rounds < 2:
            h = F.relu(h - 0.01)
            rounds += 1
        return self.b(h)


# -- chance


@idiom("layer_drop")
class LayerDrop(Small):
    """Skips layers by chance in training, as wav2vec2 and BART do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        for layer in self.layers:
            if not self.training or torch.rand(()).item() > 0.3:
                h = F.relu(layer(h))
        return self.b(h)


@idiom("python_random")
class PythonRandom(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h if random.random() < 0.5 else F.gelu(h))


@idiom("stochastic_depth", images(8))
class StochasticDepth(SmallImages):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if self.training:
            kept = torch.bernoulli(h.new_full((h.size(0), 1, 1, 1), 0.5))
            h = h + kept * F.relu(self.c(h))
        return self.b(h.mean((2, 3)))


@idiom("noise_in_forward")
class Noise(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x) + 0.1 * torch.randn(x.size(0), 8))
        return self.b(h + torch.randn_like(h) if self.training else h)


@idiom("mixup_inside")
class MixupInside(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if self.training:
            h = 0.7 * h + 0.3 * h[torch.randperm(h.size(0))]
        return self.b(h)


@idiom("randomised_relu")
class Rrelu(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.rrelu(self.a(x), training=self.training))


# -- recomputed in the backward pass


@idiom("checkpoint_non_reentrant")
class Checkpointed(Small):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(self.block, F.relu(self.a(x)), use_reentrant=False))


@idiom("checkpoint_reentrant")
class CheckpointedReentrant(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(self.block, F.relu(self.a(x)), use_reentrant=True))


@idiom("checkpoint_of_a_function")
class CheckpointedFunction(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(lambda h: F.relu(self.a(h)), x, use_reentrant=False))
