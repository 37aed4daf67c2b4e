"""The models: parameter counts, checkpoint keys, initialisation, and the published networks' own outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from moda import models
from moda.models.mobilenet import MobileNet
from moda.models.resnet import ResNet
from moda.models.vgg import VGG
from moda.observation.taps import observe


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("lenet5", {}, 62_006),
        ("vgg16", {}, 33_646_666),
        ("vgg16", {"num_classes": 100}, 34_015_396),
        ("vgg16", {"num_classes": 100, "image_size": 224}, 134_678_692),
        ("resnet18", {}, 11_173_962),
        ("resnet18", {"num_classes": 100}, 11_220_132),
        ("mobilenet", {}, 3_217_226),
        ("mobilenet", {"num_classes": 100}, 3_309_476),
        ("small_vgg", {}, 100_138),
    ],
)
def test_parameter_counts_are_the_published_ones(name, options, count):
    with torch.device("meta"):
        assert parameters(models.create(name, **options)) == count


def norm(name: str, neurons: int) -> list[tuple[str, tuple[int, ...]]]:
    entries = ("weight", "bias", "running_mean", "running_var")
    return [*((f"{name}.{entry}", (neurons,)) for entry in entries), (f"{name}.num_batches_tracked", ())]


def layer(name: str, *shape: int, bias: bool = True) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{name}.weight", shape), *([(f"{name}.bias", shape[:1])] if bias else [])]


def vgg16_state() -> list[tuple[str, tuple[int, ...]]]:
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    indices = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)
    state = []
    for index, inputs, outputs in zip(indices, (3, *widths), widths, strict=False):
        state += layer(f"features.{index}", outputs, inputs, 3, 3) + norm(f"features.{index + 1}", outputs)
    state += layer("classifier.0", 4096, 512) + layer("classifier.2", 4096, 4096)
    return state + layer("classifier.4", 10, 4096)


def resnet18_state() -> list[tuple[str, tuple[int, ...]]]:
    state = layer("conv1", 64, 3, 3, 3, bias=False) + norm("bn1", 64)
    inputs = 64
    for stage, outputs in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            state += layer(f"{name}.conv1", outputs, inputs, 3, 3, bias=False) + norm(f"{name}.bn1", outputs)
            state += layer(f"{name}.conv2", outputs, outputs, 3, 3, bias=False) + norm(f"{name}.bn2", outputs)
            if stage > 1 and block == 0:
                state += layer(f"{name}.downsample.0", outputs, inputs, 1, 1, bias=False)
                state += norm(f"{name}.downsample.1", outputs)
            inputs = outputs
    return state + layer("fc", 10, 512)


def mobilenet_state() -> list[tuple[str, tuple[int, ...]]]:
    widths = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    state = layer("conv1", 32, 3, 3, 3, bias=False) + norm("bn1", 32)
    for index, (inputs, outputs) in enumerate(zip((32, *widths), widths, strict=False)):
        name = f"layers.{index}"
        state += layer(f"{name}.conv1", inputs, 1, 3, 3, bias=False) + norm(f"{name}.bn1", inputs)
        state += layer(f"{name}.conv2", outputs, inputs, 1, 1, bias=False) + norm(f"{name}.bn2", outputs)
    return state + layer("linear", 10, 1024)


def lenet5_state() -> list[tuple[str, tuple[int, ...]]]:
    state = layer("conv1", 6, 3, 5, 5) + layer("conv2", 16, 6, 5, 5)
    return state + layer("fc1", 120, 400) + layer("fc2", 84, 120) + layer("fc3", 10, 84)


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("vgg16", vgg16_state()),
        ("resnet18", resnet18_state()),
        ("mobilenet", mobilenet_state()),
        ("lenet5", lenet5_state()),
    ],
)
def test_checkpoint_keys_shapes_and_order_are_the_published_ones(name, state):
    with torch.device("meta"):
        model = models.create(name)
    assert [(key, tuple(value.shape)) for key, value in model.state_dict().items()] == state


@pytest.mark.parametrize(
    ("name", "size", "taps"),
    [("lenet5", 32, 4), ("vgg16", 32, 15), ("resnet18", 16, 17), ("mobilenet", 16, 27), ("small_vgg", 8, 5)],
)
def test_every_activation_call_is_a_module_and_a_tap(name, size, taps):
    model = models.create(name, width=0.125)
    assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == taps
    observed = observe(model)
    logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 10)
    assert len(observed.names) == len(observed.activations()) == taps


def golden_model(name: str, z: dict[str, np.ndarray]) -> nn.Module:
    num_classes = z["full_logits"].shape[1]
    if "vgg" in name:
        return VGG(z["conv_cfg"].tolist(), z["classifier_cfg"].tolist(), num_classes, 3, z["input"].shape[-1])
    if "resnet" in name:
        return ResNet(z["stage_widths"].tolist(), z["blocks_per_stage"].tolist(), num_classes, 3)
    blocks = z["block_cfg"].tolist()
    return MobileNet(blocks[0][0], [(outputs, stride) for _, outputs, stride in blocks], num_classes, 3)


GOLDEN_MODELS = [
    "vgg_random", "vgg_e2e", "resnet_random", "resnet_short", "resnet_e2e",
    "mobilenet_random", "mobilenet_full_depth", "mobilenet_e2e",
]  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_published_weights_give_the_published_logits(golden, name):
    z = golden(f"compose_{name}")
    model = golden_model(name, z)
    state = {key.removeprefix("state/"): torch.from_numpy(z[key]) for key in z if key.startswith("state/")}
    model.load_state_dict(state)
    model.eval().double()
    with torch.no_grad():
        logits = model(torch.from_numpy(z["input"]).double())
    np.testing.assert_allclose(logits.numpy(), z["full_logits64"], rtol=1e-9, atol=1e-10)
    assert parameters(model) == z["n_params_full"]
    assert list(observe(model, example=torch.from_numpy(z["input"]).double()).names) == z["relu_layer_names"].tolist()


@pytest.mark.parametrize("name", ["vgg16", "resnet18", "mobilenet", "small_vgg"])
def test_convolutions_start_kaiming_normal_by_fan_out(name):
    model = models.create(name, width=0.5)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.weight.shape[0] * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.08)
            assert module.weight.mean().item() == pytest.approx(0, abs=0.1 * math.sqrt(2 / fan_out))
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            assert not module.bias.any()


def test_depthwise_convolutions_start_by_their_own_fan_out():
    weight = models.mobilenet(width=0.5).layers[10].conv1.weight  # (256, 1, 3, 3): PyTorch's fan-out is 256 * 9
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.08)


@pytest.mark.parametrize("name", ["vgg16", "mobilenet", "small_vgg"])
def test_linears_start_normal_with_standard_deviation_a_hundredth(name):
    linears = [module for module in models.create(name, width=0.5).modules() if isinstance(module, nn.Linear)]
    assert linears
    for module in linears:
        assert module.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert not module.bias.any()


@pytest.mark.parametrize("name", ["lenet5", "resnet18"])
def test_the_other_linears_start_as_pytorch_does(name):
    model = models.create(name)
    linear = model.fc if name == "resnet18" else model.fc1
    bound = 1 / math.sqrt(linear.in_features)  # uniform in +-bound
    assert 0.9 * bound < linear.weight.abs().max().item() <= bound
    assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("name", models.NAMES)
def test_a_fresh_model_has_seen_no_data(name):
    for module in models.create(name, width=0.25).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_batches_tracked == 0
            assert not module.running_mean.any()
            assert (module.running_var == 1).all()
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_the_width_multiplier_scales_hidden_layers_only():
    model = models.small_vgg(num_classes=7, in_channels=1, width=0.25)
    convolutions = [tuple(m.weight.shape[:2]) for m in model.modules() if isinstance(m, nn.Conv2d)]
    linears = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear)]
    assert convolutions == [(8, 1), (8, 8), (16, 8), (16, 16)]
    assert linears == [(32, 16 * 2 * 2), (7, 32)]


def test_no_layer_vanishes_at_a_tiny_width():
    model = models.lenet5(width=0.01)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert model.conv1.out_channels == 1


@pytest.mark.parametrize(
    ("name", "size"),
    [("lenet5", 16), ("lenet5", 45), ("vgg16", 33), ("vgg16", 64), ("small_vgg", 4), ("small_vgg", 15)],
)
def test_the_flattened_size_follows_the_image_size(name, size):
    model = models.create(name, width=0.1, image_size=size).eval()
    assert model(torch.randn(1, 3, size, size)).shape == (1, 10)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet"])
def test_models_with_adaptive_pooling_take_any_size(name):
    model = models.create(name, width=0.1, image_size=20).eval()
    assert model(torch.randn(1, 3, 20, 24)).shape == (1, 10)


def test_create_makes_what_the_functions_make():
    torch.manual_seed(3)
    made = models.create("small_vgg", num_classes=4, in_channels=1, image_size=12)
    torch.manual_seed(3)
    called = models.small_vgg(4, 1, image_size=12)
    for (key, value), (other_key, other) in zip(made.state_dict().items(), called.state_dict().items(), strict=True):
        assert key == other_key
        assert torch.equal(value, other)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "alexnet"}, ValueError, "name: expected one of lenet5, vgg16, .* got 'alexnet'"),
        ({"name": "vgg16", "num_classes": 0}, ValueError, "num_classes: expected at least 1, got 0"),
        ({"name": "resnet18", "num_classes": 2.0}, TypeError, "num_classes: expected an int, got float"),
        ({"name": "mobilenet", "in_channels": True}, TypeError, "in_channels: expected an int, got bool"),
        ({"name": "lenet5", "width": 0.0}, ValueError, "width: expected a positive number, got 0.0"),
        ({"name": "resnet18", "width": float("nan")}, ValueError, "width: expected a positive number, got nan"),
        ({"name": "mobilenet", "width": "1"}, TypeError, "width: expected a number, got str"),
        ({"name": "vgg16", "image_size": 31}, ValueError, "image_size: expected at least 32, got 31"),
        ({"name": "lenet5", "image_size": 8}, ValueError, "image_size: expected at least 16, got 8"),
        ({"name": "small_vgg", "image_size": 3}, ValueError, "image_size: expected at least 4, got 3"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        models.create(**options)
