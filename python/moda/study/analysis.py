"""Describes a decomposition: module sizes, overlaps, and what modules share in each layer (arXiv 2411.01074)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moda.composition.measure import mean_over_pairs, module_sizes, overlap_matrix
from moda.data.unpacking import unpacked
from moda.decomposition.container import Decomposition
from moda.decomposition.rates import FiringRates
from moda.inference import device_of, evaluating
from moda.observation.taps import Taps, observing
from moda_kernels import ClassSimilarity

__all__ = ["Analysis", "LayerAnalysis", "analyze", "class_similarities"]


@dataclass(frozen=True)
class LayerAnalysis:
    """What modules share in one layer. Shares are in [0, 1].

    Attributes:
        tap: the layer's name.
        neurons: the number of neurons.
        dead: the number of neurons that fire for no sample of any class.
        shared_by_all: the number of neurons that every class keeps.
        module_share: the mean over classes of the share of neurons that the class keeps.
        overlap: the mean over pairs of classes of the share of neurons that both keep.
        jaccard: the mean over pairs of classes of |both keep| / |either keeps|; a pair that keeps nothing counts 0.
    """

    tap: str
    neurons: int
    dead: int
    shared_by_all: int
    module_share: float
    overlap: float
    jaccard: float


@dataclass(frozen=True, eq=False)
class Analysis:
    """The figures of a decomposition.

    Attributes:
        sizes: (K,) float64, the parameters of each module over those of the model.
        overlaps: (K, K) float64, in the published counting; on the diagonal a module is compared with itself.
        layers: one entry per layer, from the input to the output.
    """

    sizes: Tensor
    overlaps: Tensor
    layers: tuple[LayerAnalysis, ...]

    @property
    def mean_size(self) -> float:
        """The mean over classes, which the paper calls "module size"."""
        return float(self.sizes.mean())

    @property
    def mean_overlap(self) -> float:
        """The mean over pairs of classes, which the paper calls "module overlap"; 0 for a single class."""
        return mean_over_pairs(self.overlaps)

    def to_dict(self) -> dict[str, Any]:
        """Give the figures as JSON holds them."""
        return {
            "mean_size": self.mean_size,
            "mean_overlap": self.mean_overlap,
            "sizes": self.sizes.tolist(),
            "overlaps": self.overlaps.tolist(),
            "layers": [asdict(layer) for layer in self.layers],
        }


def analyze(
    model: nn.Module | Taps, decomposition: Decomposition, rates: FiringRates, *, example: Any = None
) -> Analysis:
    """Compute sizes and overlaps of all modules, and what they share in each layer.

    The figures are exact. No module is built and no parameter listed: a hundred classes take seconds.

    Args:
        model: the model of the decomposition, or its taps.
        decomposition: its modules.
        rates: the firing rates it was made from.
        example: see `moda.compose`.

    Raises:
        ValueError: the decomposition or the rates are not those of the model.
    """
    if tuple(rates.taps) != tuple(decomposition.masks):
        raise ValueError(
            f"rates: expected the taps of the decomposition, {list(decomposition.masks)}, got {list(rates.taps)}"
        )
    return Analysis(
        sizes=module_sizes(model, decomposition, example=example),
        overlaps=overlap_matrix(model, decomposition, example=example),
        layers=tuple(_layer(tap, mask, rates.counts) for tap, mask in decomposition.masks.items()),
    )


def _layer(tap: str, mask: Tensor, counts: Mapping[str, Tensor]) -> LayerAnalysis:
    kept = mask.double()
    both = kept @ kept.T
    sizes = kept.sum(1)
    either = sizes[:, None] + sizes - both
    neurons = mask.shape[1]
    return LayerAnalysis(
        tap=tap,
        neurons=neurons,
        dead=int((counts[tap].sum(0) == 0).sum()),
        shared_by_all=int(mask.all(0).sum()),
        module_share=float(sizes.mean() / neurons),
        overlap=mean_over_pairs(both) / neurons,
        jaccard=mean_over_pairs(both / either.clamp_min(1)),
    )


def class_similarities(model: nn.Module | Taps, loader: Iterable[Any], num_classes: int) -> dict[str, Tensor]:
    """Compute per tap the (K, K) mean cosine similarity between the samples of two classes, in evaluation mode.

    Args:
        model: any module, observed or not, or its taps.
        loader: batches (inputs, labels), or of another form that `count_firings` takes.
        num_classes: the number of classes K.

    Raises:
        ValueError: a label is outside [0, K).
        RuntimeError: the loader is empty.
    """
    similarity = ClassSimilarity(num_classes)
    with observing(model) as taps, evaluating(taps.model), torch.no_grad():
        device = device_of(taps.model)
        for batch in loader:
            inputs, labels = unpacked(batch)
            activations: dict[int, Tensor] = {}
            with taps.recording(activations.__setitem__):
                inputs.to(device).into(taps.model)
            similarity.update(list(activations.values()), labels.to(device))
        matrices = similarity.result()
        return dict(zip(taps.names, (matrix.cpu() for matrix in matrices), strict=True))
