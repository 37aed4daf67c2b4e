"""Suite "firing": firing counts of one batch over all layers of a model, against the published counting loop."""

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
from moda_kernels import BackendUnavailableError, FiringCounter
from moda_kernels.backends import select

_BACKENDS = ("reference", "torch", "triton", "native")


@dataclass(frozen=True)
class CountInputs:
    """The inputs of a counting case. `silent` activations are all zero, so that no read can be skipped."""

    shapes: inputs.Shapes
    classes: int
    device: torch.device
    silent: bool = False


def counting_case(name: str, about: CountInputs, budget: Budget, *, compiling: bool = False) -> Case:
    """Compare every backend at the given shapes. The bytes count one read of every activation, although a neuron that
    fires early needs less.

    Freed memory is kept. That helps the published loop, whose temporaries cost more in page faults than in arithmetic.
    """
    return Case(
        suite="firing",
        name=name,
        baseline="reference",
        build=lambda: _contenders(about, compiling),
        budget=budget,
        keeps_memory=True,
        moved={"update": inputs.total_bytes(about.shapes)},
        parameters={"samples": about.shapes[0][0], "classes": about.classes, "layers": len(about.shapes)},
    )


def _contenders(about: CountInputs, compiling: bool) -> list[Contender]:
    activations = inputs.activations(about.shapes, about.device)
    if about.silent:
        activations = [torch.zeros_like(activation) for activation in activations]
    labels = inputs.labels(about.shapes[0][0], about.classes, about.device)
    expected = functools.cache(lambda: _count(FiringCounter(about.classes, backend="reference"), activations, labels))
    found = []
    for backend in _BACKENDS:
        try:
            select("count_firings", backend, activations)
        except BackendUnavailableError as error:
            found.append(Contender(backend, skipped=str(error)))
            continue
        found.append(_contender(backend, FiringCounter(about.classes, backend=backend), activations, labels, expected))
    return found + _compiled(about, activations, labels, expected) if compiling else found


def _count(counter: FiringCounter, activations: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    counter.update(activations, labels)
    return [count.clone() for count in counter.counts]


def _contender(
    name: str,
    counter: FiringCounter,
    activations: Sequence[Tensor],
    labels: Tensor,
    expected: Callable[[], list[Tensor]],
) -> Contender:
    def check() -> str:
        return gate.first_difference("counts", _count(counter, activations, labels), expected(), 0)

    return Contender(name, {"update": Timed(lambda _: counter.update(activations, labels))}, check)


def _compiled(
    about: CountInputs, activations: Sequence[Tensor], labels: Tensor, expected: Callable[[], list[Tensor]]
) -> list[Contender]:
    loop = "the published loop selects samples by class and layer, and each selection breaks the graph"
    found = [Contender("reference, compiled", skipped=loop)]
    problem = compile_problem(about.device.type)
    if problem:
        return [*found, Contender("torch, compiled", skipped=problem)]
    counter = FiringCounter(about.classes, backend="torch")
    counter.update = compiled(counter.update)  # type: ignore[method-assign]
    return [*found, _contender("torch, compiled", counter, activations, labels, expected)]
