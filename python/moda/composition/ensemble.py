"""Ensembles: a network for each class, which answers for its own class alone.

Modules of GradSplitter and CNNSplitter are not united. Each is the network with the neurons that its class does not
keep at 0, and gives one number: the class's logit, or the probability that a head of its own makes of all logits. The
numbers of several modules stand side by side as the logits of one network do, and the highest one is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from moda.decomposition.container import Decomposition
from moda.inference import device_of

__all__ = ["ClassHead", "Ensemble", "ensemble", "united"]

Member: TypeAlias = "Callable[[Decomposition, list[int]], nn.Module]"
"""Makes the network of a decomposition of rows that puts out the logits of some classes."""


class ClassHead(nn.Module):
    """The head of one class: logits to the probability of the class, sigmoid(W2 relu(W1 relu(z) + b1) + b2).

    Args:
        tensors: of this class alone, see `moda.decomposition.heads`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        neurons, logits = tensors["hidden.weight"].shape
        like = tensors["hidden.weight"]
        self.hidden = nn.Linear(logits, neurons, device=like.device, dtype=like.dtype)
        self.output = nn.Linear(neurons, 1, device=like.device, dtype=like.dtype)
        self.load_state_dict(dict(tensors))

    def forward(self, logits: Tensor) -> Tensor:
        """Map (N, logits) to (N, 1)."""
        probability: Tensor = self.output(self.hidden(logits.relu()).relu()).sigmoid()
        return probability


class Ensemble(nn.Module):
    """The modules of some classes side by side, made by `moda.compose` or `moda.mask`.

    It is called as the model that its modules were made from, and gives one column for each class: logits of the
    classes, or probabilities.

    Args:
        modules: the network of each class; it gives the class's logit (N, 1), or what the class's head takes.
        heads: of each class, in the same order; none where modules give their own logit.
        classes: class indices, in the order of the outputs.
        num_classes: of the whole model.
    """

    def __init__(
        self, modules: Sequence[nn.Module], heads: Sequence[nn.Module], classes: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        self.training = modules[0].training
        self.members = nn.ModuleList(modules)
        self.heads = nn.ModuleList(heads)
        self.classes = tuple(classes)
        self.num_classes = num_classes

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the model's own forward; (N, classes)."""
        outputs = [_tensor(member(*args, **kwargs)) for member in self.members]
        if len(self.heads):
            outputs = [head(output) for head, output in zip(self.heads, outputs, strict=True)]
        return torch.cat(outputs, 1)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of the outputs; None if they are not known."""
        names = getattr(self.members[0], "class_names", None)
        if names is None or len(self.heads):
            return None if names is None else tuple(names[number] for number in self.classes)
        return tuple(name for member in self.members for name in getattr(member, "class_names", ()))

    def report(self) -> str:
        """What is left of each layer in every module, see `ComposedModel.report`."""
        reports = [getattr(member, "report", lambda: "not composed")() for member in self.members]
        return "\n\n".join(f"class {number}\n{text}" for number, text in zip(self.classes, reports, strict=True))

    def extra_repr(self) -> str:
        """Classes."""
        return f"classes={list(self.classes)} of {self.num_classes}"


def _tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"model: expected logits (N, classes) as its one output, to stand side by side, got {got}")
    return output


def ensemble(decomposition: Decomposition, classes: Sequence[int], member: Member) -> Ensemble:
    """Put the modules of some classes side by side.

    Args:
        decomposition: its outputs combine by "logit" or "probability".
        classes: class indices, in the order of the outputs.
        member: makes a module.
    """
    every = list(range(decomposition.num_classes))
    if decomposition.combine == "logit":
        modules = [member(united(decomposition, [number]), [number]) for number in classes]
        heads: list[nn.Module] = []
    else:
        modules = [member(united(decomposition, [number]), every) for number in classes]
        heads = [
            ClassHead({name: tensor[number] for name, tensor in decomposition.heads.items()}).to(device_of(module))
            for number, module in zip(classes, modules, strict=True)
        ]
    return Ensemble(modules, heads, classes, decomposition.num_classes)


def united(decomposition: Decomposition, classes: Sequence[int]) -> Decomposition:
    """Every class's module is the union of the modules of some: of its composition any logits can be taken."""
    chosen = decomposition.select(classes)
    masks = {site: mask.expand(decomposition.num_classes, -1).clone() for site, mask in chosen.items()}
    return Decomposition(masks, decomposition.method, decomposition.settings, metadata=decomposition.metadata)
