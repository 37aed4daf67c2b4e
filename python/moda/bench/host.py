"""Suite "host": what a training step costs the host in calls, with Triton's launches stubbed (`stubbed.py`).

The networks are narrow and the batch is of two small images, so that next to nothing is computed, and steps are taken
in a row, as training does. Standard steps are PyTorch's on the CPU: its dispatch and autograd are those of a GPU, its
convolutions, and the drivers' calls that are missing, are not. So the difference between ways to train says more than
their ratio.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moda import models
from moda.bench import inputs, stubbed
from moda.bench.case import Case, Contender
from moda.bench.clock import Budget, Timed
from moda.observation.taps import Route, observe
from moda_kernels import ModularLoss

STANDARD = "standard"
STEPS = 10
"""Taken for each sample, so that all but the first find the processor's caches as steps in a row do."""
_SAMPLES, _WIDTH = 2, 1 / 16
_ROUTES: dict[str, tuple[Route, bool]] = {
    "grouped": ("grouped", False),
    "fused": ("fused", False),
    "fused, norms": ("fused", True),
}


def host_case(model: str, budget: Budget) -> Case:
    """Compare steps of every route, ten in a row, with standard ones (forward, cross entropy, loss, backward, SGD)."""
    taps = len(inputs.tap_shapes(model, inputs.CIFAR, _SAMPLES))
    return Case(
        suite="host",
        name=f"{model} {STEPS} steps, launches stubbed",
        baseline=STANDARD,
        build=lambda: _contenders(model),
        budget=budget,
        parameters={"model": model, "steps": STEPS, "taps": taps},
    )


def _contenders(model: str) -> list[Contender]:
    reason = stubbed.problem()
    if reason:
        return [Contender(name, skipped=reason) for name in (STANDARD, *_ROUTES)]
    phase = f"{STEPS} steps"
    found = [Contender(STANDARD, {phase: Timed(_repeated(_step(model, None)))})]
    for name, way in _ROUTES.items():
        with stubbed.stubbed_driver():
            step = _step(model, way)
            step()  # the probe
        found.append(Contender(name, {phase: Timed(_stubbed(_repeated(step)))}))
    return found


def _step(model: str, way: tuple[Route, bool] | None) -> Callable[[], None]:
    torch.manual_seed(0)
    device = torch.device("cpu")
    network = models.create(model, num_classes=10, image_size=inputs.CIFAR, width=_WIDTH).train()
    images, labels = inputs.images(_SAMPLES, inputs.CIFAR, device), inputs.labels(_SAMPLES, 10, device)
    taps = None if way is None else observe(network, route=way[0], fuse_norms=way[1])
    loss, optimizer = ModularLoss(), torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        value: Tensor = F.cross_entropy(network(images), labels)
        if taps is not None:
            value = value + loss(taps.activations(), labels)
        value.backward()
        optimizer.step()

    return step


def _stubbed(steps: Callable[[object], None]) -> Callable[[object], None]:
    def over_the_stub(state: object) -> None:
        with stubbed.stubbed_driver():
            steps(state)

    return over_the_stub


def _repeated(step: Callable[[], None]) -> Callable[[object], None]:
    def steps(_: object) -> None:
        torch.set_flush_denormal(True)  # stubbed kernels leave any number, and the processor takes long over denormals
        try:
            for _ in range(STEPS):
                step()
        finally:
            torch.set_flush_denormal(False)

    return steps
