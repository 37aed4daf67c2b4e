"""What CNNSplitter (arXiv 2209.06116) asks a trained network: which neurons matter, and what parts of it answer.

A module is the network with all but its neurons at 0. The samples of many modules go through the network together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moda.inference import device_of, evaluating
from moda.methods.base import Loader, Prepared
from moda.observation.taps import Taps

Bools = npt.NDArray[np.bool_]

_PASS = 2048  # samples of all modules together that one pass takes
RATIOS = tuple(share / 10 for share in range(1, 11))
"""Shares of a layer's neurons that its sensitivity is tried with."""
DECIDING = (0.5, 1.0)
"""Those that decide whether a layer is sensitive."""


@dataclass(frozen=True, eq=False)
class PreparedSearch(Prepared):
    """A frozen, observed network.

    Attributes:
        taps: of the network.
        owners: the slot that decides on each tap's neurons, as {tap: tap}.
        widths: neurons of each tap.
        layout: the order in memory of the network's inputs.
    """

    taps: Taps = field(kw_only=True)
    owners: Mapping[str, str] = field(kw_only=True)
    widths: Mapping[str, int] = field(kw_only=True)
    layout: torch.memory_format = field(default=torch.contiguous_format, kw_only=True)

    @property
    def slots(self) -> list[str]:
        """The taps that decide, in execution order."""
        return [tap for tap, owner in self.owners.items() if tap == owner]


# ---- running modules ----------------------------------------------------------------------------------------------


def labels_of(loader: Loader, num_classes: int) -> npt.NDArray[np.int64]:
    """Return the labels of all samples of a loader, (n,) int64.

    Raises:
        ValueError: the loader gives no batch, or a class has no sample.
    """
    labels = [batch[1] for batch in loader]
    if not labels:
        raise ValueError("loader: expected at least one batch, got none")
    joined: npt.NDArray[np.int64] = torch.cat(labels).cpu().numpy().astype(np.int64)
    missing = sorted(set(range(num_classes)) - set(joined.tolist()))
    if missing:
        raise ValueError(f"loader: expected samples of every class, got none of classes {missing}")
    return joined


