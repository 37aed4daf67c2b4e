"""A batch norm whose result is computed when somebody asks for it: with the activation behind it, or plainly.

Where the probe saw that a batch norm feeds nothing but one ReLU or its like, directly or through one addition, the
norm's module gives a `Deferred` in the place of its result. The activation takes it apart and runs
`moda_kernels.norm_relu_pool`. Every other use computes what PyTorch's own batch norm (and the addition) gives, from the
same tensors, so that a model which does something else than in the probe still gets its own numbers, bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from moda.observation.activations import plain_class
from moda_kernels import closed_form
from moda_kernels.backends import Backend, select
from moda_kernels.batch_norm import RECTIFIERS, BatchNorm, check_batch_norm

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Classes of modules whose calls may be deferred. Of others, and of subclasses, it is the function that they call."""

_WAY_OUT = "observe the model with fuse_norms=False"
_OVERWRITTEN = (
    "a batch norm's input, weight or bias, or what is added to its result, was overwritten in place before the "
    f"activation behind it ran, in a way that the first forward pass did not show; {_WAY_OUT}"
)
_BYPASSED = (
    "the result of a batch norm goes somewhere else than in the first forward pass, past PyTorch's functions (a custom "
    f"autograd function or operator); {_WAY_OUT}"
)

_JOINED = (
    "the gradient of a batch norm's result is asked for, which was computed in one operation with the activation "
    f"behind it, and the first forward pass did not show that; {_WAY_OUT}"
)

# What may be asked of a result without computing it.
_METADATA = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_meta")
) | frozenset(
    getattr(Tensor, name)
    for name in (
        "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex",
        "element_size", "get_device", "__len__",
    )
)  # fmt: skip
# What asks for a gradient of a result, and the place among its arguments.
_OF_GRADIENTS = {torch.autograd.grad: 1, Tensor.retain_grad: 0, Tensor.register_hook: 0}
_ADDITIONS_IN_PLACE = frozenset((Tensor.add_, Tensor.__iadd__))
_ADDITIONS = frozenset((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)) | _ADDITIONS_IN_PLACE


class NormCall:
    """One call of a batch norm, whose result may be computed once for the running statistics."""

    def __init__(self, x: Tensor, norm: BatchNorm) -> None:
        self.x = x
        self.norm = norm
        self.counted = False  # whether the batch is in the running statistics
        self.joined = False  # whether an activation has computed it with itself, so that it is in no graph
        read = (x, norm.weight, norm.bias, *(() if norm.training else norm[:2]))
        self._versions = [(tensor, tensor._version) for tensor in read if tensor is not None]

    def check(self) -> None:
        """Raise a RuntimeError if what the result is computed from is not what it was."""
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError(_OVERWRITTEN)

    def plain(self) -> Tensor:
        """The result as PyTorch computes it."""
        self.check()
        norm = self.norm
        running = (None, None) if norm.training and self.counted else (norm.running_mean, norm.running_var)
        self.counted = True
        return F.batch_norm(self.x, *running, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps)

    def settle(self) -> None:
        """Bring the batch into the running statistics, if nobody has asked for the result."""
        if self.norm.training and not self.counted:
            with torch.no_grad():
                self.plain()


