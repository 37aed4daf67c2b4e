"""Gates of MwT (arXiv 2306.09376) and NeMo: small networks predict, per sample, how far each neuron counts.

A gate is a number in [0, 1) that a layer's output is multiplied with, one per sample and neuron. Exactly 0 means that
the sample does not use the neuron; nothing flows back through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WIDE_CONVOLUTION = 128  # output channels from which the generator of a convolution has half as many hidden neurons
_WIDE_LINEAR = 3073
_FIRST_BIAS = 1.0  # with it every gate is open in the beginning


def hidden_of_convolution(outputs: int) -> int:
    """Return the hidden width of a convolution's generator (MwT, published code)."""
    return outputs if outputs < _WIDE_CONVOLUTION else outputs // 2


def hidden_of_linear(outputs: int) -> int:
    """Return the hidden width of a linear layer's generator (NeMo, published code)."""
    return outputs if outputs < _WIDE_LINEAR else outputs // 2


class MaskGenerator(nn.Module):
    """Predicts a layer's gates from the layer's own input: relu(tanh(W2 relu(W0 mean(x)))).

    The mean is over everything but samples and features: over positions for a convolution, over tokens for a linear
    layer. Weights begin Kaiming-normal, biases at 1. The keys are those of the published checkpoints
    (`mask_generator.0.weight`, `mask_generator.2.weight`, ...).

    Args:
        inputs: features of the layer's input.
        outputs: neurons of the layer.
        hidden: neurons of the generator's hidden layer.
        features_last: whether features are the last axis of the input (linear layers), not the second (convolutions).
        first_bias: whether the first linear layer has a bias: for linear layers it does, for convolutions it does not.
    """

    def __init__(self, inputs: int, outputs: int, hidden: int, *, features_last: bool, first_bias: bool) -> None:
        super().__init__()
        self.features_last = features_last
        self.mask_generator = nn.Sequential(
            nn.Linear(inputs, hidden, bias=first_bias), nn.ReLU(), nn.Linear(hidden, outputs)
        )
        for module in self.mask_generator:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.constant_(module.bias, _FIRST_BIAS)

    def forward(self, x: Tensor) -> Tensor:
        """Map the layer's input, (N, features, *positions) or (N, *tokens, features), to gates (N, outputs)."""
        first = 1 if self.features_last else 2
        averaged = list(range(first, first + x.dim() - 2))
        pooled = x.mean(averaged) if averaged else x
        return F.relu(torch.tanh(self.mask_generator(pooled)))


def generator_for(layer: nn.Module) -> MaskGenerator:
    """Make the generator of a convolution or linear layer, on its device and in its dtype.

    Raises:
        TypeError: the layer is neither.
    """
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.Linear):
        hidden = hidden_of_linear(layer.out_features)
        made = MaskGenerator(layer.in_features, layer.out_features, hidden, features_last=True, first_bias=True)
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        hidden = hidden_of_convolution(layer.out_channels)
        made = MaskGenerator(layer.in_channels, layer.out_channels, hidden, features_last=False, first_bias=False)
    else:
        raise TypeError(f"layer: expected a convolution or a linear layer, got {type(layer).__name__}")
    return made.to(weight) if isinstance(weight, Tensor) else made


def apply_gate(value: Tensor, gate: Tensor, *, features_last: bool) -> Tensor:
    """Multiply a layer's output, (N, C, *positions) or (N, *tokens, C), with gates (N, C)."""
    shape = [1] * value.dim()
    shape[0] = gate.shape[0]
    shape[-1 if features_last else 1] = gate.shape[1]
    return value * gate.view(shape)


# ---- masks from gates ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GateMasks:
    """The neurons that classes keep in one layer, and how far the threshold had to come down for that.

    Attributes:
        masks: (K, C) bool.
        thresholds: per class the share of samples from which a neuron was kept; 0 where none is ever used.
        unused: classes none of whose samples uses any neuron.
    """

    masks: Tensor
    thresholds: tuple[float, ...]
    unused: tuple[int, ...]


