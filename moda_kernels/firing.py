"""Class statistics per neuron: firing counts, which are behind a decomposition, and sums of pooled activations."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from moda_kernels import distributed
from moda_kernels.backends import select
from moda_kernels.distributed import Group
from moda_kernels.means import mean_of_classes
from moda_kernels.pooling import is_pooled
from moda_kernels.precision import accumulation
from moda_kernels.tally import Tally
from moda_kernels.validation import check_batch, check_label_range, check_magnitude, check_num_classes


class FiringCounter:
    """Counts, over batches, for how many samples of each class each neuron fires (arXiv 2411.01074).

    A neuron fires for a sample when any of its positions exceeds `threshold` in magnitude; NaN counts as firing, as
    in the published code. Counts are int64 and live on the device of the activations; integer sums have no order, so
    they are bitwise equal from run to run.

    With `sums=True` the pooled activations (mean over positions of the absolute value; an (N, C) layer is its own,
    signed) are added up per class and neuron as well, from the same read of each activation: how strongly a neuron
    fires, beside how often. Without, reading stops at a neuron's first firing position. Sums of the same batches in the
    same order are bitwise equal from run to run, with backend "native" on any device, and for any number of threads;
    another order of samples or batches rounds differently.

    Threads may share a counter: each batch is added as a whole.

    Labels outside [0, num_classes) are an error: at once on the CPU; on a GPU, where looking would be a synchronisation
    per batch, at the next read of a result.

    Args:
        num_classes: K, at least 1.
        threshold: magnitude that a position must exceed, finite and >= 0; the published code uses 0. With any other,
            pooled activations (of `pool` or `relu_pool`) are refused: a mean says nothing about single positions.
        backend: see `moda_kernels.backends`.
        sums: also add up pooled activations.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> counter = FiringCounter(num_classes=10)
        >>> for x, y in loader:
        ...     model(x)
        ...     counter.update(model.activations(), y)
        >>> counter.rates[0].shape     # (10, neurons of the first layer)
    """

    def __init__(self, num_classes: int, *, threshold: float = 0.0, backend: str = "auto", sums: bool = False) -> None:
        check_num_classes(num_classes)
        if not isinstance(sums, bool):
            raise TypeError(f"sums: expected True or False, got {type(sums).__name__}")
        self.num_classes = num_classes
        self.threshold = check_magnitude(threshold, "threshold")
        self.backend = backend
        self._with_sums = sums
        self._lock = threading.Lock()
        self._counts: list[Tensor] = []
        self._sums: list[Tensor] = []
        with torch.inference_mode(False):
            self._class_sizes = torch.zeros(num_classes, dtype=torch.int64)
            self._invalid = torch.zeros((), dtype=torch.int64)

    def update(self, activations: Sequence[Tensor], labels: Tensor) -> None:
        """Count one batch.

        Args:
            activations: one tensor per layer, (N, C) or (N, C, *spatial), floating point; the same layers in every
                call.
            labels: (N,) int64 or int32, in [0, num_classes).

        Raises:
            TypeError, ValueError: an argument is not as above, or the layers differ from earlier batches' in number,
                neurons or, with sums, between float64 and narrower; nothing is counted.
        """
        layers = check_batch(activations, labels)
        self._check_unpooled(layers)
        widths = [layer.shape[1] for layer in layers]
        dtypes = [accumulation(layer.dtype) for layer in layers] if self._with_sums else []
        if labels.device.type == "cpu":
            check_label_range(labels, self.num_classes)
        with self._alone():
            self._check_layers(widths, dtypes)
            implementation = select("count_firings", self.backend, layers, (labels, *self._counts))
            self._place(widths, dtypes, labels.device)
            implementation.count_firings(layers, labels, self.threshold, self._tally())

    @property
    def counts(self) -> list[Tensor]:
        """One (K, C) int64 tensor per layer: samples of the class for which the neuron fired."""
        self._check_invalid()
        return self._counts

    @property
    def class_sizes(self) -> Tensor:
        """(K,) int64: samples seen of each class."""
        self._check_invalid()
        return self._class_sizes

    @property
    def rates(self) -> list[Tensor]:
        """One (K, C) float32 tensor per layer in [0, 1]: counts / class size; 0 for those of `empty_classes`."""
        sizes = self.class_sizes.clamp_min(1).double()[:, None]
        return [(count.double() / sizes).float() for count in self._counts]

    @property
    def sums(self) -> list[Tensor]:
        """One (K, C) tensor per layer: pooled activations added over the class's samples.

        float64 for float64 layers and float32 otherwise.

        Raises:
            ValueError: the counter was made without `sums=True`.
        """
        if not self._with_sums:
            raise ValueError("sums: expected a counter made with FiringCounter(..., sums=True), got one made without")
        self._check_invalid()
        return self._sums

    @property
    def means(self) -> list[Tensor]:
        """One (K, C) tensor per layer, of the dtype of its sums: sums / class size; 0 for those of `empty_classes`.

        Raises:
            ValueError: the counter was made without `sums=True`.
        """
        return [mean_of_classes(total, self._class_sizes) for total in self.sums]

    @property
    def empty_classes(self) -> list[int]:
        """Classes of which no sample was seen; their rates of 0 say nothing. Reads the sizes on the host."""
        return (self.class_sizes == 0).nonzero().flatten().tolist()

    def merge(self, other: FiringCounter) -> None:
        """Add the counts, and sums if there are, of another counter of the same classes, threshold and layers.

        Raises:
            ValueError: the counters differ in one of these; nothing is added.
        """
        if not isinstance(other, FiringCounter):
            raise TypeError(f"other: expected a FiringCounter, got {type(other).__name__}")
        given = other._settings()
        for name, mine in self._settings().items():
            if mine != given[name]:
                raise ValueError(f"other: expected {name}={mine} as here, got {given[name]}")
        if not other.counts:
            return
        with other._alone():
            widths, dtypes = other._widths(), other._sum_dtypes()
            added = [_own(tensor) for tensor in other._tally().tensors()]
        with self._alone():
            self._check_layers(widths, dtypes)
            self._place(widths, dtypes, added[0].device)
            for mine, theirs in zip(self._tally().tensors(), added, strict=True):
                mine += theirs

    def all_reduce(self, group: Group) -> None:
        """Replace the counts, and sums if there are, on every rank by those of all ranks of a process group together.

        Integer sums have no order: every rank ends with the same counts, whatever the number of ranks that shared the
        samples. Sums of activations are added over the ranks in float64; they are the same on every rank, and from run
        to run given a deterministic all-reduce. A rank that counted no batch takes part. Calling it twice counts twice.

        Args:
            group: a process group that this process is in, or "world" for the default one.

        Raises:
            TypeError, ValueError: `group` is none, or the ranks' counters differ in classes, threshold, sums or layers;
                then on every rank, and nothing is added.
        """
        process_group = distributed.resolve_group(group)
        mine = (self._settings(), self._widths(), self._sum_dtypes())
        everyone = distributed.gather_objects(mine, process_group)
        counted = [layers for _, *layers in everyone if layers[0]]
        if any(theirs != mine[0] for theirs, *_ in everyone) or any(layers != counted[0] for layers in counted):
            described = [_describe(settings, *layers) for settings, *layers in everyone]
            raise ValueError(
                f"group: expected the same classes, threshold, sums and layers on every rank, got "
                f"{distributed.describe(described)}"
            )
        with self._alone(), torch.inference_mode(False):
            if counted:
                widths, dtypes = counted[0]
                self._place(widths, dtypes, self._class_sizes.device)
            *self._counts, self._class_sizes, self._invalid = distributed.sum_tensors(
                [*self._counts, self._class_sizes, self._invalid], torch.int64, process_group
            )
            if self._sums:
                self._sums = distributed.sum_tensors(self._sums, torch.float64, process_group)

    def state_dict(self) -> dict[str, Tensor]:
        """Counts, sums if there are, sizes and settings as tensors.

        `load_state_dict` takes it back, safetensors can hold it.
        """
        state = {f"counts.{index}": count for index, count in enumerate(self.counts)}
        state |= {f"sums.{index}": total for index, total in enumerate(self._sums)}
        state["class_sizes"] = self._class_sizes
        state["threshold"] = torch.tensor(self.threshold, dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, in place of what was counted so far.

        Raises:
            ValueError: entries are missing, unknown or of another shape or dtype; the counter stays as it was.
        """
        layers = range(sum(name.startswith("counts.") for name in state))
        counts, sums = [f"counts.{index}" for index in layers], [f"sums.{index}" for index in layers]
        if set(state) != {"class_sizes", "threshold", *counts, *(sums if self._with_sums else ())}:
            per_layer = "counts.0, sums.0, counts.1, sums.1" if self._with_sums else "counts.0, counts.1"
            raise ValueError(
                f"state: expected class_sizes, threshold and {per_layer}, ..., as of a counter made with "
                f"sums={self._with_sums}, got {sorted(state)}"
            )
        for name in [*counts, "class_sizes"]:
            _check_state_tensor(name, state[name], (torch.int64,), self.num_classes)
        for name, count in zip(sums, counts, strict=True) if self._with_sums else ():
            _check_state_tensor(
                name, state[name], (torch.float32, torch.float64), self.num_classes, state[count].shape[1]
            )
        threshold = float(state["threshold"])
        if threshold != self.threshold:
            raise ValueError(f"state['threshold']: expected {self.threshold} as here, got {threshold}")
        with self._alone(), torch.inference_mode(False):
            self._counts = [_own(state[name]) for name in counts]
            self._sums = [_own(state[name]) for name in sums] if self._with_sums else []
            self._class_sizes = _own(state["class_sizes"])
            self._invalid = torch.zeros((), dtype=torch.int64, device=self._class_sizes.device)

    def __repr__(self) -> str:
        settings = f"num_classes={self.num_classes}, threshold={self.threshold:g}, neurons={self._widths()}"
        return f"FiringCounter({settings}{', sums=True' if self._with_sums else ''})"

    def _settings(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes, "threshold": self.threshold, "sums": self._with_sums}

    def _widths(self) -> list[int]:
        return [count.shape[1] for count in self._counts]

    def _sum_dtypes(self) -> list[torch.dtype]:
        """Per layer, of its sums; none without sums."""
        return [total.dtype for total in self._sums]

    def _check_layers(self, widths: list[int], dtypes: list[torch.dtype]) -> None:
        counted, summed = self._widths(), self._sum_dtypes()
        if counted and counted != widths:
            raise ValueError(f"activations: expected layers of {counted} neurons as counted so far, got {widths}")
        if summed and summed != dtypes:
            raise ValueError(
                f"activations: expected layers whose sums are {_names(summed)} as so far, got {_names(dtypes)}"
            )

    def _check_unpooled(self, layers: Sequence[Tensor]) -> None:
        if self.threshold == 0:  # a mean of magnitudes is above 0 where one of them is
            return
        for index, layer in enumerate(layers):
            if is_pooled(layer):
                raise ValueError(
                    f"activations[{index}]: expected an activation, to compare its positions with the threshold "
                    f"{self.threshold:g}, got pooled rows, which hold means over positions"
                )

    def _alone(self) -> AbstractContextManager[Any]:
        """Keeps other threads out; a compiler traces one thread, and knows no locks."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _tally(self) -> Tally:
        return Tally(self._counts, self._class_sizes, self._invalid, self._sums)

    def _place(self, widths: list[int], dtypes: list[torch.dtype], device: torch.device) -> None:
        """Counts, and sums if there are `dtypes` for them, on the device; made at the first batch.

        Tensors made in inference mode could not be added to outside of it.
        """
        if self._counts and self._class_sizes.device == device:
            return
        with torch.inference_mode(False):
            if not self._counts:
                self._counts = [
                    torch.zeros(self.num_classes, width, dtype=torch.int64, device=device) for width in widths
                ]
                self._sums = [
                    torch.zeros(self.num_classes, width, dtype=dtype, device=device)
                    for width, dtype in zip(widths, dtypes, strict=False)
                ]
            self._counts = [count.to(device) for count in self._counts]
            self._sums = [total.to(device) for total in self._sums]
            self._class_sizes, self._invalid = self._class_sizes.to(device), self._invalid.to(device)

    def _check_invalid(self) -> None:
        invalid = int(self._invalid)
        if invalid:
            raise ValueError(
                f"labels: expected classes in [0, {self.num_classes}), got {invalid} samples with a class outside of it"
            )


def _names(dtypes: Sequence[torch.dtype]) -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


def _describe(settings: Mapping[str, Any], widths: list[int], dtypes: list[torch.dtype]) -> str:
    """A rank's counter, in an error."""
    sums = f", sums {_names(dtypes)}" if settings["sums"] else ""
    return f"num_classes={settings['num_classes']}, threshold={settings['threshold']:g}, neurons {widths}{sums}"


def _own(tensor: Tensor) -> Tensor:
    """A copy that kernels may add to."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _check_state_tensor(
    name: str, tensor: Any, dtypes: Sequence[torch.dtype], num_classes: int, neurons: int | None = None
) -> None:
    """A tensor of a state: (K,) class sizes, or (K, C) for any C unless `neurons` says which."""
    dims = 1 if name == "class_sizes" else 2
    right = tensor.dtype in dtypes and tensor.dim() == dims and tensor.shape[0] == num_classes
    if not right or (neurons is not None and tensor.shape[1] != neurons):
        shape = f"({num_classes},)" if dims == 1 else f"({num_classes}, {neurons or 'C'})"
        expected = " or ".join(_names(dtypes))
        raise ValueError(
            f"state[{name!r}]: expected {expected} of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
        )
