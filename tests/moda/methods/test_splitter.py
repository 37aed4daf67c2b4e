"""GradSplitter's masks and heads over a frozen network, against the published splitters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moda
from moda.methods.splitter import Splitter, binarised, detection_f1, splitter_loss
from moda.models.incecnn import InceCNN
from moda.models.rescnn import ResCNN
from moda.models.simcnn import SimCNN

Golden = Callable[[str], dict[str, np.ndarray]]
NAMES = ("simcnn", "rescnn", "incecnn")


def base_of(name: str, arrays: dict[str, np.ndarray]) -> nn.Module:
    widths = arrays["conv_cfg"][:, 1].tolist()
    if name == "simcnn":
        model: nn.Module = SimCNN(widths, (16, 16), 4, 3, 32, batch_norm=True)
    elif name == "rescnn":
        model = ResCNN(widths, 4, 3, 32, batch_norm=True)
    else:
        model = InceCNN(widths[:3], [widths[3:6], widths[6:9], widths[9:]], 4, 3)
    state = {key[6:]: torch.tensor(value) for key, value in arrays.items() if key.startswith("state/")}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def convolution_taps(names: tuple[str, ...]) -> list[str]:
    """Taps of convolutions; the linear layers of SimCNN are not masked by the published code."""
    return [name for name in names if name not in ("relu_13", "relu_14")]


class Case:
    """A published splitter and ours with its masks and heads."""

    def __init__(self, golden: Golden, name: str, dtype: torch.dtype, **options: int) -> None:
        self.arrays = arrays = golden(f"peers/gs_splitter_{name}")
        self.model = base_of(name, arrays).to(dtype)
        self.images = ((torch.tensor(arrays["x_u8"]).float() - 128) / 64).to(dtype)
        self.labels = torch.tensor(arrays["labels"])
        self.taps = moda.observe(self.model, example=self.images[:2])
        self.convolutions = convolution_taps(self.taps.names)
        assert self.convolutions == [f"relu_{index}" for index in range(len(arrays["owner"]))]
        shared = {
            f"relu_{index}": f"relu_{owner}" for index, owner in enumerate(arrays["owner"].tolist()) if owner != index
        }
        self.splitter = Splitter(self.taps, 4, sites=self.convolutions, shared=shared, **options).to(dtype)
        with torch.no_grad():
            for index in arrays["layers"].tolist():
                rows = [torch.tensor(arrays[f"m_{number}_{index}"]) for number in range(4)]
                self.splitter.mask(f"relu_{index}").copy_(torch.stack(rows))
        self.splitter.heads.load_heads(
            [
                {
                    key.split("/", 2)[2]: torch.tensor(value)
                    for key, value in arrays.items()
                    if key.startswith(f"head/{k}/")
                }
                for k in range(4)
            ]
        )


@pytest.mark.parametrize("classes_at_once", [4, 3, 1])
@pytest.mark.parametrize("name", NAMES)
def test_probabilities_are_the_published_ones(golden: Golden, name: str, classes_at_once: int):
    case = Case(golden, name, torch.float64, classes_at_once=classes_at_once)
    np.testing.assert_allclose(case.splitter(case.images).detach(), case.arrays["p64"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_is_as_close_as_the_published_one(golden: Golden, name: str):
    case = Case(golden, name, torch.float32)
    exact, published = case.arrays["p64"], case.arrays["p32"]
    error = np.abs(case.splitter(case.images).detach().numpy() - exact).max()
    assert error <= 2 * np.abs(published - exact).max() + 2e-6


@pytest.mark.parametrize("factor", [1, 40])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_clipped_gradients_are_the_published_ones(golden: Golden, name: str, factor: int):
    case = Case(golden, name, torch.float64)
    arrays = case.arrays
    probabilities, share = case.splitter(case.images), case.splitter.kept_share()
    cross_entropy = splitter_loss(probabilities, case.labels, share, 0)
    np.testing.assert_allclose((cross_entropy.detach(), share.detach()), arrays["loss64"], rtol=1e-10)
    (factor * splitter_loss(probabilities, case.labels, share, 0.1)).backward()
    for index in arrays["layers"].tolist():
        gradient = case.splitter.mask(f"relu_{index}").grad
        for number in range(4):
            expected = arrays[f"gm_{number}_{index}" if factor == 1 else f"gm40_{number}_{index}"]
            np.testing.assert_allclose(gradient[number], expected, rtol=1e-8, atol=1e-11)
    if factor == 1:
        gradients = dict(
            zip(("0.weight", "0.bias", "2.weight", "2.bias"), case.splitter.heads.parameters(), strict=True)
        )
        for number in range(4):
            for key, parameter in gradients.items():
                expected = arrays[f"ghead/{number}/{key}"]
                np.testing.assert_allclose(parameter.grad[number], expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_modules_keep_the_published_kernels_and_one_where_a_layer_is_empty(golden: Golden, name: str):
    case = Case(golden, name, torch.float64)
    found = case.splitter.module_masks()
    number, layer = case.arrays["empty"][0].tolist()
    widths = [found[tap].shape[1] for tap in case.convolutions]
    expected = torch.tensor(case.arrays["kernels"]).split(widths, 1)
    for index, (tap, kernels) in enumerate(zip(case.convolutions, expected, strict=True)):
        if case.arrays["owner"][index] != case.arrays["owner"][layer]:
            np.testing.assert_array_equal(found[tap], kernels)
        else:
            others = [k for k in range(4) if k != number]
            np.testing.assert_array_equal(found[tap][others], kernels[others])
            assert int(found[tap][number].int().argmax()) == int(case.splitter.mask(tap)[number].argmax())
            assert int(found[tap][number].sum()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_detection_is_scored_as_published(golden: Golden, name: str):
    arrays = golden(f"peers/gs_splitter_{name}")
    outputs, labels = torch.tensor(arrays["module64"]), torch.tensor(arrays["labels"])
    found = [detection_f1(outputs[:, number], labels, number) for number in range(4)]
    np.testing.assert_allclose(found, np.nan_to_num(arrays["f1"]), rtol=1e-6)


def test_the_best_detector_of_several_is_chosen_as_published(golden: Golden):
    arrays = golden("peers/gs_choice")
    labels, target = torch.tensor(arrays["labels"]), int(arrays["target"])
    scores = [detection_f1(torch.tensor(candidate), labels, target) for candidate in arrays["outputs"]]
    np.testing.assert_allclose(scores, np.nan_to_num(arrays["f1"]), rtol=1e-6)
    assert int(np.argmax(scores)) == int(arrays["best"])


def test_gradients_are_clipped_at_every_use(golden: Golden):
    arrays = golden("peers/gs_sign")
    mask = torch.tensor(arrays["m"]).requires_grad_()
    kept = binarised(mask)
    np.testing.assert_array_equal(kept.detach(), arrays["b"])
    kept.backward(torch.tensor(arrays["upstream"]))
    np.testing.assert_array_equal(mask.grad, arrays["grad"])
    mask.grad = None
    for upstream in arrays["twice_up"]:
        binarised(mask).backward(torch.tensor(upstream))
    np.testing.assert_array_equal(mask.grad, arrays["twice_grad"])


class Plain(nn.Module):
    """Two taps of different width."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes: expected at least 2, got 1"),
        ({"classes_at_once": 0}, "classes_at_once: expected at least 1, got 0"),
        ({"sites": []}, "sites: expected at least one tap"),
        ({"sites": ["layers.7"]}, "sites: expected taps of the model .*, got 'layers.7'"),
        ({"shared": {"layers.3": "layers.9"}}, "shared: expected taps of the model, got 'layers.9'"),
        ({"shared": {"layers.9": "layers.1"}}, "shared: expected taps of the model, got 'layers.9'"),
        ({"shared": {"layers.3": "layers.1"}}, "shared: 'layers.3' has 5 neurons, its owner 'layers.1' 4"),
        ({"shared": {"layers.3": "layers.3"}}, "shared: expected an owner for every tap, got a circle"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str):
    taps = moda.observe(Plain(), example=torch.randn(2, 3))
    with pytest.raises(ValueError, match=message):
        Splitter(taps, **{"num_classes": 2, **options})
