"""What an activation is: hidden activations of the rectifier family, as modules, functions and methods.

ReLU, ReLU6, LeakyReLU, PReLU, RReLU, ELU, SELU, CELU, GELU, SiLU, Mish, Hardswish, Softplus, and the activation classes
of Hugging Face transformers and of timm that are made of arithmetic. Gates and squashing functions (Sigmoid,
Hardsigmoid, Tanh, Softmax) are none: what they put out are weights, not neurons that fire. Nor is arithmetic that
happens to rectify (`x.clamp(min=0)`).
"""

from __future__ import annotations

from collections.abc import Iterable
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda_kernels.batch_norm import ACTIVATIONS

_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Softplus,
)  # fmt: skip
_NAMES = (
    "celu", "elu", "gelu", "hardswish", "leaky_relu", "mish", "prelu", "relu", "relu6", "rrelu", "selu", "silu",
    "softplus",
)  # fmt: skip
_INPLACE_PLACES = {
    "celu": 2, "elu": 2, "hardswish": 1, "leaky_relu": 2, "mish": 1, "relu": 1, "relu6": 1, "rrelu": 4, "selu": 1,
    "silu": 1,
}  # fmt: skip


class ActivationFunction(NamedTuple):
    """A function or method of PyTorch that is an activation: its name, and when it overwrites its input."""

    name: str
    always: bool  # overwrites it whatever the arguments
    place: int | None  # of the argument `inplace`, if it has one

    def overwrites(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call with these arguments writes its result over its input."""
        if self.always or self.place is None:
            return self.always
        if "inplace" in kwargs:
            return bool(kwargs["inplace"])
        return len(args) > self.place and bool(args[self.place])


FUNCTIONS: dict[object, ActivationFunction] = {
    function: ActivationFunction(name, form != name, _INPLACE_PLACES.get(name) if place is F else None)
    for name in _NAMES
    for place in (torch, Tensor, torch._C._nn, F)
    for form in (name, f"{name}_")
    if (function := getattr(place, form, None)) is not None
}
"""By the function or method itself."""

_OF_TRANSFORMERS = "transformers.activations"
_OF_ARITHMETIC = frozenset((("transformers", "BloomGelu"), ("timm", "QuickGELU")))  # which shows no call of a function
_NONE_OF_TRANSFORMERS = ("LinearActivation", "ClassInstantier", "XIELUActivation")

# Their forward pass may take a fused road that calls no activation function, and takes another one where calls of
# functions are watched: they are left alone, whole.
_FUSED_ROADS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


def is_left_whole(module: nn.Module) -> bool:
    """Whether nothing inside of a module is looked at; encoders are open where PyTorch's fast path is switched off."""
    fused = isinstance(module, _FUSED_ROADS) and torch.backends.mha.get_fastpath_enabled()
    return fused or isinstance(module, nn.MultiheadAttention)


PLAIN = "moda plain"
"""Where a class of an observed model keeps the class that it was made of."""


_PLAIN_MODULES = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu", nn.GELU: "gelu",
}  # fmt: skip


def function_of(module: nn.Module) -> str:
    """The function that a call of this module computes, of those that the kernels have; empty for another one."""
    name = _PLAIN_MODULES.get(plain_class(type(module)), "")
    settings: Any = module
    if name == "gelu" and settings.approximate != "none":
        return ""
    if name == "relu6" and (settings.min_val, settings.max_val) != (0, 6):
        return ""
    return name


def function_called(name: str, kwargs: dict[str, Any]) -> str:
    """The same for a call of a function or method of PyTorch of this name."""
    plain = kwargs.keys() <= {"inplace", "approximate"} and kwargs.get("approximate", "none") == "none"
    return name if name in ACTIVATIONS and plain else ""


class Known:
    """Which modules are activations of one observed model, and which functions: the known ones and the user's own."""

    def __init__(self, own: Iterable[Any] = (), sites: Iterable[str] = ()) -> None:
        own = tuple(own)
        self.sites = frozenset(sites)
        self.classes = tuple(kind for kind in own if isinstance(kind, type))
        self.functions = tuple(kind for kind in own if not isinstance(kind, type))
        for kind in own:
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)) and not _is_function(kind):
                raise TypeError(
                    f"activations: expected classes of modules and functions written in Python, got {kind!r}"
                )

    def is_module(self, module: nn.Module, path: str) -> bool:
        """Whether each call of this module, which lies at `path` in the model, is one activation.

        Where sites are named it is those alone. A subclass that somebody else made of one of PyTorch's classes is none:
        it is looked into, for the functions that it calls.
        """
        if self.sites:
            return path in self.sites
        if isinstance(module, self.classes):
            return True
        plain = plain_class(type(module))
        if plain.__module__ == _OF_TRANSFORMERS:
            return plain.__name__.endswith("Activation") and plain.__name__ not in _NONE_OF_TRANSFORMERS
        if (plain.__module__.split(".")[0], plain.__name__) in _OF_ARITHMETIC:
            return True
        return isinstance(module, _MODULES) and plain.__module__.startswith("torch.")


def _is_function(kind: object) -> bool:
    return isinstance(kind, FunctionType)


def plain_class(kind: type) -> type:
    """The class that a class of an observed model was made of; the class itself if it is none."""
    plain: type = vars(kind).get(PLAIN, kind)
    return plain
