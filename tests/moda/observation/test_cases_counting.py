"""Counting and masking any model: every form of batch and output, against activations read off by hand."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moda
from moda_kernels import FiringCounter
from tests.moda._helpers.observing import Trace
from tests.moda._helpers.zoo import FAMILIES

X, LABELS = torch.linspace(-1, 1, 72).view(12, 6).mul(20).sin(), torch.arange(12) % 3


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Net(nn.Module):
    def __init__(self, output: str) -> None:
        super().__init__()
        self.output, self.a, self.b = output, nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, shift: Tensor | None = None, labels: Tensor | None = None) -> Any:
        self.steps += 1
        h = F.relu(self.a(x if shift is None else x + shift))
        logits = self.b(h)
        answers: dict[str, Callable[[], Any]] = {
            "tensor": lambda: logits,
            "dict": lambda: {"hidden": h, "logits": logits},
            "tuple": lambda: (logits, h),
            "dataclass": lambda: Answer(logits, h),
        }
        return answers[self.output]()


def expected(model: Net, x: Tensor) -> Tensor:
    fired = F.relu(model.a(x)) > 0
    return torch.stack([fired[k == LABELS].double().mean(0) for k in range(3)])


BATCHES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "pairs": ([(X[:7], LABELS[:7]), (X[7:], LABELS[7:])], {}),
    "lists": ([[X[:7], LABELS[:7]], [X[7:], LABELS[7:]]], {}),
    "int32 labels": ([(X, LABELS.int())], {}),
    "several inputs": ([((X - 1, torch.ones(12, 1)), LABELS)], {}),
    "dicts": ([{"x": X, "labels": LABELS}], {}),
    "of another form": ([{"image": X, "target": LABELS}], {"unpack": lambda batch: (batch["image"], batch["target"])}),
    "with an empty one": ([(X, LABELS), (X[:0], LABELS[:0])], {}),
    "one sample each": ([(X[i : i + 1], LABELS[i : i + 1]) for i in range(12)], {}),
}


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("output", ["tensor", "dict", "tuple", "dataclass"])
@pytest.mark.parametrize("form", BATCHES)
def test_every_form_of_batch_and_output_is_counted(form: str, output: str, observed: bool) -> None:
    model = Net(output).train()
    before = Trace(model)
    taps = moda.observe(model) if observed else None
    batches, settings = BATCHES[form]
    rates = moda.count_firings(model if taps is None else taps, batches, 3, progress=False, **settings)
    (found,) = rates.rates.values()
    assert torch.allclose(found.double(), expected(model, X))
    assert model.training
    if taps is not None:
        taps.remove()
    assert Trace(model) == before


@pytest.mark.parametrize(
    "name", ["tokens_of_patches", "windows_in_the_batch", "frames_in_the_batch", "squeeze_excitation"]
)
def test_rates_of_activations_folded_into_the_batch(name: str) -> None:
    (entry,) = (entry for entry in FAMILIES["written"] if entry.name == name)
    model, labels = entry.made().eval(), torch.arange(6) % 2
    args, _ = entry.samples(6)
    rates = moda.count_firings(model, [(args[0], labels)], 2, progress=False)
    with torch.no_grad(), moda.observe(model) as taps:
        with taps.recording():
            model(*args)
            activations = taps.activations()
        for name, activation in zip(taps.names, activations, strict=True):
            fired = (activation.flatten(2) != 0).any(2) if activation.dim() > 2 else activation != 0
            wanted = torch.stack([fired[labels == k].double().mean(0) for k in range(2)])
            assert torch.allclose(rates.rates[name].double(), wanted)


def test_other_calls_than_in_the_first_pass_are_an_error_for_counting() -> None:
    class Deciding(Net):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            h = F.relu(self.a(x))
            return self.b(h if x.sum() > 0 else F.relu(h - 0.1))

    model = Deciding("tensor")
    batches = [(torch.ones(4, 6), LABELS[:4]), (-torch.ones(4, 6), LABELS[:4])]
    before = Trace(model)
    with pytest.raises(ValueError, match="activation calls"):
        moda.count_firings(model, batches, 3, progress=False)
    assert Trace(model) == before


def test_pooled_rows_are_refused_where_a_threshold_asks_for_positions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    taps = moda.observe(model, route="fused")
    for _ in range(2):
        model(torch.randn(6, 3, 8, 8))
        pooled = taps.activations()
    with pytest.raises(ValueError, match="pooled"):
        FiringCounter(3, threshold=0.1).update(pooled, LABELS[:6])


def test_a_counter_shared_by_threads_loses_nothing() -> None:
    counter, activations = FiringCounter(3), [F.relu(X), F.relu(-X)]
    threads = [
        threading.Thread(target=lambda: [counter.update(activations, LABELS) for _ in range(20)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    once = FiringCounter(3)
    once.update(activations, LABELS)
    assert torch.equal(counter.class_sizes, 80 * once.class_sizes)
    assert all(torch.equal(a, 80 * b) for a, b in zip(counter.counts, once.counts, strict=True))


def test_state_made_in_inference_mode_is_usable_outside() -> None:
    model = Net("tensor")
    with torch.inference_mode():
        rates = moda.count_firings(model, [(X, LABELS)], 3, progress=False)
    masked = moda.mask(model, moda.decompose(rates), [0, 2])
    masked(X).sum().backward()
    assert model.a.weight.grad is not None
    with moda.observe(model) as taps:
        model(X).sum().backward()
        assert len(taps.activations()) == 1


@pytest.mark.parametrize("output", ["tensor", "dict", "tuple", "dataclass"])
def test_a_masked_model_gives_rows_of_the_classes_and_leaves_the_model_alone(output: str) -> None:
    model = Net(output).eval()
    kept = torch.zeros(3, 8, dtype=torch.bool)
    kept[0, :3], kept[2, 5:] = True, True
    before, plain = Trace(model), model(X)
    masked = moda.mask(model, moda.Decomposition({"relu": kept}), [2, 0])
    logits = model.b(F.relu(model.a(X)) * (kept[0] | kept[2]))[:, [2, 0]]
    got = masked(X)
    found = got if isinstance(got, Tensor) else got["logits"] if isinstance(got, dict) else getattr(got, "logits", None)
    assert torch.allclose(got[0] if found is None else found, logits)
    again = model(X)
    assert type(again) is type(plain)
    assert Trace(model) == before


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU, nn.Softplus, nn.ELU])
def test_smooth_activations_that_always_fire_bring_a_warning(act: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moda.decompose(moda.count_firings(model, [(X, LABELS)], 3, progress=False))
    assert any("100.0%" in str(warning.message) and "attribute" in str(warning.message) for warning in caught)


def test_a_rule_that_drops_neurons_brings_none() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moda.decompose(moda.count_firings(model, [(X, LABELS)], 3, progress=False))
