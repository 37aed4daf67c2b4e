"""CNNSplitter: importance, sensitivity, modules and the search, against the published code and by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moda.methods.base import Method
from moda.methods.cnnsplitter import CNNSplitter, Search
from moda.methods.genetic import Slot, decode
from moda.methods.importance import (
    DECIDING,
    RATIOS,
    PreparedSearch,
    importances,
    module_outputs,
    most_important,
    sensitive_slots,
    sensitivities,
)
from moda.methods.search_file import SEARCH
from moda.models.rescnn import ResCNN
from moda.models.simcnn import SimCNN

Golden = Callable[[str], dict[str, np.ndarray]]


class Case:
    """A trained network of the golden data, in float64."""

    def __init__(self, golden: Golden, name: str) -> None:
        self.arrays = arrays = golden(f"peers/cs_model_{name}")
        widths = arrays["conv_cfg"][:, 1].tolist()
        shared = {}
        if name == "simcnn":
            model: nn.Module = SimCNN(widths, (16, 16), 5, 3, 32)
        else:
            model = ResCNN(widths, 5, 3, 32)
            shared = {"relu_1": "relu_3", "relu_5": "relu_7", "relu_9": "relu_11"}
        model.load_state_dict({k[6:]: torch.tensor(v) for k, v in arrays.items() if k.startswith("state/")})
        self.images = (torch.tensor(arrays["x_u8"]).double() - 128) / 64
        self.labels = torch.tensor(arrays["labels"])
        self.loader = [(self.images[i : i + 10], self.labels[i : i + 10]) for i in range(0, len(self.labels), 10)]
        self.taps = tuple(f"relu_{index}" for index in range(len(widths)))
        self.prepared = CNNSplitter(sites=self.taps, shared=shared).prepare(model.double(), 5, self.images[:2])

    def masks_of(self, kernels: np.ndarray) -> dict[str, np.ndarray]:
        """Per tap (M, C), from (M, total) kernels."""
        widths = self.arrays["conv_cfg"][:, 1]
        return dict(zip(self.taps, np.split(kernels, np.cumsum(widths)[:-1], axis=1), strict=True))


NAMES = ("simcnn", "rescnn")


def test_importance_is_the_published_one(golden: Golden):
    """Of SimCNN; in ResCNN the published code reads maps behind pooling and addition, which are no taps."""
    case = Case(golden, "simcnn")
    found = importances(case.prepared, case.loader)
    for index, tap in enumerate(case.taps):
        expected = case.arrays[f"importance_{index:02}"]
        np.testing.assert_allclose(found[tap], expected, rtol=1e-4, atol=1e-4)
        order = (-found[tap]).argsort(dim=1, stable=True)
        ties = np.abs(np.diff(np.sort(expected, 1), axis=1)).min(1) < 1e-4
        np.testing.assert_array_equal(order[~ties], case.arrays[f"order_{index:02}"][~ties])


@pytest.mark.parametrize("name", NAMES)
def test_sensitivity_is_the_published_one(golden: Golden, name: str):
    case = Case(golden, name)
    orders = {tap: case.arrays[f"order_{index:02}"] for index, tap in enumerate(case.taps)}
    places = slice(None, None, 3)  # of the ratios: all take long
    ratios = case.arrays["sens_ratio"][places].tolist()
    found = sensitivities(case.prepared, case.loader, orders, ratios)
    for slot, curve in found.items():
        index = case.taps.index(slot)
        np.testing.assert_allclose(curve, case.arrays["sens_acc"][index][places], atol=1e-6)
        kept = [most_important(orders[slot], ratio).shape[1] for ratio in ratios]
        assert kept == case.arrays["sens_kept"][index][places].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_modules_answer_as_the_published_ones(golden: Golden, name: str):
    case = Case(golden, name)
    for number in range(5):
        outputs = module_outputs(case.prepared, case.masks_of(_filled(case, number)), [number] * 3, case.loader)
        np.testing.assert_allclose(outputs, case.arrays["outputs64"][number], rtol=1e-9, atol=1e-9)


def _filled(case: Case, number: int) -> np.ndarray:
    """The kernels of a class's chromosomes; a layer without any keeps kernel 0."""
    kernels = case.arrays["kernels"][number].copy()
    start = 0
    for width in case.arrays["conv_cfg"][:, 1]:
        empty = ~kernels[:, start : start + width].any(1)
        kernels[empty, start] = True
        start += width
    return kernels


@pytest.mark.parametrize("name", NAMES)
def test_chromosomes_mean_the_published_kernels(golden: Golden, name: str):
    case = Case(golden, name)
    arrays = case.arrays
    widths = arrays["conv_cfg"][:, 1]
    slots = [
        Slot(int(widths[conv]), int(groups)) for conv, groups in zip(arrays["slot_conv"], arrays["groups"], strict=True)
    ]
    assert [f"relu_{conv}" for conv in arrays["slot_conv"]] == case.prepared.slots
    for number in range(5):
        orders = [arrays[f"order_{conv:02}"][number] for conv in arrays["slot_conv"]]
        kept = dict(zip(case.prepared.slots, decode(arrays["genes"][number], slots, orders), strict=True))
        for mask in kept.values():
            mask[~mask.any(1), 0] = True
        joined = np.concatenate([kept[owner] for owner in case.prepared.owners.values()], 1)
        np.testing.assert_array_equal(joined, _filled(case, number))


