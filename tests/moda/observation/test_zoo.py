"""Every model of the zoo, observed: outputs, gradients, state and random numbers are the plain model's, bit for bit."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moda
from moda.observation.taps import Taps, taps_of
from moda_kernels import ModularLoss
from tests.moda._helpers.observing import (
    ActivationCalls,
    Trace,
    assert_recorded_in_order,
    assert_same_pass,
    follows_samples,
    one_pass,
    same,
    with_first_sample_repeated,
)
from tests.moda._helpers.zoo import FAMILIES, ZOO, Entry, tensors_of

BATCH = 4
LABELS = torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize("name", ZOO)
def test_an_observed_model_is_the_plain_model(name: str) -> None:
    entry = ZOO[name]
    plain, model = entry.made().train(), entry.made().train()
    taps = moda.observe(model, fuse_norms=False)
    for seed in (1, 2):  # the probe, then a pass as all later ones are
        wanted = one_pass(plain, entry.samples(BATCH, seed), seed)
        then = taps.clear if seed == 1 else lambda: check_loss(taps, model)
        assert_same_pass(one_pass(model, entry.samples(BATCH, seed), seed, then), wanted)
    assert taps.names or taps.skipped
    assert all(reason.strip() for reason in taps.skipped.values())
    assert len(taps.names) == len(set(taps.names)) == len(taps.widths)
    check_eval(entry, plain, model)
    taps.remove()
    assert Trace(model) == Trace(plain)
    assert_same_outputs(*(outputs(entry, each, 4) for each in (model, plain)))


@pytest.mark.parametrize("route", ["grouped", "fused"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [entry.name for entry in FAMILIES["written"]])
def test_an_idiom_on_the_other_routes_and_first_seen_in_either_mode(name: str, training: bool, route: Any) -> None:
    entry = ZOO[f"written/{name}"]
    plain, model = entry.made().train(training), entry.made().train(training)
    with moda.observe(model, route=route, fuse_norms=False) as taps:
        for seed in (1, 2):
            wanted = one_pass(plain, entry.samples(BATCH, seed), seed)
            assert_same_pass(one_pass(model, entry.samples(BATCH, seed), seed, lambda: check_loss(taps, model)), wanted)
    assert Trace(model) == Trace(plain)


def check_loss(taps: Taps, model: nn.Module) -> None:
    """The modular loss of what was just recorded is finite, and so are its gradients."""
    if not taps.names:
        with pytest.raises(RuntimeError, match=re.escape(next(iter(taps.skipped)))):
            taps.activations()
        return
    try:
        activations = taps.activations()
    except RuntimeError as error:
        assert any("reentrant" in type(module).__name__.lower() for module in model.modules())
        assert "use_reentrant=False" in str(error)  # noqa: PT017
        return
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    assert all(activation.size(0) == BATCH for activation in activations)
    if len(activations) == len(taps.names):  # chance may have left out a layer
        assert [activation.size(1) for activation in activations] == list(taps.widths)
    differentiable = [activation for activation in activations if activation.requires_grad]
    if differentiable:
        model.zero_grad(set_to_none=True)
        loss = ModularLoss()(activations, LABELS)
        assert torch.isfinite(loss)
        loss.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    for buffer, before in buffers:  # which a checkpoint changes once more in its second backward pass
        if not buffer.is_inference():
            buffer.data.copy_(before)


def check_eval(entry: Entry, plain: nn.Module, model: nn.Module) -> None:
    """In eval mode: the same outputs, and what is recorded are the activations, a row a sample where that can be said."""
    plain.eval(), model.eval()
    assert_same_outputs(outputs(entry, model, 3), outputs(entry, plain, 3))
    twin = copy.deepcopy(plain)
    with ActivationCalls(twin) as called:
        outputs(entry, twin, 4)
    inputs = entry.samples(BATCH, 4)
    recorded, logits = record(entry, model, inputs)
    if not any(module._forward_hooks or "forward" in vars(module) for module in plain.modules()):
        assert_recorded_in_order(recorded.values(), called.outputs)
    try:
        again, other_logits = record(entry, model, with_first_sample_repeated(inputs, BATCH))
    except RuntimeError:  # offsets and the like: rows of such inputs cannot change places
        return
    if follows_samples(logits, other_logits):  # the model itself treats each sample by itself
        assert again.keys() == recorded.keys()
        for name, activation in recorded.items():
            assert follows_samples(activation, again[name]), f"{name}: rows are no samples"


def record(entry: Entry, model: nn.Module, inputs: tuple[Any, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Activations and logits of a pass of a deep copy, which has taps of its own."""
    copied = copy.deepcopy(model)
    taps = taps_of(copied)
    assert taps is not None
    assert taps is not taps_of(model)
    assert taps.model is copied
    torch.manual_seed(4)
    random.seed(4)
    args, kwargs = inputs
    with torch.no_grad(), taps.recording():
        logits = entry.logits(copied(*args, **kwargs))
        activations = taps.activations() if taps.names else []
    return dict(zip(taps.names, activations, strict=True)), logits


@torch.no_grad()
def outputs(entry: Entry, model: nn.Module, seed: int) -> list[Tensor]:
    """All tensors that come out of a pass without gradients."""
    torch.manual_seed(seed)
    random.seed(seed)
    args, kwargs = entry.samples(BATCH, seed)
    return tensors_of(model(*args, **kwargs))


def assert_same_outputs(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted)
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))
