"""Totals per class and neuron over batches: the base of `FiringCounter` and `AttributionSums`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from moda_kernels import distributed
from moda_kernels.backends import check_backend
from moda_kernels.distributed import Group
from moda_kernels.means import mean_of_classes
from moda_kernels.tally import Tally
from moda_kernels.validation import check_num_classes, check_strided, shown

COUNTS, SUMS = "counts", "sums"
_DTYPES = {COUNTS: (torch.int64,), SUMS: (torch.float32, torch.float64)}

_Totals = TypeVar("_Totals", bound="ClassTotals")


class ClassTotals:
    """Totals of one or two kinds, (K, C) per layer, and the number of samples of each class that are in them.

    They live on the device of the activations.

    Counts are int64, sums float64 for float64 layers and float32 otherwise. Labels outside [0, num_classes) are an
    error: at once on the CPU; on a GPU, where looking would be a synchronisation per batch, at the next read.
    Threads may share one.
    """

    _WORD = "summed"  # what errors say was done to a layer

    def __init__(self, num_classes: int, backend: str, kinds: Sequence[str]) -> None:
        check_num_classes(num_classes)
        check_backend(backend)
        self.num_classes = num_classes
        self.backend = backend
        self._totals: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
        self._lock = threading.Lock()
        with torch.inference_mode(False):
            self._class_sizes = torch.zeros(num_classes, dtype=torch.int64)
            self._invalid = torch.zeros((), dtype=torch.int64)

    @property
    def class_sizes(self) -> Tensor:
        """(K,) int64: samples seen of each class."""
        self._check_invalid()
        return self._class_sizes

    @property
    def sums(self) -> list[Tensor]:
        """One (K, C) tensor per layer, added over the class's samples: float64 for float64 layers, else float32."""
        self._check_invalid()
        return self._sums

    @property
    def means(self) -> list[Tensor]:
        """One (K, C) tensor per layer, of the dtype of its sums: sums / class size; 0 for those of `empty_classes`."""
        return [mean_of_classes(total, self._class_sizes) for total in self.sums]

    @property
    def empty_classes(self) -> list[int]:
        """Classes of which no sample was seen; what is 0 for them says nothing. Reads the sizes on the host."""
        return (self.class_sizes == 0).nonzero().flatten().tolist()

    def merge(self: _Totals, other: _Totals) -> None:
        """Add the totals of `other`, which has the same settings and layers.

        Raises:
            TypeError, ValueError: the two differ in kind, settings or layers; nothing is added.
        """
        if type(other) is not type(self):
            raise TypeError(f"other: expected {type(self).__name__} as here, got {type(other).__name__}")
        given = other._settings()
        for name, mine in self._settings().items():
            if mine != given[name]:
                raise ValueError(f"other: expected {name}={mine} as here, got {given[name]}")
        other._check_invalid()
        if not other._widths():
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
        """Replace the totals on every rank by those of all ranks of a process group together.

        Integer sums have no order: every rank ends with the same counts, whatever the number of ranks that shared the
        samples. Other sums are added over the ranks in float64; they are the same on every rank, and from run to run
        given a deterministic all-reduce. A rank that saw no batch takes part. Calling it twice counts twice.

        Args:
            group: a process group that this process is in, or "world" for the default one.

        Raises:
            TypeError, ValueError: `group` is none, or the ranks' settings or layers differ; then on every rank, and
                nothing is added.
        """
        process_group = distributed.resolve_group(group)
        mine = (self._settings(), self._widths(), self._sum_dtypes())
        everyone = distributed.gather_objects(mine, process_group)
        seen = [layers for _, *layers in everyone if layers[0]]
        if any(theirs != mine[0] for theirs, *_ in everyone) or any(layers != seen[0] for layers in seen):
            described = [self._describe(settings, *layers) for settings, *layers in everyone]
            raise ValueError(
                f"group: expected the same {self._SAME} on every rank, got {distributed.describe(described)}"
            )
        with self._alone(), torch.inference_mode(False):
            if seen:
                widths, dtypes = seen[0]
                self._place(widths, dtypes, self._class_sizes.device)
            *counts, self._class_sizes, self._invalid = distributed.sum_tensors(
                [*self._counts, self._class_sizes, self._invalid], torch.int64, process_group
            )
            if counts:
                self._totals[COUNTS] = counts
            if self._sums:
                self._totals[SUMS] = distributed.sum_tensors(self._sums, torch.float64, process_group)

    def state_dict(self) -> dict[str, Tensor]:
        """Totals, sizes and settings as tensors. `load_state_dict` takes it back, safetensors can hold it."""
        self._check_invalid()
        state = {
            f"{kind}.{index}": total for kind, totals in self._totals.items() for index, total in enumerate(totals)
        }
        state["class_sizes"] = self._class_sizes
        for name, value in self._numbers().items():
            state[name] = torch.tensor(value, dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, in place of what was added up so far.

        Raises:
            TypeError, ValueError: entries are missing, unknown, of another kind, shape or dtype, or no totals of
                batches (a count beyond its class's size); this one stays as it was.
        """
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            raise TypeError(f"state: expected a mapping of names to tensors, got {type(state).__name__}")
        first, *others = self._totals
        layers = range(sum(name.startswith(f"{first}.") for name in state))
        names = {kind: [f"{kind}.{index}" for index in layers] for kind in self._totals}
        if set(state) != {"class_sizes", *self._numbers(), *(name for given in names.values() for name in given)}:
            raise ValueError(f"state: expected {self._expected_state()}, got {shown(sorted(state))}")
        for name in names[first]:
            _check_state_tensor(name, state[name], _DTYPES[first], self.num_classes)
        _check_state_tensor("class_sizes", state["class_sizes"], (torch.int64,), self.num_classes)
        for kind in others:
            for name, like in zip(names[kind], names[first], strict=True):
                _check_state_tensor(name, state[name], _DTYPES[kind], self.num_classes, state[like].shape[1])
        for name, mine in self._numbers().items():
            _check_number(name, state[name], mine)
        _check_totals({name: state[name] for given in names.values() for name in given}, state["class_sizes"])
        with self._alone(), torch.inference_mode(False):
            self._totals = {kind: [_own(state[name]) for name in given] for kind, given in names.items()}
            self._class_sizes = _own(state["class_sizes"])
            self._invalid = torch.zeros((), dtype=torch.int64, device=self._class_sizes.device)

    # Subclasses override these.

    _SAME = "classes and layers"  # of all ranks

    def _numbers(self) -> dict[str, float]:
        """Settings that are kept in a state."""
        return {}

    def _settings(self) -> dict[str, Any]:
        """The settings in which two that are merged must agree."""
        return {"num_classes": self.num_classes}

    def _expected_state(self) -> str:
        return "class_sizes and sums.0, sums.1, ..."

    def _describe(self, settings: Mapping[str, Any], widths: list[int], dtypes: list[torch.dtype]) -> str:
        """A rank's totals, as an error describes them."""
        return f"num_classes={settings['num_classes']}, neurons {widths}, sums {names_of(dtypes)}"

    # The totals.

    @property
    def _counts(self) -> list[Tensor]:
        """The totals of this kind, one per layer; empty if it is not taken."""
        return self._totals.get(COUNTS, [])

    @property
    def _sums(self) -> list[Tensor]:
        """The totals of this kind, one per layer; empty if it is not taken."""
        return self._totals.get(SUMS, [])

    def _tally(self) -> Tally:
        return Tally(self._counts, self._class_sizes, self._invalid, self._sums)

    def _alone(self) -> AbstractContextManager[Any]:
        """A context that keeps other threads out; an empty one for a compiler, which knows no locks."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _widths(self) -> list[int]:
        return [total.shape[1] for total in next(iter(self._totals.values()))]

    def _sum_dtypes(self) -> list[torch.dtype]:
        return [total.dtype for total in self._sums]

    def _check_layers(self, widths: list[int], dtypes: list[torch.dtype]) -> None:
        seen, summed = self._widths(), self._sum_dtypes()
        if seen and seen != widths:
            raise ValueError(f"activations: expected layers of {seen} neurons as {self._WORD} so far, got {widths}")
        if summed and summed != dtypes:
            raise ValueError(
                f"activations: expected layers whose sums are {names_of(summed)} as so far, got {names_of(dtypes)}"
            )

    def _place(self, widths: list[int], dtypes: list[torch.dtype], device: torch.device) -> None:
        """Make the totals at the first batch, with sums of `dtypes`, or move them to the device.

        They are made outside of inference mode, because tensors made in it could not be added to later.
        """
        made = bool(self._widths())
        if made and self._class_sizes.device == device:
            return
        with torch.inference_mode(False):
            for kind, totals in self._totals.items():
                of_layers = [torch.int64] * len(widths) if kind == COUNTS else dtypes
                self._totals[kind] = (
                    [total.to(device) for total in totals]
                    if made
                    else [
                        torch.zeros(self.num_classes, width, dtype=dtype, device=device)
                        for width, dtype in zip(widths, of_layers, strict=True)
                    ]
                )
            self._class_sizes, self._invalid = self._class_sizes.to(device), self._invalid.to(device)

    def _check_invalid(self) -> None:
        invalid = int(self._invalid)
        if invalid:
            raise ValueError(
                f"labels: expected classes in [0, {self.num_classes}), got {invalid} samples with a class outside of it"
            )


def names_of(dtypes: Sequence[torch.dtype]) -> list[str]:
    """The dtypes as an error names them."""
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy, which kernels may add to."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _check_state_tensor(
    name: str, tensor: Any, dtypes: Sequence[torch.dtype], num_classes: int, neurons: int | None = None
) -> None:
    """Check a tensor of a state: (K,) class sizes, or (K, C) totals, where any C will do unless `neurons` gives it."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"state[{name!r}]: expected a tensor, got {type(tensor).__name__}")
    check_strided(tensor, f"state[{name!r}]")
    if tensor.is_meta:
        raise TypeError(f"state[{name!r}]: expected a tensor with numbers, got one on device meta")
    dims = 1 if name == "class_sizes" else 2
    right = tensor.dtype in dtypes and tensor.dim() == dims and tensor.shape[0] == num_classes
    if not right or (neurons is not None and tensor.shape[1] != neurons):
        shape = f"({num_classes},)" if dims == 1 else f"({num_classes}, {neurons or 'C'})"
        expected = " or ".join(names_of(dtypes))
        raise ValueError(
            f"state[{name!r}]: expected {expected} of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
        )


def _check_number(name: str, value: Any, mine: float) -> None:
    """Check a setting in a state, a number or a tensor of one."""
    one = isinstance(value, Tensor) and value.numel() == 1 and not (value.is_complex() or value.is_meta)
    if not one and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise TypeError(f"state[{name!r}]: expected a number or a tensor of one, got {type(value).__name__}")
    number = value.item() if isinstance(value, Tensor) else value
    if number != mine:
        raise ValueError(f"state[{name!r}]: expected {mine} as here, got {shown(number)}")


def _check_totals(totals: Mapping[str, Tensor], class_sizes: Tensor) -> None:
    """Check that totals are such as batches add up to: no count beyond its class's size."""
    if bool((class_sizes < 0).any()):
        raise ValueError(f"state['class_sizes']: expected sizes of at least 0, got {int(class_sizes.min())}")
    for name, total in totals.items():
        if total.device != class_sizes.device:
            raise ValueError(
                f"state[{name!r}]: expected device {class_sizes.device} as class_sizes are on, got {total.device}"
            )
        if total.dtype == torch.int64 and bool(((total < 0) | (total > class_sizes[:, None])).any()):
            raise ValueError(f"state[{name!r}]: expected counts from 0 to the class's size, got others")
