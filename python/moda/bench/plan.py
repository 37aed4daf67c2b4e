"""Which cases a run has, quick or full, on the CPU or on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from moda.bench import scaling
from moda.bench.case import Case
from moda.bench.clock import Budget
from moda.bench.counting import CountInputs, counting_case
from moda.bench.decomposition import PassInputs, composition_case, decomposition_case
from moda.bench.inputs import CIFAR, IMAGENET, MODELS, Shapes, tap_shapes
from moda.bench.losses import LossInputs, loss_case
from moda.bench.pooling import pooling_case
from moda.bench.training_step import StepInputs, step_case

SUITES = ("step", "loss", "relu_pool", "firing", "decomposition", "composition", "scaling")

_LARGE = 16 << 20
"""Bytes of a tensor from which ReLU with pooling is to cost no more than ReLU alone."""


@dataclass(frozen=True)
class Plan:
    """How much to run.

    A CPU gets ImageNet shapes at a quarter of the batch, which its memory holds together with float64 oracles, and
    `torch.compile` for one model only, which takes it most of a minute per case.
    """

    device: torch.device
    quick: bool

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def budget(self) -> Budget:
        """Of one phase of a kernel's case."""
        if self.quick:
            return Budget(least=3, most=10, seconds=1.0, warmups=1)
        return Budget(least=5, most=50, seconds=2.0)

    @property
    def step_budget(self) -> Budget:
        """Of a training step: ratios near 1 need rounds, not seconds."""
        if self.quick:
            return Budget(least=3, most=3, seconds=1.0, warmups=1)
        return Budget(
            least=15 if self.gpu else 9, most=50 if self.gpu else 15, seconds=20.0, warmups=3 if self.gpu else 1
        )

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of kernels: half precision where the hardware has it."""
        return (torch.float32, torch.bfloat16) if self.gpu else (torch.float32,)

    @property
    def models(self) -> tuple[str, ...]:
        """Model names."""
        return ("mobilenet",) if self.quick else MODELS

    @property
    def imagenet_batch(self) -> int:
        """Published: 64."""
        return 64 if self.gpu else 16

    def compiles(self, model: str) -> bool:
        """Whether torch.compile takes part."""
        return not self.quick and (self.gpu or model == "mobilenet")

    def cases(self, suites: tuple[str, ...] = SUITES) -> list[Case]:
        """The cases of the suites, in this order."""
        makers = {
            "step": self._step,
            "loss": self._loss,
            "relu_pool": self._relu_pool,
            "firing": self._firing,
            "decomposition": self._decomposition,
            "composition": self._composition,
            "scaling": self._scaling,
        }
        return [case for suite in suites for case in makers[suite]()]

    def _step(self) -> Iterator[Case]:
        batch = 32 if self.quick else 128
        for model in self.models:
            about = StepInputs(model, batch, CIFAR, self.device)
            yield step_case(about, self.step_budget, compiling=self.compiles(model))
            if self.gpu and not self.quick:
                yield step_case(replace(about, autocast=torch.bfloat16), self.step_budget, compiling=True)
                large = replace(about, batch=64, image_size=IMAGENET)
                yield step_case(large, self.step_budget, compiling=True)
                yield step_case(replace(large, autocast=torch.bfloat16), self.step_budget, compiling=True)

    def _shapes(self) -> Iterator[tuple[str, str, Shapes]]:
        """Model, size and shapes of every combination that kernels are measured at."""
        for model in self.models:
            yield model, "CIFAR", tap_shapes(model, CIFAR, 128)
            if not self.quick:
                yield model, "ImageNet", tap_shapes(model, IMAGENET, self.imagenet_batch)

    def _loss(self) -> Iterator[Case]:
        for model, size, shapes in self._shapes():
            for dtype in self.dtypes:
                about = LossInputs(shapes, 10 if size == "CIFAR" else 100, self.device, dtype)
                name = f"{model} {size} {str(dtype).removeprefix('torch.')}"
                compiling = self.compiles(model) and (self.gpu or size == "CIFAR")
                yield loss_case("loss", name, about, self.budget, compiling=compiling)

    def _relu_pool(self) -> Iterator[Case]:
        shapes = {shape for _, _, shapes in self._shapes() for shape in shapes if len(shape) > 2}
        shapes = {shape for shape in shapes if shape[0] == 128 or shape[1:] in {(64, 224, 224), (512, 14, 14)}}
        by_size = sorted(shapes, key=lambda shape: (-math.prod(shape), shape))
        if self.quick:
            by_size = by_size[:1]
        for shape in by_size:
            for dtype in self.dtypes:
                compiling = not self.quick and 4 * math.prod(shape) >= _LARGE and shape[0] == 128
                yield pooling_case(shape, self.device, self.budget, dtype=dtype, compiling=compiling)

    def _firing(self) -> Iterator[Case]:
        for model, size, shapes in self._shapes():
            for classes in (10,) if self.quick else (10, 100):
                about = CountInputs(shapes, classes, self.device)
                compiling = self.compiles(model) and size == "CIFAR" and classes == 10
                yield counting_case(f"{model} {size} {classes} classes", about, self.budget, compiling=compiling)
            if not self.quick:
                silent = CountInputs(shapes, 10, self.device, silent=True)
                yield counting_case(f"{model} {size} 10 classes, all zero", silent, self.budget)

    def _passes(self) -> Iterator[PassInputs]:
        for model in self.models:
            yield PassInputs(model, 32 if self.quick else 128, CIFAR, self.device)

    def _decomposition(self) -> Iterator[Case]:
        budget = self.budget if self.quick else Budget(least=7, most=50, seconds=4.0)
        for about in self._passes():
            yield decomposition_case(about, budget)

    def _composition(self) -> Iterator[Case]:
        for about in self._passes():
            yield composition_case(about, (0.1, 0.25, 0.5), self.budget)

    def _scaling(self) -> Iterator[Case]:
        axes = {"batch": scaling.BATCHES, "classes": scaling.CLASSES, "layers": scaling.LAYERS}
        if self.quick:
            axes = {"batch": (128, 512, 2048)}
        yield from scaling.scaling_cases(self.device, self.budget, dict(axes))
