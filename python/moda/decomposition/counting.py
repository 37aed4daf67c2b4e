"""Model and data -> firing rates, or activation shares: run the model over a loader and count at every tap."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moda.data.unpacking import Inputs, Unpack
from moda.decomposition.passes import Batch, batches, check_any, names_over
from moda.decomposition.rates import FiringRates
from moda.decomposition.scores import ActivationShares
from moda.inference import device_of, evaluating
from moda.observation.run import OTHER_CALLS
from moda.observation.taps import Taps, observing
from moda_kernels import FiringCounter
from moda_kernels.distributed import check_group

if TYPE_CHECKING:
    from moda_kernels.distributed import Group

GROUP_BYTES = 32 << 20
"""Of activations that are counted together on the CPU: fewer calls than layers, and little memory."""


def count_firings(
    model: nn.Module | Taps,
    loader: Iterable[Any],
    num_classes: int,
    *,
    threshold: float = 0.0,
    unpack: Unpack | None = None,
    backend: str = "auto",
    group: Group | None = None,
    progress: bool = True,
) -> FiringRates:
    """Firing rates of a model over the batches of a loader.

    Runs in evaluation mode without gradients, on the device of the model; every submodule's train/eval mode is put
    back afterwards, and a plain model is plain again. On the CPU every activation is counted while the model runs and
    then forgotten, which takes the memory of a plain pass; ReLUs overwrite their input where nobody else
    sees it (`Taps.overwriting`). The samples that a `DistributedSampler` repeats to give every process the same number
    are run but not counted, so that with `group` the rates are those of one process over the whole data set.

    Args:
        model: any module, observed or not, or its taps.
        loader: gives batches: (inputs, labels), where inputs may be several; or dicts with "labels". Labels are (N,)
            int64 or int32.
        num_classes: K.
        threshold: magnitude that a position must exceed to fire; the published code uses 0.
        unpack: gives the inputs (a tensor, a tuple or a dict) and the labels of a batch of another form.
        backend: see `moda_kernels.backends`.
        group: a process group, or "world" for the default one, whose ranks each bring a part of the data: every rank
            gets the rates of all of it. A rank may have no batch.
        progress: show a progress bar on standard error, if that is a terminal.

    Raises:
        TypeError: `model` is no module, or a batch has another form.
        ValueError: the loader gives no batch, labels are outside [0, num_classes), or the model has no activations or
            not the same ones in every forward pass.
    """
    counter = FiringCounter(num_classes, threshold=threshold, backend=backend)
    check_group(group)
    names = run_counter(counter, model, batches(loader, "Counting firings", progress, unpack), group)
    return FiringRates(
        taps=names,
        rates={tap: rate.cpu() for tap, rate in zip(names, counter.rates, strict=True)},
        counts={tap: count.cpu() for tap, count in zip(names, counter.counts, strict=True)},
        class_sizes=counter.class_sizes.cpu(),
        threshold=counter.threshold,
    )


def activation_shares(
    model: nn.Module | Taps,
    loader: Iterable[Any],
    num_classes: int,
    *,
    unpack: Unpack | None = None,
    backend: str = "auto",
    group: Group | None = None,
    progress: bool = True,
) -> ActivationShares:
    """Mean magnitude of every neuron's activation for every class: scores that need no gradient.

    The score of a neuron for a class is the mean, over the class's samples and over positions, of |activation|; what
    `decompose` takes is its share of the layer. Runs as `count_firings` does.

    Args:
        model: any module, observed or not, or its taps.
        loader: gives batches, see `count_firings`.
        num_classes: K.
        unpack: see `count_firings`.
        backend: see `moda_kernels.backends`.
        group: see `count_firings`.
        progress: show a progress bar on standard error, if that is a terminal.

    Raises:
        TypeError, ValueError: as `count_firings`.
    """
    counter = FiringCounter(num_classes, backend=backend, sums=True)
    check_group(group)
    names = run_counter(counter, model, batches(loader, "Adding up activations", progress, unpack), group)
    return ActivationShares(
        scores={tap: mean.float().cpu() for tap, mean in zip(names, counter.means, strict=True)},
        class_sizes=counter.class_sizes.cpu(),
    )


def run_counter(
    counter: FiringCounter, model: nn.Module | Taps, counted: Iterable[Batch], group: Group | None
) -> tuple[str, ...]:
    """Count the activations of all batches, of all ranks; names of the taps.

    With sums, an (N, C) activation is taken as one of one position, so that its magnitudes are added up as those of
    others are.

    Raises:
        ValueError: there is no batch.
    """
    with observing(model) as taps, evaluating(taps.model), torch.no_grad(), taps.overwriting():
        count = _count_while_running if device_of(taps.model).type == "cpu" else _count_when_run
        count(taps, counted, counter)
        if group is not None:
            counter.all_reduce(group)
        if not counter.counts:
            raise ValueError("loader: expected at least one batch, got none")
        return names_over(group, taps)


def _own_part(activation: Tensor, own: int, counter: FiringCounter) -> Tensor:
    """What is counted of an activation: the first `own` samples."""
    part = activation[:own]
    return part[..., None] if counter.with_sums and part.dim() == 2 else part


def _count_when_run(taps: Taps, batches: Iterable[Batch], counter: FiringCounter) -> None:
    """All layers of a batch together: one launch."""
    device = device_of(taps.model)
    for inputs, labels, own in batches:
        activations: list[Tensor] = []

        def receive(_index: int, activation: Tensor, kept: list[Tensor] = activations) -> None:
            kept.append(activation)

        with taps.recording(receive):
            inputs.to(device).into(taps.model)
        check_any(taps)
        if own:
            counter.update([_own_part(x, own, counter) for x in activations], labels[:own].to(device))


def _count_while_running(taps: Taps, batches: Iterable[Batch], counter: FiringCounter) -> None:
    """A few layers at a time, as soon as they are there: still in cache, and their memory free for layers to come."""
    groups = _LayerGroups(counter)
    for inputs, labels, own in batches:
        if own:
            groups.count(taps, inputs.to("cpu"), labels[:own].cpu())
        else:
            inputs.to("cpu").into(taps.model)
        check_any(taps)
    groups.add_to(counter)


class _LayerGroups:
    """Counters of consecutive layers, which the first forward pass cuts into groups of some `GROUP_BYTES`."""

    def __init__(self, counter: FiringCounter) -> None:
        self._make = partial(
            FiringCounter,
            counter.num_classes,
            threshold=counter.threshold,
            backend=counter.backend,
            sums=counter.with_sums,
        )
        self._example = counter
        self._counters: list[FiringCounter] = []
        self._cut = False  # whether the groups are known
        self._done = 0  # groups of this forward pass
        self._pending: list[Tensor] = []

    def count(self, taps: Taps, inputs: Inputs, labels: Tensor) -> None:
        """Run the model, and count its activations of the first len(labels) samples."""
        self._done = 0
        with taps.recording(partial(self._receive, labels)):
            inputs.into(taps.model)
        if self._pending and not self._cut:
            self._flush(labels)
        if self._pending or self._done != len(self._counters):
            raise ValueError(OTHER_CALLS)
        self._cut = True

    def add_to(self, counter: FiringCounter) -> None:
        """Bring the groups together in a counter that has counted nothing yet."""
        if not self._counters:
            return
        state = self._counters[0].state_dict()
        for kind in ("counts", "sums") if counter.with_sums else ("counts",):
            totals = [total for group in self._counters for total in getattr(group, kind)]
            state |= {f"{kind}.{index}": total for index, total in enumerate(totals)}
        counter.load_state_dict(state)

    def _receive(self, labels: Tensor, _index: int, activation: Tensor) -> None:
        self._pending.append(_own_part(activation, len(labels), self._example))
        if self._cut and self._done < len(self._counters):
            complete = len(self._pending) == len(self._counters[self._done].counts)
        else:
            complete = sum(layer.nbytes for layer in self._pending) >= GROUP_BYTES
        if complete:
            self._flush(labels)

    def _flush(self, labels: Tensor) -> None:
        if self._done == len(self._counters):
            if self._cut:
                raise ValueError(OTHER_CALLS)
            self._counters.append(self._make())
        layers, self._pending = self._pending, []
        self._counters[self._done].update(layers, labels)
        self._done += 1
