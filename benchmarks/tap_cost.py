"""What a tap costs the host: `python -m benchmarks.tap_cost`.

Models of 20 activation calls on a tensor of 24 numbers, so that next to nothing is computed, are run plain and
observed in turn. Printed, and written to benchmarks/results/tap-cost.json, are microseconds for each activation call
over the plain one's: forward alone (with the reading of what was recorded), and forward and backward, where a loss that
computes nothing hands a gradient to the model's output and to every activation that it was given. Beside them stands
what a `torch.autograd.Function` of Python costs that computes nothing, in the place of a fused tap.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moda

CALLS = 20
ROUNDS = 8
REPEATS = 60
RESULTS = Path(__file__).parent / "results" / "tap-cost.json"


class Floor(torch.autograd.Function):
    """Allocates what a fused ReLU gives, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        y, pooled = torch.empty_like(x), x.new_empty(x.shape[:2])
        ctx.save_for_backward(y)
        return y, pooled

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dpooled: Tensor | None) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


class NoLoss(torch.autograd.Function):
    """A loss that computes nothing: gradients are there from the beginning, as a loss's own work would make them."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *values: Tensor) -> Tensor:
        ctx.gradients = gradients
        return gradients[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


class Modules(nn.Module):
    """Calls activation modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.activations = nn.ModuleList(nn.ReLU() for _ in range(CALLS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for activation in self.activations:
            x = activation(x)
        return x


class Functions(Modules):
    """Calls the function."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(CALLS):
            x = torch.relu(x)
        return x


def contenders(kind: type[Modules], x: Tensor) -> dict[str, Callable[[], list[Tensor]]]:
    """What gives the tensors that a backward pass begins at, by name."""
    plain, grouped, fused, floor = kind(), kind(), kind(), kind()
    of_grouped = moda.observe(grouped, route="grouped", example=x)
    of_fused = moda.observe(fused, route="fused", example=x)

    def without_computing() -> list[Tensor]:
        value, rows = floor.first(x), []
        for _ in range(CALLS):
            value, pooled = Floor.apply(value)
            rows.append(pooled)
        return [value, *rows]

    return {
        "plain": lambda: [plain(x)],
        "grouped": lambda: [grouped(x), *of_grouped.activations()],
        "fused": lambda: [fused(x), *of_fused.activations()],
        "floor of a Python autograd function": without_computing,
    }


def least(run: Callable[[], Any]) -> float:
    """Microseconds for each activation call: the least of some repeats, which other processes disturb least."""
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best / CALLS * 1e6


def backward(run: Callable[[], list[Tensor]]) -> Callable[[], None]:
    """Forward and backward."""
    gradients = [torch.ones_like(value) for value in run()]

    def both() -> None:
        NoLoss.apply(gradients, *run()).backward()

    return both


def measured(kind: type[Modules]) -> dict[str, dict[str, float]]:
    """The least of all rounds, by contender and direction; contenders take turns."""
    x = torch.randn(2, 3, 2, 2, requires_grad=True)
    times: dict[str, dict[str, float]] = {}
    for _ in range(ROUNDS):
        for name, run in contenders(kind, x).items():
            for direction, timed in (("forward", run), ("both", backward(run))):
                held = times.setdefault(name, {})
                held[direction] = min(held.get(direction, float("inf")), least(timed))
    return times


def main() -> None:
    torch.set_num_threads(1)
    rows = {}
    for kind in (Modules, Functions):
        times = measured(kind)
        for name, of_name in times.items():
            row = {direction: round(value - times["plain"][direction], 2) for direction, value in of_name.items()}
            rows[f"{kind.__name__.lower()}, {name}"] = (
                row if name != "plain" else {k: round(v, 2) for k, v in of_name.items()}
            )
    for name, row in rows.items():
        print(f"{name}: forward {row['forward']:+.2f} us, forward and backward {row['both']:+.2f} us")
    notes = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }
    RESULTS.write_text(json.dumps({"microseconds over plain": rows, **notes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
