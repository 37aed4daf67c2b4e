"""Firing rates: golden rates, the oracle of a plain pass, memory, and models left as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from moda.bench.memory import peak_bytes
from moda.decomposition.counting import count_firings
from moda.decomposition.rule import decompose
from moda.models.mobilenet import MobileNet
from moda.models.resnet import ResNet
from moda.models.vgg import VGG
from moda.observation.taps import observe, taps_of
from moda_kernels import FiringCounter
from tests.moda._helpers.decomposing import golden_layers


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(4 * 4 * 4, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


def small_data(samples: int = 23) -> TensorDataset:
    return TensorDataset(torch.randn(samples, 1, 4, 4), torch.arange(samples) % 3)


def golden_model(name: str, z: dict[str, np.ndarray]) -> nn.Module:
    num_classes = z["full_logits"].shape[1]
    if name == "vgg":
        model = VGG(z["conv_cfg"].tolist(), z["classifier_cfg"].tolist(), num_classes, 3, z["input"].shape[-1])
    elif name == "resnet":
        model = ResNet(z["stage_widths"].tolist(), z["blocks_per_stage"].tolist(), num_classes, 3)
    else:
        blocks = z["block_cfg"].tolist()
        model = MobileNet(blocks[0][0], [(outputs, stride) for _, outputs, stride in blocks], num_classes, 3)
    model.load_state_dict({key[6:]: torch.from_numpy(z[key]) for key in z if key.startswith("state/")})
    return model


@pytest.mark.parametrize("name", ["vgg", "resnet", "mobilenet"])
def test_published_models_give_the_published_rates_and_masks(golden, name):
    z = golden(f"compose_{name}_e2e")
    model = golden_model(name, z)
    data = TensorDataset(torch.from_numpy(z["data_x"]), torch.from_numpy(z["data_y"]))
    rates = count_firings(model, DataLoader(data, batch_size=16), z["full_logits"].shape[1], progress=False)
    decomposition = decompose(rates, threshold=float(z["tau"]))
    assert list(rates.taps) == list(decomposition.masks) == z["relu_layer_names"].tolist()
    assert rates.class_sizes.tolist() == np.bincount(z["data_y"]).tolist()
    for tap, layer in zip(rates.taps, golden_layers(z), strict=True):
        np.testing.assert_array_equal(rates.rates[tap].numpy(), z[f"rates_{layer}"])
        np.testing.assert_array_equal(decomposition.masks[tap].numpy(), z[f"masks_{layer}"])


def test_rates_are_those_of_the_activations_in_evaluation_mode():
    model, data = small_net(), small_data()
    nn.init.constant_(model[1].bias, -1.5)  # so that few positions fire
    rates = count_firings(model, DataLoader(data, batch_size=5), 3, progress=False)
    model.eval()
    with torch.no_grad():
        spatial = model[:3](data.tensors[0])
        hidden = model[3:7](spatial)
    for tap, fired in (("2", spatial.amax((2, 3)) > 0), ("6", hidden > 0)):
        expected = torch.stack([fired[data.tensors[1] == k].float().mean(0) for k in range(3)])
        torch.testing.assert_close(rates.rates[tap], expected, rtol=0, atol=1e-7)
        assert 0 < rates.rates[tap].mean() < 1
        expected_counts = torch.stack([fired[data.tensors[1] == k].sum(0) for k in range(3)])
        assert torch.equal(rates.counts[tap], expected_counts)
    assert rates.class_sizes.tolist() == [8, 8, 7]
    assert rates.num_classes == 3
    assert rates.threshold == 0


def test_counting_needs_the_memory_of_a_plain_pass():
    layers = [layer for _ in range(8) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    model, images = nn.Sequential(*layers), torch.randn(128, 8, 64, 64)
    batches = [(images, torch.arange(128) % 4)]
    with torch.no_grad():
        plain = peak_bytes(lambda: model(images), torch.device("cpu"))
    counted = peak_bytes(lambda: count_firings(model, batches, 4, progress=False), torch.device("cpu"))
    assert counted < plain + 3 * images.nbytes  # two make a group; eight of that size would be kept otherwise


@pytest.mark.parametrize("group_bytes", [1, 300, 10**9])
def test_groups_of_layers_change_no_count(monkeypatch, group_bytes):
    monkeypatch.setattr("moda.decomposition.counting.GROUP_BYTES", group_bytes)
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers).eval()
    taps = observe(model)
    batches = [(torch.randn(size, 3, 4, 4), torch.arange(size) % 3) for size in (5, 7, 2)]
    counter = FiringCounter(3)
    with torch.no_grad(), taps.recording():
        for images, labels in batches:
            model(images)
            counter.update(taps.activations(), labels)
    rates = count_firings(model, batches, 3, progress=False)
    assert all(map(torch.equal, rates.counts.values(), counter.counts))
    assert torch.equal(rates.class_sizes, counter.class_sizes)


def test_an_observed_model_is_counted_as_a_plain_one_which_stays_plain():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU()).eval()
    batches = [(torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])) for _ in range(2)]
    plain = count_firings(model, batches, 2, progress=False)
    assert taps_of(model) is None
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU]
    taps = observe(model)
    for given in (model, taps):
        observed = count_firings(given, batches, 2, progress=False)
        assert observed.taps == plain.taps
        assert all(torch.equal(observed.counts[tap], plain.counts[tap]) for tap in plain.taps)
        assert torch.equal(observed.class_sizes, torch.tensor([4, 6]))
    assert taps_of(model) is taps


def test_a_model_whose_activations_come_and_go_is_named():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.last, self.calls = nn.ReLU(), nn.ReLU(), 0

        def forward(self, x):
            self.calls += 1
            return self.last(self.relu(x)) if self.calls % 2 else self.relu(x)

    model = Skips()
    with pytest.raises(ValueError, match="model: expected the"):
        count_firings(model, [(torch.randn(2, 3), torch.tensor([0, 1]))] * 2, 2, progress=False)


def test_the_firing_threshold_is_passed_on():
    model, loader = small_net(), DataLoader(small_data(), batch_size=23)
    low, high = (count_firings(model, loader, 3, threshold=value, progress=False) for value in (0.0, 0.8))
    assert high.threshold == 0.8
    assert high.counts["6"].sum() < low.counts["6"].sum()
    assert (high.counts["2"] <= low.counts["2"]).all()


def test_counting_leaves_the_model_as_it_was():
    net = small_net().train()
    net[1].eval()  # a frozen norm in a model that is training
    model, taps = net, observe(net)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    count_firings(model, DataLoader(small_data(), batch_size=5), 3, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="no activations recorded"):
        taps.activations()


def test_a_failure_half_way_leaves_the_model_as_it_was():
    model = small_net().train()
    bad = [(torch.randn(2, 1, 4, 4), torch.tensor([0, 1])), (torch.randn(2, 1, 4, 4), torch.tensor([0, 3]))]
    with pytest.raises(ValueError, match=r"labels: expected classes in \[0, 3\), got 3"):
        count_firings(model, bad, 3, progress=False)
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "loader: expected at least one batch, got none"),
        ([torch.zeros(2, 1, 4, 4)], TypeError, r"loader: expected batches of \(inputs, labels\), got Tensor"),
        ([(torch.zeros(2, 1, 4, 4),)], TypeError, r"loader: expected batches of \(inputs, labels\), got tuple of 1"),
        ([(torch.zeros(2, 1, 4, 4), [0, 1])], TypeError, r"loader: expected batches .* got labels of type list"),
    ],
)
def test_bad_loaders_are_named(loader, error, message):
    with pytest.raises(error, match=message):
        count_firings(small_net(), loader, 3, progress=False)


def test_what_is_no_model_is_named():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        count_firings("resnet18", [], 3)


def test_progress_goes_to_a_terminal_on_standard_error_or_nowhere(capfd, monkeypatch):
    model, loader = small_net(), DataLoader(small_data(), batch_size=5)
    count_firings(model, loader, 3, progress=True)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes what it writes to for a terminal
    count_firings(model, loader, 3, progress=False)
    assert capfd.readouterr() == ("", "")
    count_firings(model, loader, 3, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Counting firings" in err
    assert "100%" in err


FORMS = {
    "several inputs": ([([torch.ones(3, 4), torch.randn(3, 4)], torch.arange(3))], None),
    "several inputs, flat": ([(torch.ones(3, 4), torch.randn(3, 4), torch.arange(3))], None),
    "dict of inputs": ([({"x": torch.ones(3, 4), "z": torch.randn(3, 4)}, torch.arange(3))], None),
    "dict with labels": ([{"x": torch.ones(3, 4), "z": torch.randn(3, 4), "labels": torch.arange(3)}], None),
    "unpack": ([(torch.arange(3), torch.randn(3, 4))], lambda batch: ((torch.ones(3, 4), batch[1]), batch[0])),
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_every_form(form):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.relu = nn.Linear(4, 5), nn.ReLU()

        def forward(self, x, z):
            return self.relu(self.a(x * z))

    loader, unpack = FORMS[form]
    rates = count_firings(Two(), loader, 3, unpack=unpack, progress=False)
    assert rates.class_sizes.tolist() == [1, 1, 1]
    assert rates.taps == ("relu",)
    assert 0 < rates.counts["relu"].sum() < 15


@pytest.mark.parametrize(
    ("batch", "unpack", "message"),
    [
        ({"x": torch.ones(2, 3)}, None, r"loader: expected .* got a dict of \['x'\]"),
        ({"x": torch.ones(2, 3), "labels": [0, 1]}, None, "loader: expected .* got labels of type list"),
        ((3, torch.arange(2)), None, "loader: expected .* got inputs of type int"),
        ((torch.ones(2, 3), torch.arange(2)), lambda batch: batch[0], "unpack: expected a function that gives"),
    ],
)
def test_batches_of_other_forms_are_named(batch, unpack, message):
    with pytest.raises(TypeError, match=message):
        count_firings(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), [batch], 3, unpack=unpack, progress=False)


def test_a_model_without_activations_is_named():
    with pytest.raises(ValueError, match="model: found no call of an activation function to tap"):
        count_firings(nn.Linear(3, 2), [(torch.ones(2, 3), torch.arange(2))], 2, progress=False)
