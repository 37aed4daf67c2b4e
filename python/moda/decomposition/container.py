"""Firing rates -> decomposition: which neurons each class keeps.

Rules as in MODA (arXiv 2411.01074) and its published code, with the code's undefined cases defined.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DistributedSampler

from moda.files import FormatError, read_json, read_tensors, write_json, write_tensors
from moda.inference import device_of, evaluating
from moda_kernels import FiringCounter, __version__

if TYPE_CHECKING:
    from moda.observation.taps import HookedModel, InstrumentedModel
    from moda_kernels.distributed import Group

FORMAT = "moda-decomposition"
FORMAT_VERSION = 1
MASKS_FILE = "masks.safetensors"
METADATA_FILE = "decomposition.json"

GROUP_BYTES = 32 << 20
"""Of activations that are counted together on the CPU: fewer calls than layers, and little memory."""
CHANGING = "model: expected the same activations in every forward pass, got others than in the first one"

_Batch: TypeAlias = "tuple[Tensor, Tensor, int]"


@dataclass(frozen=True, eq=False)
class FiringRates:
    """For how many samples of each class each neuron fires. All tensors are on the CPU.

    Attributes:
        taps: tap names in execution order.
        rates: per tap (K, C) float32, counts / class size; 0 for a class without samples.
        counts: per tap (K, C) int64.
        class_sizes: (K,) int64.
        threshold: the magnitude that a position had to exceed.
    """

    taps: tuple[str, ...]
    rates: dict[str, Tensor]
    counts: dict[str, Tensor]
    class_sizes: Tensor
    threshold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rates", "counts"):
            given = list(getattr(self, name))
            if given != list(self.taps):
                raise ValueError(f"{name}: expected the taps {list(self.taps)} in this order, got {given}")

    @property
    def num_classes(self) -> int:
        """K."""
        return self.class_sizes.shape[0]

    @property
    def empty_classes(self) -> list[int]:
        """Classes of which no sample was seen; their rates of 0 say nothing."""
        return [int(index) for index in (self.class_sizes == 0).nonzero().flatten()]


def count_firings(
    model: InstrumentedModel | HookedModel,
    loader: Iterable[Any],
    num_classes: int,
    *,
    threshold: float = 0.0,
    backend: str = "auto",
    group: Group | None = None,
    progress: bool = True,
) -> FiringRates:
    """Firing rates of an instrumented model over the batches of a loader.

    Runs in evaluation mode without gradients, on the device of the model; every submodule's train/eval mode is put
    back afterwards. On the CPU every activation is counted while the model runs and then forgotten, which takes the
    memory of a plain pass; ReLUs overwrite their input where nobody else sees it (`InstrumentedModel.overwriting`).
    The samples that a `DistributedSampler` repeats to give every process the same number are run but not counted, so
    that with `group` the rates are those of one process over the whole data set.

    Args:
        model: `moda.instrument(model)`.
        loader: gives batches whose first two items are inputs and labels ((N,) int64 or int32).
        num_classes: K.
        threshold: magnitude that a position must exceed to fire; the published code uses 0.
        backend: see `moda_kernels.backends`.
        group: a process group, or "world" for the default one, whose ranks each bring a part of the data: every rank
            gets the rates of all of it. A rank may have no batch.
        progress: show a progress bar on standard error, if that is a terminal.

    Raises:
        TypeError: `model` is not instrumented, or a batch is not a pair.
        ValueError: the loader gives no batch, or labels are outside [0, num_classes).
    """
    if not all(hasattr(type(model), name) for name in ("taps", "activations", "recording")):
        raise TypeError(f"model: expected an instrumented model, moda.instrument(model), got {type(model).__name__}")
    counter = FiringCounter(num_classes, threshold=threshold, backend=backend)
    count = _count_while_running if device_of(model).type == "cpu" else _count_when_run
    with evaluating(model), torch.no_grad(), model.overwriting():
        count(model, _batches(loader, progress), counter)
    if group is not None:
        counter.all_reduce(group)
    if not counter.counts:
        raise ValueError("loader: expected at least one batch, got none")
    taps = tuple(model.taps)
    return FiringRates(
        taps=taps,
        rates={tap: rate.cpu() for tap, rate in zip(taps, counter.rates, strict=True)},
        counts={tap: count.cpu() for tap, count in zip(taps, counter.counts, strict=True)},
        class_sizes=counter.class_sizes.cpu(),
        threshold=counter.threshold,
    )


def _count_when_run(model: InstrumentedModel | HookedModel, batches: Iterable[_Batch], counter: FiringCounter) -> None:
    """All layers of a batch together: one launch."""
    device = device_of(model)
    with model.recording():
        for inputs, labels, own in batches:
            model(inputs.to(device))
            activations = model.activations()
            if own:
                counter.update([activation[:own] for activation in activations], labels[:own].to(device))


def _count_while_running(
    model: InstrumentedModel | HookedModel, batches: Iterable[_Batch], counter: FiringCounter
) -> None:
    """A few layers at a time, as soon as they are there: still in cache, and their memory free for layers to come."""
    groups = _LayerGroups(counter)
    for inputs, labels, own in batches:
        if own:
            groups.count(model, inputs.cpu(), labels[:own].cpu())
        else:
            model(inputs.cpu())
    groups.add_to(counter)


class _LayerGroups:
    """Counters of consecutive layers, which the first forward pass cuts into groups of some `GROUP_BYTES`."""

    def __init__(self, counter: FiringCounter) -> None:
        self._make = partial(FiringCounter, counter.num_classes, threshold=counter.threshold, backend=counter.backend)
        self._counters: list[FiringCounter] = []
        self._cut = False  # whether the groups are known
        self._done = 0  # groups of this forward pass
        self._pending: list[Tensor] = []

    def count(self, model: InstrumentedModel | HookedModel, inputs: Tensor, labels: Tensor) -> None:
        """Run the model, and count its activations of the first len(labels) samples."""
        self._done = 0
        with model.recording(partial(self._receive, labels)):
            model(inputs)
        if self._pending and not self._cut:
            self._flush(labels)
        if self._pending or self._done != len(self._counters):
            raise ValueError(CHANGING)
        self._cut = True

    def add_to(self, counter: FiringCounter) -> None:
        """Bring the groups together in a counter that has counted nothing yet."""
        if not self._counters:
            return
        counts = [count for group in self._counters for count in group.counts]
        state = {f"counts.{index}": count for index, count in enumerate(counts)}
        counter.load_state_dict({**self._counters[0].state_dict(), **state})

    def _receive(self, labels: Tensor, _index: int, activation: Tensor) -> None:
        self._pending.append(activation[: len(labels)])
        if self._cut and self._done < len(self._counters):
            complete = len(self._pending) == len(self._counters[self._done].counts)
        else:
            complete = sum(layer.nbytes for layer in self._pending) >= GROUP_BYTES
        if complete:
            self._flush(labels)

    def _flush(self, labels: Tensor) -> None:
        if self._done == len(self._counters):
            if self._cut:
                raise ValueError(CHANGING)
            self._counters.append(self._make())
        layers, self._pending = self._pending, []
        self._counters[self._done].update(layers, labels)
        self._done += 1


def _batches(loader: Iterable[Any], progress: bool) -> Iterator[_Batch]:
    """Inputs, labels, and how many of the samples, the first ones, are to be counted."""
    console = Console(stderr=True)
    uncounted = _own_samples(loader)
    if progress and console.is_terminal:  # a log file wants no bar
        loader = track(loader, "Counting firings", console=console, transient=True)
    for batch in loader:
        inputs, labels = _inputs_and_labels(batch)
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


def _inputs_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)):
        raise TypeError(f"loader: expected batches of (inputs, labels), got {type(batch).__name__}")
    if len(batch) < 2:
        raise TypeError(f"loader: expected batches of (inputs, labels), got {type(batch).__name__} of {len(batch)}")
    for name, value in zip(("inputs", "labels"), batch, strict=False):
        if not isinstance(value, Tensor):
            raise TypeError(f"loader: expected tensors in each batch, got {name} of type {type(value).__name__}")
    return batch[0], batch[1]


def masks_from_rates(rates: Tensor, threshold: float = 0.9, min_fraction: float = 0.005) -> Tensor:
    """The neurons that each class keeps in one layer.

    A class keeps the neurons with rate >= threshold, compared in float32. A class that would keep fewer than
    max(1, int(min_fraction * C)) keeps its k highest rates instead (ties: lower index first), where k is that minimum
    or the size of the largest class in this layer, whichever is larger. This is the published floor, but for ties,
    which it leaves to the library.

    Args:
        rates: (K, C) floating point in [0, 1].
        threshold: in [0, 1].
        min_fraction: in [0, 1].

    Returns:
        (K, C) bool.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    _check_fraction("threshold", threshold)
    _check_fraction("min_fraction", min_fraction)
    _check_rates(rates)
    rates = rates.float()
    kept = rates >= torch.tensor(threshold, dtype=torch.float32, device=rates.device)
    sizes = kept.sum(1)
    minimum = max(1, int(min_fraction * rates.shape[1]))
    k = max(minimum, int(sizes.max()))
    highest = rates.argsort(dim=1, descending=True, stable=True)[:, :k]
    lifted = torch.zeros_like(kept).scatter_(1, highest, True)
    return torch.where((sizes < minimum)[:, None], lifted, kept)


