"""The published implementation's training, step by step: every loss before every update, and the weights at the end."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moda_kernels
from moda.observation.taps import observe

CASES = ["trajectory_cnn", "trajectory_nan_batches"]


def build(z: dict[str, np.ndarray], dtype: torch.dtype) -> nn.Module:
    """The net of the golden data, from its initial weights (float32 numbers, also for float64)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (inputs, outputs, kernel, stride, padding, pooled) in enumerate(z["conv_cfg"].tolist()):
        layers[f"conv{index}"] = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        layers[f"bn{index}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{index}"] = nn.ReLU()
        if pooled:
            layers[f"pool{index}"] = nn.MaxPool2d(2)
    flat, hidden, classes = z["fc_cfg"].tolist()
    layers |= {"flatten": nn.Flatten(), "fc0": nn.Linear(flat, hidden), "relu3": nn.ReLU()}
    layers |= {"fc1": nn.Linear(hidden, classes)}
    net = nn.Sequential(layers)
    net.load_state_dict({key[5:]: torch.from_numpy(z[key]) for key in z if key.startswith("init/")})
    return net.to(dtype)


def batches(z: dict[str, np.ndarray], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    images = torch.from_numpy(z["images_u8"])[:, None].to(dtype) / 16
    labels = torch.from_numpy(z["labels_all"])
    return [(images[index], labels[index]) for index in torch.from_numpy(z["batch_idx"])]


def train(net: nn.Module, z: dict[str, np.ndarray], dtype: torch.dtype, backend: str) -> np.ndarray:
    """(steps, 5) cross-entropy, affinity, dispersion, compactness and total before each update."""
    lr, momentum, nesterov, *weights = z["hyper"].tolist()
    model = net.train()
    taps = observe(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, nesterov=bool(nesterov))
    rows = []
    for images, labels in batches(z, dtype):
        cross_entropy = F.cross_entropy(model(images), labels)
        terms = moda_kernels.modular_losses(taps.activations(), labels, backend=backend)
        total = cross_entropy + sum(weight * term for weight, term in zip(weights, terms, strict=True))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        rows.append([value.item() for value in (cross_entropy, *terms, total)])
    return np.array(rows)


def expected_losses(z: dict[str, np.ndarray], key: str) -> np.ndarray:
    """The published losses with the NaN of a term without pairs replaced by our 0, in the total too."""
    losses = z[key].astype(np.float64)
    for column, pairs in ((1, "n_same_pairs"), (2, "n_diff_pairs")):
        assert (np.isnan(losses[:, column]) == (z[pairs] == 0)).all()
    terms = np.nan_to_num(losses[:, :4])
    return np.column_stack([terms, terms @ np.array([1, *z["hyper"][3:]])])


@pytest.mark.parametrize("name", CASES)
def test_float64_training_is_the_published_one(golden, name):
    z = golden(name)
    net = build(z, torch.float64)
    losses = train(net, z, torch.float64, backend="auto")
    np.testing.assert_allclose(losses, expected_losses(z, "loss_f64"), rtol=1e-7, atol=1e-8)
    state = net.state_dict()
    final = {key[8:]: z[key] for key in z if key.startswith("final64/")}
    assert set(state) == set(final)
    for key, value in final.items():
        np.testing.assert_allclose(state[key].numpy(), value, rtol=1e-6, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_float32_training_stays_beside_it(golden, name, backend):
    z = golden(name)
    losses = train(build(z, torch.float32), z, torch.float32, backend=backend)
    np.testing.assert_allclose(losses, expected_losses(z, "loss_f64"), rtol=0, atol=2e-4)


def test_the_cases_hold_what_they_are_for(golden):
    """Batches without a same-class pair are in the one case, none in the other."""
    assert (golden("trajectory_nan_batches")["n_same_pairs"] == 0).sum() == 18
    assert (golden("trajectory_cnn")["n_same_pairs"] > 0).all()
    assert golden("trajectory_cnn")["batch_idx"].shape == (60, 64)
