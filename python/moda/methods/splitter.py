"""The splitter of GradSplitter (arXiv 2311.04438): masks and heads for all classes over one frozen network.

For class k every tap has a real number m per neuron; the neuron is kept where m > 0. The frozen network with the
dropped neurons at 0 gives logits z, and a head turns them into the probability that the sample is of class k:

    p_k = sigmoid(W2 relu(W1 relu(z) + b1) + b2)

All classes are computed in one batched pass, or in as few as memory allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moda.checks import check_count
from moda.decomposition.heads import HEAD_TENSORS
from moda.inference import device_of
from moda.observation.taps import Taps
from moda_kernels.validation import MOST_CLASSES

PUBLISHED_HIDDEN = 10
"""Hidden neurons of a head."""


class _Binary(torch.autograd.Function):
    """1 where a mask is above 0, else 0, with a straight-through gradient clipped to [-1, 1]."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor) -> Tensor:
        return (mask > 0).to(mask.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        clipped: Tensor = gradients[0].clamp(-1, 1)
        return clipped


def binarised(mask: Tensor) -> Tensor:
    """Return 1 where `mask` is above 0, else 0 (also for NaN).

    The gradient passes straight through, clipped to [-1, 1] element by element. As published, every use of a mask
    binarises it anew and so clips a gradient of its own.
    """
    made: Tensor = _Binary.apply(mask)  # type: ignore[no-untyped-call]
    return made


class _Masked(torch.autograd.Function):
    """Activations of k classes, one after the other in the batch, times their binary masks.

    It keeps the activation alone, and goes over memory less often than a product of PyTorch's does: no gradient of the
    activation is made where none is asked for.
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor, mask: Tensor) -> Tensor:
        kept = (mask > 0).to(activation.dtype)
        ctx.save_for_backward(activation, kept)
        ctx.mask_dtype = mask.dtype
        return _times(activation, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        activation, kept = ctx.saved_tensors
        of_activation = _times(gradient, kept) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_activation, None
        products = (gradient * activation).unflatten(0, (len(kept), -1))
        of_mask = products.sum([1, *range(3, products.dim())]).to(ctx.mask_dtype)
        return of_activation, of_mask.clamp_(-1, 1)


def _times(rows: Tensor, kept: Tensor) -> Tensor:
    """(k * N, C, ...) times (k, C)."""
    by_class: Tensor = rows.unflatten(0, (len(kept), -1))
    made: Tensor = (by_class * kept.view(len(kept), 1, -1, *[1] * (rows.dim() - 2))).flatten(0, 1)
    return made


def masked(activation: Tensor, mask: Tensor) -> Tensor:
    """Return activations (k * N, C, ...) of k classes, with 0 where the class's row of `mask` (k, C) is not above 0.

    The gradient is that of a product with `binarised(mask)`: straight through, clipped at this use by itself.
    """
    made: Tensor = _Masked.apply(activation, mask)  # type: ignore[no-untyped-call]
    return made


class Heads(nn.Module):
    """One small network per class from the frozen network's logits to the class's probability.

    Args:
        num_classes: K.
        logits: how many logits the frozen network has.
        hidden: hidden neurons of a head; the published code has 10 always.
    """

    def __init__(self, num_classes: int, logits: int, hidden: int = PUBLISHED_HIDDEN) -> None:
        super().__init__()
        single = [_head(logits, hidden) for _ in range(num_classes)]  # initialised as PyTorch does
        state = {name: torch.stack([head.state_dict()[name] for head in single]) for name in single[0].state_dict()}
        self.first_weight = nn.Parameter(state["0.weight"])  # (K, hidden, logits)
        self.first_bias = nn.Parameter(state["0.bias"])
        self.second_weight = nn.Parameter(state["2.weight"])  # (K, 1, hidden)
        self.second_bias = nn.Parameter(state["2.bias"])

    def forward(self, logits: Tensor, classes: slice = slice(None)) -> Tensor:
        """Map logits (k, N, logits) of the networks of k classes to probabilities (N, k)."""
        x = torch.baddbmm(self.first_bias[classes, None], logits.relu(), self.first_weight[classes].transpose(1, 2))
        x = torch.baddbmm(self.second_bias[classes, None], x.relu(), self.second_weight[classes].transpose(1, 2))
        return x.squeeze(2).T.sigmoid()

    def of_class(self, number: int) -> nn.Sequential:
        """Return a copy of the head of one class, `Linear, ReLU, Linear`, under the published keys."""
        hidden, logits = self.first_weight.shape[1:]
        head = _head(logits, hidden).to(self.first_weight)
        head.load_state_dict(
            {
                "0.weight": self.first_weight[number],
                "0.bias": self.first_bias[number],
                "2.weight": self.second_weight[number],
                "2.bias": self.second_bias[number],
            }
        )
        return head

    def tensors(self) -> dict[str, Tensor]:
        """Return a copy of the tensors of all heads, on the CPU, by the names that decompositions have for them."""
        return {
            name: parameter.detach().cpu().clone()
            for name, parameter in zip(HEAD_TENSORS, self.parameters(), strict=True)
        }

    def load_heads(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Take over the heads of all classes, each with the published keys."""
        with torch.no_grad():
            for parameter, name in zip(self.parameters(), ("0.weight", "0.bias", "2.weight", "2.bias"), strict=True):
                parameter.copy_(torch.stack([state[name] for state in states]))


def _head(logits: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(logits, hidden), nn.ReLU(), nn.Linear(hidden, 1))


class Splitter(nn.Module):
    """Masks and heads of all classes over a frozen, observed network.

    Args:
        taps: the observed network, after its first forward pass. Its parameters must not require gradients, and it must
            be in evaluation mode: `frozen` sees to both.
        num_classes: K.
        logits: how many logits the network has; None for K.
        sites: the taps that are masked; None for all of them.
        shared: taps that use another tap's masks, as {tap: owner}. Outputs that are added to one another share masks.
        initial: the masks' first value; published: 1. At 0 every neuron is off.
        hidden: hidden neurons of a head.
        classes_at_once: for how many classes the network runs in one pass.
        layout: the order in memory of the network's inputs.

    Raises:
        ValueError: an argument is not as above.
    """

    taps: Taps

    def __init__(
        self,
        taps: Taps,
        num_classes: int,
        *,
        logits: int | None = None,
        sites: Sequence[str] | None = None,
        shared: Mapping[str, str] | None = None,
        initial: float = 1.0,
        hidden: int = PUBLISHED_HIDDEN,
        classes_at_once: int | None = None,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes, least=2, most=MOST_CLASSES)
        if classes_at_once is not None and classes_at_once < 1:
            raise ValueError(f"classes_at_once: expected at least 1, got {classes_at_once}")
        self.__dict__["taps"] = taps  # the frozen network is no part of this module
        self.num_classes = num_classes
        self.layout = layout
        self.classes_at_once = min(num_classes, classes_at_once or num_classes)
        widths = chosen_widths(dict(zip(taps.names, taps.widths, strict=True)), sites)
        self.owners = owners_of(widths, shared or {})
        device = device_of(taps.model)
        self.masks = nn.ParameterList(
            nn.Parameter(torch.full((num_classes, widths[name]), initial, device=device))
            for name in dict.fromkeys(self.owners.values())
        )
        self.heads = Heads(num_classes, num_classes if logits is None else logits, hidden).to(device)
        self._places = {name: place for place, name in enumerate(dict.fromkeys(self.owners.values()))}

    def mask(self, tap: str) -> Tensor:
        """The real (K, C) masks of a tap; those of its owner where it shares them."""
        mask: Tensor = self.masks[self._places[self.owners[tap]]]
        return mask

    def forward(self, inputs: Tensor) -> Tensor:
        """Map the network's inputs (N, ...) to probabilities (N, K)."""
        parts = []
        for start in range(0, self.num_classes, self.classes_at_once):
            classes = slice(start, min(start + self.classes_at_once, self.num_classes))
            parts.append(self.heads(self._logits(inputs, classes), classes))
        return torch.cat(parts, 1)

    def _logits(self, inputs: Tensor, classes: slice) -> Tensor:
        """(k, N, logits) of the networks of k classes, computed side by side."""
        count = classes.stop - classes.start
        names = self.taps.names

        def replaced(index: int, activation: Tensor) -> Tensor:
            tap = names[index]
            return masked(activation, self.mask(tap)[classes]) if tap in self.owners else activation

        with self.taps.replacing(replaced):
            repeated = inputs.repeat(count, *[1] * (inputs.dim() - 1)).contiguous(memory_format=self.layout)
            logits: Tensor = self.taps.model(repeated)
        of_classes: Tensor = logits.unflatten(0, (count, -1))
        return of_classes

    def kept_share(self) -> Tensor:
        """Return the share of neurons that modules keep, over all classes and taps, shared masks counted at each tap.

        It is a scalar that gradients pass through, clipped at each tap by itself.
        """
        kept = [binarised(self.mask(tap)) for tap in self.owners]
        total = sum(mask.numel() for mask in kept)
        return torch.stack([mask.sum() for mask in kept]).sum() / total

    def module_masks(self) -> dict[str, Tensor]:
        """Return the neurons of each class's module, per tap (K, C) bool.

        A tap that would keep no neuron for a class keeps the one with the largest m. (The published code computes with
        nothing there while it trains, and keeps neuron 0 when it extracts the module.)
        """
        made = {}
        for tap in self.owners:
            mask = self.mask(tap).detach()
            kept = mask > 0
            empty = ~kept.any(1)
            kept[empty] = F.one_hot(mask.nan_to_num(-math.inf).argmax(1), mask.shape[1]).bool()[empty]
            made[tap] = kept.cpu()
        return made


def chosen_widths(widths: Mapping[str, int], sites: Sequence[str] | None) -> dict[str, int]:
    """The neurons of the taps that are masked."""
    if sites is None:
        return dict(widths)
    if not sites:
        raise ValueError("sites: expected at least one tap, got none")
    unknown = [site for site in sites if site not in widths]
    if unknown:
        raise ValueError(f"sites: expected taps of the model ({', '.join(widths)}), got {unknown[0]!r}")
    return {tap: width for tap, width in widths.items() if tap in set(sites)}


def owners_of(widths: Mapping[str, int], shared: Mapping[str, str]) -> dict[str, str]:
    """The owner of each tap's masks."""
    owners = {}
    for tap in widths:
        owner = tap
        seen = {tap}
        while owner in shared:
            owner = shared[owner]
            if owner not in widths:
                raise ValueError(f"shared: expected taps of the model, got {owner!r}")
            if owner in seen:
                raise ValueError(f"shared: expected an owner for every tap, got a circle at {owner!r}")
            seen.add(owner)
        if widths[owner] != widths[tap]:
            raise ValueError(f"shared: {tap!r} has {widths[tap]} neurons, its owner {owner!r} {widths[owner]}")
        owners[tap] = owner
    unknown = sorted(set(shared) - set(widths))
    if unknown:
        raise ValueError(f"shared: expected taps of the model, got {unknown[0]!r}")
    return owners


def splitter_loss(probabilities: Tensor, labels: Tensor, kept_share: Tensor, weight: float) -> Tensor:
    """Return the published loss: cross-entropy with the probabilities as its logits, plus the weighted share kept.

    Args:
        probabilities: (N, K).
        labels: (N,) int64.
        kept_share: scalar, from `Splitter.kept_share`.
        weight: of the share; published: 0.1 while masks are trained, else 0.
    """
    return F.cross_entropy(probabilities, labels) + weight * kept_share


def detection_f1(outputs: Tensor, labels: Tensor, number: int) -> float:
    """Return the F1 score of a module as a detector of its class; 0 without a true positive (the published code's NaN).

    Args:
        outputs: (N,) or (N, 1) probabilities; above 0.5 is a detection.
        labels: (N,) int64.
        number: the class.
    """
    detected, wanted = outputs.reshape(-1) > 0.5, labels == number
    right = int((detected & wanted).sum())
    return 2 * right / (int(detected.sum()) + int(wanted.sum())) if right else 0.0
