"""What running a model over a loader takes, whatever is measured: batches, those that count, names of the taps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DistributedSampler

from moda.data.unpacking import Inputs, Unpack, check_callable, check_loader, unpacked
from moda.observation.names import NO_ACTIVATION
from moda.observation.taps import Taps
from moda_kernels.distributed import gather_objects, resolve_group
from moda_kernels.validation import check_flag

if TYPE_CHECKING:
    from moda_kernels.distributed import Group

Batch: TypeAlias = "tuple[Inputs, Tensor, int]"
"""Inputs, labels, and how many of the samples, the first ones, are to be counted."""


def batches(loader: Iterable[Any], doing: str, progress: bool, unpack: Unpack | None) -> Iterator[Batch]:
    """The batches of a loader; a progress bar says what is being done, where somebody looks at a terminal.

    Raises:
        TypeError: `loader` gives no batches, `unpack` is no function or `progress` no bool.
    """
    check_loader(loader)
    check_callable(unpack, "unpack")
    check_flag(progress, "progress")
    return _batches(loader, doing, progress, unpack)


def _batches(loader: Iterable[Any], doing: str, progress: bool, unpack: Unpack | None) -> Iterator[Batch]:
    console = Console(stderr=True)
    uncounted = _own_samples(loader)
    if progress and console.is_terminal:  # a log file wants no bar
        loader = track(loader, doing, console=console, transient=True)
    for batch in loader:
        inputs, labels = unpacked(batch, unpack)
        own = int(min(len(labels), uncounted))
        uncounted -= own
        yield inputs, labels, own


def _own_samples(loader: Iterable[Any]) -> float:
    """How many samples of the loader, from its first, are not repeated ones; infinity if it repeats none.

    A `DistributedSampler` without `drop_last` fills up the order of all processes at its end, and each takes every
    W-th sample of it, beginning with its own rank's.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(batch_sampler, "sampler", getattr(loader, "sampler", None))
    if not isinstance(sampler, DistributedSampler):
        return math.inf
    size = len(sampler.dataset)  # type: ignore[arg-type]
    return len(range(sampler.rank, size, sampler.num_replicas))


def names_over(group: Group | None, taps: Taps) -> tuple[str, ...]:
    """Names of the taps; those of another rank, where this one had no batch to learn them from."""
    if group is None:
        return taps.names
    known = taps.names if taps.probed else None
    names = next(names for names in gather_objects(known, resolve_group(group)) if names is not None)
    return tuple(names)


def check_any(taps: Taps) -> None:
    """Raise ValueError if the model has no tap; the message says why."""
    if not taps.names:
        raise ValueError(NO_ACTIVATION + "".join(f"; {name}: {why}" for name, why in taps.skipped.items()))
