"""Backend "native", the compiled extension: C++ kernels for the CPU, and the firing counter in CUDA.

Two roads lead to the same kernels (`_native_calls.py`):

- eager: `torch.autograd.Function`s, called directly, and one in C++ for `relu_pool` (`_native_relu_pool.py`). A call
  through the dispatcher costs more than a small kernel: `relu_pool` of (4, 8, 4, 4) takes 26 us of CPU time through a
  function of Python, 70 us as an operator, 115 and 219 us with its backward (one core of an AMD EPYC Milan);
- under `torch.compile`, and wherever else operations are recorded: the operators of `_native_ops.py`, seen whole.

Layouts: contiguous `(N, C, *spatial)`, neurons last in memory (channels_last, tokens), `(N, C)`; others are made
contiguous. Sums are in float32 for half precision and float32, in float64 for float64. Results are bitwise equal from
run to run and for any number of threads. Threads: as many as `torch.get_num_threads()`, out of PyTorch's own pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moda_kernels import _native_calls as calls
from moda_kernels import _native_ops as ops
from moda_kernels import _native_relu_pool, _norm_ops, closed_form
from moda_kernels.batch_norm import BatchNorm
from moda_kernels.once import once_only
from moda_kernels.plain import is_traced
from moda_kernels.precision import accumulation
from moda_kernels.segments import Segments
from moda_kernels.tally import Tally

OPS = frozenset(
    {"grouped_losses", "pool", "relu_pool", "norm_relu_pool", "class_sums", "count_firings", "add_attributions"}
)
DTYPES: Mapping[str, frozenset[torch.dtype]] = {
    **dict.fromkeys(OPS, frozenset(calls.DTYPE_CODES)),
    "class_sums": frozenset({torch.float32, torch.float64}),
}
READS_MEMORY = True
DEVICES: Mapping[str, frozenset[str]] | None = {
    **dict.fromkeys(OPS, frozenset({"cpu"})),
    "count_firings": frozenset({"cpu", "cuda"}),
}


def unavailable(device: torch.device | None = None) -> str | None:
    """None if the extension can run (on `device`), else why not and what to do about it, in one line."""
    try:
        extension = calls.extension()
    except calls.NotBuiltError as error:
        return str(error)
    if device is not None and device.type == "cuda" and not extension.build_info()["cuda"]:
        return "the native extension was built without CUDA; with nvcc installed, MODA_CUDA=1 builds it (docs/build.md)"
    return None


# A compiler takes what it says for a constant: torch.compiler.assume_constant_result, without importing the compiler.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def build_info() -> dict[str, Any]:
    """What the extension was built from and how it runs.

    Returns:
        version, source_digest, compiler (str), cuda (bool), nvcc and cuda_architectures (str, empty without CUDA),
        cpu_isa ("portable", "avx2", "avx512"), cpu_isas (those that this processor runs),
        threading ("torch's OpenMP pool", "std::thread"), autograd (what runs the node of relu_pool: "C++", "Python").

    Raises:
        RuntimeError: there is no extension that can run; the message is that of `unavailable`.
    """
    info: dict[str, Any] = calls.extension().build_info()
    return {**info, "autograd": "Python" if _native_relu_pool.compiled() is None else "C++"}


def pool(activations: Sequence[Tensor]) -> list[Tensor]:
    """The pooled activation of every layer; differentiable once. An (N, C) layer is its own, in float32 or float64."""
    spatial = [calls.dense(x) for x in activations if x.dim() > 2]
    means = iter(_pool_dense(spatial) if spatial else ())
    return [next(means) if x.dim() > 2 else x.to(accumulation(x.dtype)) for x in activations]


def _pool_dense(layers: Sequence[Tensor]) -> Sequence[Tensor]:
    if is_traced():
        means: Sequence[Tensor] = ops.pool(list(layers))
        return means
    pooled: tuple[Tensor, ...] = _Pool.apply(*layers)  # type: ignore[no-untyped-call]
    return pooled


def relu_pool(x: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
    """`relu(x)` and its pooled activation; differentiable once. An (N, C) activation is its own pool."""
    if x.dim() == 2 or (inplace and (is_traced() or calls.layout(x) is None)):
        y = torch.relu_(x) if inplace else torch.relu(x)
        return y, pool([y])[0]
    if is_traced():
        y, pooled = ops.relu_pool(calls.dense(x))
        return y, pooled
    return _native_relu_pool.relu_pool(x, inplace)


def grouped_losses(activations: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(affinity, dispersion, compactness); 0-d, in the widest layer's accumulation dtype; differentiable once."""
    layers, segments = [calls.dense(x) for x in activations], Segments.from_labels(labels)
    if is_traced():
        affinity, dispersion, compactness, _ = ops.grouped_losses(layers, list(segments))
        return affinity, dispersion, compactness
    affinity, dispersion, compactness = _GroupedLosses.apply(segments, *layers)  # type: ignore[no-untyped-call]
    return affinity, dispersion, compactness


