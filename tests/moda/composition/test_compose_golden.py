"""Compositions and measures against those of the authors' implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from moda.composition import measure
from moda.composition.compose import compose, plan
from moda.composition.masking import mask
from moda.decomposition.container import Decomposition
from moda.models.mobilenet import MobileNet
from moda.models.resnet import ResNet
from moda.models.vgg import VGG
from moda.observation.taps import taps_of
from tests.moda._helpers.composing import watched

CASES = [
    "vgg_random",
    "vgg_e2e",
    "resnet_random",
    "resnet_short",
    "resnet_e2e",
    "mobilenet_random",
    "mobilenet_full_depth",
    "mobilenet_e2e",
]


KNOWN: dict[tuple[str, torch.dtype], tuple[nn.Module, Decomposition]] = {}
"""Models of earlier tests, whose graphs are read once."""


def published(name: str, z: dict[str, np.ndarray], dtype: torch.dtype) -> tuple[nn.Module, Decomposition]:
    """The model and its modules."""
    if (name, dtype) not in KNOWN:
        KNOWN[name, dtype] = read(z, dtype)
    return KNOWN[name, dtype]


def read(z: dict[str, np.ndarray], dtype: torch.dtype) -> tuple[nn.Module, Decomposition]:
    """From a file of golden data."""
    num_classes = z["full_logits"].shape[1]
    model: nn.Module
    if "conv_cfg" in z:
        hidden = z["classifier_cfg"].tolist()
        model = VGG(z["conv_cfg"].tolist(), hidden, num_classes, 3, z["input"].shape[-1])
    elif "stage_widths" in z:
        model = ResNet(z["stage_widths"].tolist(), z["blocks_per_stage"].tolist(), num_classes, 3)
    else:
        rows = z["block_cfg"].tolist()
        model = MobileNet(rows[0][0], [(outputs, stride) for _, outputs, stride in rows], num_classes, 3)
    model.load_state_dict({k.removeprefix("state/"): torch.from_numpy(v) for k, v in z.items() if k[:6] == "state/"})
    observed = watched(model.to(dtype).eval(), torch.from_numpy(z["input"]).to(dtype))
    names = taps_of(observed).names
    assert list(names) == z["relu_layer_names"].tolist()
    masks = [torch.from_numpy(z[f"masks_l{layer:02d}"]) for layer in range(len(names))]
    return observed, Decomposition(dict(zip(names, masks, strict=True)))


def target_lists(z: dict[str, np.ndarray]) -> list[tuple[str, list[int]]]:
    return [(k[-2:], z[k].tolist()) for k in sorted(z) if k.startswith("targets_")]


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_published_composition(golden, name):
    """Also where the published code falls back on a foreign neuron (MobileNet): in these files nothing of it arrives."""
    z = golden(f"compose_{name}")
    single, decomposition = published(name, z, torch.float32)
    double, _ = published(name, z, torch.float64)
    x = torch.from_numpy(z["input"])
    for case, targets in target_lists(z):
        ascending = [targets.index(c) for c in sorted(targets)]
        with torch.no_grad():
            logits = compose(single, decomposition, targets)(x)[:, ascending].numpy()
            logits64 = compose(double, decomposition, targets)(x.double())[:, ascending].numpy()
            law64 = mask(double, decomposition, targets)(x.double())[:, ascending].numpy()
        np.testing.assert_allclose(logits64, law64, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(logits64, z[f"logits64_{case}"], rtol=1e-9, atol=1e-10)
        expected = z[f"logits_{case}"]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_layers_have_the_published_sizes(golden, name):
    """Also where the published code falls back on a foreign neuron: ours keeps one in its place."""
    z = golden(f"compose_{name}")
    model, decomposition = published(name, z, torch.float32)
    full = sum(parameter.numel() for parameter in model.parameters())
    assert full == z["n_params_full"]
    for case, targets in target_lists(z):
        composed = compose(model, decomposition, targets)
        assert sum(parameter.numel() for parameter in composed.parameters()) == z[f"n_params_{case}"]
        assert measure.size(model, decomposition, targets) == z[f"n_params_{case}"] / full
        assert layer_sizes(composed, z["layer_names"].tolist()) == z[f"dims_{case}"].tolist()
        kept = plan(model, decomposition, targets).kept
        assert {k: kept[k].count(v.shape) for k, v in model.state_dict().items()} == {
            k: v.numel() for k, v in composed.state_dict().items()
        }


def layer_sizes(composed: nn.Module, names: list[str]) -> list[list[int]]:
    """(in, out) of every layer, by its weight and the groups that it is called with."""
    sizes = []
    widths = {name: len(keep) for name, keep in composed.masks.items()}
    assert widths
    for name in names:
        weight = composed.get_parameter(f"{name}.weight")
        outputs, inputs = weight.shape[:2]
        node = next(
            n for n in composed.routes["eval"].graph.nodes if n.op == "get_attr" and n.target == f"{name}.weight"
        )
        (call,) = node.users
        groups = call.args[6] if len(call.args) > 6 else 1
        sizes.append([inputs * groups, outputs])
    return sizes


@pytest.mark.parametrize("name", CASES)
def test_module_sizes_and_overlaps_are_the_published_ones(golden, name):
    z = golden(f"compose_{name}")
    model, decomposition = published(name, z, torch.float32)
    sizes = [measure.size(model, decomposition, [c]) for c in range(decomposition.num_classes)]
    np.testing.assert_allclose(sizes, z["module_size"], rtol=1e-12)
    matrix = measure.overlap_matrix(model, decomposition).numpy()
    first, second = z["overlap_pairs"].T
    np.testing.assert_allclose(matrix[first, second], z["overlap_fraction"], rtol=1e-12)
    np.testing.assert_array_equal(np.round(matrix[first, second] * z["n_params_full"]), z["overlap_count"])
    a, b = z["overlap_pairs"][0]
    assert measure.overlap(model, decomposition, int(a), int(b)) == matrix[a, b]
