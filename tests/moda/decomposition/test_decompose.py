"""Firing rates and decompositions: golden rates and masks, the published rule, files that refuse what is malformed."""

from __future__ import annotations

import importlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from moda.bench.memory import peak_bytes
from moda.decomposition.container import (
    Decomposition,
    FiringRates,
    check_classes,
    count_firings,
    decompose,
    masks_from_rates,
)
from moda.files import FormatError
from moda.models.mobilenet import MobileNet
from moda.models.resnet import ResNet
from moda.models.vgg import VGG
from moda.observation.taps import instrument
from moda_kernels import FiringCounter

# ---- rates -> masks --------------------------------------------------------------------------------------------


def golden_layers(z: dict[str, np.ndarray]) -> list[str]:
    return sorted(key.removeprefix("rates_") for key in z if key.startswith("rates_l"))


@pytest.mark.parametrize("name", ["masks_k4", "masks_k10", "masks_below_min"])
@pytest.mark.parametrize("t", range(5))
def test_masks_are_the_published_ones(golden, name, t):
    z = golden(name)
    for layer in golden_layers(z):
        rates = z[f"rates_{layer}"]
        masks = masks_from_rates(torch.from_numpy(rates), float(z["tau"][t])).numpy()
        published, tied = z[f"mask_t{t}_{layer}"], z[f"ambiguous_t{t}_{layer}"]
        np.testing.assert_array_equal(masks[~tied], published[~tied])
        np.testing.assert_array_equal(masks.sum(1), z[f"k_t{t}_{layer}"])
        for k in np.flatnonzero(tied):
            np.testing.assert_array_equal(np.sort(rates[k][masks[k]]), np.sort(rates[k][published[k]]))


def test_a_class_below_the_floor_is_lifted_to_the_largest_class():
    rates = torch.tensor([[0.95, 0.92, 0.1, 0.0], [0.5, 0.2, 0.7, 0.1], [0.0, 0.91, 0.0, 0.3]])
    expected = [[True, True, False, False], [True, False, True, False], [False, True, False, False]]
    assert masks_from_rates(rates, 0.9).tolist() == expected


def test_the_threshold_is_compared_in_float32():
    nine_tenths = torch.tensor([[9 / 10, 0.95, np.nextafter(np.float32(0.9), np.float32(0))]], dtype=torch.float32)
    assert masks_from_rates(nine_tenths, 0.9).tolist() == [[True, True, False]]
    assert masks_from_rates(nine_tenths.double(), 0.9).tolist() == [[True, True, False]]


