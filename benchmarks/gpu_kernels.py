"""How near kernels come to a GPU's memory bandwidth: `python -m benchmarks.gpu_kernels`, written to
`benchmarks/results/gpu/<device>-kernels.json`.

A CUDA graph of one operation on as many buffers as do not fit in the cache together is replayed; the time of a replay
over the number of buffers is the operation's, without the host's. Beside it stand a copy and PyTorch's own operation
on the same buffers. Bandwidth counts what an ideal kernel reads and writes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_files import DEVICE, GpuResults, describe, options
from moda_kernels import BackendUnavailableError, norm_relu_pool, pool, relu_pool
from moda_kernels.backends import select

BACKEND = "triton"
CIFAR = ((128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8), (128, 512, 4, 4), (128, 512, 2, 2))
IMAGENET = ((64, 64, 112, 112), (64, 256, 56, 56), (64, 512, 14, 14), (64, 512, 7, 7))
CACHES = 3
"""The buffers of a graph are this many times the L2 cache."""
MOST_BUFFERS, REPLAYS, ROUNDS = 64, 5, 5


@dataclass(frozen=True)
class Operation:
    """What is measured: prepared for one buffer, it is a call; `passes` are its reads and writes of the activation."""

    name: str
    passes: int
    prepare: Callable[[Tensor], Callable[[], object]]
    needs: str = ""


def _copy(x: Tensor) -> Callable[[], object]:
    target = torch.empty_like(x)
    return lambda: target.copy_(x)


def _backward(forward: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[Tensor], Callable[[], object]]:
    def prepare(x: Tensor) -> Callable[[], object]:
        leaf = x.detach().requires_grad_()
        outputs = forward(leaf)
        gradients = [torch.randn_like(output) for output in outputs]
        return lambda: torch.autograd.grad(outputs, leaf, gradients, retain_graph=True)

    return prepare


def _forward(forward: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[[Tensor], Callable[[], object]]:
    def prepare(x: Tensor) -> Callable[[], object]:
        return lambda: forward(x)

    return prepare


def _relu_pool(x: Tensor) -> tuple[Tensor, ...]:
    return relu_pool(x, backend=BACKEND)


def _relu(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.relu(x),)


def _pool(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(pool([x], backend=BACKEND))


def _numbers(x: Tensor) -> list[Tensor]:
    return [torch.full((x.shape[1],), value, device=x.device) for value in (0.0, 1.0, 0.8, 0.1)]


def _norm_relu(x: Tensor) -> tuple[Tensor, ...]:
    mean, var, weight, bias = _numbers(x)
    return (torch.relu_(F.batch_norm(x, mean, var, weight, bias, training=True)),)


def _norm_relu_pool(x: Tensor) -> tuple[Tensor, ...]:
    return norm_relu_pool(x, *_numbers(x), training=True, backend=BACKEND)


OPERATIONS = (
    Operation("copy", 2, _copy),
    Operation("relu", 2, _forward(_relu)),
    Operation("relu_pool", 2, _forward(_relu_pool), "relu_pool"),
    Operation("pool", 1, _forward(_pool), "pool"),
    Operation("relu backward", 3, _backward(_relu)),
    Operation("relu_pool backward", 3, _backward(_relu_pool), "relu_pool"),
    Operation("pool backward", 2, _backward(_pool), "pool"),
    Operation("batch norm, relu", 3, _forward(_norm_relu)),
    Operation("norm_relu_pool", 3, _forward(_norm_relu_pool), "norm_relu_pool"),
    Operation("batch norm, relu backward", 5, _backward(_norm_relu)),
    Operation("norm_relu_pool backward", 5, _backward(_norm_relu_pool), "norm_relu_pool"),
)


def shapes(quick: bool) -> Iterator[tuple[tuple[int, ...], torch.dtype, bool]]:
    """Shape, dtype and whether it is channels_last."""
    chosen = (CIFAR[0], CIFAR[2], IMAGENET[1], IMAGENET[2]) if quick else CIFAR + IMAGENET
    for shape in chosen:
        for dtype in (torch.float32, torch.bfloat16):
            for channels_last in (False, True):
                yield shape, dtype, channels_last


def seconds(operation: Operation, buffers: list[Tensor], rounds: int) -> float | None:
    """Seconds of the operation on one buffer; None without rounds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # backward runs on the stream of its forward
        calls = [operation.prepare(buffer) for buffer in buffers]
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    if not rounds:
        return None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    taken = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3 / REPLAYS / len(calls))
    return statistics.median(taken)


def measure(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, rounds: int) -> list[dict[str, Any]]:
    """A row for every operation."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    size = math.prod(shape) * dtype.itemsize
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(MOST_BUFFERS, max(2, math.ceil(CACHES * cache / size)))
    buffers = [
        torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout)
        for _ in range(count if rounds else 2)
    ]
    rows = []
    for operation in OPERATIONS:
        row: dict[str, Any] = {
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "channels_last": channels_last,
            "operation": operation.name,
        }
        try:
            if operation.needs:
                select(operation.needs, BACKEND, buffers[:1])
            taken = seconds(operation, buffers, rounds)
        except BackendUnavailableError:
            continue
        except Exception as error:
            row["problem"] = f"{type(error).__name__}: {str(error)[:300]}"
            taken = None
        if taken:
            row["microseconds"] = round(taken * 1e6, 2)
            row["bytes_per_second"] = operation.passes * size / taken
        rows.append(row)
    return rows


def main() -> None:
    arguments = options(__doc__, "four shapes")
    results = GpuResults("kernels", describe())
    for shape, dtype, channels_last in shapes(arguments.quick):
        rows = measure(shape, dtype, channels_last, 0 if arguments.warm else ROUNDS)
        torch.cuda.empty_cache()
        problems = [f"{row['operation']}: {row['problem']}" for row in rows if "problem" in row]
        if not arguments.warm:
            results.add(rows)
            copy = rows[0].get("bytes_per_second", 1.0)
            shares = " | ".join(
                f"{row['operation']} {row['microseconds']:.1f} us {row['bytes_per_second'] / copy:.2f}"
                for row in rows
                if "microseconds" in row
            )
            name = "x".join(map(str, shape))
            layout = "channels_last" if channels_last else "contiguous"
            print(f"{name} {rows[0]['dtype']} {layout}: copy {copy / 1e12:.2f} TB/s | {shares}", flush=True)
        for problem in problems:
            print(problem, flush=True)


if __name__ == "__main__":
    main()
