"""Suite "loss": the three modular losses, forward, backward and both, of all layers of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moda.bench import gate, inputs
from moda.bench.case import Case, Contender
from moda.bench.clock import Budget, Timed
from moda.bench.compiled import compile_problem, compiled
from moda.bench.machine import memory_bytes
from moda_kernels import BackendUnavailableError, ModularLoss, reference
from moda_kernels.backends import NAMES, select

PHASES = ("forward", "backward", "both")

_PUBLISHED_BYTES_PER_PAIR = 64
"""What the published formulas hold per pair and layer: similarity, indices, masks, and what autograd keeps of them."""


@dataclass(frozen=True)
class LossInputs:
    """The shapes, labels and dtype of a loss case."""

    shapes: inputs.Shapes
    classes: int
    device: torch.device
    dtype: torch.dtype = torch.float32

    @property
    def samples(self) -> int:
        """The number of samples, N."""
        return self.shapes[0][0]

    @property
    def bytes(self) -> int:
        """The bytes of all activations."""
        return inputs.total_bytes(self.shapes, self.dtype)

    def moved(self) -> dict[str, int]:
        """The bytes to move: forward reads every activation, backward reads it again for its sign and writes its
        gradient.
        """
        return {"forward": self.bytes, "backward": 2 * self.bytes, "both": 3 * self.bytes}


class Oracle:
    """The published formulas in float64. They run layer by layer, so that a large case holds one layer only."""

    def __init__(self, activations: Sequence[Tensor], labels: Tensor, loss: ModularLoss) -> None:
        self.losses = torch.zeros(3, dtype=torch.float64, device=labels.device)
        self.gradients = []
        weights = torch.tensor([*loss.weights], dtype=torch.float64, device=labels.device) / len(activations)
        for activation in activations:
            layer = activation.detach().double().requires_grad_()
            terms = torch.stack(reference.published_losses([layer], labels))
            (gradient,) = torch.autograd.grad((terms * weights).sum(), layer)
            self.losses += terms.detach() / len(activations)
            self.gradients.append(gradient.float())

    def problem(self, losses: Sequence[Tensor], gradients: Sequence[Tensor]) -> str:
        """Say what is wrong with a contender's results, or return ""."""
        wide = gate.difference("losses", torch.stack([*losses]), self.losses, gate.TOLERANCES[losses[0].dtype])
        tolerance = gate.TOLERANCES[gradients[0].dtype]
        return wide or gate.first_difference("gradients", gradients, self.gradients, tolerance)


def loss_case(
    suite: str,
    name: str,
    about: LossInputs,
    budget: Budget,
    *,
    phases: Sequence[str] = PHASES,
    compiling: bool = False,
    keeps_memory: bool = False,
    parameters: dict[str, int | float | str] | None = None,
) -> Case:
    """Compare every backend at the given shapes, with `compiling` also torch.compile of the plain ones."""
    described: dict[str, int | float | str] = {
        "samples": about.samples,
        "classes": about.classes,
        "layers": len(about.shapes),
        "dtype": str(about.dtype).removeprefix("torch."),
    }
    return Case(
        suite=suite,
        name=name,
        baseline="reference",
        build=lambda: _contenders(about, phases, compiling),
        budget=budget,
        moved={phase: moved for phase, moved in about.moved().items() if phase in phases},
        keeps_memory=keeps_memory,
        parameters={**described, **(parameters or {})},
    )


def _contenders(about: LossInputs, phases: Sequence[str], compiling: bool) -> list[Contender]:
    activations = [a.requires_grad_() for a in inputs.activations(about.shapes, about.device, about.dtype)]
    labels = inputs.labels(about.samples, about.classes, about.device)
    oracle = functools.cache(lambda: Oracle(activations, labels, ModularLoss()))
    too_large = _too_large(about)
    found = []
    for backend in NAMES:
        found.append(_contender(backend, ModularLoss(backend=backend), activations, labels, oracle, phases))
        if backend == "reference" and too_large:
            found[-1] = Contender(backend, skipped=too_large)
    if compiling:
        problem = compile_problem(about.device.type)
        for backend in ("reference", "torch"):
            name = f"{backend}, compiled"
            if problem:
                found.append(Contender(name, skipped=problem))
                continue
            loss = compiled(ModularLoss(backend=backend))
            found.append(_contender(name, loss, activations, labels, oracle, phases))
    return found


def _too_large(about: LossInputs) -> str:
    needed = _PUBLISHED_BYTES_PER_PAIR * len(about.shapes) * about.samples**2 // 2
    free = memory_bytes(about.device) // 2
    return f"needs about {needed >> 20} MiB for its pairs, {free >> 20} MiB are free for it" if needed > free else ""


def _contender(
    name: str,
    loss: Callable[[Sequence[Tensor], Tensor], Tensor],
    activations: Sequence[Tensor],
    labels: Tensor,
    oracle: Callable[[], Oracle],
    phases: Sequence[str],
) -> Contender:
    backend = getattr(loss, "backend", "torch")
    try:
        select("grouped_losses", backend, activations)
    except BackendUnavailableError as error:
        return Contender(name, skipped=str(error))

    def forward(_: object = None) -> Tensor:
        return loss(activations, labels)

    def backward(value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, activations)

    def check() -> str:
        gradients = backward(forward())
        return oracle().problem(loss.last, gradients)  # type: ignore[attr-defined]

    timed = {
        "forward": Timed(forward),
        "backward": Timed(backward, prepare=forward),
        "both": Timed(lambda _: backward(forward())),
    }
    return Contender(name, {phase: timed[phase] for phase in phases}, check)
