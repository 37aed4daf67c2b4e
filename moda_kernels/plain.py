"""Which tensors compiled kernels may take: those whose numbers lie in memory, while nobody records what is done.

A compiled kernel reads memory at addresses. Fake, distributed, batched, functional and other wrapped tensors have no
memory of their own; a zero tensor and one whose storage was freed have none at all; and a pending negation has not been
written to memory yet.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_TYPES = (Tensor, Parameter)


def is_traced() -> bool:
    """Whether operations are recorded or replaced, so that kernels must be called as registered operators.

    That is so under `torch.compile`, `torch.export`, `make_fx`, `FakeTensorMode`, a FLOP counter and every other
    dispatch mode.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def is_transformed() -> bool:
    """Whether a function transform is at work, for which compiled kernels have no rule.

    These are `torch.func` (grad, vmap, jvp, functionalize), forward-mode derivatives and `torch.jit.trace`.
    """
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def obstacle(tensors: Iterable[Tensor]) -> str | None:
    """Why compiled kernels cannot take these tensors; None if they can. It is cheap: every step asks it."""
    if torch.compiler.is_compiling():
        return None
    if is_transformed():
        return "it has no rule for function transforms (torch.func, forward-mode derivatives, torch.jit.trace)"
    if is_traced():
        return None
    for tensor in tensors:
        if problem := _problem(tensor):
            return f"it reads plain strided memory, got {problem}"
    return None


def _problem(tensor: Tensor) -> str | None:
    if type(tensor) not in _TYPES and _dispatches(type(tensor)):
        return f"a {type(tensor).__name__}"
    if tensor.is_neg():
        return "a tensor with a pending negation (resolve_neg() carries it out)"
    return None if _has_address(tensor) else "a tensor without memory"


def _has_address(tensor: Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:  # a wrapper of a function transform
        return False


def is_freed(tensor: Tensor) -> bool:
    """Whether a tensor's memory was freed, so that PyTorch itself would read address 0."""
    if torch.compiler.is_compiling() or type(tensor) not in _TYPES or _has_address(tensor):
        return False
    if tensor.numel() == 0 or tensor.is_meta:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor)
    return not (wrapped or torch._is_zerotensor(tensor))


def _dispatches(kind: type[Tensor]) -> bool:
    """Whether a subclass stands for something other than its memory; one that only overrides functions does not."""
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def holds_numbers(tensor: Tensor) -> bool:
    """Whether the tensor has values; a fake tensor has only a shape and a dtype."""
    return type(tensor) in _TYPES or not isinstance(tensor, FakeTensor)


def is_batch(tensor: Tensor | None) -> bool:
    """Whether this stands for several gradients at once: inside vmap, or with `is_grads_batched`."""
    functorch = torch._C._functorch
    return tensor is not None and (functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


def resolved(tensor: Tensor) -> Tensor:
    """The tensor with its values in memory of its own, for gradients that autograd hands to a kernel.

    Raises:
        TypeError: its type has no such memory, or it stands for several gradients.
    """
    problem = _problem(tensor)
    if problem is None:
        return tensor
    batched = is_batch(tensor)
    if batched:
        problem = "a batch of gradients (is_grads_batched, or vmap over a backward pass)"
    if batched or type(tensor) not in _TYPES:
        raise TypeError(f'gradient: expected plain strided memory, got {problem}; backend="torch" takes it')
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device).add_(tensor)
