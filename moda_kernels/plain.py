"""Whether kernels may read a tensor's memory as it lies."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether every tensor is strided memory that holds its numbers, and nothing watches what is done to it.

    Fake, distributed, batched and other wrapped tensors have no memory of their own; a pending negation is not yet in
    it; a dispatch mode (`FakeTensorMode`, a FLOP counter) expects to see every operation.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.maybe_current_level() is not None:
        return False
    return all(
        type(tensor) in (Tensor, Parameter) and tensor.layout == torch.strided and not tensor.is_neg()
        for tensor in tensors
    )