def test_ties_at_the_border_go_to_the_lower_index():
    rates = torch.tensor([[0.3, 0.5, 0.3, 0.5, 0.3, 0.3], [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    assert masks_from_rates(rates, 0.9)[0].tolist() == [True, True, False, True, False, False]
    assert masks_from_rates(torch.zeros(1, 800), 0.9).nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]


@pytest.mark.parametrize(
    ("neurons", "min_fraction", "kept"),
    [(399, 0.005, 1), (400, 0.005, 2), (512, 0.005, 2), (1024, 0.005, 5), (4096, 0.005, 20), (10, 0.25, 2), (8, 0, 1)],
)
def test_the_floor_is_a_share_of_the_neurons_and_at_least_one(neurons, min_fraction, kept):
    rates = torch.linspace(0, 0.5, neurons)[None]
    mask = masks_from_rates(rates, 0.9, min_fraction)
    assert mask[0].nonzero().flatten().tolist() == list(range(neurons - kept, neurons))


def published_rule(rates: np.ndarray, threshold: float, min_fraction: float) -> np.ndarray:
    """The rule as published: class by class, each seeing the masks repaired before it. Ties: lower index."""
    masks = rates >= np.float32(threshold)
    floor = max(1, int(min_fraction * rates.shape[1]))
    for k, mask in enumerate(masks):
        if mask.sum() < floor:
            size = max(floor, masks.sum(1).max())
            best = sorted(range(rates.shape[1]), key=lambda neuron: (-rates[k, neuron], neuron))[:size]
            masks[k] = np.isin(np.arange(rates.shape[1]), best)
    return masks


@settings(deadline=None, max_examples=60)
@given(
    classes=st.integers(1, 6),
    neurons=st.integers(1, 40),
    threshold=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    min_fraction=st.sampled_from([0.0, 0.005, 0.2, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_all_classes_at_once_is_the_rule_class_by_class(classes, neurons, threshold, min_fraction, seed):
    samples = np.random.default_rng(seed)
    rates = (samples.integers(0, 11, (classes, neurons)) / 10 * samples.choice([0, 0.5, 1], (classes, 1))).astype("f4")
    masks = masks_from_rates(torch.from_numpy(rates), threshold, min_fraction).numpy()
    np.testing.assert_array_equal(masks, published_rule(rates, threshold, min_fraction))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.zeros(2, 3, dtype=torch.int64),),
            TypeError,
            "rates: expected a floating-point tensor, got torch.int64",
        ),
        (([[0.5]],), TypeError, "rates: expected a floating-point tensor, got list"),
        ((torch.zeros(3),), ValueError, r"rates: expected shape \(classes, neurons\), got \(3,\)"),
        ((torch.zeros(0, 3),), ValueError, r"rates: expected shape \(classes, neurons\), got \(0, 3\)"),
        ((torch.full((2, 3), 1.5),), ValueError, r"rates: expected values in \[0, 1\]"),
        ((torch.full((2, 3), float("nan")),), ValueError, r"rates: expected values in \[0, 1\].* NaN"),
        ((torch.zeros(2, 3), 1.1), ValueError, r"threshold: expected a number in \[0, 1\], got 1.1"),
        ((torch.zeros(2, 3), float("nan")), ValueError, r"threshold: expected a number in \[0, 1\], got nan"),
        ((torch.zeros(2, 3), "0.9"), TypeError, r"threshold: expected a number in \[0, 1\], got str"),
        ((torch.zeros(2, 3), 0.9, -0.1), ValueError, r"min_fraction: expected a number in \[0, 1\], got -0.1"),
    ],
)
def test_bad_rates_and_numbers_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        masks_from_rates(*arguments)


# ---- counting --------------------------------------------------------------------------------------------------


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
    model = instrument(golden_model(name, z))
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
    rates = count_firings(instrument(model), DataLoader(data, batch_size=5), 3, progress=False)
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
    model, images = instrument(nn.Sequential(*layers)), torch.randn(128, 8, 64, 64)
    batches = [(images, torch.arange(128) % 4)]
    with torch.no_grad():
        plain = peak_bytes(lambda: model(images), torch.device("cpu"))
    counted = peak_bytes(lambda: count_firings(model, batches, 4, progress=False), torch.device("cpu"))
    assert counted < plain + 3 * images.nbytes  # two make a group; eight of that size would be kept otherwise


@pytest.mark.parametrize("group_bytes", [1, 300, 10**9])
def test_groups_of_layers_change_no_count(monkeypatch, group_bytes):
    monkeypatch.setattr(importlib.import_module("moda.decomposition.container"), "GROUP_BYTES", group_bytes)
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())]
    model = instrument(nn.Sequential(*layers).eval())
    batches = [(torch.randn(size, 3, 4, 4), torch.arange(size) % 3) for size in (5, 7, 2)]
    counter = FiringCounter(3)
    with torch.no_grad(), model.recording():
        for images, labels in batches:
            model(images)
            counter.update(model.activations(), labels)
    rates = count_firings(model, batches, 3, progress=False)
    assert all(map(torch.equal, rates.counts.values(), counter.counts))
    assert torch.equal(rates.class_sizes, counter.class_sizes)


