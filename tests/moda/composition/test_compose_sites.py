"""Decompositions of methods that act on the outputs of layers and norms: mask, compose and measure take them as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moda
from moda import models
from moda.composition.compose import compose
from moda.composition.files import load_composed, save_composed
from moda.composition.masking import mask
from moda.composition.source import to_source
from moda.decomposition.container import Decomposition
from moda.methods.sites import GateSite, convolution_sites, find_sites, token_sites
from moda.models.vit import Size, ViT
from moda.observation.taps import observe, taps_of
from tests.moda._helpers.composing import lively

CLASSES = 4


def hooked(model: nn.Module, kept: Mapping[str, Tensor], last: Iterable[str], x: Tensor, classes: list[int]) -> Tensor:
    """The plain model with hooks that set what is dropped to 0: the oracle."""

    def hook(factor: Tensor, features_last: bool, _module: nn.Module, _args: object, output: Tensor) -> Tensor:
        shape = (-1,) if features_last else (-1, *[1] * (output.dim() - 2))
        return output * factor.to(output).view(shape)

    handles = [
        model.get_submodule(path).register_forward_hook(partial(hook, factor, path in last))
        for path, factor in kept.items()
    ]
    try:
        with torch.no_grad():
            return model(x)[:, classes]
    finally:
        for handle in handles:
            handle.remove()


def convolutions(model: nn.Module, x: Tensor) -> list[GateSite]:
    """Each convolution's own output, before norm and activation, as GradSplitter masks kernels."""
    found = find_sites(model, x)
    return [GateSite(site.layer, site.layer, site.width, False) for site in found if not site.features_last]


def small_vit() -> nn.Module:
    return ViT(Size(layers=3, hidden=24, heads=4, mlp=32, image=8, patch=4), CLASSES, 3)


Choose = Callable[[nn.Module, Tensor], list[GateSite]]
CASES: dict[str, tuple[str, Callable[[], nn.Module], int, Choose]] = {
    "gradsplitter, simcnn": (
        "gradsplitter",
        lambda: models.create("simcnn", num_classes=CLASSES, width=0.1),
        32,
        convolutions,
    ),
    "mwt, vgg": (
        "mwt",
        lambda: models.create("small_vgg", num_classes=CLASSES, width=0.5),
        8,
        lambda model, x: convolution_sites(find_sites(model, x)),
    ),
    "mwt, resnet": (
        "mwt",
        lambda: models.create("resnet18", num_classes=CLASSES, width=0.1),
        16,
        lambda model, x: convolution_sites(find_sites(model, x)),
    ),
    "nemo, vit": ("nemo", small_vit, 8, lambda model, x: token_sites(find_sites(model, x))),
}


def modules_of(sites: Sequence[GateSite], method: str, seed: int = 0) -> Decomposition:
    """Random modules; of every second layer with heads whole heads of 6 neurons."""
    generator = torch.Generator().manual_seed(seed)
    masks = {site.output: torch.rand(CLASSES, site.width, generator=generator) < 0.5 for site in sites}
    return Decomposition(masks, method=method)


@pytest.mark.parametrize("case", CASES)
def test_composed_masked_and_hooked_models_are_the_same(case: str) -> None:
    method, make, side, choose = CASES[case]
    model, x = lively(make()), torch.randn(3, 3, side, side, dtype=torch.float64)
    sites = choose(model, x)
    modules, classes = modules_of(sites, method), [2, 0]
    last = [site.output for site in sites if site.features_last]
    expected = hooked(copy.deepcopy(model), modules.select(classes), last, x, classes)
    with torch.no_grad():
        assert not torch.allclose(expected, model(x)[:, classes])
        torch.testing.assert_close(mask(model, modules, classes)(x), expected, rtol=1e-9, atol=1e-9)
        composed = compose(model, modules, classes, example=x[:2])
        torch.testing.assert_close(composed(x), expected, rtol=1e-9, atol=1e-9)
    assert taps_of(model) is None
    left, whole = (sum(p.numel() for p in each.parameters()) for each in (composed, model))
    assert left < 0.9 * whole
    assert moda.measure.size(model, modules, classes, example=x[:2]) == pytest.approx(left / whole)


