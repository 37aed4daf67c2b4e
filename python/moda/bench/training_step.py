"""Suite "step": a whole training step, standard and modular, side by side."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda import models
from moda.bench import gate, inputs
from moda.bench.case import Case, Contender
from moda.bench.clock import Budget, Timed
from moda.bench.compiled import compile_problem, compiled
from moda.bench.memory import held_bytes, peak_bytes
from moda.observation.taps import accelerate, observe
from moda_kernels import BackendUnavailableError, ModularLoss
from moda_kernels.backends import select

STANDARD = "standard"
ACCELERATED = "accelerated"
"""Standard training with `moda.accelerate`: what the modular loss costs by itself is ours over this."""
_CHECKED_SAMPLES = 16
_CHECKED_BATCHES = 6
"""Of which a model with fused norms must be right on one: where the input of a ReLU is 0 but for rounding, its gradient
passes or does not, and in a late layer one element is a tenth of a gradient. Wrong arithmetic shows on every batch."""
_TOLERANCES = {None: 1e-2, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Of parameter gradients, by autocast: the same convolutions in another order of sums, through batch norm over few
samples; in half precision every activation's gradient is rounded before it goes on."""
_NOISE = 1e-5
"""Of the largest gradient of the model."""


@dataclass(frozen=True)
class StepInputs:
    """The model, batch and dtype of a step case."""

    model: str
    batch: int
    image_size: int
    device: torch.device
    classes: int = 10
    autocast: torch.dtype | None = None


@dataclass(frozen=True)
class Recipe:
    """The way a contender trains. Without a loss it is standard training."""

    name: str
    loss: ModularLoss | None = None
    route: Literal["grouped", "fused", "auto"] = "grouped"
    compiled: bool = False
    fuse_norms: bool = False


def step_case(about: StepInputs, budget: Budget, *, compiling: bool = False) -> Case:
    """Compare whole steps (forward, cross entropy, modular loss, backward, SGD with momentum) of each way to train."""
    dtype = str(about.autocast).removeprefix("torch.") if about.autocast else "float32"
    return Case(
        suite="step",
        name=f"{about.model} {about.image_size} px batch {about.batch} {dtype}",
        baseline=STANDARD,
        build=lambda: _contenders(about, compiling),
        budget=budget,
        parameters={"model": about.model, "batch": about.batch, "image_size": about.image_size, "dtype": dtype},
    )


def _recipes(compiling: bool) -> list[Recipe]:
    recipes = [
        Recipe(STANDARD),
        Recipe(ACCELERATED, fuse_norms=True),
        Recipe("reference", ModularLoss(backend="reference")),
        Recipe("grouped", ModularLoss(), "grouped"),
        Recipe("fused", ModularLoss(), "fused"),
        Recipe("ours", ModularLoss(), "auto", fuse_norms=True),
    ]
    if compiling:
        recipes.append(Recipe(f"{STANDARD}, compiled", compiled=True))
        recipes.append(Recipe("ours, compiled", ModularLoss(), "auto", compiled=True, fuse_norms=True))
    return recipes


def _contenders(about: StepInputs, compiling: bool) -> list[Contender]:
    torch.manual_seed(0)
    model = models.create(about.model, num_classes=about.classes, image_size=about.image_size).to(about.device)
    torch.compiler.reset()
    gradients = functools.cache(lambda loss, batch: _gradients(about, model, Recipe("reference", loss), batch))
    return [_contender(about, model, recipe, gradients) for recipe in _recipes(compiling)]


def _contender(
    about: StepInputs,
    model: nn.Module,
    recipe: Recipe,
    expected: Callable[[ModularLoss | None, int], list[Tensor]],
) -> Contender:
    problem = _problem(about, recipe)
    if problem:
        return Contender(recipe.name, skipped=problem)
    step = Step(about, copy.deepcopy(model), recipe)

    def check() -> str:
        if recipe.loss is None and not recipe.fuse_norms:
            return ""  # the baseline is right by definition
        problems = []
        for batch in range(_CHECKED_BATCHES if recipe.fuse_norms else 1):
            wanted = expected(None if recipe.loss is None else _REFERENCE, batch)
            # The bias of a convolution in front of a batch norm has no effect: its gradient is rounding noise.
            noise = _NOISE * max(float(gradient.abs().amax()) for gradient in wanted)
            got = _gradients(about, model, recipe, batch)
            problem = gate.first_difference("gradients", got, wanted, _TOLERANCES[about.autocast], noise)
            if not problem:
                return ""
            problems.append(problem)
        return problems[0]

    return Contender(recipe.name, {"step": Timed(lambda _: step())}, check, memory=step.peak_bytes)


_REFERENCE = ModularLoss(backend="reference")


def _problem(about: StepInputs, recipe: Recipe) -> str:
    if recipe.compiled and compile_problem(about.device.type):
        return compile_problem(about.device.type)
    if recipe.loss is None:
        return ""
    try:
        select("grouped_losses", recipe.loss.backend, [torch.empty(1, 1, device=about.device)])
    except BackendUnavailableError as error:
        return str(error)
    return ""


def _gradients(about: StepInputs, model: nn.Module, recipe: Recipe, batch: int) -> list[Tensor]:
    """Return the parameter gradients of a step on a batch of few samples."""
    step = Step(about, copy.deepcopy(model), recipe, samples=_CHECKED_SAMPLES, skipped=batch * _CHECKED_SAMPLES)
    if recipe.fuse_norms:
        step.loss()  # the probe, which fuses no norm
    step.loss().backward()
    return [parameter.grad for parameter in step.model.parameters() if parameter.grad is not None]


class Step:
    """A training step that repeats on the same batch."""

    def __init__(
        self, about: StepInputs, model: nn.Module, recipe: Recipe, samples: int | None = None, skipped: int = 0
    ) -> None:
        self.about = about
        self.modular_loss = recipe.loss
        batch = samples or about.batch
        self.images = inputs.images(skipped + batch, about.image_size, about.device)[skipped:]
        self.labels = inputs.labels(batch, about.classes, about.device)
        model.train()
        self.model = model
        self.taps = None
        if recipe.loss is not None:
            self.taps = observe(model, route=recipe.route, fuse_norms=recipe.fuse_norms)
        elif recipe.fuse_norms:
            accelerate(model)
        # Small steps keep the weights near where they began: a diverged model would time arithmetic on NaN.
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        self.loss = compiled(self._loss) if recipe.compiled else self._loss

    def _loss(self) -> Tensor:
        with torch.autocast(self.about.device.type, self.about.autocast, enabled=self.about.autocast is not None):
            logits = self.model(self.images)
            loss = F.cross_entropy(logits, self.labels)
        if self.modular_loss is not None and self.taps is not None:
            loss = loss + self.modular_loss(self.taps.activations(), self.labels)
        return loss

    def __call__(self) -> None:
        """Run the step."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def peak_bytes(self) -> int:
        """Return the memory at the peak of a step in bytes: what training holds between steps, and what a step adds."""
        self()  # the first step makes the optimizer's state
        self.optimizer.zero_grad()
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        held = [*self.model.parameters(), *self.model.buffers(), *(v for v in state if isinstance(v, Tensor))]
        return held_bytes([*held, self.images, self.labels]) + peak_bytes(self, self.about.device)
