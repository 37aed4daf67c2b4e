"""NeMo on whole networks, against runs of the published code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moda import models
from moda.methods.base import Method, train
from moda.methods.gates import masks_from_frequencies
from moda.methods.mwt import load_published_state
from moda.methods.nemo import NeMo, TaughtLogits
from moda.models.resnet import ResNet
from moda.models.vit import Size, ViT

Golden = Callable[[str], dict[str, np.ndarray]]


def packed(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    state, start = {}, 0
    for name, sizes in zip(arrays[f"{prefix}_names"], arrays[f"{prefix}_shapes"], strict=True):
        shape = [int(size) for size in sizes if size]
        stop = start + int(np.prod(shape))
        state[str(name)] = torch.tensor(arrays[f"{prefix}_values"][start:stop]).reshape(shape)
        start = stop
    return state


def vit(arrays: dict[str, np.ndarray]) -> ViT:
    layers, hidden, heads, mlp, side, patch, classes = arrays["cfg"].tolist()
    return ViT(Size(layers, hidden, heads, mlp, side, patch), classes, 3)


def test_a_gated_transformer_is_the_published_one(golden: Golden):
    """Its checkpoint's keys are ours."""
    arrays = golden("peers/nemo_vit")
    images = (torch.tensor(arrays["x_u8"]).double() - 128) / 64
    prepared = NeMo().prepare(vit(arrays).double().eval(), 4, images)
    prepared.model.load_state_dict(packed(arrays, "state"))
    logits = prepared.model(images)
    np.testing.assert_allclose(logits.detach(), arrays["logits64"], rtol=1e-8, atol=1e-9)
    assert [site.layer for site in prepared.gates.sites] == arrays["order"].tolist()
    for index, gate in enumerate(prepared.gates.take()):
        np.testing.assert_allclose(gate.detach(), arrays[f"gate64_{index:02}"], rtol=1e-8, atol=1e-9)


def digits(arrays: dict[str, np.ndarray]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    images = (torch.tensor(arrays["x_u8"]).double() / 16)[:, None].repeat(1, 3, 1, 1)
    labels = torch.tensor(arrays["labels"])
    return images, [(images[rows], labels[rows]) for rows in arrays["batch_idx"].tolist()]


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_training_goes_as_the_published_one(golden: Golden, name: str):
    """Two epochs on digits, term by term and to the last weight."""
    arrays = golden(f"peers/nemo_training_{name}")
    images, batches = digits(arrays)
    rate, momentum, _, epochs, alpha, temperature = arrays["hyper"].tolist()
    method = NeMo(alpha, temperature, int(epochs), rate, momentum)
    state = packed(arrays, "state")
    if name == "cnn":
        stem, classes = len(state["bn1.weight"]), len(state["fc.bias"])
        model: nn.Module = ResNet([stem * 2**i for i in range(4)], (2, 2, 2, 2), classes, 3).double()
        prepared = method.prepare(model, classes, images[:2])
        tracked = {
            f"{key.removesuffix('running_mean')}num_batches_tracked" for key in state if key.endswith("running_mean")
        }
        load_published_state(prepared, _in_order(state | {key: torch.tensor(0) for key in tracked}))
    else:
        prepared = method.prepare(vit(arrays).double(), 4, images[:2])
        prepared.model.load_state_dict(state)
    for summary, terms in zip(train(method, prepared, batches), arrays["steps64"].mean(1), strict=True):
        np.testing.assert_allclose([summary.terms["task"], summary.terms["contrast"]], terms[:2], rtol=1e-6, atol=1e-7)
    if name == "vit":
        for key, value in packed(arrays, "final64").items():
            np.testing.assert_allclose(prepared.model.state_dict()[key], value, rtol=1e-5, atol=1e-7, err_msg=key)


def _in_order(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with each block's tensors together, which the added counters are not."""
    blocks = list(dict.fromkeys(key.rpartition(".")[0].split(".bn")[0].split(".conv.")[0] for key in state))
    return {key: state[key] for block in blocks for key in state if key.startswith(f"{block}.")} | state


def test_modules_are_the_published_ones_but_where_a_layer_is_never_used(golden: Golden):
    arrays = golden("peers/nemo_masks")
    bits, labels = torch.tensor(arrays["bits"]).bool(), torch.tensor(arrays["labels"])
    frequencies = torch.stack([bits[labels == number].float().mean(0) for number in range(3)])
    widths = arrays["widths"].tolist()
    fallback = {tuple(pair) for pair in arrays["fallback"].tolist()}
    expected = torch.tensor(arrays["vit_masks"]).bool().split(widths, 1)
    for layer, part in enumerate(frequencies.split(widths, 1)):
        found = masks_from_frequencies(part)
        for number in range(3):
            if (number, layer) in fallback:
                assert number in found.unused
                assert int(found.masks[number].sum()) == 1
            else:
                assert torch.equal(found.masks[number], expected[layer][number])


def test_a_distilled_transformer_learns_from_labels_and_teacher():
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    teacher = models.create("resnet18", num_classes=3, width=0.05)
    student = models.create("deit_small", num_classes=3, width=0.05, image_size=8)
    method = NeMo(epochs=2, learning_rate=0.01, teacher=teacher)
    prepared = method.prepare(student, 3, images)
    kept = {key: value.clone() for key, value in teacher.state_dict().items()}
    outputs = prepared.model.train()(images)
    assert isinstance(outputs, TaughtLogits)
    assert not outputs.teacher.requires_grad
    prepared.gates.take()
    first, last = train(method, prepared, [(images, labels)])
    assert last.terms["task"] < first.terms["task"]
    assert all(torch.equal(value, kept[key]) for key, value in teacher.state_dict().items())
    assert prepared.model.eval()(images).shape == (6, 3)
    prepared.gates.take()
    modules = method.extract(prepared, [(images, labels)])
    assert len(modules.sites) == 66
    assert modules.method == "nemo"


def test_it_is_a_method():
    assert isinstance(NeMo(), Method)


def test_the_first_gated_convolution_takes_part_when_asked(golden: Golden):
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])
    model = models.create("resnet18", num_classes=2, width=0.05).eval()
    both = []
    for published in (True, False):
        method = NeMo(published=published)
        torch.manual_seed(0)
        prepared = method.prepare(model, 2, images)
        both.append(float(method.loss(prepared, prepared.model(images), labels)["contrast"].detach()))
        prepared.gates.remove()
    assert both[0] != both[1]


IMAGES = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeMo(contrast=float("nan")), "contrast: expected a finite number of at least 0, got nan"),
        (lambda: NeMo(temperature=0), "temperature: expected a finite number greater than 0, got 0"),
        (lambda: NeMo(threshold=1.1), r"threshold: expected a finite number greater than 0 and of at most 1, got 1.1"),
        (lambda: NeMo(epochs=0), "epochs: expected at least 1"),
        (
            lambda: NeMo().prepare(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), 2, IMAGES),
            "model: expected at least two enc",
        ),
        (lambda: NeMo().prepare(models.create("resnet18", width=0.05), 1, IMAGES), "num_classes: expected at least 2"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        make()