def _check_fraction(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number in [0, 1], got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


def _check_rates(rates: Tensor) -> None:
    if not isinstance(rates, Tensor) or not rates.dtype.is_floating_point:
        raise TypeError(f"rates: expected a floating-point tensor, got {getattr(rates, 'dtype', type(rates).__name__)}")
    if rates.dim() != 2 or 0 in rates.shape:
        raise ValueError(f"rates: expected shape (classes, neurons), got {tuple(rates.shape)}")
    if not bool(((rates >= 0) & (rates <= 1)).all()):
        raise ValueError("rates: expected values in [0, 1], got some outside of it or NaN")


def decompose(
    rates: FiringRates, threshold: float = 0.9, min_fraction: float = 0.005, *, allow_empty_classes: bool = False
) -> Decomposition:
    """One module per class from firing rates, by `masks_from_rates` at every tap.

    Args:
        rates: what `count_firings` gave.
        threshold: rate from which a neuron is kept, in [0, 1].
        min_fraction: the least share of a layer's neurons that a class keeps, in [0, 1].
        allow_empty_classes: give classes without samples a module all the same: with rates of 0 everywhere it is an
            arbitrary one (the published code's behaviour).

    Raises:
        TypeError: `rates` is no FiringRates.
        ValueError: a number is out of range, or a class has no samples.
    """
    if not isinstance(rates, FiringRates):
        raise TypeError(f"rates: expected FiringRates from count_firings, got {type(rates).__name__}")
    empty = rates.empty_classes
    if empty and not allow_empty_classes:
        raise ValueError(
            f"rates: expected samples of every class, got none of classes {empty}; count over data that has them, or "
            "pass allow_empty_classes=True to give them arbitrary modules"
        )
    masks = {tap: masks_from_rates(rates.rates[tap], threshold, min_fraction) for tap in rates.taps}
    metadata = {
        "class_sizes": rates.class_sizes.tolist(),
        "empty_classes": empty,
        "firing_threshold": rates.threshold,
    }
    return Decomposition(masks, threshold=threshold, min_fraction=min_fraction, metadata=metadata)


@dataclass(frozen=True, eq=False)
class Decomposition:
    """All modules of a model: per tap and class, the neurons that the class keeps.

    Attributes:
        masks: per tap, in execution order, (K, C) bool.
        threshold: rate from which neurons were kept.
        min_fraction: the least share of a layer's neurons that a class keeps.
        metadata: what else is worth knowing (class sizes, empty classes), anything that JSON can hold.

    Raises:
        TypeError, ValueError: the masks are not as above.
    """

    masks: dict[str, Tensor]
    threshold: float = 0.9
    min_fraction: float = 0.005
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_fraction("threshold", self.threshold)
        _check_fraction("min_fraction", self.min_fraction)
        _check_masks(self.masks)
        _check_metadata(self.metadata)
        object.__setattr__(self, "masks", dict(self.masks))
        object.__setattr__(self, "metadata", dict(self.metadata))

    @property
    def num_classes(self) -> int:
        """K."""
        return next(iter(self.masks.values())).shape[0]

    @property
    def taps(self) -> tuple[str, ...]:
        """Tap names in execution order."""
        return tuple(self.masks)

    def __repr__(self) -> str:
        neurons = sum(mask.shape[1] for mask in self.masks.values())
        return (
            f"Decomposition(num_classes={self.num_classes}, taps={len(self.masks)}, neurons={neurons}, "
            f"threshold={self.threshold:g}, min_fraction={self.min_fraction:g})"
        )

    def select(self, classes: Iterable[int]) -> dict[str, Tensor]:
        """Per tap (C,) bool: the neurons that at least one of the classes keeps.

        Raises:
            TypeError, ValueError: see `check_classes`.
        """
        chosen = check_classes(classes, self.num_classes)
        return {tap: mask[chosen].any(0) for tap, mask in self.masks.items()}

    def save(self, folder: str | Path) -> None:
        """Write the decomposition to a folder, made if need be: `masks.safetensors` and `decomposition.json`.

        Each file is replaced as a whole, the masks first; the JSON holds the masks' SHA-256, so a crash between the
        two is seen by `load`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        digest = write_tensors(folder / MASKS_FILE, self.masks)
        description = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "library_version": __version__,
            "num_classes": self.num_classes,
            "threshold": self.threshold,
            "min_fraction": self.min_fraction,
            "taps": [{"name": tap, "neurons": mask.shape[1]} for tap, mask in self.masks.items()],
            "masks_sha256": digest,
            "metadata": self.metadata,
        }
        write_json(folder / METADATA_FILE, description)

    @classmethod
    def load(cls, folder: str | Path) -> Decomposition:
        """Read what `save` wrote.

        Raises:
            FormatError (a ValueError): a file is missing, malformed, of another version, or does not match the other;
                the message names the file and says what is wrong.
        """
        folder = Path(folder)
        description = read_json(folder / METADATA_FILE, FORMAT, FORMAT_VERSION)
        try:
            shapes = _described_shapes(description)
            tensors = read_tensors(folder / MASKS_FILE, str(description["masks_sha256"]))
            _check_stored_masks(folder / MASKS_FILE, tensors, shapes)
            return cls(
                {tap: tensors[tap] for tap in shapes},
                threshold=description["threshold"],
                min_fraction=description["min_fraction"],
                metadata=description["metadata"],
            )
        except FormatError:
            raise
        except KeyError as error:
            raise FormatError(f"{folder / METADATA_FILE}: entry {error} is missing") from None
        except (TypeError, ValueError) as error:
            raise FormatError(f"{folder / METADATA_FILE}: {error}") from None


def check_classes(classes: Iterable[int], num_classes: int) -> list[int]:
    """The classes as a list, in the order given.

    Raises:
        TypeError: not a sequence of integers.
        ValueError: none, one twice, or one outside [0, num_classes).
    """
    if isinstance(classes, (int, str)):
        raise TypeError(f"classes: expected a sequence of class indices, got {classes!r}")
    try:
        chosen = [operator.index(c) for c in classes]
    except TypeError:
        raise TypeError(f"classes: expected a sequence of class indices, got {classes!r}") from None
    if not chosen:
        raise ValueError("classes: expected at least one class, got none")
    unknown = sorted({c for c in chosen if not 0 <= c < num_classes})
    if unknown:
        raise ValueError(f"classes: expected classes in [0, {num_classes}), got {unknown}")
    twice = sorted({c for c in chosen if chosen.count(c) > 1})
    if twice:
        raise ValueError(f"classes: expected every class once, got {twice} more than once")
    return chosen


def _check_masks(masks: Mapping[str, Tensor]) -> None:
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks: expected a mapping of tap names to masks, got {type(masks).__name__}")
    if not masks:
        raise ValueError("masks: expected at least one tap, got none")
    num_classes = None
    for tap, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"masks[{tap!r}]: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}"
            )
        if mask.dim() != 2 or 0 in mask.shape:
            raise ValueError(f"masks[{tap!r}]: expected shape (classes, neurons), got {tuple(mask.shape)}")
        num_classes = num_classes or mask.shape[0]
        if mask.shape[0] != num_classes:
            raise ValueError(f"masks[{tap!r}]: expected {num_classes} classes as in the first tap, got {mask.shape[0]}")


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata: expected an object, got {type(metadata).__name__}")
    try:
        json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata: expected only what JSON can hold: {error}") from None


def _described_shapes(description: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Shape of each tap's mask by the description, in execution order."""
    num_classes, taps = description["num_classes"], description["taps"]
    if not isinstance(taps, list) or not all(isinstance(tap, dict) and {"name", "neurons"} <= set(tap) for tap in taps):
        raise TypeError(f'taps: expected a list of {{"name": ..., "neurons": ...}}, got {taps!r}')
    shapes = {tap["name"]: (num_classes, tap["neurons"]) for tap in taps}
    if len(shapes) != len(taps):
        raise ValueError("taps: a name occurs twice")
    return shapes


def _check_stored_masks(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> None:
    """What the description promises is what the file holds; a bool is a byte there and must be 0 or 1."""
    if set(tensors) != set(shapes):
        missing, unknown = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
        raise FormatError(f"{path}: taps differ from {METADATA_FILE}: missing {missing}, not described {unknown}")
    for tap, shape in shapes.items():
        mask = tensors[tap]
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise FormatError(f"{path}: {tap}: expected bool {shape}, got {mask.dtype} {tuple(mask.shape)}")
        if mask.numel() and int(mask.view(torch.uint8).max()) > 1:
            raise FormatError(f"{path}: {tap}: expected bytes 0 and 1 in a bool tensor, got others")
