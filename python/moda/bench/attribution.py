"""Suite "attribution": what attributions cost over the forward and backward pass that they need."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moda.bench import gate
from moda.bench.case import Case, Contender
from moda.bench.clock import Budget, Timed
from moda.bench.decomposition import PassInputs
from moda.decomposition.attribution import attribute
from moda.decomposition.targets import margin
from moda.observation.taps import observe
from moda_kernels import BackendUnavailableError

PLAIN = "forward and backward"
_CLASSES = 10
_BACKENDS = ("torch", "triton", "native")


def attribution_case(about: PassInputs, budget: Budget) -> Case:
    """Compare `moda.attribute` by every backend with the plain pass: a forward, and a backward as far as it has to go.

    The plain pass derives the same margin, makes no gradients of parameters, and ends at the first ReLU's output, which
    is the first activation that an attribution is of. The first forward pass, which finds the taps, is not measured.
    """
    return Case(
        suite="attribution",
        name=about.name,
        baseline=PLAIN,
        build=lambda: _contenders(about),
        budget=budget,
        parameters=about.parameters,
    )


def _contenders(about: PassInputs) -> list[Contender]:
    model, (batch, *_) = about.make()
    model.eval().requires_grad_(False)
    plain = copy.deepcopy(model)
    taps = observe(model)

    def attributions(backend: str, samples: int | None = None) -> list[Tensor]:
        loader = [tuple(tensor[:samples] for tensor in batch)]
        return list(attribute(taps, loader, _CLASSES, backend=backend, progress=False).scores.values())

    expected = functools.cache(lambda: attributions("torch"))
    found = [Contender(PLAIN, {"pass": Timed(_plain_pass(plain, *batch))})]
    for backend in _BACKENDS:
        try:
            attributions(backend, samples=1)
        except BackendUnavailableError as error:
            found.append(Contender(backend, skipped=str(error)))
            continue
        found.append(_contender(backend, functools.partial(attributions, backend), expected))
    return found


def _plain_pass(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[object], None]:
    first = next(module for module in model.modules() if isinstance(module, nn.ReLU))

    def run(_: object) -> None:
        hook = first.register_forward_hook(_start_of_the_graph)
        try:
            margin(model(images), labels).sum().backward()
        finally:
            hook.remove()

    return run


def _start_of_the_graph(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
    if not output.requires_grad:
        output.requires_grad_()


def _contender(name: str, run: Callable[[], list[Tensor]], expected: Callable[[], list[Tensor]]) -> Contender:
    def check() -> str:
        return gate.first_difference("attributions", run(), expected(), gate.TOLERANCES[torch.float32])

    return Contender(name, {"pass": Timed(lambda _: run())}, check)
