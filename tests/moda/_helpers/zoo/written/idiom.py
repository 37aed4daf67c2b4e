"""How a hand-written model enters the zoo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Generator, nn

from tests.moda._helpers.zoo.entry import CLASSES, Entry, Inputs, vectors

IDIOMS: list[Entry] = []

Model = TypeVar("Model", bound=type[nn.Module])


def idiom(
    name: str,
    inputs: Callable[[int, Generator], Inputs] | None = None,
    *,
    output: str | int | None = None,
    num_classes: int = CLASSES,
    **settings: Any,
) -> Callable[[Model], Model]:
    """Put a model class into the zoo, made with these settings; by default its samples are six numbers each."""

    def enter(model: Model) -> Model:
        made = lambda: model(**settings)  # noqa: E731
        IDIOMS.append(Entry(name, "written", made, inputs or vectors(6), num_classes, output))
        return model

    return enter


class Small(nn.Module):
    """Two layers, `a` from 6 to 8 and `b` from 8 to the classes, which most idioms put to use."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, CLASSES)


class SmallImages(nn.Module):
    """A convolution `a` of images to 8 channels, and a layer `b` from those to the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, CLASSES)