def module_outputs(
    prepared: PreparedSearch, masks: Mapping[str, Bools], classes: Sequence[int], loader: Loader
) -> npt.NDArray[np.float32]:
    """Run modules, and give each one's logit of its own class on every sample.

    Args:
        prepared: the network.
        masks: per tap (M, C) bool, the neurons of M modules.
        classes: of each module, its class.
        loader: gives batches of (inputs, labels).

    Returns:
        (M, samples), float64 for a float64 network, else float32.
    """
    device = device_of(prepared.model)
    kept = {tap: torch.from_numpy(np.ascontiguousarray(mask)).to(device) for tap, mask in masks.items()}
    own = torch.as_tensor(list(classes), device=device)
    parts = []
    with evaluating(prepared.model), torch.no_grad():
        for inputs, _ in loader:
            count = max(1, _PASS // max(1, len(inputs)))
            runs = [
                _run(prepared, inputs.to(device), kept, own, slice(start, start + count))
                for start in range(0, len(own), count)
            ]
            parts.append(torch.cat(runs))
    outputs: npt.NDArray[np.float32] = torch.cat(parts, 1).cpu().numpy()
    return outputs


def _run(prepared: PreparedSearch, inputs: Tensor, kept: Mapping[str, Tensor], own: Tensor, part: slice) -> Tensor:
    """(m, N) own-class logits of some modules on a batch."""
    chosen = own[part]
    count = len(chosen)
    names = prepared.taps.names

    def masked(index: int, activation: Tensor) -> Tensor:
        if names[index] not in kept:
            return activation
        factor = kept[names[index]][part].to(activation.dtype)
        rows: Tensor = activation.unflatten(0, (count, -1))
        product: Tensor = rows * factor.view(count, 1, -1, *[1] * (activation.dim() - 2))
        return product.flatten(0, 1)

    with prepared.taps.replacing(masked):
        repeated = inputs.repeat(count, *[1] * (inputs.dim() - 1)).contiguous(memory_format=prepared.layout)
        logits: Tensor = prepared.model(repeated)
    of_modules: Tensor = logits.unflatten(0, (count, -1))
    return of_modules[torch.arange(count, device=chosen.device), :, chosen]


# ---- importance and sensitivity -----------------------------------------------------------------------------------


def importances(prepared: PreparedSearch, loader: Loader, confidence: float = 0.9) -> dict[str, Tensor]:
    """Return how important each neuron is per class: the mean over samples of its activation summed over positions.

    Only samples count that the network gives at least `confidence` of probability to be of their class; a class without
    any such sample is judged by all of its samples.

    Returns:
        Per tap (K, C) float64. A tap that another one decides for has the other one's.
    """
    device = device_of(prepared.model)
    names, num_classes = prepared.taps.names, prepared.num_classes
    sums = {tap: torch.zeros(2, num_classes, width, dtype=torch.float64) for tap, width in prepared.widths.items()}
    counts = torch.zeros(2, num_classes, dtype=torch.float64)  # of confident samples, and of all
    with evaluating(prepared.model), torch.no_grad():
        for inputs, labels in loader:
            seen: dict[str, Tensor] = {}

            def receive(index: int, rows: Tensor, seen: dict[str, Tensor] = seen) -> None:
                seen[names[index]] = rows.flatten(2).sum(2) if rows.dim() > 2 else rows.clone()

            with prepared.taps.recording(receive):
                logits = prepared.model(inputs.to(device))
            own = logits.softmax(1).gather(1, labels.to(device)[:, None])[:, 0]
            every = torch.nn.functional.one_hot(labels.long(), num_classes).double()
            weights = torch.stack([every * (own >= confidence).cpu().double()[:, None], every])
            counts += weights.sum(1)
            for tap, total in sums.items():
                total += weights.transpose(1, 2) @ seen[tap].cpu().double()
    confident = counts[0] > 0
    chosen = torch.where(confident, counts[0], counts[1]).clamp(min=1)[:, None]
    found = {tap: torch.where(confident[:, None], total[0], total[1]) / chosen for tap, total in sums.items()}
    return {tap: found[owner] for tap, owner in prepared.owners.items()}


def most_important(order: npt.NDArray[np.int64], ratio: float) -> npt.NDArray[np.int64]:
    """Return the floor(ratio * C) most important neurons, or neuron 0 alone where that is none, as published.

    Args:
        order: (K, C), each class's neurons by falling importance.
        ratio: in [0, 1].
    """
    count = int(order.shape[1] * ratio)
    return order[:, :count] if count else np.zeros_like(order[:, :1])


def sensitivities(
    prepared: PreparedSearch,
    loader: Loader,
    orders: Mapping[str, npt.NDArray[np.int64]],
    ratios: Sequence[float] = RATIOS,
) -> dict[str, list[float]]:
    """Return how accurate all modules together are when they keep only part of one layer.

    Args:
        prepared: the network.
        loader: gives batches of (inputs, labels).
        orders: per tap (K, C), each class's neurons by falling importance.
        ratios: shares of the layer's neurons that modules keep, the most important ones of their class.

    Returns:
        Per slot one accuracy per ratio.
    """
    num_classes = prepared.num_classes
    labels = labels_of(loader, num_classes)

    def accuracy(slot: str, kept: npt.NDArray[np.int64]) -> float:
        masks = {tap: np.ones((num_classes, width), bool) for tap, width in prepared.widths.items()}
        for tap, owner in prepared.owners.items():
            if owner == slot:
                masks[tap] = np.zeros_like(masks[tap])
                np.put_along_axis(masks[tap], kept, True, axis=1)
        outputs = module_outputs(prepared, masks, range(num_classes), loader)
        return float((outputs.argmax(0) == labels).mean())

    found: dict[str, list[float]] = {}
    whole: float | None = None  # with all of a layer modules are the network, whichever layer it is
    for slot in prepared.slots:
        found[slot] = []
        for ratio in ratios:
            kept = most_important(orders[slot], ratio)
            if kept.shape[1] == prepared.widths[slot]:
                whole = accuracy(slot, kept) if whole is None else whole
                found[slot].append(whole)
            else:
                found[slot].append(accuracy(slot, kept))
    return found


def sensitive_slots(
    accuracies: Mapping[str, Sequence[float]], loss: float = 0.05, ratios: Sequence[float] = RATIOS
) -> list[str]:
    """Return the slots whose half of most important neurons does not suffice.

    That is, modules that keep half of the layer lose more than `loss` of the accuracy that they have with all of it.
    (In the published code people choose by looking at the same curves.)

    Args:
        accuracies: per slot one accuracy per ratio.
        loss: as a share.
        ratios: the shares of the layer that were kept, `DECIDING` among them.
    """
    half, whole = (list(ratios).index(share) for share in DECIDING)
    return [slot for slot, curve in accuracies.items() if curve[half] < curve[whole] - loss]
