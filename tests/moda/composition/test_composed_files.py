"""Composed models on disk: what comes back, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from moda import models
from moda.composition.compose import ComposedModel, compose
from moda.composition.files import load_composed, save_composed
from moda.composition.masking import mask
from moda.files import FormatError
from tests.moda._helpers.composing import lively, random_modules, watched, widths


def model(seed: int = 0, width: float = 0.05, num_classes: int = 4) -> nn.Module:
    return watched(lively(models.create("resnet18", num_classes=num_classes, width=width), seed))


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, ComposedModel]:
    """A composed model, trained by one step since it was made."""
    torch.manual_seed(0)
    whole = model()
    composed = compose(whole, random_modules(widths(whole, image()), 4, 0.4), [3, 1])
    composed(image()).square().sum().backward()
    torch.optim.SGD(composed.parameters(), 0.01).step()
    folder = tmp_path_factory.mktemp("composed") / "made" / "here"
    save_composed(composed, folder, {"source": "a run"})
    return folder, composed


def test_it_comes_back_whole(saved):
    folder, composed = saved
    loaded = load_composed(folder)
    assert loaded.classes == (3, 1)
    assert all(torch.equal(loaded.masks[tap], keep) for tap, keep in composed.masks.items())
    assert all(torch.equal(value, composed.state_dict()[name]) for name, value in loaded.state_dict().items())
    x = image()
    assert torch.equal(loaded(x), composed(x))
    assert json.loads((folder / "composed.json").read_text())["metadata"] == {"source": "a run"}


def test_it_can_be_saved_again(saved, tmp_path):
    folder, _ = saved
    save_composed(load_composed(folder), tmp_path)
    for name in ("model.safetensors", "masks.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_tied_weights_are_saved(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    whole = watched(Tied(), torch.randn(2, 4))
    composed = compose(whole, random_modules({"relu": 4}, 4, 0.5), [0])
    save_composed(composed, tmp_path)
    x = torch.randn(3, 4)
    loaded = load_composed(tmp_path)
    assert torch.equal(loaded(x), composed(x))
    assert loaded.get_parameter("first.weight") is loaded.get_parameter("second.weight")


def test_only_composed_models_are_saved(tmp_path):
    whole = model()
    masked = mask(whole, random_modules(widths(whole, image()), 4, 0.4), [0])
    with pytest.raises(TypeError, match=r"composed: expected a model made by moda.compose, got MaskedModel"):
        save_composed(masked, tmp_path)
    with pytest.raises(TypeError, match=r"composed: expected a model made by moda.compose, got Linear"):
        save_composed(nn.Linear(2, 2), tmp_path)


def edited(folder: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(folder, target)
    description = json.loads((target / "composed.json").read_text())
    description.update(changes)
    description = {key: value for key, value in description.items() if value is not ...}
    (target / "composed.json").write_text(json.dumps(description))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "moda-decomposition"}, '"format": "moda-composed", got'),
        ({"format_version": 3}, "expected format_version 2, got 3"),
        ({"classes": ...}, "composed.json: entry 'classes' is missing"),
        ({"classes": [1, 1]}, r"composed.json: classes: expected every class once, got \[1\]"),
        ({"classes": [3, 9]}, r"composed.json: classes: expected classes in \[0, 4\), got \[9\]"),
        ({"routes": {}}, "composed.json: routes: expected"),
        (
            {"modules": {}},
            r"composed.json: routes: a graph takes 'layer1.0.relu1', which is not described|a graph takes",
        ),
        ({"class_names": ["a"]}, "composed.json: class_names: expected 4 names, got 1"),
        ({"num_classes": "many"}, "composed.json: num_classes: expected an integer, got str"),
        ({"taps": [{"name": "relu1"}]}, "composed.json: taps.0.: entry 'neurons' is missing"),
        ({"taps": [{"name": "relu1", "neurons": 3}]}, "masks.safetensors: expected other tensors: missing .*unknown"),
        ({"weights_sha256": "0" * 64}, "model.safetensors: its SHA-256 is"),
        ({"masks_sha256": "0" * 64}, "masks.safetensors: its SHA-256 is"),
    ],
)
def test_malformed_descriptions(saved, tmp_path, changes, message):
    with pytest.raises(FormatError, match=message):
        load_composed(edited(saved[0], tmp_path / "copy", **changes))


@pytest.mark.parametrize("name", ["model.safetensors", "masks.safetensors", "composed.json"])
def test_missing_and_damaged_files(saved, tmp_path, name):
    folder = edited(saved[0], tmp_path / "copy")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=name):
        load_composed(folder)
    (folder / name).unlink()
    with pytest.raises(FormatError, match=f"{name}: no such file"):
        load_composed(folder)


def test_masks_that_are_no_masks(saved, tmp_path):
    import hashlib

    masks = {tap: keep.float() for tap, keep in saved[1].masks.items()}
    data = safetensors.torch.save(masks)
    folder = edited(saved[0], tmp_path / "copy", masks_sha256=hashlib.sha256(data).hexdigest())
    (folder / "masks.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match=r"masks.safetensors: .*: expected bool \(.*, got torch.float32"):
        load_composed(folder)
