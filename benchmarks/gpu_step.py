"""The price of a training step on an NVIDIA GPU: `python -m benchmarks.gpu_step`, written to
`benchmarks/results/gpu/<device>-step.json`.

Every way to train takes the same steps (forward, cross entropy, modular loss, backward, SGD with momentum) in turn. A
way has three numbers:

    host      microseconds until the step is enqueued, by an idle GPU
    steady    microseconds of a step of many in a row, with no synchronisation between them
    graph     microseconds of a replay of the step captured in a CUDA graph: what the GPU itself takes

A case is written as soon as it is measured, and with `--warm` all of them run once and nothing is written: what Triton
compiles is then in its cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moda
from benchmarks.gpu_files import DEVICE, GpuResults, describe, options
from moda import models
from moda.bench import inputs
from moda.observation.run import replayed
from moda_kernels import ModularLoss

WARMUPS, ROUNDS = 4, 3
HOST_STEPS, STEADY_STEPS = 5, 10


@dataclass(frozen=True)
class Case:
    """A network, its images and how it computes."""

    model: str
    dtype: str
    channels_last: bool
    image_size: int = 32
    batch: int = 128

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{self.model} {self.image_size} px batch {self.batch} {self.dtype} {layout}"


def cases(quick: bool) -> Iterator[Case]:
    """CIFAR shapes and one of ImageNet; without `quick` all of both."""
    for model in inputs.MODELS:
        for dtype in ("float32", "bfloat16"):
            for channels_last in (False, True):
                case = Case(model, dtype, channels_last)
                yield case
                if not quick or case == Case("resnet18", "bfloat16", True):
                    yield replace(case, image_size=224, batch=64)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "standard": lambda _: None,
    "accelerated": lambda model: (moda.accelerate(model), None)[1],
    "grouped": lambda model: moda.observe(model, route="grouped", fuse_norms=False),
    "fused": lambda model: moda.observe(model, route="fused", fuse_norms=False),
    "ours": lambda model: moda.observe(model),
}
"""How a model is prepared; what comes back is its taps, if it has any."""


class Step:
    """One way's training step, which repeats on the same batch."""

    def __init__(self, case: Case, way: str) -> None:
        torch.manual_seed(0)
        device = torch.device(DEVICE)
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        self.model = models.create(case.model, num_classes=10, image_size=case.image_size)
        self.model.to(device, memory_format=layout).train()
        self.images = inputs.images(case.batch, case.image_size, device).contiguous(memory_format=layout)
        self.labels = inputs.labels(case.batch, 10, device)
        self.half = case.dtype == "bfloat16"
        self.loss = ModularLoss()
        self.taps = WAYS[way](self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.half):
            value = F.cross_entropy(self.model(self.images), self.labels)
        if self.taps is not None:
            value = value + self.loss(self.taps.activations(), self.labels)
        value.backward()
        self.optimizer.step()
        return value

    def capture(self) -> None:
        """Warm up on a side stream and capture the step."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), replayed():
            for _ in range(WARMUPS):
                self()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with replayed(), torch.cuda.graph(graph, stream=stream):
            self()
        self.graph = graph


def host(step: Step) -> float:
    """Seconds until a step is enqueued, the median of a few."""
    seconds = []
    for _ in range(HOST_STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def in_a_row(call: Callable[[], object]) -> float:
    """Seconds a call, of many without synchronisation."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(STEADY_STEPS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / STEADY_STEPS


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """A row for every way: medians in microseconds over rounds in which each had its turn, memory, and problems."""
    rows, steps = [], {}
    for way in WAYS:
        row = {"case": str(case), **asdict(case), "way": way}
        rows.append(row)
        try:
            steps[way] = step = Step(case, way)
            for _ in range(WARMUPS):
                loss = step().detach()  # a graph that is kept ties its leaves to this stream, which is not captured
            row["loss"] = float(loss)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            row["step_bytes"] = torch.cuda.max_memory_allocated() - before
            step.capture()
        except Exception as error:
            row["problem"] = f"{type(error).__name__}: {str(error)[:300]}"
    taken: dict[str, dict[str, list[float]]] = {way: {"host": [], "steady": [], "graph": []} for way in steps}
    for _ in range(rounds):
        for way, step in steps.items():
            taken[way]["host"].append(host(step))
            taken[way]["steady"].append(in_a_row(step))
            if step.graph is not None:
                taken[way]["graph"].append(in_a_row(step.graph.replay))
    for row in rows:
        for name, seconds in taken.get(row["way"], {}).items():
            if seconds:
                row[name] = round(statistics.median(seconds) * 1e6, 1)
    return rows


def main() -> None:
    arguments = options(__doc__, "CIFAR shapes and one of ImageNet")
    results = GpuResults("step", describe())
    for case in cases(arguments.quick):
        rows = measure(case, 0 if arguments.warm else ROUNDS)
        torch.cuda.empty_cache()
        if arguments.warm:
            print(case, [row["problem"] for row in rows if "problem" in row], flush=True)
            continue
        results.add(rows)
        standard = rows[0]
        for row in rows:
            ratios = " ".join(
                f"{name} {row[name]:8.0f} us ({row[name] / standard[name]:.2f})"
                for name in ("host", "steady", "graph")
                if name in row and name in standard
            )
            memory = row.get("step_bytes", 0) / max(1, standard.get("step_bytes", 1))
            print(
                f"{row['case']:<52} {row['way']:<12} {ratios} memory {memory:.2f} {row.get('problem', '')}", flush=True
            )


if __name__ == "__main__":
    main()