class Deferred(Tensor):
    """Stands for the result of a batch norm, and for what was added to it."""

    _call: NormCall
    _residual: Tensor | None
    _residual_version: int
    _value: Tensor | None
    _version_of_value: int  # when it was computed; -1 of what an activation wrote over the result
    _summand: weakref.ref[Deferred] | None  # of a sum, what the residual was added to

    @staticmethod
    def __new__(cls, call: NormCall, residual: Tensor | None = None, base: Deferred | None = None) -> Deferred:
        """Make a tensor without memory, of the shape that the result has."""
        x, needed = call.x, (call.x, call.norm.weight, call.norm.bias, residual)
        requires_grad = any(tensor is not None and tensor.requires_grad for tensor in needed)
        made: Deferred = Tensor._make_wrapper_subclass(
            cls, x.size(), strides=x.stride(), dtype=x.dtype, device=x.device, requires_grad=requires_grad
        )
        if requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                made.register_hook(_refuse_gradient)  # type: ignore[no-untyped-call]
        made._call, made._value, made._version_of_value = call, None, 0
        made._summand = None if base is None else weakref.ref(base)
        made._add(residual)
        return made

    def __init__(self, call: NormCall, residual: Tensor | None = None, base: Deferred | None = None) -> None:
        """Everything is done in `__new__`."""

    def _add(self, residual: Tensor | None) -> None:
        self._residual = residual
        self._residual_version = 0 if residual is None else residual._version

    @property
    def is_sum(self) -> bool:
        """Whether something was added to the result."""
        return self._residual is not None

    @property
    def is_open(self) -> bool:
        """Whether nobody has asked for the result so far."""
        return self._value is None and not self._call.counted

    def plain(self) -> Tensor:
        """What the model would have without us; with its gradient, whatever mode it is asked for in."""
        if self._value is None:
            self._check()
            # Hooks of a checkpoint that this happens inside of must not see what is computed only once.
            with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(_same, _same):
                value = self._unadded()
                self._value = value if self._residual is None else value + self._residual
            self._version_of_value = self._value._version
        return self._value

    def _unadded(self) -> Tensor:
        """The batch norm's own result: the tensor that who kept it has, as long as it is that."""
        base = None if self._summand is None else self._summand()
        if base is None or base._residual is not None:
            return self._call.plain()
        if base._value is None or base._value._version == base._version_of_value:
            return base.plain()
        return self._call.plain()

    def activated(self, function: str) -> tuple[Tensor, Tensor] | None:
        """The function of the result and its pooled activation, in one operation; None where that cannot be."""
        if not (self.is_open and torch.is_grad_enabled()) or hooks_on_saved_tensors():
            return None
        self._check()
        call = self._call
        if self._residual is not None and function not in RECTIFIERS:
            return None  # the operation would keep what was added, which the model may overwrite from here on
        norm = call.norm._replace(residual=self._residual, activation=function)
        backend = _compiled_backend(call.x, norm)
        if backend is None:
            return None
        results = backend.norm_relu_pool(call.x, norm)
        call.counted = call.joined = True
        return results

    def overwrite(self, value: Tensor) -> None:
        """Stand for this value from here on."""
        self._value, self._version_of_value = value, -1

    def _check(self) -> None:
        self._call.check()
        if self._residual is not None and self._residual._version != self._residual_version:
            raise RuntimeError(_OVERWRITTEN)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Metadata and the first addition leave the result open; everything else asks for it."""
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _OF_GRADIENTS and any(_is_joined(value) for value in tree_leaves(args[_OF_GRADIENTS[func]])):
            raise RuntimeError(_JOINED)
        if func in _ADDITIONS and not kwargs and len(args) == 2:
            total = _sum(*args, inplace=func in _ADDITIONS_IN_PLACE)
            if total is not None:
                return total
        return func(*plain_values(args), **plain_values(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, *_args: Any, **_kwargs: Any) -> Any:
        """Whoever gets here did not ask for the value, and there is none."""
        raise RuntimeError(_BYPASSED)


def plain_values(values: Any) -> Any:
    """The nested values, with what each `Deferred` stands for in its place."""
    return tree_map(lambda value: value.plain() if type(value) is Deferred else value, values)


def _sum(first: Any, second: Any, inplace: bool) -> Deferred | None:
    """The sum of two values, of which one at least is deferred; None where it has to be computed."""
    norm, other = (first, second) if inplace or _may_be_added_to(first) else (second, first)
    if first is second or not isinstance(norm, Deferred) or not _may_be_added_to(norm):
        return None
    if type(other) is Deferred:
        other = other.plain()
    alike = type(other) is Tensor and torch.is_grad_enabled() and not other.is_inference()
    if inplace and other.requires_grad and not norm.requires_grad:
        return None  # which a tensor without memory cannot come to do
    if not alike or any(getattr(other, name) != getattr(norm, name) for name in ("shape", "dtype", "device", "layout")):
        return None
    if not inplace:
        return Deferred(norm._call, other, norm)
    norm._add(other)
    return norm


def _is_joined(value: Any) -> bool:
    return type(value) is Deferred and value._call.joined and value._version_of_value != -1


def _may_be_added_to(value: Any) -> bool:
    return type(value) is Deferred and value.is_open and value._residual is None


def defer(x: Tensor, norm: BatchNorm) -> tuple[Deferred, NormCall] | None:
    """What takes the place of a batch norm's result, and the call behind it; None where it has to be computed."""
    call = NormCall(x, norm) if _may_wait(x, norm) else None
    return None if call is None else (Deferred(call), call)


def _may_wait(x: Tensor, norm: BatchNorm) -> bool:
    if x.is_inference() or x.is_neg() or not _is_dense(x) or hooks_on_saved_tensors():
        return False
    try:
        check_batch_norm(x, norm)
    except (TypeError, ValueError):  # PyTorch has an error of its own for it, or takes what the kernels do not
        return False
    return _compiled_backend(x, norm) is not None


def is_plain_norm(module: nn.Module) -> bool:
    """Whether this is one of PyTorch's batch norms, and does what PyTorch wrote."""
    kind = plain_class(type(module))
    return kind in NORMS and kind.forward is _BatchNorm.forward


def defer_module(module: Any, x: Tensor) -> tuple[Deferred, NormCall] | None:
    """As `defer`, for a call of a plain batch norm whose hooks the caller has looked for.

    The counter of batches is moved on, as the module does it.
    """
    if not is_plain_norm(module):
        return None
    training, tracked = module.training, module.track_running_stats
    mean, var = (module.running_mean, module.running_var) if tracked or not training else (None, None)
    norm = BatchNorm(mean, var, module.weight, module.bias, None, training, module.momentum or 0.0, module.eps)
    if not _may_wait(x, norm):
        return None
    if training and tracked and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            norm = norm._replace(momentum=1.0 / float(module.num_batches_tracked))
    call = NormCall(x, norm)
    return Deferred(call), call


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _compiled_backend(x: Tensor, norm: BatchNorm) -> Backend | None:
    """The backend that has the norm as one kernel; None if none takes these tensors."""
    backend = select("norm_relu_pool", "auto", (x,), norm.tensors())
    return None if backend is closed_form else backend


def hooks_on_saved_tensors() -> bool:
    """Whether somebody looks at what is saved for backward, as checkpoints do, which save the same again later."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _refuse_gradient(_gradient: Tensor) -> None:
    raise RuntimeError(_BYPASSED)


def _same(value: Any) -> Any:
    return value
