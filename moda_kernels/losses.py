"""The modular losses: affinity, dispersion and compactness (arXiv 2411.01074, section 3)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moda_kernels import distributed
from moda_kernels.backends import Backend, check_backend, select
from moda_kernels.closed_form import summed
from moda_kernels.distributed import Group
from moda_kernels.plain import is_traced, is_transformed
from moda_kernels.validation import check_batch, check_label_range, check_magnitude, check_num_classes


class ModularLosses(NamedTuple):
    """The three terms, unweighted; 0-d tensors."""

    affinity: Tensor
    dispersion: Tensor
    compactness: Tensor


class ModularWeights(NamedTuple):
    """Weights of the three terms: the paper's alpha, beta and gamma."""

    affinity: float
    dispersion: float
    compactness: float


def modular_losses(
    activations: Sequence[Tensor],
    labels: Tensor,
    *,
    backend: str = "auto",
    group: Group | None = None,
    num_classes: int | None = None,
) -> ModularLosses:
    """Affinity, dispersion and compactness of a batch, each the mean over layers.

    With pooled activations a_i (mean over positions of |x|; an (N, C) activation as it is) and n_i = a_i /
    max(|a_i|, 1e-12):

        affinity    = 1 - mean over pairs i<j of one class of  n_i . n_j
        dispersion  =     mean over pairs i<j of two classes of n_i . n_j
        compactness =     mean over all elements of |a|

    A batch without a pair of the kind gives 0 for that term, with zero gradient. An all-zero row has cosine 0 with
    every row, still counts in the means and receives gradient 0. Never NaN for finite activations.

    Args:
        activations: one tensor per layer, (N, C) or (N, C, *spatial), floating point, any strides, dtypes may differ.
        labels: (N,) int64 or int32 class of each sample; any integers, only equality matters.
        backend: "auto", or a name of `moda_kernels.backends()`.
        group: a process group, or "world" for the default one: the batch is then what its ranks hold together, every
            rank gets the losses of that global batch, and a rank may hold no sample. The gradient each rank gets is
            that of the global losses times the number of ranks, because DDP and FSDP2 average gradients over ranks
            (`moda_kernels.distributed` derives it). The backend pools; sums and gradients are plain PyTorch.
        num_classes: with `group`, says that labels are in [0, num_classes): saves the exchange of labels between
            ranks, and with it the read on the host. Has no effect on a batch of one process.

    Returns:
        Three 0-d tensors, float64 if a layer is float64, else float32; differentiable with respect to the
        activations (twice with backend "torch" and "reference", without a group).

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it, what was given and what is expected.
            With a group, also if its ranks disagree on layers or dtypes.
        BackendUnavailableError: the backend asked for cannot run.

    Warns:
        UserWarning: the batch is one sample, or (looked at on the CPU only) every label is negative, as labels to be
            ignored are.

    Examples:
        >>> layer = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # two samples of class 4, one of class 9
        >>> losses = modular_losses([layer], torch.tensor([4, 4, 9]))
        >>> losses.affinity.item(), losses.dispersion.item(), losses.compactness.item()
        (0.0, 0.0, 0.5)
    """
    if num_classes is not None:
        check_num_classes(num_classes)
    losses = _losses(activations, labels, backend, group, num_classes)
    if group is None and (useless := _why_useless(labels)):
        warnings.warn(useless, stacklevel=2)
    return losses


def _losses(
    activations: Sequence[Tensor], labels: Tensor, backend: str, group: Group | None, num_classes: int | None
) -> ModularLosses:
    if group is not None:
        return _global_losses(activations, labels, backend, group, num_classes)
    layers, implementation = _chosen(activations, labels, backend)
    return ModularLosses(*implementation.grouped_losses(layers, labels))


def _chosen(activations: Sequence[Tensor], labels: Tensor, backend: str) -> tuple[tuple[Tensor, ...], Backend]:
    layers = check_batch(activations, labels)
    return layers, select("grouped_losses", backend, layers, (labels,))


