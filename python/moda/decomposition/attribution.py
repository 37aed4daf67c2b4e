"""Model and data -> attributions: how much of a class's target goes through each neuron."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moda.data.unpacking import Inputs, Unpack
from moda.decomposition.passes import batches, check_any, names_over
from moda.decomposition.scores import Attributions
from moda.decomposition.targets import Target, evaluated, named
from moda.inference import device_of, evaluating
from moda.observation.taps import Taps, observing
from moda.outputs import Output, check_output, logits_of
from moda_kernels import AttributionSums
from moda_kernels.distributed import check_group
from moda_kernels.validation import check_label_range

if TYPE_CHECKING:
    from moda_kernels.distributed import Group


def attribute(
    model: nn.Module | Taps,
    loader: Iterable[Any],
    num_classes: int,
    *,
    target: str | Target = "margin",
    unpack: Unpack | None = None,
    output: Output = None,
    backend: str = "auto",
    group: Group | None = None,
    progress: bool = True,
) -> Attributions:
    """Attributions of a model's neurons over the batches of a loader.

    The attribution of a neuron for a sample is |sum over positions of activation x derivative of the target|, the
    change of the target, to first order, when the neuron outputs 0 (Molchanov et al. 2019); a class's is the mean over
    its samples, in any order.

    One forward and one backward pass per batch, in evaluation mode, on the device of the model. Gradients of parameters
    are never made (`requires_grad` is put back afterwards, as every submodule's train/eval mode is), and each
    activation's gradient is added up as soon as it is there, so that none outlives its layer. Batch norm and the ReLU
    behind it are one operation where activations are large, as in training (`observe`). The samples that a
    `DistributedSampler` repeats are run but not counted, as by `count_firings`.

    Args:
        model: any module that gives logits (N, num_classes); observed or not; or its taps.
        loader: gives batches; see `count_firings`.
        num_classes: K.
        target: what is attributed: "margin" (the logit of the sample's class minus the mean of the others), "logit",
            "cross_entropy", or a function of logits (N, K) and labels (N,) that gives (N,).
        unpack: how to take a batch apart; see `count_firings`.
        output: which of several outputs are the logits, by key or place; by default the one called "logits", or the
            first of K columns.
        backend: see `moda_kernels.backends`.
        group: a process group, or "world" for the default one, whose ranks each bring a part of the data: every rank
            gets the attributions of all of it. A rank may have no batch.
        progress: show a progress bar on standard error, if that is a terminal.

    Raises:
        TypeError: a batch, the target or what the model puts out is not as above.
        ValueError: the loader gives no batch, labels are outside [0, num_classes), the model gives other logits, or
            the target does not depend on any tap.
    """
    name, function = named(target)
    gradients = _Gradients(num_classes, backend)
    given = batches(loader, "Attributing", progress, unpack)
    check_output(output)
    check_group(group)
    with observing(model) as taps:
        device = device_of(taps.model)
        with evaluating(taps.model), _without_parameter_gradients(taps.model), torch.enable_grad():
            for inputs, labels, own in given:
                check_label_range(labels[:own], num_classes)
                counted = labels[:own].to(device).long()
                output_of_model = gradients.forward(taps, inputs.to(device).detached(), counted)
                logits = logits_of(output_of_model, num_classes, output)
                if own:
                    evaluated(function, logits[:own], counted).sum().backward()
        totals = gradients.together(taps, group)
        names = names_over(group, taps)
    return Attributions(
        scores={tap: mean.float().cpu() for tap, mean in zip(names, totals.means, strict=True)},
        class_sizes=totals.class_sizes.cpu(),
        target=name,
    )


class _Gradients:
    """Adds up activation x gradient of each tap as its gradient arrives, from the last tap to the first."""

    def __init__(self, num_classes: int, backend: str) -> None:
        self._make = partial(AttributionSums, num_classes, backend=backend)
        self._make()  # which checks both
        self._sums: dict[int, AttributionSums] = {}
        self._sizes = torch.zeros(num_classes, dtype=torch.int64)
        self._overwritten: set[int] = set()  # taps that the model overwrites later
        self._seen: list[tuple[int, Tensor, int]] = []  # of this forward pass: tap, activation, version
        self._labels = self._sizes

    def forward(self, taps: Taps, inputs: Inputs, labels: Tensor) -> Any:
        """Run the model such that a backward pass from what it gives adds to the sums; its output."""
        self._labels = labels
        output = self._run(taps, inputs)
        changed = {index for index, activation, version in self._seen if activation._version != version}
        if changed:  # seen once per model
            self._overwritten |= changed
            output = self._run(taps, inputs)
        self._seen = []
        check_any(taps)
        self._sizes = self._sizes.to(labels.device) + labels.bincount(minlength=len(self._sizes))
        return output

    def _run(self, taps: Taps, inputs: Inputs) -> Any:
        self._seen = []
        with taps.replacing(self._watch, fuse_norms=True):
            return inputs.into(taps.model)

    def _watch(self, index: int, activation: Tensor) -> Tensor:
        """The activation, with a hook on its gradient; the start of the graph if it has none."""
        if not activation.requires_grad:
            activation = _Start.apply(activation, torch.zeros((), requires_grad=True))  # type: ignore[no-untyped-call]
        # Without the graph, of which a hook would keep itself alive.
        value = activation.detach()
        if index in self._overwritten:
            value = value.clone()
        else:
            self._seen.append((index, value, value._version))
        activation.register_hook(partial(self._add, index, value))
        return activation

    def _add(self, index: int, activation: Tensor, gradient: Tensor) -> None:
        own = len(self._labels)
        sums = self._sums.setdefault(index, self._make())
        sums.update([activation[:own]], [gradient.detach()[:own]], self._labels)

    def together(self, taps: Taps, group: Group | None) -> AttributionSums:
        """The sums of all taps, and of all ranks; a tap that no gradient reached has zeros."""
        totals = self._make()
        if int(self._sizes.sum()):  # a rank without samples says nothing of dtypes
            sums = [
                self._sums[index].sums[0]
                if index in self._sums
                else self._sizes.new_zeros(len(self._sizes), width).float()
                for index, width in enumerate(taps.widths)
            ]
            state = {f"sums.{index}": total for index, total in enumerate(sums)}
            totals.load_state_dict({**state, "class_sizes": self._sizes})
        if group is not None:
            totals.all_reduce(group)
        if not totals.sums:
            raise ValueError("loader: expected at least one batch, got none")
        return totals


class _Start(torch.autograd.Function):
    """A copy of an activation that has no graph, with one that ends here: the activation may be somebody else's tensor.

    Unlike a leaf, the copy may be overwritten by the model.
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor, anchor: Tensor) -> Tensor:
        return activation.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


@contextmanager
def _without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter requires gradients meanwhile; afterwards each does if it did."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