def test_many_modules_at_once_answer_as_each_alone(golden: Golden):
    case = Case(golden, "simcnn")
    masks = case.masks_of(_filled(case, 2))
    together = module_outputs(case.prepared, masks, [2, 2, 2], case.loader)
    for row in range(3):
        single = {tap: mask[row : row + 1] for tap, mask in masks.items()}
        np.testing.assert_allclose(
            module_outputs(case.prepared, single, [2], case.loader)[0], together[row], rtol=1e-12
        )


# ---- the search ---------------------------------------------------------------------------------------------------


def toy() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Three blobs, and a network that tells them apart with more neurons than it needs."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[3.0, 0.0], [-2.0, 2.0], [-2.0, -2.0]])
    labels = torch.arange(3).repeat(40)
    inputs = centres[labels] + 0.5 * torch.randn(120, 2, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model, [(inputs[i : i + 50], labels[i : i + 50]) for i in range(0, 120, 50)]


SETTINGS = CNNSplitter(
    generations=6, population=12, parents=6, elites=3, mutation_percent=10, progress=False, patience=None
)


@pytest.fixture(scope="module")
def found() -> tuple[PreparedSearch, list[tuple[Tensor, Tensor]]]:
    model, loader = toy()
    return SETTINGS.prepare(model, 3, loader[0][0]), loader


def test_a_search_finds_smaller_modules_that_answer_right(found):
    prepared, loader = found
    modules = SETTINGS.extract(prepared, loader)
    labels = torch.cat([labels for _, labels in loader]).numpy()
    masks = {tap: mask.numpy() for tap, mask in modules.masks.items()}
    outputs = module_outputs(prepared, masks, range(3), loader)
    assert (outputs.argmax(0) == labels).mean() > 0.95
    assert all(mask.any(1).all() for mask in masks.values())
    assert np.concatenate(list(masks.values()), 1).mean() < 0.85
    assert modules.method == "cnnsplitter"
    assert modules.settings["population"] == 12


def test_the_best_ensemble_never_gets_worse(found):
    prepared, loader = found
    search = SETTINGS.search(prepared, loader)
    scores = [search.best_score]
    while not search.finished:
        search.breed()
        scores.append(search.best_score)
    assert scores == sorted(scores)
    assert search.generation == 6


def test_a_search_that_was_stopped_goes_on_as_it_would_have(found):
    prepared, loader = found
    whole = SETTINGS.search(prepared, loader)
    for _ in range(2):
        whole.breed()
    state = whole.state_dict()
    resumed = SETTINGS.search(prepared, loader)
    resumed.load_state_dict(state)
    for _ in range(3):
        whole.breed()
        resumed.breed()
    np.testing.assert_array_equal(whole.populations, resumed.populations)
    np.testing.assert_array_equal(whole.joint.fitness, resumed.joint.fitness)
    assert whole.best_score == resumed.best_score


def stopped(settings: CNNSplitter, prepared: PreparedSearch, loader: object, generations: int) -> None:
    """Run a search that is stopped when it breeds once more than so many times."""
    breed = Search.breed

    def once_more(search: Search) -> None:
        if search.generation == generations:
            raise KeyboardInterrupt
        breed(search)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Search, "breed", once_more)
        with pytest.raises(KeyboardInterrupt):
            settings.extract(prepared, loader)


@pytest.mark.parametrize("generations", [1, 3, 5])
def test_a_search_that_is_kept_in_a_file_goes_on_as_it_would_have(found, tmp_path: Path, generations: int):
    prepared, loader = found
    wanted = SETTINGS.extract(prepared, loader)
    kept = replace(SETTINGS, state_file=tmp_path / "search.json")
    stopped(kept, prepared, loader, generations)
    assert SEARCH.read(tmp_path / "search.json")["generation"] == generations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moda.methods.cnnsplitter.sensitivities", lambda *_: pytest.fail("it begins anew"))
        made = kept.extract(prepared, loader)
    assert made.metadata == wanted.metadata
    assert made.settings == wanted.settings
    assert all(torch.equal(made.masks[tap], wanted.masks[tap]) for tap in wanted.masks)
    again = kept.extract(prepared, loader)  # at the end of a search nothing is left to do
    assert again.metadata == wanted.metadata


