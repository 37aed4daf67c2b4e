"""The published algorithms of modularization methods, written plainly: what the suite "methods" compares with.

Each does what its specification says and nothing to be fast: losses layer by layer over all pairs, one pass through the
network for each class, a network cut out for each candidate, and combinations tried one after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda.methods.splitter import binarised

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]
Combination = tuple[tuple[int, ...], float]


def mwt_losses(gates: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return cohesion and coupling: means over the pairs of samples of a batch, then over layers."""
    first, second = torch.triu_indices(len(labels), len(labels), 1, device=labels.device)
    same = labels[first] == labels[second]
    cohesion, coupling = [], []
    for gate in gates:
        rows = F.normalize(gate, dim=1, eps=1e-12)
        cosines = (rows @ rows.T)[first, second]
        cohesion.append(1 - cosines[same].mean())
        coupling.append(cosines[~same].mean())
    return torch.stack(cohesion).mean(), torch.stack(coupling).mean()


def nemo_loss(gates: Sequence[Tensor], labels: Tensor, temperature: float) -> Tensor:
    """Return the contrastive loss, layer by layer; similarities outside a set are multiplied by 0 before exp."""
    same = (labels[:, None] == labels[None, :]).to(gates[0].dtype)
    losses = []
    for gate in gates:
        rows = F.normalize(gate, dim=1, eps=1e-12)
        cosines = rows @ rows.T
        positive = torch.exp(cosines * same / temperature).sum(1)
        negative = torch.exp(cosines * (1 - same) / temperature).sum(1)
        losses.append(-torch.log((positive + 1e-8) / (positive + negative + 1e-8)).mean())
    return torch.stack(losses).mean()


class SplitterNetwork(nn.Module):
    """GradSplitter's splitter: a mask per class and layer, a head per class, and a pass for each class.

    Args:
        layers: of a frozen network in which one follows the other; every ReLU is masked.
        masks: per ReLU the masks of all classes, (K, C).
        heads: of each class.
    """

    def __init__(self, layers: Sequence[nn.Module], masks: Sequence[Tensor], heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.__dict__["layers"] = list(layers)  # the frozen network is no part of this module
        of_classes = ([mask[number].detach().clone() for mask in masks] for number in range(len(heads)))
        self.masks = nn.ModuleList(nn.ParameterList(map(nn.Parameter, own)) for own in of_classes)
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs to probabilities (N, K)."""
        columns = []
        for masks, head in zip(self.masks, self.heads, strict=True):
            value, left = x, iter(masks)  # type: ignore[call-overload]
            for layer in self.__dict__["layers"]:
                value = layer(value)
                if isinstance(layer, nn.ReLU):
                    value = value * binarised(next(left)).view(1, -1, *[1] * (value.dim() - 2))
            columns.append(head(value.relu()).sigmoid())
        return torch.cat(columns, 1)

    def kept_share(self) -> Tensor:
        """Return the share of neurons that modules keep."""
        kept = [binarised(mask) for masks in self.masks for mask in masks]  # type: ignore[attr-defined]
        return torch.stack([mask.sum() for mask in kept]).sum() / sum(mask.numel() for mask in kept)


def cut(layers: Sequence[nn.Module], masks: Sequence[Bools]) -> nn.Sequential:
    """Return a module as CNNSplitter's published code builds it: a network of its own, with the kept neurons alone.

    Args:
        layers: of a network in which one follows the other: convolutions, norms, ReLUs, pooling, flattening, linear
            layers.
        masks: which neurons are kept, for every layer with a ReLU behind it in turn; the last layer keeps all.
    """
    made: list[nn.Module] = []
    kept = [torch.from_numpy(np.flatnonzero(mask)) for mask in masks]
    width, inputs = 0, torch.empty(0)  # the neurons of the layer before, and those of them that are left
    for layer in map(copy.deepcopy, layers):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = layer.weight.detach()
            if width:  # a linear layer behind convolutions has a column for every position of a neuron
                weight = weight.unflatten(1, (width, -1))[:, inputs].flatten(1, 2)
            width = len(weight)
            inputs = kept.pop(0) if kept else torch.arange(width)
            layer.weight = nn.Parameter(weight[inputs], requires_grad=False)
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias.detach()[inputs], requires_grad=False)
        elif isinstance(layer, nn.BatchNorm2d):
            for name in ("weight", "bias"):
                setattr(layer, name, nn.Parameter(getattr(layer, name).detach()[inputs], requires_grad=False))
            for name in ("running_mean", "running_var"):
                setattr(layer, name, getattr(layer, name)[inputs])
        made.append(layer)
    return nn.Sequential(*made).eval()


def joint_fitness(
    outputs: Floats,
    labels: npt.NDArray[np.int64],
    kernels: Bools,
    order: Sequence[int],
    thresholds: Sequence[tuple[int, float]],
    weight: float,
    alpha: float,
) -> npt.NDArray[np.float64]:
    """Return the fitness (N, P) that CNNSplitter's tournament gives, each combination evaluated by itself.

    Args:
        outputs: (N, P, samples), each candidate's output for its own class.
        labels: (samples,).
        kernels: (N, P, total), the neurons of each candidate.
        order: the classes in the order in which lists of them stand.
        thresholds: (classes, accuracy) per round.
        weight: of accuracy.
        alpha: 1 minus the weight of diversity.
    """
    sets = [[frozenset(np.flatnonzero(row).tolist()) for row in population] for population in kernels]
    lists: list[tuple[tuple[int, ...], list[Combination]]] = [
        ((number,), [((member,), 0.0) for member in range(outputs.shape[1])]) for number in order
    ]
    for _, threshold in thresholds:
        joined = []
        for index in range(0, len(lists), 2):
            pair = lists[index : index + 2]
            if len(pair) == 1:
                joined.append(pair[0])
                continue
            classes = pair[0][0] + pair[1][0]
            tried = []
            for left, _ in pair[0][1]:
                for right, _ in pair[1][1]:
                    members = left + right
                    tried.append((members, _accuracy(outputs, labels, classes, members)))
            many = sum(accuracy >= threshold for _, accuracy in tried)
            kept = sorted(tried, key=lambda entry: -entry[1])[: max(50, min(500, many))]
            scored = [
                (members, weight * accuracy + (1 - alpha) * _diversity(sets, classes, members))
                for members, accuracy in kept
            ]
            joined.append((classes, sorted(scored, key=lambda entry: -entry[1])))
        lists = joined
    fitness = np.zeros(outputs.shape[:2])
    for members, score in lists[0][1]:
        for number, member in zip(lists[0][0], members, strict=True):
            fitness[number, member] = max(fitness[number, member], score)
    return fitness


def _accuracy(
    outputs: Floats, labels: npt.NDArray[np.int64], classes: tuple[int, ...], members: tuple[int, ...]
) -> float:
    own = np.isin(labels, classes)
    columns = np.stack([outputs[number, member][own] for number, member in zip(classes, members, strict=True)])
    return float((np.array(classes)[columns.argmax(0)] == labels[own]).mean())


def _diversity(sets: Sequence[Sequence[frozenset[int]]], classes: tuple[int, ...], members: tuple[int, ...]) -> float:
    chosen = [sets[number][member] for number, member in zip(classes, members, strict=True)]
    differences = [1 - len(a & b) / len(a | b) for index, a in enumerate(chosen) for b in chosen[index + 1 :]]
    return sum(differences) / len(differences)