def test_a_hooked_model_is_counted_as_a_traced_one():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU()).eval()
    batches = [(torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])) for _ in range(2)]
    traced = count_firings(instrument(model), batches, 2, progress=False)
    hooked = count_firings(instrument(model, method="hooks"), batches, 2, progress=False)
    assert hooked.taps == traced.taps
    assert all(torch.equal(hooked.counts[tap], traced.counts[tap]) for tap in traced.taps)
    assert torch.equal(hooked.class_sizes, torch.tensor([4, 6]))


def test_a_model_whose_activations_come_and_go_is_named():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.last, self.calls = nn.ReLU(), nn.ReLU(), 0

        def forward(self, x):
            self.calls += 1
            return self.last(self.relu(x)) if self.calls % 2 else self.relu(x)

    model = instrument(Skips(), method="hooks")
    with pytest.raises(ValueError, match="model: expected the same activations in every forward pass"):
        count_firings(model, [(torch.randn(2, 3), torch.tensor([0, 1]))] * 2, 2, progress=False)


def test_the_firing_threshold_is_passed_on():
    model, loader = instrument(small_net()), DataLoader(small_data(), batch_size=23)
    low, high = (count_firings(model, loader, 3, threshold=value, progress=False) for value in (0.0, 0.8))
    assert high.threshold == 0.8
    assert high.counts["6"].sum() < low.counts["6"].sum()
    assert (high.counts["2"] <= low.counts["2"]).all()


def test_counting_leaves_the_model_as_it_was():
    net = small_net().train()
    net[1].eval()  # a frozen norm in a model that is training
    model = instrument(net)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    count_firings(model, DataLoader(small_data(), batch_size=5), 3, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError):
        model.activations()


def test_a_failure_half_way_leaves_the_model_as_it_was():
    model = instrument(small_net()).train()
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
        ([(torch.zeros(2, 1, 4, 4), [0, 1])], TypeError, r"loader: expected tensors .* got labels of type list"),
    ],
)
def test_bad_loaders_are_named(loader, error, message):
    with pytest.raises(error, match=message):
        count_firings(instrument(small_net()), loader, 3, progress=False)


def test_a_plain_model_is_named():
    with pytest.raises(TypeError, match=r"model: expected an instrumented model, moda.instrument\(model\), got Seq"):
        count_firings(small_net(), [], 3)


def test_progress_goes_to_a_terminal_on_standard_error_or_nowhere(capfd, monkeypatch):
    model, loader = instrument(small_net()), DataLoader(small_data(), batch_size=5)
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


# ---- decompositions --------------------------------------------------------------------------------------------


def rates_of(layers: dict[str, torch.Tensor], sizes: list[int]) -> FiringRates:
    class_sizes = torch.tensor(sizes)
    counts = {tap: (rate * class_sizes[:, None]).round().long() for tap, rate in layers.items()}
    return FiringRates(tuple(layers), layers, counts, class_sizes, 0.0)


def test_decompose_applies_the_rule_at_every_tap_and_says_what_it_used():
    layers = {"b": torch.tensor([[1.0, 0.5], [0.0, 0.8]]), "a": torch.tensor([[0.6, 0.8, 0.1], [0.1, 0.1, 0.7]])}
    decomposition = decompose(rates_of(layers, [10, 10]), threshold=0.75, min_fraction=0.01)
    assert list(decomposition.masks) == ["b", "a"]
    assert decomposition.taps == ("b", "a")
    assert decomposition.masks["b"].tolist() == [[True, False], [False, True]]
    assert decomposition.masks["a"].tolist() == [[False, True, False], [False, False, True]]
    assert (decomposition.threshold, decomposition.min_fraction, decomposition.num_classes) == (0.75, 0.01, 2)
    assert decomposition.metadata == {"class_sizes": [10, 10], "empty_classes": [], "firing_threshold": 0.0}


