"""Gates of MwT and NeMo, and the masks that follow from them, against the published code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moda.methods.gates import (
    MaskGenerator,
    apply_gate,
    cohesion,
    coupling,
    generator_for,
    hidden_of_convolution,
    hidden_of_linear,
    jaccard,
    kept_share,
    masks_from_frequencies,
)

Golden = Callable[[str], dict[str, np.ndarray]]
PREFIX = "mask_generator."


def entries(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: torch.tensor(value) for name, value in arrays.items() if name.startswith(prefix)}


def generator_of(state: dict[str, Tensor], **options: bool) -> MaskGenerator:
    own = {name[len(PREFIX) :]: value for name, value in state.items() if name.startswith(PREFIX)}
    hidden, inputs = own["mask_generator.0.weight"].shape
    made = MaskGenerator(inputs, len(own["mask_generator.2.bias"]), hidden, **options)
    made.load_state_dict(own)
    return made.double()


@pytest.mark.parametrize("case", range(4))
def test_gated_convolutions_are_the_published_ones(golden: Golden, case: int):
    """Values, gradients on input and parameters, and the norm's running statistics."""
    arrays = golden("peers/mwt_generator")
    inputs, outputs, kernel, padding, stride, bias, train, hidden = arrays[f"cfg_{case}"].tolist()
    state = entries(arrays, f"p{case}/")
    block = nn.ModuleDict(
        {
            "conv": nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=bool(bias)),
            "bn": nn.BatchNorm2d(outputs),
        }
    )
    block.load_state_dict({name: value for name, value in state.items() if not name.startswith(PREFIX)}, strict=False)
    block.double().train(bool(train))
    generator = generator_of(state, features_last=False, first_bias=False)
    assert hidden_of_convolution(outputs) == hidden == len(generator.mask_generator[0].weight)
    x = torch.tensor(arrays[f"x_{case}"]).double().requires_grad_()
    gate = generator(x)
    out = apply_gate(block["bn"](block["conv"](x)), gate, features_last=False)
    np.testing.assert_allclose(gate.detach(), arrays[f"gate64_{case}"], rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(gate.detach() == 0, arrays[f"gate64_{case}"] == 0)
    np.testing.assert_allclose(out.detach(), arrays[f"out64_{case}"], rtol=1e-10, atol=1e-10)
    weights, gate_weights = (torch.tensor(arrays[f"{name}_{case}"]).double() for name in "rq")
    ((weights * out).sum() + (gate_weights * gate).sum()).backward()
    np.testing.assert_allclose(x.grad, arrays[f"gx_{case}"], rtol=1e-8, atol=1e-10)
    gradients = {name: p.grad for name, p in block.named_parameters()}
    gradients |= {PREFIX + name: p.grad for name, p in generator.named_parameters()}
    for name, expected in entries(arrays, f"g{case}/").items():
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-8, atol=1e-10, err_msg=name)
    for name, expected in entries(arrays, f"bn_after{case}/").items():
        np.testing.assert_allclose(getattr(block["bn"], name), expected, rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("case", range(2))
def test_gated_linear_layers_are_the_published_ones(golden: Golden, case: int):
    arrays = golden("peers/nemo_linear")
    inputs, outputs, bias, hidden = arrays[f"cfg_{case}"].tolist()
    state = entries(arrays, f"p{case}/")
    layer = nn.Linear(inputs, outputs, bias=bool(bias))
    layer.load_state_dict({name: value for name, value in state.items() if not name.startswith(PREFIX)})
    layer.double()
    generator = generator_of(state, features_last=True, first_bias=True)
    assert hidden_of_linear(outputs) == hidden
    x = torch.tensor(arrays[f"x_{case}"]).double().requires_grad_()
    gate = generator(x)
    out = apply_gate(layer(x), gate, features_last=True)
    np.testing.assert_allclose(gate.detach(), arrays[f"gate64_{case}"], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(out.detach(), arrays[f"out64_{case}"], rtol=1e-10, atol=1e-11)
    weights, gate_weights = (torch.tensor(arrays[f"{name}_{case}"]).double() for name in "rq")
    ((weights * out).sum() + (gate_weights * gate).sum()).backward()
    np.testing.assert_allclose(x.grad, arrays[f"gx_{case}"], rtol=1e-8, atol=1e-10)
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    gradients |= {PREFIX + name: p.grad for name, p in generator.named_parameters()}
    for name, expected in entries(arrays, f"g{case}/").items():
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-8, atol=1e-10, err_msg=name)


def test_hidden_widths_are_the_published_ones(golden: Golden):
    for outputs, hidden in golden("peers/mwt_generator")["hidden_rule"].tolist():
        assert hidden_of_convolution(outputs) == hidden
    for outputs, hidden in golden("peers/nemo_linear")["hidden_rule"].tolist():
        assert hidden_of_linear(outputs) == hidden


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Conv1d(3, 4, 3), nn.Linear(3, 4).double()])
def test_fresh_gates_are_open(layer: nn.Module):
    """Biases of 1 and an input of zeros: relu(tanh(1 + whatever the weights add)) is above 0 where they add nothing."""
    generator = generator_for(layer)
    assert generator.mask_generator[2].bias.dtype == layer.weight.dtype
    assert bool((generator.mask_generator[2].bias == 1).all())
    x = torch.zeros(2, 3, *([5] * (layer.weight.dim() - 2)), dtype=layer.weight.dtype)
    if isinstance(layer, nn.Linear):
        nn.init.zeros_(generator.mask_generator[2].weight)
    torch.testing.assert_close(generator(x), torch.ones(2, 4, dtype=x.dtype).tanh())


