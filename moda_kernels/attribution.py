"""Attribution of neurons: how much of a target goes through each neuron, to first order, per class."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moda_kernels.backends import select
from moda_kernels.class_totals import SUMS, ClassTotals
from moda_kernels.precision import accumulation
from moda_kernels.validation import check_batch, check_gradients, check_label_range


class AttributionSums(ClassTotals):
    """Adds up, over batches, |sum over positions of activation x gradient| per class and neuron.

    With the gradient of a sample's target (say, the margin of its class) with respect to the activation, the sum over
    positions is the change of the target, to first order, when the neuron is set to 0 (Molchanov et al. 2019,
    "Importance Estimation for Neural Network Pruning"). The absolute value is taken per sample, after the sum over
    positions.

    Sums are float64 for float64 layers and float32 otherwise, and live on the device of the activations. Sums of the
    same batches in the same order are bitwise equal from run to run on the CPU, for any number of threads, and with
    backend "triton"; another order of samples or batches rounds differently.

    Labels outside [0, num_classes) are an error: at once on the CPU; on a GPU, where looking would be a synchronisation
    per batch, at the next read of a result.

    Args:
        num_classes: K, at least 1.
        backend: see `moda_kernels.backends`.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Examples:
        >>> import torch
        >>> from moda_kernels import AttributionSums
        >>> totals = AttributionSums(num_classes=2)
        >>> activation = torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]])      # two samples, one neuron, two positions
        >>> gradient = torch.tensor([[[1.0, -2.0]], [[1.0, 5.0]]])
        >>> totals.update([activation], [gradient], torch.tensor([0, 1]))
        >>> totals.sums[0].tolist()
        [[3.0], [3.0]]
    """

    def __init__(self, num_classes: int, *, backend: str = "auto") -> None:
        super().__init__(num_classes, backend, (SUMS,))

    def update(self, activations: Sequence[Tensor], gradients: Sequence[Tensor], labels: Tensor) -> None:
        """Add one batch.

        Args:
            activations: one tensor per layer, (N, C) or (N, C, *spatial), floating point; the same layers in every
                call.
            gradients: for each activation, the gradient of each sample's own target: of the same shape, dtype and
                device, in any layout.
            labels: (N,) int64 or int32, in [0, num_classes).

        Raises:
            TypeError, ValueError: an argument is not as above, or the layers differ from earlier batches' in number,
                neurons or between float64 and narrower; nothing is added.
        """
        layers = check_batch(activations, labels)
        of_layers = check_gradients(gradients, layers)
        widths = [layer.shape[1] for layer in layers]
        dtypes = [accumulation(layer.dtype) for layer in layers]
        if labels.device.type == "cpu":
            check_label_range(labels, self.num_classes)
        with self._alone():
            self._check_layers(widths, dtypes)
            implementation = select("add_attributions", self.backend, layers, (labels, *of_layers, *self._sums))
            self._place(widths, dtypes, labels.device)
            implementation.add_attributions(layers, of_layers, labels, self._tally())

    def __repr__(self) -> str:
        return f"AttributionSums(num_classes={self.num_classes}, neurons={self._widths()})"