def _why_useless(labels: Tensor) -> str | None:
    """Why affinity and dispersion say nothing about this batch; None if they do. It is cheap: every step asks it."""
    if is_traced() or is_transformed() or labels.is_meta:
        return None
    if labels.shape[0] == 1:
        return "labels: one sample makes no pair, so that affinity and dispersion are 0; use batches of two and more"
    if type(labels) is Tensor and labels.device.type == "cpu" and labels[0] < 0 and bool((labels < 0).all()):
        return f"labels: all of them are negative (such as {int(labels[0])}, to be ignored), and are taken for classes"
    return None


def _global_losses(
    activations: Sequence[Tensor], labels: Tensor, backend: str, group: Group, num_classes: int | None
) -> ModularLosses:
    process_group = distributed.resolve_group(group)
    layers = check_batch(activations, labels, allow_empty=True)
    # On a GPU, looking would be a synchronisation; there a label out of range is a device-side error.
    if num_classes is not None and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        check_label_range(labels, num_classes)
    losses = distributed.grouped_losses(layers, labels, backend=backend, group=process_group, num_classes=num_classes)
    return ModularLosses(*losses)


class ModularLoss(nn.Module):
    """The weighted sum of the modular losses, to be added to the task's loss.

    loss = affinity_weight * affinity + dispersion_weight * dispersion + compactness_weight * compactness

    The defaults are the paper's. After each call `last` holds the three terms, detached, on their device: reading
    them for a log costs no synchronisation until you do.

    Args:
        affinity: weight of the affinity term, finite and >= 0.
        dispersion: weight of the dispersion term.
        compactness: weight of the compactness term.
        backend: see `modular_losses`.
        group: see `modular_losses`; "world" may be given before the process group is made, and can be pickled.
        num_classes: see `modular_losses`.

    Raises:
        TypeError, ValueError: a weight is no number, negative or not finite, or another argument is not as above.

    Examples:
        >>> modular_loss = ModularLoss(affinity=1.0, dispersion=1.0, compactness=0.5)
        >>> layer = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])  # one neuron fires for all three samples
        >>> modular_loss([layer], torch.tensor([4, 4, 9])).item()  # 0 + 1 + 0.5 * 0.5
        1.25
        >>> modular_loss.last.dispersion.item()
        1.0
    """

    def __init__(
        self,
        affinity: float = 1.0,
        dispersion: float = 1.0,
        compactness: float = 0.3,
        *,
        backend: str = "auto",
        group: Group | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.weights = ModularWeights(
            check_magnitude(affinity, "affinity", "weight"),
            check_magnitude(dispersion, "dispersion", "weight"),
            check_magnitude(compactness, "compactness", "weight"),
        )
        if num_classes is not None:
            check_num_classes(num_classes)
        check_backend(backend)
        distributed.check_group(group)
        self.backend = backend
        self.group = group
        self.num_classes = num_classes
        self.last: ModularLosses | None = None
        self._warned = False

    def forward(self, activations: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The weighted sum, a 0-d tensor. Arguments, errors and warnings (once) as in `modular_losses`."""
        total, self.last = self._weighted(activations, labels)
        if self.group is None and not self._warned and (useless := _why_useless(labels)):
            self._warned = True
            warnings.warn(useless, stacklevel=2)
        return total

    def _weighted(self, activations: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, ModularLosses]:
        """The weighted sum, and the terms, detached."""
        if self.group is None:
            layers, backend = _chosen(activations, labels, self.backend)
            if "weighted_losses" in backend.OPS and any(self.weights):
                total, terms = backend.weighted_losses(layers, labels, self.weights)
            else:
                total, terms = summed(backend.grouped_losses(layers, labels), self.weights)
        else:
            losses = _global_losses(activations, labels, self.backend, self.group, self.num_classes)
            total, terms = summed(losses, self.weights)
        return total, ModularLosses(*terms)

    def extra_repr(self) -> str:
        """Weights, backend and group, for printing."""
        weights = ", ".join(f"{name}={weight:g}" for name, weight in self.weights._asdict().items())
        group = "" if self.group is None else f", group={self.group!r}, num_classes={self.num_classes}"
        return f"{weights}, backend={self.backend!r}{group}"