def test_a_layer_without_neurons_of_its_own_has_no_generator():
    with pytest.raises(TypeError, match="layer: expected a convolution or a linear layer, got BatchNorm2d"):
        generator_for(nn.BatchNorm2d(3))


# ---- masks --------------------------------------------------------------------------------------------------------


def split(array: np.ndarray, widths: np.ndarray) -> list[Tensor]:
    return list(torch.tensor(array).split(widths.tolist(), 1))


def frequencies_of(bits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return torch.stack([bits[labels == number].float().mean(0) for number in range(num_classes)])


@pytest.mark.parametrize("case", [0, 1, 2])
def test_masks_are_the_published_ones(golden: Golden, case: int):
    arrays = golden("peers/mwt_masks")
    widths = arrays[f"n_layers_{case}"]
    bits = torch.tensor(arrays[f"gate_{case}"] > 0)
    labels = torch.tensor(arrays[f"labels_{case}"])
    frequencies = frequencies_of(bits, labels, int(arrays[f"n_classes_{case}"]))
    np.testing.assert_array_equal(frequencies, arrays[f"freq_{case}"])
    found = [
        masks_from_frequencies(part, float(arrays[f"thr_{case}"])) for part in frequencies.split(widths.tolist(), 1)
    ]
    masks = torch.cat([layer.masks for layer in found], 1)
    np.testing.assert_array_equal(masks, arrays[f"masks_{case}"])
    np.testing.assert_array_equal(np.array([layer.thresholds for layer in found]).T, arrays[f"used_{case}"])
    np.testing.assert_allclose(coupling(masks), arrays[f"coupling_{case}"], rtol=1e-6)
    np.testing.assert_allclose(kept_share([masks]), arrays[f"krr_{case}"], rtol=1e-6)
    if not np.isnan(arrays[f"cohesion_{case}"]):
        np.testing.assert_allclose(cohesion(bits, labels, masks), arrays[f"cohesion_{case}"], rtol=1e-6)


def test_a_layer_that_a_class_never_uses_keeps_one_neuron_and_says_so(golden: Golden):
    """Where the published code stops with an error."""
    arrays = golden("peers/mwt_masks")
    assert bool(arrays["error_3"])
    bits = torch.tensor(arrays["gate_3"] > 0)
    frequencies = frequencies_of(bits, torch.tensor(arrays["labels_3"]), int(arrays["n_classes_3"]))
    parts = [masks_from_frequencies(part) for part in frequencies.split(arrays["n_layers_3"].tolist(), 1)]
    assert any(part.unused for part in parts)
    for part in parts:
        assert bool((part.masks.sum(1) >= 1).all())
        for number in part.unused:
            assert part.masks[number].tolist() == [True, *[False] * (part.masks.shape[1] - 1)]
            assert part.thresholds[number] == 0


def test_a_class_without_samples_is_refused(golden: Golden):
    arrays = golden("peers/mwt_masks")
    assert bool(arrays["error_4"])
    bits = torch.tensor(arrays["gate_4"] > 0)
    frequencies = frequencies_of(bits, torch.tensor(arrays["labels_4"]), int(arrays["n_classes_4"]))
    with pytest.raises(ValueError, match="frequencies: expected values in .* NaN .a class without samples"):
        masks_from_frequencies(frequencies)


def test_rarely_used_neurons_are_kept_where_there_are_no_others():
    """Used by 1 and 3 of 100 samples: below the last threshold of the published steps, but not never."""
    found = masks_from_frequencies(torch.tensor([[0.01, 0.03, 0.0]]))
    assert found.masks.tolist() == [[False, True, False]]
    assert found.thresholds == (pytest.approx(0.03),)


def test_the_published_on_line_figures(golden: Golden):
    arrays = golden("peers/mwt_masks")
    bits, labels = torch.tensor(arrays["online_gate"] > 0), torch.tensor(arrays["online_labels"])
    table = jaccard(bits, bits)
    same = labels[:, None] == labels[None, :]
    upper = torch.ones_like(same).triu(1)
    figures = (table[same & upper].mean(), table[~same & upper].mean(), bits.float().mean())
    np.testing.assert_allclose(figures, arrays["online"], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3),), TypeError, "frequencies: expected a tensor of shape"),
        ((torch.full((1, 1), 1.5),), ValueError, "frequencies: expected values in"),
        ((torch.ones(1, 1), 0.0), ValueError, r"threshold: expected a number in \(0, 1\], got 0.0"),
        ((torch.ones(1, 1), float("nan")), ValueError, "threshold: expected"),
        ((torch.ones(1, 1), 0.9, 0.0), ValueError, "step: expected a number above 0, got 0.0"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[object, ...], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        masks_from_frequencies(*arguments)


def test_figures_of_nothing_are_zero():
    assert coupling(torch.ones(1, 4, dtype=torch.bool)) == 0
    assert cohesion(torch.ones(2, 4, dtype=torch.bool), torch.tensor([0, 1]), torch.ones(2, 4, dtype=torch.bool)) == 0
    assert jaccard(torch.zeros(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool)).item() == 0
