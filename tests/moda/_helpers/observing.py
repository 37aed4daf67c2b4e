"""What tests of observation share: one pass of a model with all that may tell it from another, and oracles for taps."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from tests.moda._helpers.zoo import tensors_of

ACTIVATIONS = frozenset((
    "relu", "relu6", "hardtanh", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
    "softplus",
))  # fmt: skip


@dataclass
class Pass:
    """All that one forward and backward pass left behind."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    state: dict[str, Any]
    random: tuple[Tensor, Any]


def task_loss(output: Any) -> Tensor:
    """A loss in which every number of the output counts, each with a weight of its own."""
    terms = [
        (tensor.float() * torch.linspace(0.5, 1.5, tensor.numel()).view(tensor.shape)).mean()
        for tensor in tensors_of(output)
        if tensor.requires_grad
    ]
    return torch.stack(terms).sum()


def one_pass(model: nn.Module, inputs: tuple[Any, Any], seed: int, then: Callable[[], None] = lambda: None) -> Pass:
    """Forward and backward with the given seed; `then` runs afterwards, while the graph is still there."""
    torch.manual_seed(seed)
    random.seed(seed)
    model.zero_grad(set_to_none=True)
    args, kwargs = inputs
    output = model(*args, **kwargs)
    state = (torch.get_rng_state(), random.getstate())
    outputs = [tensor.detach().clone() for tensor in tensors_of(output)]
    task_loss(output).backward(retain_graph=True)
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    made = Pass(outputs, gradients, {n: copy.deepcopy(v) for n, v in model.state_dict().items()}, state)
    then()
    return made


def assert_same_pass(got: Pass, wanted: Pass) -> None:
    """Bit for bit."""
    assert len(got.outputs) == len(wanted.outputs)
    for place, (a, b) in enumerate(zip(got.outputs, wanted.outputs, strict=True)):
        assert same(a, b), f"output {place}: off by {difference(a, b)}"
    assert got.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        assert same(got.gradients[name], gradient), (
            f"gradient of {name}: off by {difference(got.gradients[name], gradient)}"
        )
    assert list(got.state) == list(wanted.state)
    for name, value in wanted.state.items():
        assert same(got.state[name], value), f"{name} in the state"
    assert torch.equal(got.random[0], wanted.random[0]), "random state of torch"
    assert got.random[1] == wanted.random[1], "random state of Python"


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, in dtype, shape and kind; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and type(a) is type(b) and torch.equal(a.nan_to_num(7e30), b.nan_to_num(7e30))
    return type(a) is type(b) and bool(a == b)


def difference(a: Any, b: Any) -> str:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape:
        return f"{type(a).__name__} against {type(b).__name__}"
    return f"{(a.double() - b.double()).abs().max():.2g} of {b.abs().max():.2g}"


class Trace:
    """What a model looks like from outside: classes, attributes, hooks, parts. Equal where nothing was left behind."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = {path: self._look(module) for path, module in model.named_modules(remove_duplicate=False)}

    @staticmethod
    def _look(module: nn.Module) -> tuple[Any, ...]:
        hooks = {key: len(value) for key, value in vars(module).items() if key.endswith("_hooks") and value}
        state = {key: type(value) for key, value in vars(module).items()}
        classes = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
        return classes, state, hooks, repr(module)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trace) and self.parts == other.parts

    def __repr__(self) -> str:
        return "\n".join(f"{path}: {part}" for path, part in self.parts.items())

    __hash__ = None  # type: ignore[assignment]


class ActivationCalls(TorchFunctionMode):
    """Keeps a copy of what each call of an activation function gives, whoever calls it, in order; also of transformers'
    activations that are made of arithmetic."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        for module in model.modules():
            kind = type(module)
            if kind.__module__ == "transformers.activations" or "gelu" in kind.__name__.lower():
                module.register_forward_hook(lambda _module, _args, output: self.outputs.extend(tensors_of(output)))

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "").removesuffix("_") in ACTIVATIONS and isinstance(output, Tensor):
            self.outputs.append(output.detach().clone())
        return output


def values(tensor: Tensor) -> Tensor:
    """The numbers in a tensor, wherever they lie."""
    return tensor.detach().double().flatten().sort().values


def assert_recorded_in_order(recorded: Iterable[Tensor], called: list[Tensor]) -> None:
    """Each recorded activation holds the numbers of one call, in the order of the calls.

    To rounding: attention takes another road where calls are looked at.
    """
    rest = iter([values(output) for output in called])
    for place, activation in enumerate(recorded):
        numbers = values(activation)
        found = any(numbers.shape == other.shape and torch.allclose(numbers, other, 1e-4, 1e-5) for other in rest)
        assert found, f"activation {place} is no call's output"


def with_first_sample_repeated(inputs: tuple[Any, Any], batch: int) -> tuple[Any, Any]:
    """The same inputs, but sample 0 is a copy of sample 1."""

    def repeat(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or value.size(0) != batch:
            return value
        value = value.clone()
        value[0] = value[1]
        return value

    return tree_map(repeat, inputs)


def follows_samples(before: Tensor, after: Tensor) -> bool:
    """Whether rows are samples: with sample 0 made a copy of sample 1, row 0 is row 1 and the others are as before."""
    close = lambda a, b: torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5)  # noqa: E731
    return close(after[0], after[1]) and close(after[1:], before[1:])