def test_a_class_without_samples_is_an_error_unless_allowed():
    rates = rates_of({"a": torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])}, [4, 0, 0])
    assert rates.empty_classes == [1, 2]
    with pytest.raises(ValueError, match=r"rates: expected samples of every class, got none of classes \[1, 2\]"):
        decompose(rates)
    allowed = decompose(rates, allow_empty_classes=True)
    assert allowed.masks["a"].tolist() == [[True, True, False]] * 3
    assert allowed.metadata["empty_classes"] == [1, 2]


def test_decompose_names_what_it_cannot_take():
    with pytest.raises(TypeError, match="rates: expected FiringRates from count_firings, got dict"):
        decompose({"a": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"rates: expected the taps \['a'\] in this order, got \['b'\]"):
        FiringRates(("a",), {"b": torch.zeros(1, 1)}, {"a": torch.zeros(1, 1)}, torch.ones(1))


def example() -> Decomposition:
    masks = {
        "relu2": torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 0]], dtype=torch.bool),
        "relu1": torch.tensor([[1, 0], [0, 1], [0, 1]], dtype=torch.bool),
    }
    return Decomposition(masks, threshold=0.8, min_fraction=0.01, metadata={"class_sizes": [3, 4, 5]})


def test_select_is_the_union_of_the_modules():
    selected = example().select([2, 0])
    assert list(selected) == ["relu2", "relu1"]
    assert selected["relu2"].tolist() == [True, True, False, True]
    assert selected["relu1"].tolist() == [True, True]
    assert example().select([1])["relu2"].tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ([], ValueError, "classes: expected at least one class, got none"),
        ([0, 3], ValueError, r"classes: expected classes in \[0, 3\), got \[3\]"),
        ([-1], ValueError, r"classes: expected classes in \[0, 3\), got \[-1\]"),
        ([1, 0, 1], ValueError, r"classes: expected every class once, got \[1\] more than once"),
        ([0.5], TypeError, r"classes: expected a sequence of class indices, got \[0.5\]"),
        (2, TypeError, "classes: expected a sequence of class indices, got 2"),
        ("12", TypeError, "classes: expected a sequence of class indices, got '12'"),
        (None, TypeError, "classes: expected a sequence of class indices, got None"),
    ],
)
def test_bad_classes_are_named(classes, error, message):
    with pytest.raises(error, match=message):
        example().select(classes)


@pytest.mark.parametrize("classes", [(2, 0), np.array([2, 0]), torch.tensor([2, 0]), iter([2, 0])])
def test_classes_keep_their_order_in_any_kind_of_sequence(classes):
    assert check_classes(classes, 3) == [2, 0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"masks": [torch.ones(2, 2, dtype=torch.bool)]}, TypeError, "masks: expected a mapping .* got list"),
        ({"masks": {}}, ValueError, "masks: expected at least one tap, got none"),
        ({"masks": {"a": torch.ones(2, 2)}}, TypeError, r"masks\['a'\]: expected a bool tensor, got torch.float32"),
        (
            {"masks": {"a": torch.ones(2, dtype=torch.bool)}},
            ValueError,
            r"masks\['a'\]: expected shape \(classes, neurons\), got \(2,\)",
        ),
        (
            {"masks": {"a": torch.ones(2, 2, dtype=torch.bool), "b": torch.ones(3, 2, dtype=torch.bool)}},
            ValueError,
            r"masks\['b'\]: expected 2 classes as in the first tap, got 3",
        ),
        (
            {"masks": {"a": torch.ones(2, 2, dtype=torch.bool)}, "threshold": 2},
            ValueError,
            r"threshold: expected a number in \[0, 1\], got 2",
        ),
    ],
)
def test_bad_masks_are_named(options, error, message):
    with pytest.raises(error, match=message):
        Decomposition(**options)


# ---- files -----------------------------------------------------------------------------------------------------