@pytest.fixture
def made() -> tuple[nn.Module, Decomposition, Tensor]:
    torch.manual_seed(0)
    model = lively(models.create("small_vgg", num_classes=CLASSES, width=0.5))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    return model, modules_of(convolutions(model, x), "gradsplitter"), x


def test_a_model_that_is_observed_elsewhere_stays_so(made: tuple[nn.Module, Decomposition, Tensor]) -> None:
    model, modules, x = made
    taps = observe(model, example=x)
    names = taps.names
    model(x)  # recorded, and still there afterwards
    with torch.no_grad():
        expected = hooked(copy.deepcopy(model), modules.select([1]), [], x, [1])
        torch.testing.assert_close(mask(model, modules, [1])(x), expected)
        torch.testing.assert_close(compose(taps, modules, [1])(x), expected)
    assert taps_of(model) is taps
    assert taps.names == names
    assert len(taps.activations()) == len(names)
    model(x)
    assert len(taps.activations()) == len(names)


def test_a_model_that_is_observed_at_the_sites(made: tuple[nn.Module, Decomposition, Tensor]) -> None:
    model, modules, x = made
    taps = observe(model, sites=modules.sites, example=x)
    with torch.no_grad():
        expected = hooked(copy.deepcopy(model), modules.select([3, 1]), [], x, [3, 1])
        torch.testing.assert_close(mask(taps.model, modules, [3, 1])(x), expected)
        torch.testing.assert_close(compose(taps, modules, [3, 1])(x), expected)
    activations = moda.count_firings(copy.deepcopy(model), [(x, torch.arange(3))], CLASSES, progress=False)
    assert list(activations.taps) == list(modules.sites)  # a copy is observed where the original is


def test_files_and_source_of_it(made: tuple[nn.Module, Decomposition, Tensor], tmp_path: Path) -> None:
    model, modules, x = made
    composed = compose(model, modules, [3, 1], example=x[:2])
    with observe(model, example=x) as taps, observe(composed, example=x) as cut:
        assert cut.names == taps.names
    save_composed(composed, tmp_path / "composed")
    loaded = load_composed(tmp_path / "composed")
    space: dict[str, object] = {}
    exec(to_source(composed, tmp_path / "plain").read_text(), space)  # what a user would import
    plain = space["load"](tmp_path / "plain" / "model.safetensors")  # type: ignore[operator]
    with torch.no_grad():
        assert torch.equal(loaded(x), composed(x))
        assert torch.equal(plain(x), composed(x))


def test_layers_that_a_method_leaves_alone_keep_their_neurons() -> None:
    model = lively(models.create("small_vgg", num_classes=CLASSES, width=0.5))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with observe(model, example=x) as taps:
        names, widths = taps.names[:2], taps.widths[:2]
    masks = {
        name: torch.arange(width).expand(CLASSES, width) % 2 == 0 for name, width in zip(names, widths, strict=True)
    }
    modules = Decomposition(masks, method="gradsplitter")
    with torch.no_grad():
        expected = mask(model, modules, [0, 2])(x)
        composed = compose(model, modules, [0, 2], example=x[:2])
        torch.testing.assert_close(composed(x), expected)
    assert all(composed.masks[name].all() for name in composed.masks if name not in masks)
    with pytest.raises(ValueError, match="decomposition: its taps are not those of the model: it lacks"):
        compose(model, Decomposition(masks), [0], example=x[:2])


def test_whole_heads_go() -> None:
    model, x = lively(small_vit()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    sites = token_sites(find_sites(model, x))
    heads = torch.tensor([True, False, True, False]).repeat_interleave(6)
    masks = {
        site.output: (heads if "attention.attention" in site.layer else torch.ones(site.width).bool()).repeat(
            CLASSES, 1
        )
        for site in sites
    }
    composed = compose(model, Decomposition(masks, method="nemo"), [1, 2], example=x)
    shapes = {name: tuple(parameter.shape) for name, parameter in composed.named_parameters()}
    for name, shape in shapes.items():
        if "attention.attention" in name and "layer.0" not in name:
            assert shape[0] == 12, name
        if "attention.output.dense.weight" in name and "layer.0" not in name:
            assert shape == (24, 12)
