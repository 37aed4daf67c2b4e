"""Tensors that no kernel expects, given to every public function: run as a program, because a mistake kills the process.

Each case is named on stdout before it runs. It must give what plain PyTorch gives for the same numbers, or raise an
exception; a line that begins with "wrong" says where it did neither, and the last line is "done".
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import moda_kernels

LABELS = torch.tensor([0, 1, 0, 1])
BACKENDS = ("auto", "native", "torch", "reference")


class Wrapper(Tensor):
    """A tensor without memory of its own: operations are done on another one."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(value: Any) -> Any:
            return value.inner if isinstance(value, Wrapper) else value

        def wrap(value: Any) -> Any:
            return Wrapper(value) if isinstance(value, Tensor) else value

        tree = torch.utils._pytree.tree_map
        return tree(wrap, function(*tree(unwrap, args), **tree(unwrap, kwargs or {})))


class Watching(TorchDispatchMode):
    """Sees every operation, and lets it pass."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Renamed(Tensor):
    """A subclass that changes nothing."""


@dataclass(frozen=True)
class Given:
    """A tensor to be given, and the plain one of the same numbers; None if there is none, and an error is expected."""

    tensor: Any
    plain: Tensor | None


SEED = int(os.environ.get("MODA_HOSTILE_SEED", "0"))


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED + sum(shape)))


def freed(*shape: int) -> Tensor:
    x = values(*shape)
    x.untyped_storage().resize_(0)
    return x


def leaked(wrapper: Callable[..., Any], x: Tensor) -> Tensor:
    """What a function transform wraps its argument in, after the transform has ended."""
    kept = []
    wrapper(lambda a: (kept.append(a), a.sum())[1])(x)
    return kept[0]


def activations() -> dict[str, Callable[[], Given]]:
    x, flat = values(4, 3, 5, 5), values(4, 6)
    last = x.contiguous(memory_format=torch.channels_last)
    negated = torch.complex(x, -x).conj().imag  # its memory holds -x
    overlapping = values(40).as_strided((4, 3, 5, 5), (3, 2, 2, 1))
    row = values(1, 3, 5, 5)
    same = {
        "contiguous": x, "channels last": last, "(N, C)": flat, "transposed": x.transpose(2, 3),
        "neurons moved": x.movedim(1, 3).contiguous().movedim(3, 1), "rows expanded": row.expand(4, 3, 5, 5),
        "overlapping": overlapping, "unaligned": values(301)[1:].view(4, 3, 5, 5), "strided": values(8, 6)[::2, ::2],
        "pending negation": negated, "pending negation (N, C)": torch.complex(flat, -flat).conj().imag,
        "float64": x.double(), "bfloat16": x.bfloat16(), "parameter": torch.nn.Parameter(x.clone()),
        "leaf": x.clone().requires_grad_(), "view of a leaf": x.clone().requires_grad_()[:],
    }  # fmt: skip
    made: dict[str, Callable[[], Given]] = {
        name: lambda tensor=tensor: Given(tensor, tensor.detach().resolve_neg().clone())
        for name, tensor in same.items()
    }
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    made |= {
        "renamed": lambda: Given(x.as_subclass(Renamed), x),
        "zero": lambda: Given(torch._efficientzerotensor((4, 3, 5, 5)), torch.zeros(4, 3, 5, 5)),
        "wrapper": lambda: Given(Wrapper(x), x),
        "functional": lambda: Given(torch._to_functional_tensor(x), x),
        "fake": lambda: Given(fake.from_tensor(x), None),
        "meta": lambda: Given(x.to("meta"), None),
        "leaked from grad": lambda: Given(leaked(torch.func.grad, x), x),
        "leaked from vmap": lambda: Given(leaked(torch.vmap, x[None]), None),
        "inference": lambda: Given(inference(x), x),
    }
    errors: dict[str, Callable[[], Any]] = {
        "freed": lambda: freed(4, 3, 5, 5), "freed (N, C)": lambda: freed(4, 6), "sparse": lambda: flat.to_sparse(),
        "csr": lambda: flat.to_sparse_csr(), "mkldnn": lambda: x.to_mkldnn(),
        "nested": lambda: torch.nested.nested_tensor([values(3, 4), values(2, 4)]),
        "jagged": lambda: torch.nested.nested_tensor([values(3, 4), values(2, 4)], layout=torch.jagged),
        "masked": lambda: torch.masked.masked_tensor(x, x > 0),
        "quantised": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "float8": lambda: x.to(torch.float8_e4m3fn), "complex": lambda: torch.complex(x, x),
        "integers": lambda: x.long(), "booleans": lambda: x > 0, "0-d": lambda: torch.tensor(1.0),
        "1-d": lambda: values(4), "no samples": lambda: x[:0], "no neurons": lambda: x[:, :0],
        "no positions": lambda: x[..., :0], "uninitialised": torch.nn.UninitializedParameter,
        "array": lambda: x.numpy(), "None": lambda: None, "list": lambda: x.tolist(),
    }  # fmt: skip
    return made | {name: lambda make=make: Given(make(), None) for name, make in errors.items()}


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def labels() -> dict[str, Callable[[], Given]]:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    return {
        "int32": lambda: Given(LABELS.int(), LABELS),
        "strided": lambda: Given(torch.stack([LABELS, LABELS + 7], 1)[:, 0], LABELS),
        "pending negation": lambda: Given(torch._neg_view(-LABELS), LABELS),
        "zero": lambda: Given(torch._efficientzerotensor((4,), dtype=torch.int64), torch.zeros(4, dtype=torch.int64)),
        "one class expanded": lambda: Given(torch.tensor([1]).expand(4), torch.ones(4, dtype=torch.int64)),
        "wrapper": lambda: Given(Wrapper(LABELS), LABELS),
        "fake": lambda: Given(fake.from_tensor(LABELS), None),
        "meta": lambda: Given(LABELS.to("meta"), None),
        "sparse": lambda: Given(LABELS.to_sparse(), None),
        "too few": lambda: Given(LABELS[:3], None),
        "2-d": lambda: Given(LABELS[None], None),
        "float": lambda: Given(LABELS.float(), None),
        "freed": lambda: Given(freed_labels(), None),
    }


def freed_labels() -> Tensor:
    y = LABELS.clone()
    y.untyped_storage().resize_(0)
    return y


Function = Callable[[Tensor, Tensor, str], Any]


def counted(x: Tensor, y: Tensor, backend: str, *, threshold: float = 0.0, sums: bool = False) -> list[Tensor]:
    counter = moda_kernels.FiringCounter(2, threshold=threshold, backend=backend, sums=sums)
    counter.update([x], y)
    return [*counter.counts, counter.class_sizes, *(counter.sums if sums else ())]


def gradient(x: Tensor, y: Tensor, backend: str) -> Tensor:
    leaf = x.detach().requires_grad_()
    losses = moda_kernels.modular_losses([leaf], y, backend=backend)
    return torch.autograd.grad(sum(losses), leaf)[0]


def normed(x: Tensor, y: Tensor, backend: str) -> Any:
    backend = "auto" if backend == "reference" else backend
    return moda_kernels.norm_relu_pool(x, None, None, training=True, backend=backend)


FUNCTIONS: dict[str, Function] = {
    "pool": lambda x, y, backend: moda_kernels.pool([x], backend=backend),
    "relu_pool": lambda x, y, backend: moda_kernels.relu_pool(x, backend=backend),
    "relu_pool in place": lambda x, y, backend: moda_kernels.relu_pool(x, inplace=True, backend=backend),
    "norm_relu_pool": normed,
    "modular_losses": lambda x, y, backend: moda_kernels.modular_losses([x, x], y, backend=backend),
    "gradient of the losses": gradient,
    "class_means": lambda x, y, backend: moda_kernels.class_means([x], y, 2, backend=backend),
    "class_similarity": lambda x, y, backend: moda_kernels.class_similarity([x], y, 2, backend=backend),
    "FiringCounter": counted,
    "FiringCounter, threshold": lambda x, y, backend: counted(x, y, backend, threshold=0.5),
    "FiringCounter, sums": lambda x, y, backend: counted(x, y, backend, sums=True),
}

CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a dispatch mode": Watching,
    "fake mode": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "a level of forward derivatives": forward_ad.dual_level,
}

TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, x: torch.func.grad(lambda a: f(a).sum())(x) * 0 + f(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, 2 * x]))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[0],
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "jit.trace": lambda f, x: torch.jit.trace(f, (x + 1,), check_trace=False)(x),
}


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], Any]
    right: Callable[[], Any] | None  # None: only an error is right, or a tensor that holds no numbers


def cases() -> Iterator[Case]:
    kinds, of_labels = activations(), labels()
    for (kind, make), (name, function), backend in itertools.product(kinds.items(), FUNCTIONS.items(), BACKENDS):
        yield case(f"{name} of {kind}, {backend}", function, make, lambda: Given(LABELS, LABELS), backend)
    whole = lambda: Given(values(4, 3, 5, 5), values(4, 3, 5, 5))  # noqa: E731
    for (kind, make), (name, function), backend in itertools.product(of_labels.items(), FUNCTIONS.items(), BACKENDS):
        if "pool" not in name:
            yield case(f"{name} with labels {kind}, {backend}", function, whole, make, backend)
    for (kind, enter), (name, function), backend in itertools.product(CONTEXTS.items(), FUNCTIONS.items(), BACKENDS):
        yield case(
            f"{name} in {kind}, {backend}", function, whole, lambda: Given(LABELS, LABELS), backend, enter,
            has_numbers=kind != "fake mode",
        )  # fmt: skip
    for (kind, transform), (name, function), backend in itertools.product(
        TRANSFORMS.items(), FUNCTIONS.items(), BACKENDS
    ):
        if not name.startswith(("Firing", "gradient")):
            yield transformed(f"{name} under {kind}, {backend}", transform, function, backend)
    yield from gradients()


def case(
    name: str, function: Function, x: Callable[[], Given], y: Callable[[], Given], backend: str,
    enter: Callable[[], AbstractContextManager[Any]] = nullcontext, has_numbers: bool = True,
) -> Case:  # fmt: skip
    def run() -> Any:
        given, of_labels = x(), y()
        with enter():
            return function(given.tensor, of_labels.tensor, backend)

    def right() -> Any:
        given, of_labels = x().plain, y().plain
        assert given is not None
        assert of_labels is not None
        return function(given, of_labels, "torch")

    known = has_numbers and x().plain is not None and y().plain is not None
    return Case(name, run, right if known else None)


def transformed(name: str, transform: Callable[..., Tensor], function: Function, backend: str) -> Case:
    x = values(4, 3, 5, 5)

    def total(a: Tensor) -> Tensor:
        return sum(part.sum() for part in flat(function(a, LABELS, backend)))

    return Case(
        name,
        lambda: transform(total, x.clone()),
        lambda: sum(part.sum() for part in flat(function(x.clone(), LABELS, "torch"))),
    )


def gradients() -> Iterator[Case]:
    """Hostile gradients, into the fused operation and the losses."""
    up, rows = values(4, 3, 5, 5), values(4, 3)
    makers: dict[str, Callable[[Tensor], Tensor]] = {
        "expanded": lambda g: g[:1].expand(g.shape), "negated": lambda g: torch._neg_view(g), "zero": zero_like,
        "wrapper": Wrapper, "transposed": lambda g: g.movedim(0, -1).contiguous().movedim(-1, 0),
    }  # fmt: skip
    for (kind, make), backend in itertools.product(makers.items(), BACKENDS):

        def backward(backend: str, make: Callable[[Tensor], Tensor] = make) -> Any:
            x = values(4, 3, 5, 5).requires_grad_()
            y, pooled = moda_kernels.relu_pool(x, backend=backend)
            return torch.autograd.grad([y, pooled], x, [make(up), make(rows)])[0]

        def losses(backend: str, make: Callable[[Tensor], Tensor] = make) -> Any:
            x = values(4, 3, 5, 5).requires_grad_()
            terms = moda_kernels.modular_losses([x], LABELS, backend=backend)
            return torch.autograd.grad(list(terms), x, [make(torch.ones(1))[0] for _ in terms])[0]

        for name, run in (("relu_pool", backward), ("losses", losses)):
            yield Case(
                f"{kind} gradient of {name}, {backend}",
                lambda run=run, backend=backend: run(backend),
                (lambda run=run: run("torch", lambda g: g)) if kind == "wrapper" else lambda run=run: run("torch"),
            )


def zero_like(g: Tensor) -> Tensor:
    return torch._efficientzerotensor(tuple(g.shape))


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for parts in result for part in flat(parts)]


def numbers(result: Any) -> list[Tensor] | None:
    """The numbers of a result; None if a tensor in it holds none (a fake one, say)."""
    found = []
    for tensor in flat(result):
        tensor = tensor.inner if isinstance(tensor, Wrapper) else tensor
        if torch._is_functional_tensor(tensor):
            torch._sync(tensor)
            tensor = torch._from_functional_tensor(tensor)
        if tensor.is_meta or type(tensor).__name__ == "FakeTensor":
            return None
        found.append(tensor.detach().resolve_neg().as_subclass(Tensor).double())
    return found


def verdict(one: Case) -> str | None:
    """What is wrong, if anything."""
    try:
        got = numbers(one.run())
    except Exception:  # an exception is always right
        return None
    if got is None:
        return None
    if one.right is None:
        return "gave numbers where there are none"
    rtol, atol = 1e-2 if "bfloat16" in one.name else 1e-4, 1e-5
    if "norm_relu_pool of bfloat16" in one.name:
        atol = (
            3e-2  # PyTorch's own batch norm rounds scale and shift to bfloat16 there, so that its values near 0 are off
        )
    for mine, right in zip(got, numbers(one.right()) or (), strict=True):
        if not torch.allclose(mine, right, rtol=rtol, atol=atol, equal_nan=True):
            return f"gave {mine.flatten()[:4].tolist()}, right is {right.flatten()[:4].tolist()}"
    return None


def main() -> None:
    """Run every case."""
    warnings.simplefilter("ignore")
    for one in cases():
        print(one.name, flush=True)
        if problem := verdict(one):
            print(f"wrong: {one.name}: {problem}", flush=True)
    print("done")


if __name__ == "__main__":
    main()
