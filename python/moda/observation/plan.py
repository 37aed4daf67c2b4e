"""What a probe found out: the taps of a model in one mode (train or eval), and where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from moda.observation.layout import Layout


@dataclass(frozen=True)
class Tap:
    """One activation call of a forward pass.

    Attributes:
        name: unique among the taps of the model.
        index: place in execution order.
        width: how many neurons.
        layout: where samples and neurons are.
        function: of `torch.nn.functional`, if it is a plain one that something else may compute (see `plain_function`).
        overwritten: whether the model overwrites the activation later.
        spare: whether nobody but this call reads its input.
        relu: whether the function is ReLU.
        pooled: whether the pooled activation may be recorded in the activation's place.
        fusible: whether ReLU and pooling may be one pass here.
        as_it_is: whether the activation itself is what is recorded.
    """

    name: str
    index: int
    width: int
    layout: Layout
    function: str = ""
    overwritten: bool = False
    spare: bool = False
    # Asked at every call of the activation.
    relu: bool = field(init=False, repr=False, compare=False)
    pooled: bool = field(init=False, repr=False, compare=False)
    fusible: bool = field(init=False, repr=False, compare=False)
    as_it_is: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "relu", self.function == "relu")
        object.__setattr__(self, "pooled", self.layout.plain and self.layout.dims > 2)
        object.__setattr__(self, "fusible", self.relu and self.pooled)
        object.__setattr__(self, "as_it_is", self.layout.plain and not self.overwritten)


class Repeated(Protocol):
    """A site that is called more than once in a forward pass."""

    hits: int
    planned: list[tuple[Tap | None, ...]]


@dataclass(frozen=True)
class Plan:
    """The taps of one mode.

    Attributes:
        taps: in execution order.
        skipped: why calls of activations are not tapped, by the names they would have.
        repeated: sites that are called more than once.
        samples: how many samples the probe had.
        folded: whether a tap has to know how many samples there are.
        largest: bytes of the largest activation that the probe saw.
        names: of the taps.
    """

    taps: tuple[Tap, ...]
    skipped: Mapping[str, str]
    repeated: tuple[Repeated, ...]
    samples: int
    folded: bool = field(default=False)
    largest: int = field(default=0)
    names: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(tap.name for tap in self.taps))

    @property
    def provisional(self) -> bool:
        """Whether fewer than two samples left open how rows belong to samples."""
        return self.samples < 2
