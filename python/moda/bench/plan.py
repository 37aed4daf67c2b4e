"""Decides which cases a run has, quick or full, on the CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from moda.bench import scaling
from moda.bench.attribution import attribution_case
from moda.bench.case import Case
from moda.bench.clock import Budget
from moda.bench.counting import CountInputs, counting_case
from moda.bench.decomposition import PassInputs, composition_case, decomposition_case
from moda.bench.host import host_case
from moda.bench.inputs import CIFAR, IMAGENET, MODELS, Shapes, tap_shapes
from moda.bench.losses import LossInputs, loss_case
from moda.bench.methods import method_cases
from moda.bench.norm import norm_case
from moda.bench.pooling import pooling_case
from moda.bench.training_step import StepInputs, step_case
from moda_kernels.batch_norm import ACTIVATIONS

SUITES = (
    "step",
    "loss",
    "relu_pool",
    "norm",
    "firing",
    "decomposition",
    "attribution",
    "composition",
    "methods",
    "scaling",
    "host",
)

_POOLED_CIFAR = ((64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2))
_POOLED_IMAGENET = ((64, 224, 224), (128, 112, 112), (512, 14, 14))
"""Neurons and positions of the taps that ReLU with pooling is measured at: one of each stage of VGG16 and ResNet18."""
_NARROW = ((32, 56, 56), (144, 28, 28), (576, 7, 7))
"""Those of networks with other activations: of MobileNetV2, at a batch of 64."""


@dataclass(frozen=True)
class Plan:
    """The extent of a run.

    A CPU gets ImageNet shapes at a sixteenth of the batch (they are far larger than its caches all the same), and
    `torch.compile` for kernels of one model only, no whole steps, which it compiles for minutes: a full run stays
    under 15 minutes on two cores.
    """

    device: torch.device
    quick: bool

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def budget(self) -> Budget:
        """The budget of one phase of a kernel's case. Its contenders are warm, because the check has run each."""
        if self.quick:
            return Budget(least=3, most=10, seconds=0.5, warmups=1)
        return Budget(least=5, most=50, seconds=2.0 if self.gpu else 1.0, warmups=1)

    @property
    def step_budget(self) -> Budget:
        """The budget of a training step. Ratios near 1 need many rounds; measuring memory has warmed it up."""
        if self.quick:
            return Budget(least=3, most=3, seconds=0, warmups=0)
        return Budget(least=15, most=50, seconds=10.0, warmups=3) if self.gpu else Budget(7, 15, 40.0, warmups=0)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes that kernels are measured in: half precision only where the hardware has it."""
        return (torch.float32, torch.bfloat16) if self.gpu else (torch.float32,)

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models to measure."""
        return ("mobilenet",) if self.quick else MODELS

    @property
    def imagenet_batch(self) -> int:
        """The batch size at ImageNet shapes; the published one is 64."""
        return 64 if self.gpu else 4

    def compiles(self, model: str) -> bool:
        """Whether torch.compile is a contender."""
        return not self.quick and (self.gpu or model == "mobilenet")

    def cases(self, suites: tuple[str, ...] = SUITES) -> list[Case]:
        """Return the cases of the suites, in this order."""
        makers = {
            "step": self._step,
            "loss": self._loss,
            "relu_pool": self._relu_pool,
            "norm": self._norm,
            "firing": self._firing,
            "decomposition": self._decomposition,
            "attribution": self._attribution,
            "composition": self._composition,
            "methods": lambda: method_cases(self.device, self.quick, self.step_budget),
            "scaling": self._scaling,
            "host": self._host,
        }
        return [case for suite in suites for case in makers[suite]()]

    def _step(self) -> Iterator[Case]:
        batch = 32 if self.quick else 128
        for model in self.models:
            about = StepInputs(model, batch, CIFAR, self.device)
            # compiling takes minutes per model on a CPU
            yield step_case(about, self.step_budget, compiling=self.gpu and not self.quick)
            if self.gpu and not self.quick:
                yield step_case(replace(about, autocast=torch.bfloat16), self.step_budget, compiling=True)
                large = replace(about, batch=64, image_size=IMAGENET)
                yield step_case(large, self.step_budget, compiling=True)
                yield step_case(replace(large, autocast=torch.bfloat16), self.step_budget, compiling=True)

    def _shapes(self) -> Iterator[tuple[str, str, Shapes]]:
        """Return model, size and shapes of every combination that kernels are measured at."""
        for model in self.models:
            yield model, "CIFAR", tap_shapes(model, CIFAR, 128)
            if not self.quick:
                yield model, "ImageNet", tap_shapes(model, IMAGENET, self.imagenet_batch)

    def _loss(self) -> Iterator[Case]:
        for model, size, shapes in self._shapes():
            for dtype in self.dtypes:
                # A class has four samples, and never fewer than two: the published formulas give NaN without a pair of
                # each kind.
                classes = 10 if size == "CIFAR" else max(2, shapes[0][0] // 4)
                about = LossInputs(shapes, classes, self.device, dtype)
                name = f"{model} {size} {str(dtype).removeprefix('torch.')}"
                compiling = self.compiles(model) and (self.gpu or size == "CIFAR")
                yield loss_case("loss", name, about, self.budget, compiling=compiling)

    def _relu_pool(self) -> Iterator[Case]:
        shapes = _POOLED_CIFAR[:1] if self.quick else _POOLED_CIFAR
        named = [(128, *shape) for shape in shapes]
        if not self.quick:
            named += [(self.imagenet_batch, *shape) for shape in _POOLED_IMAGENET]
        for shape in named:
            for dtype in self.dtypes:
                compiling = not self.quick and (self.gpu or shape == named[0])
                yield pooling_case(shape, self.device, self.budget, dtype=dtype, compiling=compiling)

    def _norm(self) -> Iterator[Case]:
        shapes = _POOLED_CIFAR[:1] if self.quick else _POOLED_CIFAR
        for shape in shapes:
            for dtype in self.dtypes:
                for residual in (False,) if self.quick else (False, True):
                    yield norm_case((128, *shape), self.device, self.budget, dtype=dtype, residual=residual)
        for shape in () if self.quick else _NARROW:
            for dtype in self.dtypes:
                for activation in ACTIVATIONS[1:]:
                    yield norm_case((64, *shape), self.device, self.budget, dtype=dtype, activation=activation)

    def _firing(self) -> Iterator[Case]:
        for model, size, shapes in self._shapes():
            for classes in (10,) if self.quick else (10, 100):
                about = CountInputs(shapes, classes, self.device)
                compiling = self.compiles(model) and size == "CIFAR" and classes == 10
                yield counting_case(f"{model} {size} {classes} classes", about, self.budget, compiling=compiling)
            if not self.quick:
                silent = CountInputs(shapes, 10, self.device, silent=True)
                yield counting_case(f"{model} {size} all zero", silent, self.budget)

    def _host(self) -> Iterator[Case]:
        for model in self.models:
            yield host_case(model, self.budget if self.quick else Budget(least=10, most=30, seconds=20.0, warmups=2))

    def _passes(self) -> Iterator[PassInputs]:
        for model in self.models:
            yield PassInputs(model, 32 if self.quick else 128, CIFAR, self.device)

    def _decomposition(self) -> Iterator[Case]:
        budget = self.budget if self.quick else Budget(least=5, most=50, seconds=20.0, warmups=1)
        for about in self._passes():
            yield decomposition_case(about, budget)

    def _attribution(self) -> Iterator[Case]:
        budget = self.budget if self.quick else Budget(least=11, most=25, seconds=20.0, warmups=1)
        for about in self._passes():
            yield attribution_case(about, budget)

    def _composition(self) -> Iterator[Case]:
        for about in self._passes():
            yield composition_case(about, (0.1, 0.25, 0.5), self.budget)

    def _scaling(self) -> Iterator[Case]:
        axes = {"batch": scaling.BATCHES, "classes": scaling.CLASSES, "layers": scaling.LAYERS}
        if not self.gpu:  # PyTorch's CUDA allocator keeps memory itself
            axes[scaling.FRESH_MEMORY] = scaling.FRESH_BATCHES
        if self.quick:
            axes = {"batch": (128, 512, 2048)}
        yield from scaling.scaling_cases(self.device, self.budget, dict(axes))