def test_a_saved_decomposition_comes_back_whole(tmp_path):
    example().save(tmp_path / "deep" / "down")
    loaded = Decomposition.load(tmp_path / "deep" / "down")
    assert list(loaded.masks) == ["relu2", "relu1"]
    for tap, mask in example().masks.items():
        assert torch.equal(loaded.masks[tap], mask)
    assert (loaded.threshold, loaded.min_fraction) == (0.8, 0.01)
    assert loaded.metadata == {"class_sizes": [3, 4, 5]}
    assert repr(loaded) == "Decomposition(num_classes=3, taps=2, neurons=6, threshold=0.8, min_fraction=0.01)"


def test_the_folder_holds_two_readable_files(tmp_path):
    example().save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decomposition.json", "masks.safetensors"]
    description = json.loads((tmp_path / "decomposition.json").read_text())
    assert description["format"] == "moda-decomposition"
    assert description["format_version"] == 1
    assert description["taps"] == [{"name": "relu2", "neurons": 4}, {"name": "relu1", "neurons": 2}]
    masks = safetensors.torch.load_file(tmp_path / "masks.safetensors")
    assert torch.equal(masks["relu1"], example().masks["relu1"])


def test_saving_again_replaces_both_files(tmp_path):
    example().save(tmp_path)
    other = Decomposition({"x": torch.tensor([[True, False]])}, threshold=0.5)
    other.save(tmp_path)
    loaded = Decomposition.load(tmp_path)
    assert list(loaded.masks) == ["x"]
    assert loaded.threshold == 0.5


def change(folder: Path, **entries: object) -> None:
    """Set entries of the description; a value of `...` removes the entry."""
    path = folder / "decomposition.json"
    description = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({key: value for key, value in description.items() if value is not ...}))


def replace_masks(folder: Path, data: bytes) -> None:
    """Another masks file, with the description made to vouch for it."""
    import hashlib

    (folder / "masks.safetensors").write_bytes(data)
    change(folder, masks_sha256=hashlib.sha256(data).hexdigest())


def masks_with(**tensors: torch.Tensor) -> bytes:
    return safetensors.torch.save({**example().masks, **tensors})


def invalid_bool() -> bytes:
    data = bytearray(safetensors.torch.save(example().masks))
    data[-1] = 7
    return bytes(data)


