"""The plain algorithms that the suite "methods" compares with give what the published code gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from moda import models
from moda.bench import published
from moda.bench.clock import Budget
from moda.bench.methods import method_cases
from moda.methods.splitter import Splitter, splitter_loss
from moda.observation.taps import observe

Golden = Callable[[str], dict[str, np.ndarray]]


@pytest.mark.parametrize("case", [0, 5, 7])
def test_losses_of_mwt(golden: Golden, case: int):
    arrays = golden("peers/mwt_losses")
    layers = sum(name.startswith(f"gate_{case}_") for name in arrays)
    gates = [torch.tensor(arrays[f"gate_{case}_{layer}"]).double() for layer in range(layers)]
    found = published.mwt_losses(gates, torch.tensor(arrays[f"labels_{case}"]))
    np.testing.assert_allclose(torch.stack(found), arrays[f"loss64_{case}"][:2], rtol=1e-10)


@pytest.mark.parametrize("case", [0, 1])
def test_loss_of_nemo(golden: Golden, case: int):
    from moda.methods.contrastive import contrastive_loss

    arrays = golden("peers/nemo_losses")
    layers = sum(name.startswith(f"gate_{case}_") for name in arrays)
    gates = [torch.tensor(arrays[f"gate_{case}_{layer}"]).double() for layer in range(layers)]
    labels = torch.tensor(arrays[f"labels_{case}"])
    for temperature in (0.2, 0.5):  # ours is compared with the golden values in test_losses
        expected = contrastive_loss(gates, labels, temperature)
        torch.testing.assert_close(published.nemo_loss(gates, labels, temperature), expected)


def test_joint_fitness_of_cnnsplitter(golden: Golden):
    arrays = {
        name.removesuffix("_0"): array for name, array in golden("peers/cs_fitness").items() if name.endswith("_0")
    }
    weight, alpha = arrays["weights"].tolist()
    rounds = [(int(size), accuracy) for size, accuracy in arrays["thresholds"]]
    found = published.joint_fitness(
        arrays["outputs"], arrays["labels"], arrays["kernels"], arrays["order"].tolist(), rounds, weight, alpha
    )
    np.testing.assert_allclose(found, arrays["fitness"], rtol=1e-6)


def test_every_method_has_a_case():
    cases = method_cases(torch.device("cpu"), True, Budget(1, 1, 0))
    assert [case.name.split()[0] for case in cases] == ["mwt", "nemo", "gradsplitter", "cnnsplitter"]
    assert {case.baseline for case in cases} == {"published"}


def test_a_candidate_that_is_cut_out_answers_as_the_network_with_its_other_neurons_at_0():
    torch.manual_seed(0)
    model = models.create("small_vgg", width=0.25).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.5, 2)
    images = torch.randn(6, 3, 8, 8)
    taps = observe(model, example=images)
    masks = [torch.rand(width) < 0.5 for width in taps.widths]
    for mask in masks:
        mask[0] = True

    def masked(index: int, activation: torch.Tensor) -> torch.Tensor:
        return activation * masks[index].view(1, -1, *[1] * (activation.dim() - 2))

    with taps.replacing(masked):
        wanted = model(images)
    module = published.cut([*model.features, model.flatten, *model.classifier], [mask.numpy() for mask in masks])
    torch.testing.assert_close(module(images), wanted, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_splitter_of_one_pass_for_each_class():
    torch.manual_seed(0)
    model = models.create("small_vgg", num_classes=4, width=0.25).double().eval().requires_grad_(False)
    images, labels = torch.randn(6, 3, 8, 8).double(), torch.tensor([0, 1, 2, 3, 0, 1])
    ours = Splitter(observe(model, example=images[:2]), 4).double()  # compared with the golden values in test_splitter
    with torch.no_grad():
        for mask in ours.masks:
            mask.copy_(torch.randn(mask.shape) + 0.4)
    layers = [*model.features, model.flatten, *model.classifier]
    heads = [ours.heads.of_class(number) for number in range(4)]
    plain = published.SplitterNetwork(layers, [ours.mask(tap) for tap in ours.owners], heads)
    torch.testing.assert_close(plain(images), ours(images))
    torch.testing.assert_close(plain.kept_share(), ours.kept_share().double())
    for splitter in (plain, ours):
        splitter_loss(splitter(images), labels, splitter.kept_share(), 40).backward()
    for place, mask in enumerate(ours.masks):
        torch.testing.assert_close(torch.stack([own[place].grad for own in plain.masks]), mask.grad)
