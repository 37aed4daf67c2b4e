"""Calls into the compiled extension, which turn tensors into addresses and sizes.

There is no autograd and no dispatch here, and nothing is checked. Every function takes *dense* activations, those with
a `layout`; `dense` makes one of any tensor. Outputs are allocated here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moda_kernels._version import __version__
from moda_kernels.batch_norm import ACTIVATIONS, BatchNorm
from moda_kernels.plain import resolved
from moda_kernels.precision import accumulation
from moda_kernels.segments import Segments
from moda_kernels.tally import Tally

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # Dtype of csrc/types.h
_POSITIONS_LAST, _NEURONS_LAST, _NO_POSITIONS = 0, 1, 2  # Layout of csrc/types.h
_BITS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}

_INSTALL = "`pip install --no-build-isolation --no-deps -e .` in a checkout builds it (docs/build.md)"


class NotBuiltError(RuntimeError):
    """The extension cannot be called; the message says why and what to do about it."""


def extension() -> Any:
    """The extension module.

    Raises:
        NotBuiltError: the extension is missing or stale, or cannot run on this processor.
    """
    loaded = _load()
    if isinstance(loaded, NotBuiltError):
        raise loaded
    return loaded


@functools.cache
def _load() -> Any:
    """The extension module, or the error; kept from the first call on, because backends are chosen in every step."""
    try:
        return _checked_extension()
    except NotBuiltError as error:
        return error


def _checked_extension() -> Any:
    try:
        module = importlib.import_module("moda_kernels._native")
    except ImportError as error:
        raise NotBuiltError(f"the native extension is not built ({error}); {_INSTALL}") from error
    info = module.build_info()
    if info["version"] != __version__:
        raise NotBuiltError(
            f"the native extension is of version {info['version']}, the package of {__version__}; {_INSTALL}"
        )
    sources = Path(__file__).resolve().parent.parent / "csrc"
    if (sources / "bindings.cpp").is_file() and source_digest(sources) != info["source_digest"]:
        raise NotBuiltError(f"the native extension was built from other sources than {sources}; {_INSTALL}")
    if os.environ.get("MODA_CPU_ISA"):
        try:
            module.use_isa(os.environ["MODA_CPU_ISA"])
        except ValueError as error:
            raise NotBuiltError(f"MODA_CPU_ISA: {error}") from error
    module.use_openmp_of(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return module


def source_digest(sources: Path) -> str:
    """The SHA-256 of the files' SHA-256s in order of their paths, which CMakeLists.txt stamps into the extension."""
    files = sorted((path for path in sources.rglob("*") if path.is_file()), key=Path.as_posix)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def layout(x: Tensor) -> int | None:
    """How an (N, C, *spatial) tensor lies in memory; None if the kernels cannot read it as it lies."""
    if x.is_contiguous():
        return _NO_POSITIONS if x.dim() == 2 else _POSITIONS_LAST
    if x.dim() == 2:
        return None
    if x.dim() == 4:
        return _NEURONS_LAST if x.is_contiguous(memory_format=torch.channels_last) else None
    return _NEURONS_LAST if x.movedim(1, -1).is_contiguous() else None


