"""One call from a network and data to modules, whatever the method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

from torch import nn

from moda.data.unpacking import check_callable, check_loader, unpacked
from moda.decomposition.container import Decomposition
from moda.inference import check_module
from moda.methods.base import EpochSummary, Loader, Method, PreparedT, train


@dataclass(frozen=True, eq=False)
class Modularized(Generic[PreparedT]):
    """What a method made of a network.

    Attributes:
        prepared: the network as the method prepared it (and, where the method trains, trained it).
        decomposition: one module per class.
        epochs: what every epoch of the method's training came to; none for a method that only searches.
    """

    prepared: PreparedT
    decomposition: Decomposition
    epochs: Sequence[EpochSummary]


def modularize(
    model: nn.Module,
    method: Method[PreparedT],
    loader: Loader,
    num_classes: int,
    *,
    validation: Loader | None = None,
    report: Callable[[EpochSummary], None] | None = None,
) -> Modularized[PreparedT]:
    """Prepare a network, train it in the method's phases, and extract one module per class.

    Args:
        model: the network; it is changed in place as the method does.
        method: one of `moda.methods`: MODA, MwT, NeMo, GradSplitter, CNNSplitter, or your own.
        loader: gives batches of (inputs, labels) of the training data, in every pass anew.
        num_classes: K.
        validation: gives batches of data that the network was not trained on, never test data. Methods that choose
            (GradSplitter its epoch, CNNSplitter its candidates) choose by it; without it by `loader`.
        report: called with what every epoch came to.

    Raises:
        TypeError: `model` is no module, or `method` no method.
        ValueError: the loader gives no batch, or the method does not fit the network; the message says what to do.
    """
    check_module(model)
    if not isinstance(method, Method):
        raise TypeError(f"method: expected a modularization method, got {type(method).__name__}")
    check_loader(loader, again=True)
    if validation is not None:
        check_loader(validation, name="validation", again=True)
    check_callable(report, "report")
    first = next(iter(loader), None)
    if first is None:
        raise ValueError("loader: expected at least one batch, got none")
    inputs, _ = unpacked(first)
    if len(inputs.args) != 1 or inputs.kwargs:
        raise ValueError("loader: expected batches of (inputs, labels) with one tensor of inputs")
    prepared = method.prepare(model, num_classes, inputs.args[0])
    epochs = []
    for summary in train(method, prepared, loader, validation):
        epochs.append(summary)
        if report is not None:
            report(summary)
    choosing = loader if validation is None or method.phases() else validation
    return Modularized(prepared, method.extract(prepared, choosing), epochs)