def norm_relu_pool(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """`activation(batch_norm(x) + residual)` and its pooled activation; differentiable twice, traced once."""
    return _norm_ops.norm_relu_pool(calls, x, norm)


def class_sums(pooled: Sequence[Tensor], labels: Tensor, num_classes: int, *, normalize: bool = True) -> list[Tensor]:
    """Per layer the (K, C) sum over each class's samples of the rows, L2-normalised by default. Not differentiable."""
    if not normalize:  # plain sums of rows need no kernel of their own
        return closed_form.class_sums(pooled, labels, num_classes, normalize=False)
    run = ops.class_sums if is_traced() else calls.class_sums
    sums: list[Tensor] = run([rows.detach() for rows in pooled], labels, num_classes)
    return sums


def count_firings(activations: Sequence[Tensor], labels: Tensor, threshold: float, tally: Tally) -> None:
    """Contract of `backends.Backend.count_firings`.

    The threshold is rounded to the layer's dtype, as PyTorch compares. A class's samples are added in the order of the
    batch, in the accumulation dtype, and then to the running sum: bitwise equal from run to run and for any number of
    threads; on CUDA also given the same alignment to 16 bytes.
    """
    if is_traced():
        layers = [x.detach() for x in activations]
        counts, sums = list(tally.counts), list(tally.sums)
        ops.count_firings(layers, labels, threshold, counts, tally.class_sizes, tally.invalid, sums)
    else:
        calls.count_firings(activations, labels, threshold, tally)


def add_attributions(activations: Sequence[Tensor], gradients: Sequence[Tensor], labels: Tensor, tally: Tally) -> None:
    """Contract of `backends.Backend.add_attributions`.

    An activation and its gradient are read once. A class's samples are added in the order of the batch, in the
    accumulation dtype, and then to the running sum: bitwise equal from run to run and for any number of threads.
    """
    if is_traced():
        layers, of_layers = ([x.detach() for x in given] for given in (activations, gradients))
        ops.add_attributions(layers, of_layers, labels, tally.class_sizes, tally.invalid, list(tally.sums))
    else:
        calls.add_attributions(activations, gradients, labels, tally)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *layers: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*layers)
        return tuple(calls.pool_forward(layers))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        layers = ctx.saved_tensors
        return once_only(calls.pool_backward(upstream, layers), [*layers, *upstream])


class _GroupedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, segments: Segments, *layers: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        # The number of segments depends on the labels' values; a compiler, which sees none, has to allow for N of them.
        ctx.room = calls.segment_count(segments)
        workspace = layers[0].new_empty(calls.losses_workspace_bytes(layers, ctx.room), dtype=torch.uint8)
        terms = calls.losses_forward(layers, segments, workspace, ctx.room)
        ctx.save_for_backward(workspace, *segments, *layers)
        dtype = calls.losses_dtype(layers)
        return tuple(layers[0].new_tensor(term, dtype=dtype) for term in terms)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        workspace, segments, layers = calls.SavedLosses.of(ctx.saved_tensors)
        gradients = calls.losses_backward(upstream, layers, ctx.needs_input_grad[1:], segments, workspace, ctx.room)
        return None, *once_only(gradients, [*layers, *upstream])