def dense(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy if the kernels cannot read it as it lies."""
    return x.contiguous() if layout(x) is None else x


def _fields(x: Tensor, rows: int = 0, out: int = 0) -> tuple[int, ...]:
    """A `Layer` of csrc/types.h; `rows` and `out` are addresses."""
    found, shape = layout(x), x.shape
    assert found is not None, "callers pass dense tensors"
    samples, neurons = shape[0], shape[1]
    positions = x.numel() // (samples * neurons)
    return x.data_ptr(), DTYPE_CODES[x.dtype], found, samples, neurons, positions, rows, out


def _flat(layers: Sequence[tuple[int, ...]]) -> list[int]:
    return list(itertools.chain.from_iterable(layers))


def _like_layout(x: Tensor, pattern: Tensor) -> Tensor:
    """`x` with the strides of the dense tensor `pattern`."""
    x = resolved(x)
    return x if x.stride() == pattern.stride() else torch.empty_like(pattern).copy_(x)


def pool_forward(layers: Sequence[Tensor]) -> list[Tensor]:
    """Pooled activations of dense layers."""
    pooled = [x.new_empty(x.shape[:2], dtype=accumulation(x.dtype)) for x in layers]
    fields = [_fields(x, rows.data_ptr()) for x, rows in zip(layers, pooled, strict=True)]
    extension().pool_forward(_flat(fields), torch.get_num_threads())
    return pooled


def pool_backward(upstream: Sequence[Tensor | None], layers: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of every dense layer whose pooled activation has one."""
    gradients = [None if rows is None else torch.empty_like(x) for rows, x in zip(upstream, layers, strict=True)]
    rows = [None if g is None else resolved(g).contiguous() for g in upstream]
    fields = [
        _fields(x, row.data_ptr(), gradient.data_ptr())
        for x, row, gradient in zip(layers, rows, gradients, strict=True)
        if row is not None and gradient is not None
    ]
    extension().pool_backward(_flat(fields), torch.get_num_threads())
    return gradients


def relu_pool_forward(x: Tensor, y: Tensor) -> Tensor:
    """Write relu(x) to y, which has the strides of x and may be x; return the pooled activation."""
    pooled = x.new_empty(x.shape[:2], dtype=accumulation(x.dtype))
    extension().relu_pool_forward(_fields(x, pooled.data_ptr(), y.data_ptr()), torch.get_num_threads())
    return pooled


def relu_pool_backward(y: Tensor, dy: Tensor | None, dpooled: Tensor | None) -> Tensor:
    """The gradient of x; an upstream gradient that is None is zero."""
    dx = torch.empty_like(y)
    dy = torch.zeros_like(y) if dy is None else _like_layout(dy, y)
    rows = y.new_zeros(y.shape[:2], dtype=accumulation(y.dtype)) if dpooled is None else resolved(dpooled).contiguous()
    fields = _fields(y, rows.data_ptr(), dx.data_ptr())
    extension().relu_pool_backward(fields, dy.data_ptr(), torch.get_num_threads())
    return dx


class SavedLosses(NamedTuple):
    """What the backward pass of the losses reads."""

    workspace: Tensor
    segments: Segments
    layers: tuple[Tensor, ...]

    @staticmethod
    def of(saved_tensors: Sequence[Tensor]) -> SavedLosses:
        """The fields from a context's saved tensors, which hold them one after the other."""
        tensors = iter(saved_tensors)
        workspace = next(tensors)
        return SavedLosses(workspace, Segments(*islice(tensors, len(Segments._fields))), tuple(tensors))


def _segment_fields(segments: Segments, room: int) -> tuple[int, ...]:
    """A `SegmentsView` of csrc/types.h."""
    addresses = (segments.order.data_ptr(), segments.offsets.data_ptr(), segments.segment.data_ptr())
    return *addresses, int(segments.same_pairs), int(segments.diff_pairs), room


class NormForward(NamedTuple):
    """The results of a forward call; `saved` is (4, C), described at NormForward in csrc/types.h."""

    y: Tensor
    pooled: Tensor | None
    saved: Tensor


class NormBackward(NamedTuple):
    """The gradients of x, of the residual if there was one, and of weight and bias: (2, C)."""

    x: Tensor
    residual: Tensor | None
    parameters: Tensor


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _numbers(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Numbers per neuron as the kernels read them."""
    return None if tensor is None else tensor.detach().to(dtype).contiguous()


def norm_relu_pool_forward(x: Tensor, norm: BatchNorm) -> NormForward:
    """Run the kernel; running statistics are updated in place if they are dense and in the accumulation dtype."""
    dtype = accumulation(x.dtype)
    y, saved = torch.empty_like(x), x.new_empty((4, x.shape[1]), dtype=dtype)
    pooled = None if x.dim() == 2 else x.new_empty(x.shape[:2], dtype=dtype)
    residual = None if norm.residual is None else _like_layout(norm.residual, x)
    weight, bias = _numbers(norm.weight, dtype), _numbers(norm.bias, dtype)
    mean, var = _numbers(norm.running_mean, dtype), _numbers(norm.running_var, dtype)
    fields = (
        *_fields(x, _address(pooled), y.data_ptr()),
        *map(_address, (residual, weight, bias, mean, var, saved)),
        int(norm.training),
        ACTIVATIONS.index(norm.activation),
    )
    extension().norm_relu_pool_forward(fields, norm.momentum, norm.eps, torch.get_num_threads())
    if norm.training:
        _put_back(norm.running_mean, mean)
        _put_back(norm.running_var, var)
    return NormForward(y, pooled, saved)


def _put_back(target: Tensor | None, updated: Tensor | None) -> None:
    """Copy running statistics to where they belong, unless the kernel wrote them there."""
    if target is not None and updated is not None and target.data_ptr() != updated.data_ptr():
        target.copy_(updated)


def norm_relu_pool_backward(
    x: Tensor,
    kept: Tensor | None,
    saved: Tensor,
    dy: Tensor | None,
    dpooled: Tensor | None,
    training: bool,
    activation: str,
) -> NormBackward:
    """The gradients; for `kept` see NormBackward in csrc/types.h. An upstream gradient that is None is zero."""
    dx, parameters = torch.empty_like(x), saved.new_empty((2, x.shape[1]))
    dy = torch.zeros_like(x) if dy is None else _like_layout(dy, x)
    rows = None if dpooled is None else resolved(dpooled).contiguous()
    kept = None if kept is None else _like_layout(kept, x)
    dresidual = None if kept is None else torch.empty_like(x)
    fields = (
        *_fields(x, _address(rows), dx.data_ptr()),
        *map(_address, (dy, kept, dresidual, saved, parameters)),
        int(training),
        ACTIVATIONS.index(activation),
    )
    extension().norm_relu_pool_backward(fields, torch.get_num_threads())
    return NormBackward(dx, dresidual, parameters)


def _losses_fields(layers: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[int]:
    """Dense layers; one that is its own pool is read in place, the others' rows are kept in the workspace."""
    return _flat(
        [
            _fields(
                x,
                x.data_ptr() if x.dim() == 2 and x.dtype == accumulation(x.dtype) else 0,
                0 if gradient is None else gradient.data_ptr(),
            )
            for x, gradient in zip(layers, gradients, strict=True)
        ]
    )


def losses_dtype(layers: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the terms."""
    return torch.float64 if any(x.dtype == torch.float64 for x in layers) else torch.float32


def segment_count(segments: Segments) -> int:
    """How many segments there are. This reads a value of a tensor, which costs nothing on the CPU."""
    return int(segments.segment[segments.order[-1]]) + 1


def losses_workspace_bytes(layers: Sequence[Tensor], room: int) -> int:
    """Bytes for every layer's rows (unless the layer is its own pool), norms and class sums of `room` segments."""
    total = 0
    for x in layers:
        samples, neurons = x.shape[:2]
        width = accumulation(x.dtype).itemsize
        own_pool = x.dim() == 2 and x.dtype == accumulation(x.dtype)
        parts = [samples * 8, room * neurons * width, neurons * width]
        parts += [] if own_pool else [samples * neurons * width]
        total += sum((part + 63) // 64 * 64 for part in parts)
    return total


def losses_forward(layers: Sequence[Tensor], segments: Segments, workspace: Tensor, room: int) -> list[float]:
    """Compute the three terms, and write to the workspace what the backward pass reads."""
    terms: list[float] = extension().losses_forward(
        _losses_fields(layers, [None] * len(layers)),
        _segment_fields(segments, room),
        workspace.data_ptr(),
        torch.get_num_threads(),
    )
    return terms


def losses_backward(
    upstream: Sequence[Tensor | None],
    layers: Sequence[Tensor],
    needed: Sequence[bool],
    segments: Segments,
    workspace: Tensor,
    room: int,
) -> list[Tensor | None]:
    """The gradient of every dense layer that needs one."""
    gradients = [torch.empty_like(x) if need else None for x, need in zip(layers, needed, strict=True)]
    extension().losses_backward(
        _losses_fields(layers, gradients),
        _segment_fields(segments, room),
        [0.0 if gradient is None else float(resolved(gradient)) for gradient in upstream],
        workspace.data_ptr(),
        torch.get_num_threads(),
    )
    return gradients


def class_sums(pooled: Sequence[Tensor], labels: Tensor, num_classes: int) -> list[Tensor]:
    """Per layer of (N, C) rows the (K, C) sums of each class's normalised rows."""
    rows = [x.contiguous() for x in pooled]
    sums = [x.new_empty(num_classes, x.shape[1]) for x in rows]
    fields = [_fields(x, out=out.data_ptr()) for x, out in zip(rows, sums, strict=True)]
    labels = labels.long().contiguous()
    extension().class_sums(_flat(fields), labels.data_ptr(), num_classes, torch.get_num_threads())
    return sums


@functools.lru_cache(maxsize=64)
def _threshold_bits(threshold: float, dtype: torch.dtype, compared: torch.dtype) -> int:
    """The bits, in dtype `compared`, of `threshold` rounded to `dtype`."""
    return int(torch.tensor(threshold, dtype=dtype).to(compared).view(_BITS[compared]))


def _firing_fields(x: Tensor, threshold: float, counts: Tensor) -> tuple[int, ...]:
    """A `FiringLayer` of csrc/types.h."""
    address, code, placed, _, neurons, positions, _, _ = _fields(x)
    dtype = x.dtype
    return address, code, placed, neurons, positions, _threshold_bits(threshold, dtype, dtype), counts.data_ptr()


def _firing_batch(labels: Tensor, tally: Tally) -> tuple[int, ...]:
    """A `FiringBatch` of csrc/types.h."""
    return (
        labels.data_ptr(),
        int(labels.dtype == torch.int64),
        labels.shape[0],
        tally.class_sizes.shape[0],
        tally.class_sizes.data_ptr(),
        tally.invalid.data_ptr(),
    )


def _run_count(kernel: str, fields: list[int], batch: tuple[int, ...], device: torch.device) -> None:
    """Call the extension's `kernel`, or its CUDA namesake on the current stream of a GPU."""
    if device.type == "cpu":
        getattr(extension(), kernel)(fields, batch, torch.get_num_threads())
        return
    with torch.cuda.device(device):  # the extension has a CUDA runtime of its own, which changes the thread's device
        stream = torch.cuda.current_stream().cuda_stream
        getattr(extension(), f"{kernel}_cuda")(fields, batch, device.index, stream)


def count_firings(activations: Sequence[Tensor], labels: Tensor, threshold: float, tally: Tally) -> None:
    """Add the batch to the tally, in place; activations of any layout."""
    layers = [dense(x) for x in activations]
    if tally.sums:
        _class_statistics(layers, labels, threshold, tally)
        return
    labels = labels.contiguous()
    fields = [_firing_fields(x, threshold, count) for x, count in zip(layers, tally.counts, strict=True)]
    _run_count("count_firings", _flat(fields), _firing_batch(labels, tally), labels.device)


def _statistics_rows(x: Tensor) -> Tensor:
    """An (N, C) tensor to write the pooled activation of a dense layer to; an (N, C) layer is its own pool."""
    dtype = accumulation(x.dtype)
    return x.to(dtype) if x.dim() == 2 else x.new_empty(x.shape[:2], dtype=dtype)


def _statistics_fields(x: Tensor, rows: Tensor, threshold: float, count: Tensor, total: Tensor) -> tuple[int, ...]:
    """A `StatisticsLayer` of csrc/types.h."""
    bits = _threshold_bits(threshold, x.dtype, rows.dtype)
    return *_fields(x, rows.data_ptr(), total.data_ptr()), bits, count.data_ptr()


def _class_statistics(layers: Sequence[Tensor], labels: Tensor, threshold: float, tally: Tally) -> None:
    """Counts and sums of dense layers, from one read of each."""
    rows = [_statistics_rows(x) for x in layers]
    ordered, order = labels.sort(stable=True)
    fields = [
        _statistics_fields(x, row, threshold, count, total)
        for x, row, count, total in zip(layers, rows, tally.counts, tally.sums, strict=True)
    ]
    batch = (*_firing_batch(ordered, tally), order.data_ptr())
    _run_count("class_statistics", _flat(fields), batch, labels.device)


def _attribution_fields(x: Tensor, gradient: Tensor, rows: Tensor, total: Tensor) -> tuple[int, ...]:
    """An `AttributionLayer` of csrc/types.h."""
    return *_fields(x, rows.data_ptr(), total.data_ptr()), gradient.data_ptr()


def add_attributions(activations: Sequence[Tensor], gradients: Sequence[Tensor], labels: Tensor, tally: Tally) -> None:
    """Add the batch to the tally, in place; activations and gradients of any layout."""
    layers = [dense(x) for x in activations]
    like = [_like_layout(gradient, x) for gradient, x in zip(gradients, layers, strict=True)]
    rows = [x.new_empty(x.shape[:2], dtype=accumulation(x.dtype)) for x in layers]
    ordered, order = labels.sort(stable=True)
    fields = [
        _attribution_fields(x, gradient, row, total)
        for x, gradient, row, total in zip(layers, like, rows, tally.sums, strict=True)
    ]
    batch = (*_firing_batch(ordered, tally), order.data_ptr())
    _run_count("class_attributions", _flat(fields), batch, labels.device)
