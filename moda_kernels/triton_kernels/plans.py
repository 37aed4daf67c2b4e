"""What a loss knows of its layers before it knows where they lie: decided at the first step, found again by shapes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias, cast

import torch
from torch import Tensor

from moda_kernels.triton_kernels.layouts import Layout, layout_of
from moda_kernels.triton_kernels.pool_forward import PooledLayer, Pooling
from moda_kernels.triton_kernels.rows import Tiling

Signature: TypeAlias = tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
"""Shape, strides and dtype of each layer."""


def is_pooled(dims: int, dtype: torch.dtype) -> bool:
    """Whether a layer's pooled rows are another tensor than the layer: it is spatial or not float32."""
    return dims != 2 or dtype != torch.float32


class Plan:
    """Layers of some shapes, strides and dtypes.

    Attributes:
        copied: places of the layers that have to be copied, because no kernel takes them as they lie.
        layouts: of the layers, after that.
        pooled: whether each layer `is_pooled`.
        to_pool: places of those that are.
        offsets: where each layer's pooled rows begin in one buffer, in elements. There are no gaps: an operator's
            outputs are compared whole. Layers stay aligned to 16 bytes as long as N * C is a multiple of 4.
        size: of that buffer.
        tiling: how the rows of all layers are cut.
    """

    def __init__(self, signature: Signature) -> None:
        found = [layout_of(shape, stride) for shape, stride, _ in signature]
        self.copied = [i for i, layout in enumerate(found) if layout is None]
        for i in self.copied:
            found[i] = layout_of(signature[i][0])
        self.layouts = [cast(Layout, layout) for layout in found]
        self.pooled = [is_pooled(len(shape), dtype) for shape, _, dtype in signature]
        self.to_pool = tuple(i for i, pooled in enumerate(self.pooled) if pooled)
        self.offsets, self.size = [], 0
        for layout, pooled in zip(self.layouts, self.pooled, strict=True):
            self.offsets.append(self.size)
            self.size += layout.rows if pooled else 0
        self.tiling = Tiling(signature[0][0][0], tuple(shape[1] for shape, _, _ in signature))
        self._layers = [
            PooledLayer(dtype, layout, len(shape) == 2)
            for (shape, _, dtype), layout in zip(signature, self.layouts, strict=True)
        ]
        self._poolings: dict[tuple[int, ...], Pooling] = {}

    def pooling(self, which: Sequence[int]) -> Pooling:
        """Some layers to pool together."""
        key = tuple(which)
        pooling = self._poolings.get(key)
        if pooling is None:
            pooling = self._poolings[key] = Pooling([self._layers[i] for i in key])
        return pooling

    def arranged(self, activations: Sequence[Tensor]) -> list[Tensor]:
        """The layers as kernels take them."""
        arranged = list(activations)
        for i in self.copied:
            arranged[i] = arranged[i].contiguous()
        return arranged

    def rows(self, activations: Sequence[Tensor], pooled: Tensor) -> list[int]:
        """Addresses of the rows of arranged layers, which are pooled in one buffer if they are not their own pool."""
        base, each = pooled.data_ptr(), zip(activations, self.pooled, self.offsets, strict=True)
        return [base + 4 * offset if own else x.data_ptr() for x, own, offset in each]


def plan_of(activations: Sequence[Tensor]) -> Plan:
    """The plan of these layers."""
    return _plan(tuple([(x.shape, x.stride(), x.dtype) for x in activations]))


_plan = lru_cache(maxsize=256)(Plan)
