"""Models that put out more than logits: what is attributed, chosen, and counted right is that of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moda
from moda.outputs import logits_of


@dataclass
class Heads:
    logits: Tensor
    hidden: Tensor


class Net(nn.Module):
    """Puts out its logits in a form of one's choice."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.form = nn.Linear(5, 8), nn.Linear(8, 3), form

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.first(x))
        logits = self.last(hidden)
        return {
            "tensor": logits,
            "dict": {"hidden": hidden, "logits": logits},
            "data class": Heads(logits, hidden),
            "tuple": (hidden, logits),
            "scores": {"hidden": hidden, "scores": logits},
        }[self.form]


OUTPUT = {"tensor": None, "dict": None, "data class": None, "tuple": 1, "scores": "scores"}


def batches(form: str = "pairs") -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    pairs = [(torch.randn(12, 5, generator=generator), torch.arange(12) % 3) for _ in range(3)]
    return pairs if form == "pairs" else [{"x": x, "labels": labels} for x, labels in pairs]


@pytest.mark.parametrize("form", OUTPUT)
def test_everything_that_reads_logits_finds_them(form):
    plain, model, output = Net("tensor"), Net(form), OUTPUT[form]
    expected = moda.attribute(plain, batches(), 3, progress=False)
    scores = moda.attribute(model, batches(), 3, output=output, progress=False)
    for tap, values in expected.scores.items():
        assert torch.equal(scores.scores[tap], values)
    chosen = [
        moda.decompose(of, epsilon="auto", model=net, loader=batches(), output=which, progress=False)
        for of, net, which in ((expected, plain, None), (scores, model, output))
    ]
    assert chosen[0].settings == chosen[1].settings
    for classes in (None, [2, 0]):
        right = moda.measure.accuracy(plain, batches(), classes)
        assert moda.measure.accuracy(model, batches("dicts"), classes, output=output) == right


@pytest.mark.parametrize(
    ("value", "arguments", "error", "message"),
    [
        ({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, {}, ValueError, "expected one tensor, or one called logits"),
        ({"a": torch.ones(2, 4)}, {"num_classes": 3}, ValueError, r"4 logits"),
        ({"a": torch.ones(2, 3)}, {"output": "b"}, ValueError, "output: expected one of"),
        (
            torch.ones(2, 3),
            {"output": "b"},
            ValueError,
            "output: expected none, as the model puts out one tensor, got 'b'",
        ),
        (torch.ones(2, 3, 4), {}, ValueError, r"expected logits \(N, K\)"),
        (torch.ones(2, 4), {"num_classes": 3}, ValueError, r"expected logits \(N, 3\) .* got shape \(2, 4\)"),
        (object(), {"num_classes": 3}, TypeError, "expected tensors"),
    ],
)
def test_bad_outputs_are_named(value, arguments, error, message):
    with pytest.raises(error, match=message):
        logits_of(value, **arguments)
