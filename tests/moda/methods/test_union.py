"""Unions of modules with a head, against the modules and the fine-tuning of the published code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moda
from moda.methods import FineTuning, HeadedModule, MwT, NeMo, fine_tune
from moda.methods.mwt import load_published_state
from moda.methods.sites import convolution_sites, find_sites
from moda.methods.union import union_module
from moda.models.resnet import ResNet
from moda.models.simcnn import SimCNN
from moda.models.vit import Size, ViT

Golden = Callable[[str], dict[str, np.ndarray]]


def state_of(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: torch.tensor(value) for key, value in arrays.items() if key.startswith(prefix)}


def test_a_union_with_its_head_is_the_published_module(golden: Golden):
    """Its logits before and behind the head, and its number of parameters; before fine-tuning it can answer itself."""
    arrays = golden("peers/mwt_module_simcnn")
    images = (torch.tensor(arrays["x_u8"]).double() - 128) / 64
    model = SimCNN(arrays["conv_cfg"][:, 1].tolist(), (32, 32), 4, 3, 32, batch_norm=True)
    model.conv_0 = model.conv_0[0]  # the published network has no norm behind the first convolution
    method = MwT(threshold=float(arrays["threshold"]))
    prepared = method.prepare(model.double().eval(), 4, images[:2])
    load_published_state(prepared, state_of(arrays, "state/"))
    modules = method.extract(prepared, [(images, torch.tensor(arrays["labels"]))])
    with pytest.raises(ValueError, match=r"model: has gates still \(conv_1\.0\.mask_generator\); take them away"):
        union_module(model, modules, [0])
    prepared.gates.remove()
    for index in (1, 2):
        targets = arrays[f"targets_{index}"].tolist()
        module = union_module(model, modules, targets, example=images[:2])
        assert isinstance(module, HeadedModule)
        np.testing.assert_allclose(module.body(images).detach(), arrays[f"body64_{index}"], rtol=1e-9, atol=1e-9)
        weights = {"1.weight": arrays[f"head_w_{index}"], "1.bias": arrays[f"head_b_{index}"]}
        module.head.load_state_dict({key: torch.tensor(value) for key, value in weights.items()})
        np.testing.assert_allclose(module(images).detach(), arrays[f"logits64_{index}"], rtol=1e-9, atol=1e-9)
        assert sum(parameter.numel() for parameter in module.parameters()) == int(arrays[f"n_params_{index}"])
    own = union_module(model, modules, targets[:2], head="own", example=images[:2])
    body = union_module(model, modules, targets[:2], example=images[:2]).body
    torch.testing.assert_close(own(images), body(images)[:, targets[:2]])


PARTS = {".conv.": ".", ".bn.": "bn."}


def renamed(state: dict[str, Tensor], model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """A published module's state under our names."""
    outputs = {site.layer: site.output for site in convolution_sites(find_sites(model, example))}
    made = {}
    for key, value in state.items():
        block, _, rest = key.partition(".conv.") if ".conv." in key else key.partition(".bn.")
        if rest:
            made[f"body.{block if '.conv.' in key else outputs[block]}.{rest}"] = value
        else:
            made[key.replace("module_head.", "head.") if "module_head" in key else f"body.{key}"] = value
    return made


def test_fine_tuning_goes_as_the_published_one(golden: Golden):
    """Three epochs on digits, step by step and to the last weight, with the epoch chosen on the test samples."""
    arrays = golden("peers/mwt_finetune")
    images = (torch.tensor(arrays["x_u8"]).double() / 16)[:, None].repeat(1, 3, 1, 1)
    labels = torch.tensor(arrays["labels"])
    before = state_of(arrays, "ft_state/")
    model = ResNet([2, 4, 8, 16], (2, 2, 2, 2), len(before["fc.bias"]), 3).double()
    sites = convolution_sites(find_sites(model, images[:2]))
    kept = torch.tensor(arrays["ft_mask"]).split([site.width for site in sites])
    classes = len(before["fc.bias"])
    masks = {site.output: mask.expand(classes, -1) for site, mask in zip(sites, kept, strict=True)}
    targets = arrays["ft_targets"].tolist()
    module = union_module(model, moda.Decomposition(masks, method="mwt"), targets, example=images[:4])
    module.load_state_dict(renamed(before, model, images[:2]))
    rate, momentum, _, epochs, horizon = arrays["ft_hyper"].tolist()
    batches = [(images[rows], labels[rows]) for rows in arrays["ft_idx"].tolist()]
    test = [(images[arrays["ft_test_idx"]], labels[arrays["ft_test_idx"]])]
    found = fine_tune(
        module,
        batches,
        settings=FineTuning(int(epochs), rate, int(horizon), momentum=momentum),
        test=test,
        published=True,
    )
    expected = arrays["ft_loss64"].mean(1)
    np.testing.assert_allclose([epoch.loss for epoch in found.epochs], expected, rtol=1e-6, atol=1e-7)
    assert [epoch.accuracy for epoch in found.epochs] == arrays["ft_acc"].tolist()
    assert found.chosen == int(arrays["ft_best"])
    state = module.state_dict()
    for key, value in renamed(state_of(arrays, "ft_final64/"), model, images[:2]).items():
        np.testing.assert_allclose(state[key], value, rtol=1e-6, atol=1e-7, err_msg=key)


def test_a_transformer_s_module_reads_the_class_token():
    model, images = ViT(Size(3, 8, 2, 12, 8, 4), 4, 3).eval(), torch.randn(4, 3, 8, 8)
    prepared = NeMo().prepare(model, 4, images)
    modules = NeMo().extract(prepared, [(images, torch.arange(4))])
    prepared.gates.remove()
    module = union_module(model, modules, [3, 1])
    assert module(images).shape == (4, 2)
    fine_tune(module, [(images, torch.arange(4))], settings=FineTuning(epochs=1))
    whole = moda.Decomposition({site: torch.ones_like(mask) for site, mask in modules.masks.items()}, method="nemo")
    own = union_module(model, whole, [3, 1], head="own")
    torch.testing.assert_close(own(images), model(images)[:, [3, 1]])
    fresh = union_module(model, whole, [3, 1], head="own", published=True)
    assert not torch.allclose(fresh(images), own(images)) or bool((model.vit.layernorm.weight == 1).all())


MASKS = {"conv_1.0": torch.ones(3, 8).bool()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "old"}, "head: expected 'new' or 'own', got 'old'"),
        ({"classes": [0, 5]}, r"classes: expected classes in \[0, 3\), got \[5\]"),
        ({"combine": "logit"}, r"decomposition: expected modules that unite \('rows'\), got 'logit'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str):
    combine = options.pop("combine", "rows")
    modules = moda.Decomposition(MASKS, method="mwt", combine=combine)
    with pytest.raises(ValueError, match=message):
        union_module(nn.Identity(), modules, options.pop("classes", [0]), **options)