def masks_from_frequencies(frequencies: Tensor, threshold: float = 0.9, step: float = 0.05) -> GateMasks:
    """Keep the neurons that a class's samples use often enough, in one layer (MwT, published code).

    A class keeps the neurons used by at least `threshold` of its samples, compared in float32. While it keeps none, the
    threshold comes down by `step`. A class whose samples use no neuron at all keeps the first one (the published code
    of MwT stops with an error there).

    Args:
        frequencies: (K, C) float32, the share of each class's samples with a gate above 0.
        threshold: where to begin, in (0, 1].
        step: how far to come down each time, above 0.

    Raises:
        TypeError, ValueError: an argument is not as above; NaN, the frequency of a class without samples, is refused.
    """
    if not isinstance(frequencies, Tensor) or frequencies.dim() != 2 or 0 in frequencies.shape:
        raise TypeError("frequencies: expected a tensor of shape (classes, neurons)")
    if not bool(((frequencies >= 0) & (frequencies <= 1)).all()):
        raise ValueError(
            "frequencies: expected values in [0, 1], got some outside of it or NaN (a class without samples)"
        )
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a number in (0, 1], got {threshold}")
    if not step > 0:
        raise ValueError(f"step: expected a number above 0, got {step}")
    frequencies = frequencies.float()
    masks, thresholds, unused = [], [], []
    for number, row in enumerate(frequencies):
        kept, used = _lowered(row, threshold, step)
        if kept is None:
            unused.append(number)
            kept = torch.zeros_like(row, dtype=torch.bool)
            kept[0] = True
        masks.append(kept)
        thresholds.append(used)
    return GateMasks(torch.stack(masks), tuple(thresholds), tuple(unused))


def _lowered(row: Tensor, threshold: float, step: float) -> tuple[Tensor | None, float]:
    """What is kept at the highest threshold that keeps anything, stepping down in Python's floats as published."""
    highest = row.max()
    while threshold > 0:
        limit = torch.tensor(threshold, dtype=torch.float32, device=row.device)
        if highest >= limit:
            return row >= limit, threshold
        threshold -= step
    # Rare neurons, used by less than a step of the samples: those used most.
    return (row >= highest, float(highest)) if highest > 0 else (None, 0.0)


# ---- how modular gates are ----------------------------------------------------------------------------------------


def jaccard(first: Tensor, second: Tensor) -> Tensor:
    """Return the Jaccard index of every row of one set of bits with every row of the other, (n, m) float32.

    Two rows without any bit have index 0.

    Args:
        first: (n, C) bool.
        second: (m, C) bool.
    """
    a, b = first.float(), second.float()
    shared = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1)[None, :] - shared
    return torch.where(either > 0, shared / either.clamp(min=1), torch.zeros_like(shared))


def cohesion(bits: Tensor, labels: Tensor, masks: Tensor) -> float:
    """Return how alike the samples of a class use its module: the mean Jaccard index over pairs, then over classes.

    A sample's bits are taken inside its class's module only. Classes with fewer than two samples are left out.

    Args:
        bits: (N, C) bool, whether a sample uses a neuron, all layers side by side.
        labels: (N,) int64 in [0, K).
        masks: (K, C) bool.
    """
    means = []
    for number, mask in enumerate(masks):
        own = bits[labels == number] & mask
        if len(own) > 1:
            table = jaccard(own, own)
            pairs = len(own) * (len(own) - 1)
            means.append(float(table.sum(dtype=torch.float64) - table.diagonal().sum(dtype=torch.float64)) / pairs)
    return sum(means) / max(1, len(means))


def coupling(masks: Tensor) -> float:
    """Return how much modules share: the mean Jaccard index over pairs of them; 0 for a single one.

    Args:
        masks: (K, C) bool, all layers side by side.
    """
    count = len(masks)
    table = jaccard(masks, masks).double()
    return float(table.sum() - table.diagonal().sum()) / max(1, count * (count - 1))


def kept_share(masks: Sequence[Tensor]) -> float:
    """Return the share of neurons that modules keep (the kernel retention rate), the mean over classes.

    Args:
        masks: per layer (K, C) bool.
    """
    joined = torch.cat(list(masks), 1)
    return float(joined.double().mean())
