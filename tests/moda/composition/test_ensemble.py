"""Modules side by side: masked and composed, with and without heads, and what they measure."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moda
from moda.composition.ensemble import Ensemble
from moda.decomposition.heads import head_parameters
from moda.methods.splitter import Splitter
from moda.observation.taps import observe


class Net(nn.Module):
    """A convolution, a norm, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(6, 5), nn.ReLU())
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.second(self.first(x).mean((2, 3))))
        return logits


def masks(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {
        "first.2": torch.rand(3, 6, generator=generator) > 0.4,
        "second.1": torch.rand(3, 5, generator=generator) > 0.4,
    }
    for mask in made.values():
        mask[:, 0] = True
    return made


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    return Net().double().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(7, 2, 6, 6, generator=torch.Generator().manual_seed(5)).double()


def test_each_gives_the_logit_of_its_own_class(model: nn.Module, images: Tensor):
    modules = moda.Decomposition(masks(), method="cnnsplitter", combine="logit")
    composed = moda.compose(model, modules, [2, 0], example=images)
    masked = moda.mask(model, modules, [2, 0])
    assert isinstance(composed, Ensemble)
    assert (composed.classes, composed.num_classes) == ((2, 0), 3)
    torch.testing.assert_close(composed(images), masked(images))
    with observe(model, example=images) as taps:
        for column, number in enumerate((2, 0)):
            kept = [modules.masks[name][number] for name in taps.names]
            with taps.replacing(lambda i, x, kept=kept: x * kept[i].view(1, -1, *[1] * (x.dim() - 2))):
                torch.testing.assert_close(composed(images)[:, column], model(images)[:, number])


@pytest.fixture(scope="module")
def split(model: nn.Module, images: Tensor) -> tuple[Splitter, moda.Decomposition]:
    """A splitter over the model, and its modules."""
    model.requires_grad_(False)
    torch.manual_seed(1)
    with observe(model, example=images) as taps:
        splitter = Splitter(taps, 3).double()
    with torch.no_grad():
        for parameter in splitter.masks:
            parameter.copy_(torch.randn_like(parameter))
            parameter[:, 0] = 1
    made = moda.Decomposition(
        splitter.module_masks(), method="gradsplitter", combine="probability", heads=splitter.heads.tensors()
    )
    return splitter, made


def test_probabilities_are_those_of_the_splitter(
    model: nn.Module, images: Tensor, split: tuple[Splitter, moda.Decomposition]
):
    splitter, modules = split
    composed = moda.compose(model, modules, [1, 2, 0], example=images)
    with observe(model, example=images) as taps:
        splitter.__dict__["taps"] = taps
        torch.testing.assert_close(composed(images), splitter(images)[:, [1, 2, 0]])
    torch.testing.assert_close(moda.mask(model, modules, [1])(images), composed(images)[:, :1])


def test_measures_count_every_module_in_full(
    model: nn.Module, images: Tensor, split: tuple[Splitter, moda.Decomposition]
):
    """Against what is built: parameters of modules add up, heads included; neurons are counted once a module."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    for modules in (moda.Decomposition(masks(), method="cnnsplitter", combine="logit"), split[1]):
        composed = moda.compose(model, modules, [0, 2], example=images)
        size = sum(parameter.numel() for parameter in composed.parameters()) / whole
        assert moda.measure.size(model, modules, [0, 2], example=images) == pytest.approx(size)
        sizes = moda.measure.module_sizes(model, modules, example=images)
        assert float(sizes[[0, 2]].sum()) == pytest.approx(size)
        kept = sum(int(mask[[0, 2]].sum()) for mask in modules.masks.values())
        assert moda.measure.neurons_kept(modules, [2, 0]) == kept / 11
        shared = moda.measure.overlap_matrix(model, modules, counting="parameters", example=images)
        heads = head_parameters(modules.heads) / whole
        torch.testing.assert_close(shared.diagonal(), sizes - heads)
        assert moda.measure.accuracy(composed, [(images, torch.tensor([0, 2] * 3 + [1]))]) >= 0
    rows = moda.Decomposition(masks(), method="mwt")
    united = {site: mask[[0, 2]].any(0) for site, mask in masks().items()}
    assert moda.measure.neurons_kept(rows, [0, 2]) == sum(int(mask.sum()) for mask in united.values()) / 11


def test_another_output_than_logits_is_named(images: Tensor):
    class Two(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x), "more": x}

    modules = moda.Decomposition(masks(), method="cnnsplitter", combine="logit")
    masked = moda.mask(Two().double().eval(), modules, [0])
    with pytest.raises(TypeError, match=r"model: expected logits \(N, classes\) as its one output, .*, got dict"):
        masked(images)


@pytest.mark.parametrize("killed_at", range(1, 13))
def test_a_kill_leaves_the_old_ensemble_or_the_new_one(
    model: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
):
    """At any rename or removal, with nothing done behind it; one of fewer modules leaves none of the others."""
    old, new = (
        moda.compose(
            model, moda.Decomposition(masks(seed), method="cnnsplitter", combine="logit"), classes, example=images
        )
        for seed, classes in ((0, [2, 0]), (1, [1]))
    )
    moda.save_composed(old, tmp_path)
    count, killed = 0, False

    def stopping(act: Callable[..., object]) -> Callable[..., object]:
        def acted(*given: object, **options: object) -> object:
            nonlocal count, killed
            count += 1
            if killed or count == killed_at:
                killed = True
                raise KeyboardInterrupt
            return act(*given, **options)

        return acted

    for owner, name in ((Path, "replace"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))
    with suppress(KeyboardInterrupt):
        moda.save_composed(new, tmp_path)
    monkeypatch.undo()
    left = moda.load_composed(tmp_path)
    whole = new if left.classes == (1,) else old
    torch.testing.assert_close(left(images), whole(images))
    moda.save_composed(new, tmp_path)
    torch.testing.assert_close(moda.load_composed(tmp_path)(images), new(images))
    assert {path.name for path in tmp_path.iterdir()} == {"ensemble.json", "module-1"}
    assert killed == (killed_at <= count)