SPOILED = {
    "no description": (lambda f: (f / "decomposition.json").unlink(), r"decomposition\.json: no such file"),
    "no masks": (lambda f: (f / "masks.safetensors").unlink(), r"masks\.safetensors: no such file"),
    "no folder": (lambda f: [path.unlink() for path in f.iterdir()] + [f.rmdir()], "no such file"),
    "no JSON": (lambda f: (f / "decomposition.json").write_text("{"), r"decomposition\.json: not JSON"),
    "no text": (lambda f: (f / "decomposition.json").write_bytes(b"\xff\xfe"), r"decomposition\.json: not JSON"),
    "a list": (lambda f: (f / "decomposition.json").write_text("[]"), "expected a JSON object, got list"),
    "another format": (lambda f: change(f, format="zip"), 'expected "format": "moda-decomposition", got \'zip\''),
    "a later version": (lambda f: change(f, format_version=2), "expected format_version 1, got 2; .*wrote it"),
    "no version": (lambda f: change(f, format_version=...), "expected format_version 1, got None"),
    "no threshold": (lambda f: change(f, threshold=...), r"decomposition\.json: entry 'threshold' is missing"),
    "no digest": (lambda f: change(f, masks_sha256=...), r"decomposition\.json: entry 'masks_sha256' is missing"),
    "threshold a word": (lambda f: change(f, threshold="high"), r"decomposition\.json: threshold: .* got str"),
    "min_fraction too big": (lambda f: change(f, min_fraction=7), r"decomposition\.json: min_fraction: .* got 7"),
    "metadata a list": (lambda f: change(f, metadata=[1]), r"decomposition\.json: metadata: expected an object, got l"),
    "taps a number": (lambda f: change(f, taps=3), r"decomposition\.json: taps: expected a list"),
    "a tap a word": (lambda f: change(f, taps=["relu1"]), r"decomposition\.json: taps: expected a list"),
    "no taps": (lambda f: change(f, taps=[]), "taps differ from decomposition.json"),
    "a tap twice": (
        lambda f: change(f, taps=[{"name": "relu1", "neurons": 2}] * 2),
        r"decomposition\.json: taps: a name occurs twice",
    ),
    "a tap too few": (
        lambda f: change(f, taps=[{"name": "relu1", "neurons": 2}]),
        r"masks\.safetensors: taps differ from decomposition\.json: missing \[\], not described \['relu2'\]",
    ),
    "a tap too many": (
        lambda f: change(f, taps=[{"name": n, "neurons": 2} for n in ("relu1", "relu2", "relu3")]),
        r"masks\.safetensors: taps differ from decomposition\.json: missing \['relu3'\]",
    ),
    "other neurons": (
        lambda f: change(f, taps=[{"name": "relu2", "neurons": 5}, {"name": "relu1", "neurons": 2}]),
        r"masks\.safetensors: relu2: expected bool \(3, 5\), got torch\.bool \(3, 4\)",
    ),
    "other classes": (lambda f: change(f, num_classes=4), r"relu2: expected bool \(4, 4\), got torch\.bool \(3, 4\)"),
    "other masks": (
        lambda f: (f / "masks.safetensors").write_bytes(masks_with(relu1=torch.ones(3, 2, dtype=torch.bool))),
        r"masks\.safetensors: its SHA-256 is .* damaged, or from another save",
    ),
    "no safetensors": (lambda f: replace_masks(f, b"PK" * 40), r"masks\.safetensors: not a safetensors file"),
    "empty masks": (lambda f: replace_masks(f, b""), r"masks\.safetensors: not a safetensors file"),
    "cut masks": (lambda f: replace_masks(f, masks_with()[:-3]), r"masks\.safetensors: not a safetensors file"),
    "float masks": (
        lambda f: replace_masks(f, masks_with(relu1=torch.ones(3, 2))),
        r"masks\.safetensors: relu1: expected bool \(3, 2\), got torch\.float32 \(3, 2\)",
    ),
    "no booleans": (lambda f: replace_masks(f, invalid_bool()), "expected bytes 0 and 1 in a bool tensor, got others"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_folder_is_refused_with_the_reason(tmp_path, what):
    folder = tmp_path / "decomposition"
    example().save(folder)
    spoil, message = SPOILED[what]
    spoil(folder)
    with pytest.raises(FormatError, match=message) as caught:
        Decomposition.load(folder)
    assert str(folder) in str(caught.value)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_opened(tmp_path):
    example().save(tmp_path)
    replace_masks(tmp_path, pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(FormatError, match="not a safetensors file"):
        Decomposition.load(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("file", ["masks.safetensors", "decomposition.json"])
def test_a_crash_while_saving_leaves_old_files_and_no_litter(tmp_path, monkeypatch, file):
    example().save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    rename = Path.replace

    def crash(self: Path, target: Path) -> Path:
        if Path(target).name == file:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        Decomposition({"x": torch.tensor([[True, False]])}).save(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / file).read_bytes() == before[file]
    assert {path.name for path in tmp_path.iterdir()} == set(before)
    if file == "masks.safetensors":
        assert list(Decomposition.load(tmp_path).masks) == ["relu2", "relu1"]
    else:  # the new masks are there, the old description is not theirs, and load sees it
        with pytest.raises(FormatError, match="from another save"):
            Decomposition.load(tmp_path)


@pytest.mark.parametrize("value", [torch.zeros(2), float("nan"), {1, 2}])
def test_metadata_that_json_cannot_hold_is_named(value):
    with pytest.raises(TypeError, match="metadata: expected only what JSON can hold: "):
        Decomposition(example().masks, metadata={"note": value})