def test_a_search_that_is_kept_is_of_these_settings_network_and_data(found, tmp_path: Path):
    prepared, loader = found
    kept = replace(SETTINGS, state_file=tmp_path / "search.json", generations=2)
    kept.extract(prepared, loader)
    assert replace(kept, generations=3).extract(prepared, loader).metadata["generation"] == 3
    with pytest.raises(ValueError, match=r"is of a search with alpha=0.9, this one has 0.5; go on with the settings"):
        replace(kept, alpha=0.5).extract(prepared, loader)
    with pytest.raises(ValueError, match="is of a search of another network, or on other data; begin anew"):
        kept.extract(prepared, [(inputs.flip(1), labels) for inputs, labels in loader])


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("populations", "zz", "populations: expected hexadecimal digits"),
        ("best", "00", "best: expected .* bits, got 8"),
        ("fitness", [[0.0]], "fitness: expected 3 lists of 12 numbers"),
        ("sensitive", ["9"], "sensitive: expected taps that decide"),
        ("draws", [1, 2], "draws: expected"),
        ("generation", -1, "generation: expected"),
    ],
)
def test_a_damaged_search_is_named(found, tmp_path: Path, entry: str, value: object, message: str):
    prepared, loader = found
    path = tmp_path / "search.json"
    kept = replace(SETTINGS, state_file=path, generations=1)
    kept.extract(prepared, loader)
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    with pytest.raises(ValueError, match=message):
        kept.extract(prepared, loader)


def test_the_same_seed_gives_the_same_modules(found):
    prepared, loader = found
    first, second = (SETTINGS.extract(prepared, loader) for _ in range(2))
    other = replace(SETTINGS, seed=7).extract(prepared, loader)
    assert all(torch.equal(first.masks[tap], second.masks[tap]) for tap in first.masks)
    assert any(not torch.equal(first.masks[tap], other.masks[tap]) for tap in first.masks)


def test_a_search_ends_early_without_progress(found):
    prepared, loader = found
    search = replace(SETTINGS, generations=100, patience=0).search(prepared, loader)
    assert search.finished


def test_a_class_that_the_network_never_is_sure_of_is_judged_by_all_its_samples(found):
    prepared, loader = found
    all_of_them = importances(prepared, loader, 0.0)
    never_sure = importances(prepared, loader, 1.1)
    for tap, values in all_of_them.items():
        torch.testing.assert_close(values, never_sure[tap])


def test_layers_are_sensitive_when_half_of_them_does_not_suffice():
    flat, steep = [0.9] * 10, [0.2] * 5 + [0.9] * 5
    assert sensitive_slots({"a": flat, "b": steep}) == ["b"]
    assert RATIOS[RATIOS.index(0.5)] == 0.5


def test_it_is_a_method():
    assert isinstance(CNNSplitter(), Method)
    assert CNNSplitter().phases() == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _p, _data: CNNSplitter(population=1), "population: expected at least 2, got 1"),
        (lambda _p, _data: CNNSplitter(parents=200), "parents, elites: expected at most 100 and 99"),
        (lambda _p, _data: CNNSplitter(alpha=2), r"alpha: expected a number in \[0, 1\], got 2"),
        (lambda _p, _data: CNNSplitter(mutation_percent=-1), "mutation_percent: expected a number in"),
        (lambda p, _l: SETTINGS.extract(p, []), "loader: expected at least one batch, got none"),
        (lambda p, data: SETTINGS.extract(p, [(data[0][0], data[0][1] * 0)]), r"got none of classes \[1, 2\]"),
        (
            lambda p, data: replace(SETTINGS, sensitive=("9",)).extract(p, data),
            "sensitive: expected taps that decide .* got '9'",
        ),
        (
            lambda _p, _data: SETTINGS.prepare(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), 1, torch.randn(2, 2)),
            "num_classes",
        ),
    ],
)
def test_bad_arguments_are_named(found, make, message: str):
    with pytest.raises(ValueError, match=message):
        make(*found)


class Viewing(nn.Module):
    """Views its features flat without copying them, which images with channels last do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x).relu()
        return self.linear(x.view(len(x), -1))


@pytest.mark.parametrize("viewing", [True, False])
def test_images_are_laid_out_as_the_network_takes_them(viewing: bool):
    model = Viewing() if viewing else nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    images = torch.randn(6, 3, 4, 4)
    prepared = CNNSplitter(progress=False).prepare(model, 3, images)
    assert prepared.layout == (torch.contiguous_format if viewing else torch.channels_last)
    every = {tap: np.ones((3, width), bool) for tap, width in prepared.widths.items()}
    outputs = module_outputs(prepared, every, range(3), [(images, torch.arange(6) % 3)])
    np.testing.assert_allclose(outputs, model(images).T.detach(), rtol=1e-5, atol=1e-6)


def test_only_what_decides_is_tried_to_find_sensitive_layers(found):
    prepared, loader = found
    orders = {
        tap: (-values).argsort(dim=1, stable=True).numpy() for tap, values in importances(prepared, loader).items()
    }
    curves = sensitivities(prepared, loader, orders)
    few = {slot: [curve[RATIOS.index(share)] for share in DECIDING] for slot, curve in curves.items()}
    assert sensitivities(prepared, loader, orders, DECIDING) == few
    for loss in (-1.0, 0.0, 0.05):
        assert sensitive_slots(few, loss, DECIDING) == sensitive_slots(curves, loss)
