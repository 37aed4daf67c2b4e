"""Idioms of what goes in and what comes out, and of names."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tests.moda._helpers.zoo.entry import CLASSES, Inputs
from tests.moda._helpers.zoo.written.idiom import Small, idiom


@idiom("dict_output", output="logits")
class DictOutput(Small):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.a(x))
        return {"features": h, "logits": self.b(h)}


@idiom("ordered_dict_output", output="out")
class OrderedOutput(Small):
    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        h = F.relu(self.a(x))
        return OrderedDict(out=self.b(h), aux=h)


@dataclass
class Result:
    logits: Tensor
    hidden: list[Tensor]
    loss: Tensor | None = None


@idiom("dataclass_output", output="logits")
class DataclassOutput(Small):
    def forward(self, x: Tensor) -> Result:
        h = F.relu(self.a(x))
        return Result(self.b(h), [h, F.gelu(h)])


class Named(NamedTuple):
    logits: Tensor
    features: Tensor


@idiom("named_tuple_output", output="logits")
class NamedTupleOutput(Small):
    def forward(self, x: Tensor) -> Named:
        h = F.relu(self.a(x))
        return Named(self.b(h), h)


@idiom("tuple_output", output=0)
class TupleOutput(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.a(x))
        return self.b(h), h


@idiom("nested_output", output="main")
class NestedOutput(Small):
    def forward(self, x: Tensor) -> dict[str, Any]:
        h = F.relu(self.a(x))
        return {"main": self.b(h), "rest": [h, {"again": (F.silu(h), None)}]}


@idiom("activation_is_the_output", num_classes=8)
class ActivationOutput(Small):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x))


@idiom("auxiliary_output_in_training", output=0)
class Auxiliary(Small):
    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        return (self.b(h), self.b(F.gelu(h))) if self.training else self.b(h)


@idiom("several_heads", output=0)
class SeveralHeads(Small):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, CLASSES)) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        h = F.relu(self.a(x))
        return [head(h) for head in self.heads]


@idiom("loss_computed_inside", output="logits")
class LossInside(Small):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.b(F.relu(self.a(x)))
        found = {"logits": logits}
        if labels is not None:
            found["loss"] = F.cross_entropy(logits, labels)
        return found


def _labelled(batch: int, generator: Generator) -> Inputs:
    return (), {"x": torch.randn(batch, 6, generator=generator), "labels": torch.arange(batch) % CLASSES}


idiom("loss_computed_inside_with_labels", _labelled, output="logits")(LossInside)


def _two(batch: int, generator: Generator) -> Inputs:
    return (torch.randn(batch, 6, generator=generator), torch.randn(batch, 4, generator=generator)), {}


@idiom("two_inputs", _two)
class TwoInputs(Small):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(4, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)) * F.relu(self.c(y)))


def _dict(batch: int, generator: Generator) -> Inputs:
    (x, y), _ = _two(batch, generator)
    return ({"x": x, "more": [y, {"scale": torch.ones(batch, 1)}]},), {}


@idiom("nested_input", _dict)
class NestedInput(TwoInputs):
    def forward(self, batch: dict[str, Any]) -> Tensor:  # type: ignore[override]
        y, more = batch["more"]
        return self.b(F.relu(self.a(batch["x"])) * more["scale"] + F.relu(self.c(y)))


def _keywords(batch: int, generator: Generator) -> Inputs:
    (x, y), _ = _two(batch, generator)
    return (), {"second": y, "first": x}


@idiom("keyword_inputs", _keywords)
class KeywordInputs(TwoInputs):
    def forward(self, *, first: Tensor, second: Tensor) -> Tensor:  # type: ignore[override]
        return self.b(F.relu(self.a(first)) + F.relu(self.c(second)))


@idiom("any_arguments", _two)
class AnyArguments(TwoInputs):
    def forward(self, *arguments: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        layers = (self.a, self.c)
        return self.b(sum(F.relu(layer(x)) for layer, x in zip(layers, arguments, strict=True)))


@idiom(
    "siamese",
    lambda batch, generator: (
        (torch.randn(batch, 6, generator=generator), torch.randn(batch, 6, generator=generator)),
        {},
    ),
)
class Siamese(Small):
    """One tower, called once for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(6, 8), nn.ReLU())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b((self.tower(x) - self.tower(y)).abs())


@idiom("words", lambda batch, generator: ((torch.randint(20, (batch, 5), generator=generator),), {}))
class Words(Small):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(self.words(x))).mean(1))


@idiom(
    "bags_of_words",
    lambda batch, generator: (
        (torch.randint(20, (batch * 3,), generator=generator), torch.arange(0, batch * 3, 3)),
        {},
    ),
)
class Bags(Small):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(20, 6, mode="mean")

    def forward(self, words: Tensor, offsets: Tensor) -> Tensor:
        return self.b(F.relu(self.a(self.words(words, offsets))))


def _packed(batch: int, generator: Generator) -> Inputs:
    return (torch.randn(batch, 5, 6, generator=generator), torch.arange(batch, 0, -1).clamp(max=5)), {}


@idiom("packed_sequence", _packed)
class Packed(Small):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(F.relu(self.a(x)), lengths, batch_first=True, enforce_sorted=False)
        _, state = self.rnn(packed)
        return self.b(F.relu(state[0]))


# -- names that are also names of something else

_NAMES = (
    "activations",
    "taps",
    "names",
    "graph",
    "code",
    "classes",
    "class",
    "lambda",
    "recording",
    "skipped",
    "3x3",
    "a-b",
    "train_",
)


@idiom("submodules_with_odd_names")
class OddNames(Small):
    def __init__(self) -> None:
        super().__init__()
        for name in _NAMES:
            self.add_module(name, nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        for name in _NAMES:
            h = self._modules[name](h) + h  # type: ignore[misc]
        return self.b(h)


@idiom("attributes_with_odd_names")
class OddAttributes(Small):
    """Attributes and methods of the user's own with names a tool might take."""

    def __init__(self) -> None:
        super().__init__()
        self.taps, self.route, self.example, self._recorder = 3, "mine", (1, 2), None
        self.register_buffer("masks", torch.ones(8))

    def activations(self, h: Tensor) -> Tensor:
        return F.relu(h) * self.masks

    def remove(self) -> str:
        return self.route

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.activations(self.a(x)) * self.taps)


@idiom("attribute_access_of_the_users")
class OwnGetattr(Small):
    """Attributes that are missing come from a wrapped module, as wrappers of data parallelism do."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("a"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(F.linear(x, self.weight, self.bias)))


@idiom("slots_and_call_of_the_users")
class OwnCall(Small):
    """The module's own `__call__` does something before and behind forward."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x * 2) + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


@idiom("sequential_indexed")
class Indexed(nn.Module):
    """Slices of a sequence are modules made anew in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[3:](self.layers[:3](x))
