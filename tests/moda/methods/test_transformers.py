"""NeMo's modules of Transformers, against those that the published builders make."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda.methods.nemo import NeMo
from moda.methods.transformers import CutTransformer
from moda.models.vit import DeiT, Size, ViT

Golden = Callable[[str], dict[str, np.ndarray]]
PLACES = (
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


class Case:
    """A published network with its masks, and ours with its weights."""

    def __init__(self, golden: Golden, name: str) -> None:
        self.arrays = golden(f"peers/nemo_module_{name}")
        self.images = (torch.tensor(self.arrays["x_u8"]).double() - 128) / 64
        layers, hidden, heads, mlp, side, patch = self.arrays["cfg"].tolist()
        state = self._state()
        classes = len(state["classifier.bias"])
        size = Size(layers, hidden, heads, mlp, side, patch)
        self.model = (ViT(size, classes, 3) if name == "vit" else DeiT(size, classes, 3)).double().eval()
        if name == "deit":
            state = {key.replace("classifier", "cls_classifier"): value for key, value in state.items()}
            state |= {key: value for key, value in self.model.state_dict().items() if key.startswith("distillation")}
        self.model.load_state_dict(state)
        self.sites = [f"{name}.encoder.layer.{index}.{place}" for index in range(1, layers) for place in PLACES]

    def _state(self) -> dict[str, Tensor]:
        state, start = {}, 0
        for name, sizes in zip(self.arrays["state_names"], self.arrays["state_shapes"], strict=True):
            shape = [int(size) for size in sizes if size]
            stop = start + int(np.prod(shape))
            state[str(name)] = torch.tensor(self.arrays["state_values"][start:stop]).reshape(shape)
            start = stop
        return state

    def masks(self, index: int) -> dict[str, Tensor]:
        widths = [self.model.get_submodule(site).out_features for site in self.sites]
        return dict(zip(self.sites, torch.tensor(self.arrays[f"masks_{index}"]).split(widths), strict=True))


@pytest.mark.parametrize("name", ["vit", "deit"])
@pytest.mark.parametrize("index", range(3))
def test_modules_are_the_published_ones(golden: Golden, name: str, index: int):
    case = Case(golden, name)
    module = CutTransformer(case.model, case.masks(index), published=True)
    head = [torch.tensor(case.arrays[f"head_{kind}_{index}"]).double() for kind in "wb"]
    logits = F.linear(module(case.images).relu(), *head)
    np.testing.assert_allclose(logits.detach(), case.arrays[f"logits64_{index}"], rtol=1e-8, atol=1e-9)
    state = module.state_dict()
    assert sorted(state) == sorted(case.arrays["tensor_names"].tolist())
    for key, shape in zip(case.arrays["tensor_names"], case.arrays[f"tensor_shapes_{index}"], strict=True):
        assert list(state[str(key)].shape) == [int(size) for size in shape if size]
    linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
    counted = sum(part.weight.numel() + part.out_features for part in linear) + sum(map(torch.numel, head))
    assert counted == int(case.arrays[f"linear_params_{index}"])


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_norms_keep_what_they_learnt(golden: Golden, name: str):
    """With all neurons kept the module is the network; the published one is not, as its norms begin anew."""
    case = Case(golden, name)
    masks = {site: torch.ones_like(mask) for site, mask in case.masks(0).items()}
    module = CutTransformer(case.model, masks)
    features = getattr(case.model, name)(case.images)[:, 0]
    torch.testing.assert_close(module(case.images), features)
    assert not torch.allclose(CutTransformer(case.model, masks, published=True)(case.images), features)
    own = module.classifier(case.model, [2, 0])
    whole = case.model.cls_classifier if name == "deit" else case.model.classifier
    torch.testing.assert_close(own(features), whole(features)[:, [2, 0]])


def test_trained_values_are_those_of_the_neurons_that_are_left(golden: Golden):
    case = Case(golden, "vit")
    masks = case.masks(1)
    with torch.no_grad():
        case.model.vit.layernorm.weight.copy_(torch.arange(12.0))
    module = CutTransformer(case.model, masks)
    kept = masks["vit.encoder.layer.11.output.dense"].nonzero()[:, 0]
    assert module.state_dict()["vit.layernorm.weight"].tolist() == kept.double().tolist()
    assert torch.equal(module.kept, kept)


def test_layers_without_gates_stay_whole_and_generators_are_left_out():
    """With query, key and value ungated, only the other three sites of a layer are cut."""
    model = ViT(Size(3, 8, 2, 12, 8, 4), 4, 3).eval()
    images = torch.randn(4, 3, 8, 8)
    prepared = NeMo(attention=False).prepare(model, 4, images)
    modules = NeMo(attention=False).extract(prepared, [(images, torch.arange(4))])
    masks = {site: torch.arange(len(mask[0])) % 2 == 0 for site, mask in modules.masks.items()}
    module = CutTransformer(model, masks)
    assert not any("mask_generator" in key for key in module.state_dict())
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert shapes["vit.encoder.layer.1.attention.attention.query.weight"] == (8, 8)
    assert shapes["vit.encoder.layer.2.attention.attention.query.weight"] == (8, 4)
    assert shapes["vit.encoder.layer.2.attention.output.dense.weight"] == (4, 8)
    assert module(images).shape == (4, 4)
    module(images).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vit.encoder.layer.9.output.dense": torch.ones(8).bool()},
            r"expected sites at linear layers of vit\.encoder",
        ),
        ({"classifier": torch.ones(4).bool()}, "expected sites at linear layers"),
        ({"vit.encoder.layer.1.output.dense": torch.ones(7).bool()}, "has 7 neurons, the model 8"),
        ({"vit.encoder.layer.1.output.dense": torch.zeros(8).bool()}, "keeps no neuron"),
        ({"vit.encoder.layer.1.attention.output.dense": torch.zeros(8).bool()}, "keeps no neuron"),
    ],
)
def test_bad_masks_are_named(change: dict[str, Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        CutTransformer(ViT(Size(2, 8, 2, 12, 8, 4), 4, 3), change)
