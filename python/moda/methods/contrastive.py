"""NeMo's losses: gates of one class should be alike and those of different classes not, and learning from a teacher.

For one layer with gates G (N, C), rows normalised to length 1, and S = G G^T, sample i has the set P of samples of its
class, itself included, and the set Q of all others. With temperature t and e = 1e-8:

    positive_i = sum over P of exp(S_ij / t) + |Q|
    negative_i = sum over Q of exp(S_ij / t) + |P|
    loss_i     = -log((positive_i + e) / (positive_i + negative_i + e))

The counts |Q| and |P| are part of the published loss: similarities outside a set enter its sum as exp(0) = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_NORM = 1e-12
_EPSILON = 1e-8


def contrastive_loss(gates: Sequence[Tensor], labels: Tensor, temperature: float = 0.2) -> Tensor:
    """Return the contrastive loss of all layers, the mean over layers of the mean over samples.

    Layers of equal width are computed together, in batched products.

    Args:
        gates: per layer (N, C) floating point.
        labels: (N,) integers.
        temperature: t above, greater than 0; published settings use 0.2 and 0.3.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    _check(gates, labels, temperature)
    same = labels[:, None] == labels[None, :]
    losses = [_of_equal_width(torch.stack(layers), same, temperature).sum() for layers in _by_width(gates).values()]
    return torch.stack(losses).sum() / len(gates)


def _check(gates: Sequence[Tensor], labels: Tensor, temperature: float) -> None:
    if not gates:
        raise ValueError("gates: expected those of at least one layer, got none")
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.dtype.is_floating_point:
        raise TypeError("labels: expected a tensor of integers of shape (N,)")
    for index, gate in enumerate(gates):
        if not isinstance(gate, Tensor) or not gate.dtype.is_floating_point:
            raise TypeError(f"gates[{index}]: expected a floating-point tensor, got {type(gate).__name__}")
        if gate.dim() != 2 or len(gate) != len(labels):
            raise ValueError(f"gates[{index}]: expected shape ({len(labels)}, neurons), got {tuple(gate.shape)}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")


def _by_width(gates: Sequence[Tensor]) -> dict[tuple[int, torch.dtype], list[Tensor]]:
    groups: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for gate in gates:
        groups.setdefault((gate.shape[1], gate.dtype), []).append(gate)
    return groups


def _of_equal_width(gates: Tensor, same: Tensor, temperature: float) -> Tensor:
    """(L,) loss of each of L layers with gates (L, N, C)."""
    rows = F.normalize(gates, dim=2, eps=_LEAST_NORM)
    weights = torch.exp(rows @ rows.transpose(1, 2) / temperature)
    inside = torch.where(same, weights, 0).sum(2)
    outside = torch.where(same, 0, weights).sum(2)
    own = same.sum(1)
    positive, negative = inside + (len(same) - own), outside + own
    losses: Tensor = torch.log((positive + negative + _EPSILON) / (positive + _EPSILON)).mean(1)
    return losses


def distillation_loss(logits: Tensor, distilled: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return DeiT's task loss with a teacher, as published with NeMo: half from the labels, half from the teacher.

    0.5 CE(logits, labels) + 0.25 (KL(teacher || logits) + KL(teacher || distilled)), at temperature 1, with the mean
    over samples.

    Args:
        logits: (N, K) of the class token's classifier.
        distilled: (N, K) of the distillation token's classifier.
        teacher: (N, K) logits of the teacher.
        labels: (N,) int64.
    """
    expected = teacher.softmax(1)
    divergences = [F.kl_div(student.log_softmax(1), expected, reduction="batchmean") for student in (logits, distilled)]
    return 0.5 * F.cross_entropy(logits, labels) + 0.25 * (divergences[0] + divergences[1])
