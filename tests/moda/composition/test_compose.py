"""The law of composition, compose == mask, over architectures, masks and classes; and what a composed model is."""

from __future__ import annotations

import copy
import functools
import gc
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moda
from moda import models
from moda.composition import measure
from moda.composition.compose import ComposedModel, compose, plan
from moda.composition.composer import composer_of
from moda.composition.masking import mask
from moda.decomposition.container import Decomposition
from moda.observation.taps import taps_of
from tests.moda._helpers.composing import assert_law, lively, random_modules, watched, widths

MODELS = {
    "lenet5": (0.5, 32),
    "vgg16": (0.04, 32),
    "small_vgg": (0.25, 8),
    "resnet18": (0.1, 16),
    "mobilenet": (0.1, 32),
    "simcnn": (0.1, 32),
    "simcnn_bn": (0.1, 32),
    "rescnn": (0.1, 32),
    "incecnn": (0.05, 8),
    "vit_small": (0.05, 32),
    "deit_small": (0.05, 32),
}


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- the law, over architectures ------------------------------------------------------------------------------


def test_every_model_is_here():
    assert set(MODELS) == set(models.NAMES)


@pytest.mark.parametrize("name", MODELS)
def test_law_for_our_models(name):
    width, side = MODELS[name]
    model = models.create(name, num_classes=5, width=width)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == 12:  # layers of a transformer, all alike
            del module[3:]
    assert_law(model, image(2, 3, side, side))


INVERTED = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2], [6, 64, 1, 2]]
"""Expansion, neurons, repeats and stride of MobileNetV2's stages, fewer than the published ones."""


def squeezed(tv):
    """The first blocks of MobileNetV3, with and without squeeze-excite."""
    blocks, _ = tv.mobilenetv3._mobilenet_v3_conf("mobilenet_v3_small", width_mult=0.25)
    return blocks[:5]


TORCHVISION = {
    "resnet18": lambda tv: tv.resnet18(num_classes=5),
    "mobilenet_v2": lambda tv: tv.MobileNetV2(5, 0.25, INVERTED),
    "mobilenet_v3": lambda tv: tv.MobileNetV3(squeezed(tv), 64, 5),
    "squeezenet1_1": lambda tv: tv.squeezenet1_1(num_classes=5),  # its classifier is a convolution, tapped and pooled
    "shufflenet_v2": lambda tv: tv.ShuffleNetV2([2, 2, 2], [24, 48, 96, 192, 64], 5),  # chunks and shuffles of channels
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_law_for_torchvision_models(name):
    tv = pytest.importorskip("torchvision.models")
    assert_law(TORCHVISION[name](tv), image(2, 3, 32, 32), shares=(0.5,))


def test_law_for_resnext():
    """Grouped convolutions in residual blocks, one block per stage."""
    resnet = pytest.importorskip("torchvision.models.resnet")
    model = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, groups=8, width_per_group=4)
    assert_law(model, image(2, 3, 32, 32))


def test_law_for_vgg11_bn():
    """With narrower hidden linear layers: torchvision's would take a gigabyte in float64."""
    tv = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        model = tv.vgg11_bn(num_classes=5)
        model.classifier[0], model.classifier[3] = nn.Linear(25088, 32), nn.Linear(32, 24)
        model.classifier[6] = nn.Linear(24, 5)
    assert_law(model.to_empty(device="cpu"), image(2, 3, 32, 32), shares=(0.5, 0.0))


def test_law_for_densenet():
    tv = pytest.importorskip("torchvision.models")
    assert_law(tv.DenseNet(8, (2, 3, 2, 2), 16, num_classes=5), image(2, 3, 32, 32), shares=(0.5,))
    assert_law(tv.DenseNet(4, (2, 3, 2), 8, num_classes=5), image(2, 3, 32, 32))


class Inception(nn.Module):
    """Branches of different depth side by side, two of them pooled, one of the inputs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU())
        self.b = nn.Sequential(
            nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        )
        self.c = nn.Conv2d(8, 5, 1)
        self.after = nn.BatchNorm2d(6 + 6 + 8 + 5)
        self.head = nn.Linear(25 + 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pooled = F.avg_pool2d(x, 3, 1, 1)
        y = F.relu(self.after(torch.cat([self.a(x), self.b(x), pooled, self.c(x)], 1)))
        y = torch.cat([F.adaptive_avg_pool2d(y, 1), F.adaptive_max_pool2d(x, (1, 1))], dim=1)
        return self.head(torch.flatten(y, 1))


class PreActivation(nn.Module):
    """Norms before convolutions, sums that are read twice, in-place sums, a subtraction, a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            y = conv(F.relu(norm(x)))
            if index == 1:
                x = x - y
            else:
                y += x
                x = y
        return self.head(x.relu().mean([2, 3]))


class Gates(nn.Module):
    """Products: a gate per channel that is not 0 at 0, one per position (width 1), a number, and a square."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.spatial = nn.Conv2d(8, 1, 1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((-2, -1), keepdim=True)))))
        x = x * gate * torch.sigmoid(self.spatial(x)) * 2 + 1
        x = 0.5 * (1 - x)
        x = F.relu(self.norm(x * x))
        return self.head(F.adaptive_avg_pool2d(x, (1, 1)).view(x.size(0), -1))


class Positions(nn.Module):
    """Flattening over positions, then a norm and a tap on single features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(),
            nn.BatchNorm1d(6 * 9),
            nn.ReLU(),
            nn.Linear(6 * 9, 7),
            nn.GELU(),
            nn.Linear(7, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class Perceptron(nn.Module):
    """Linear layers only, batch norm without flattening before, a parameter per channel in PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 9), nn.BatchNorm1d(9, affine=False), nn.PReLU(9),
            nn.Linear(9, 7), nn.PReLU(), nn.Linear(7, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Tokens(nn.Module):
    """Linear layers on (N, T, C), layer norm, attention, and logits after a softmax: nothing that can all be sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.embed(x))
        y = self.norm(x)
        x = x + self.attention(y, y, y)[0]
        x = x + self.down(F.gelu(self.up(x)))
        return F.log_softmax(self.head(x.mean(1)), dim=1)


class Grouped(nn.Module):
    """Groups of several channels, depthwise with two filters per channel, a shuffle, and a look at the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.grouped = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.BatchNorm2d(12), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(12, 24, 3, groups=12, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.mixed = nn.Sequential(nn.ChannelShuffle(4), nn.Conv2d(24, 8, 1, groups=2), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.grouped(self.stem(x)))
        shape = x.shape
        x = x.view(shape[0], 2, shape[1] // 2, shape[2], shape[3]).transpose(1, 2).flatten(1, 2)
        return self.head(self.mixed(x).mean((2, 3)))


class Odd(nn.Module):
    """What cannot be sliced by module: a layer called twice, tied weights, functional layers, a fixed view, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.twice = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.right.weight = self.left.weight
        self.kernel = nn.Parameter(torch.randn(6, 6, 1, 1))
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.up = nn.Upsample(scale_factor=2)
        self.last = nn.Conv2d(6, 4, 3, stride=2)
        self.head = nn.Linear(4 * 49, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.twice(F.relu(self.twice(x)))))
        x = F.relu(self.left(x)) + F.relu(self.right(x))
        x = F.relu(F.conv2d(x, self.kernel) * self.scale)
        x = F.pad(self.up(F.interpolate(x, size=(4, 4))), (4, 4, 4, 4), value=0.5)
        x = F.relu(self.last(F.pad(x, (0, -1, 0, -1))))
        return self.head(x.view(-1, 4 * 49))


class Signal(nn.Module):
    """One dimension, instance norm, a skip past a narrower layer, logits straight from pooled channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(2, 6, 3, padding=1), nn.InstanceNorm1d(6, affine=True), nn.LeakyReLU(0.1))
        self.second = nn.Sequential(nn.Conv1d(6, 6, 3, padding=1), nn.SiLU())
        self.last = nn.Sequential(nn.Conv1d(6, 5, 1), nn.Hardswish(), nn.AdaptiveAvgPool1d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.second(x))


class Overwritten(nn.Module):
    """A sum in place, read by its old name too, by taps that keep different neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.other = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = alias = self.stem(x)
        y += self.other(x)
        return self.head(torch.cat([F.relu(y), F.relu(alias)], 1).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Overwritten, (2, 3, 6, 6)),
        (Inception, (2, 3, 8, 8)),
        (PreActivation, (2, 3, 6, 6)),
        (Gates, (2, 3, 6, 6)),
        (Positions, (2, 3, 8, 8)),
        (Perceptron, (3, 6)),
        (Tokens, (2, 3, 4)),
        (Grouped, (2, 3, 6, 6)),
        (Odd, (2, 3, 8, 8)),
        (Signal, (2, 2, 9)),
    ],
)
def test_law_for_networks_that_hold_every_rule(model, shape):
    assert_law(model(), image(*shape), shares=(0.8, 0.6, 0.4, 0.15, 0.0))


# ---- the law, over masks and classes --------------------------------------------------------------------------


def residual() -> nn.Module:
    return lively(models.create("resnet18", num_classes=4, width=0.05))


@functools.cache
def residual_and_image(mode: bool = False) -> tuple[nn.Module, Tensor]:
    """One observed model for all tests that only look at it: its graphs are read once."""
    torch.manual_seed(0)
    x = image(2, 3, 8, 8)
    return watched(residual().train(mode), x), x


@settings(max_examples=25, deadline=None)
@given(
    masks=st.lists(st.integers(0, 2**16 - 1), min_size=17, max_size=17),
    classes=st.permutations(range(4)).flatmap(lambda order: st.integers(1, 4).map(lambda n: order[:n])),
)
def test_law_for_any_masks_and_classes(masks, classes):
    """Each of 17 layers draws its own bit pattern: whole layers vanish, neighbours have nothing in common."""
    model, x = residual_and_image()
    kept = {}
    for bits, (tap, c) in zip(masks, widths(model, x).items(), strict=True):
        pattern = torch.tensor([bits >> (i % 16) & 1 for i in range(4 * c)], dtype=torch.bool)
        kept[tap] = pattern.view(4, c)
    decomposition = Decomposition(kept)
    with torch.no_grad():
        expected = mask(model, decomposition, classes)(x)
        torch.testing.assert_close(compose(model, decomposition, classes)(x), expected, rtol=1e-10, atol=1e-10)


def test_mask_is_what_it_says():
    """By hand: relu of the first layer times 0 or 1, the second layer's outputs picked."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    masks = torch.tensor([[True, False, False, True], [False] * 4, [False, False, True, True]])
    x = torch.randn(5, 3)
    hidden = model[0](x).clamp(min=0) * torch.tensor([1.0, 0.0, 1.0, 1.0])
    expected = model[2](hidden)[:, [2, 0]]
    masked = mask(model, Decomposition({"1": masks}), [2, 0])
    torch.testing.assert_close(masked(x), expected, rtol=1e-6, atol=1e-6)
    assert masked.classes == (2, 0)
    assert masked.model is model


def test_outputs_are_in_the_order_given():
    model = watched(residual())
    x = image(2, 3, 8, 8)
    decomposition = random_modules(widths(model, x), 4, 0.5)
    with torch.no_grad():
        forward, backward = (compose(model, decomposition, classes)(x) for classes in ([0, 3, 1], [1, 3, 0]))
        torch.testing.assert_close(forward, backward.flip(1), rtol=1e-10, atol=1e-10)
        assert not torch.allclose(forward, backward)


def test_everything_kept_is_the_whole_model():
    model = watched(residual())
    x = image(2, 3, 8, 8)
    decomposition = random_modules(widths(model, x), 4, 2.0)
    composed = compose(model, decomposition, range(4))
    with torch.no_grad():
        assert torch.equal(composed(x), model(x))
    assert not [node for node in composed.routes["eval"].graph.nodes if "index_select" in str(node.target)]
    assert {k: v.shape for k, v in composed.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_law_in_float32():
    """Rounding only: 1e-5 in float32."""
    model = watched(residual().float())
    x = torch.randn(2, 3, 16, 16)
    decomposition = random_modules(widths(model, x), 4, 0.5)
    with torch.no_grad():
        expected = mask(model, decomposition, [3, 1])(x)
        torch.testing.assert_close(compose(model, decomposition, [3, 1])(x), expected, rtol=1e-5, atol=1e-5)


# ---- what is kept ---------------------------------------------------------------------------------------------


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depth(self.first(x)).mean((2, 3)))


def test_depthwise_layer_that_nothing_reaches():
    """The published code lets channel 2 of the first layer through here; ours holds its place and feeds zeros."""
    model = watched(lively(Depthwise()), image(2, 3, 5, 5))
    first, depth = torch.tensor([[True, True, False, False]] * 2), torch.tensor([[False, False, True, True]] * 2)
    decomposition = Decomposition({"first.2": first, "depth.2": depth})
    composed = compose(model, decomposition, [1])
    assert plan(model, decomposition, [1]).kept["first.0.weight"].rows.tolist() == [2]
    assert plan(model, decomposition, [1]).kept["depth.0.weight"].rows.tolist() == [2, 3]
    assert composed.get_parameter("first.0.weight").shape == (1, 3, 1, 1)
    one, other = image(1, 3, 5, 5), image(1, 3, 5, 5)
    with torch.no_grad():
        assert torch.equal(composed(one), composed(other))
        torch.testing.assert_close(composed(one), mask(model, decomposition, [1])(one), rtol=1e-12, atol=1e-12)


def test_known_weights_of_a_skip_connection():
    """Kept rows and columns by hand: the block's input keeps 0 and 2, its inside 1 and 3, its output 2 and 3."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.outer = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.a, self.b, self.c = nn.ReLU(), nn.ReLU(), nn.ReLU()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(self.stem(x))
            return self.head(self.c(x + self.outer(self.b(self.inner(x)))).mean((2, 3)))

    model = watched(Skip(), torch.randn(2, 1, 3, 3))
    keep = {"a": [0, 2], "b": [1, 3], "c": [2, 3]}
    masks = {tap: torch.zeros(3, 4, dtype=torch.bool).index_fill_(1, torch.tensor(i), True) for tap, i in keep.items()}
    composed = compose(model, Decomposition(masks), [2, 0])
    for name, rows, columns in [
        ("stem", [0, 2], [0]),
        ("inner", [1, 3], [0, 2]),
        ("outer", [2, 3], [1, 3]),
        ("head", [2, 0], [2, 3]),
    ]:
        assert torch.equal(
            composed.get_parameter(f"{name}.weight"), model.get_parameter(f"{name}.weight")[rows][:, columns]
        )
        assert torch.equal(composed.get_parameter(f"{name}.bias"), model.get_parameter(f"{name}.bias")[rows])


def test_groups_are_cut_where_that_is_exact():
    """Two of four groups are wanted; in them local columns 0 (group 1) and 1 (group 3): both columns stay."""
    model = watched(nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=4), nn.ReLU(),
                                     nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)), torch.randn(2, 1, 4, 4))  # fmt: skip
    inputs, outputs = torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.bool)
    inputs[:, [0, 2, 7]], outputs[:, [2, 6, 7]] = True, True
    kept = plan(model, Decomposition({"1": inputs, "3": outputs}), [0]).kept
    assert kept["0.weight"].rows.tolist() == [2, 7]
    assert kept["2.weight"].rows.tolist() == [2, 3, 6, 7]
    assert kept["2.weight"].columns.tolist() == [0, 1]
    assert kept["6.weight"].columns.tolist() == [2, 6, 7]


def test_linear_in_first_layer_of_a_convolution_sees_every_position():
    model = watched(lively(Positions()))
    keep = {"features.2": [1, 4], "classifier.3": list(range(9, 20)), "classifier.5": [0]}
    neurons = widths(model, image(1, 3, 8, 8))
    masks = {tap: torch.zeros(5, neurons[tap], dtype=torch.bool) for tap in neurons}
    for tap, indices in keep.items():
        masks[tap][:, indices] = True
    kept = plan(model, Decomposition(masks), [3]).kept
    assert kept["features.0.weight"].rows.tolist() == [1]  # 4 x 9.. is beyond what the next tap keeps
    assert kept["classifier.2.weight"].rows.tolist() == list(range(9, 20))
    assert kept["classifier.4.weight"].columns.tolist() == list(range(9, 20))
    assert kept["classifier.6.weight"].rows.tolist() == [3]


# ---- what a composed model is ---------------------------------------------------------------------------------


def composed_residual(mode: bool = False) -> tuple[nn.Module, ComposedModel]:
    model, x = residual_and_image(mode)
    return model, compose(model, random_modules(widths(model, x), 4, 0.5), [2, 0])


def test_it_holds_copies_and_lets_the_model_go():
    model = watched(residual(), image(2, 3, 8, 8))
    composed = compose(model, random_modules(widths(model, image(2, 3, 8, 8)), 4, 0.5), [2, 0])
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in composed.state_dict().values()}
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in composed.state_dict().values())
    gone = weakref.ref(model.get_parameter("fc.weight"))
    del model, storages
    gc.collect()
    assert gone() is None


def test_composing_leaves_the_model_as_it_was():
    model = watched(residual())
    x = image(2, 3, 8, 8)
    before = model(x), copy.deepcopy(model.state_dict())
    decomposition = random_modules(widths(model, x), 4, 0.5)
    compose(model, decomposition, [1])
    mask(model, decomposition, [1])(x)
    assert torch.equal(model(x), before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())
    taps_of(model).clear()
    model(x)
    assert len(taps_of(model).activations()) == 17


def test_it_can_be_trained():
    _, composed = composed_residual(mode=True)
    x, labels = image(6, 3, 8, 8), torch.tensor([0, 1, 0, 1, 1, 0])
    optimiser = torch.optim.SGD(composed.parameters(), 0.05)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(composed(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in composed.parameters())


def test_gradients_are_those_of_the_masked_model():
    model = watched(residual())
    x = image(2, 3, 8, 8)
    decomposition = random_modules(widths(model, x), 4, 0.5)
    composed = compose(model, decomposition, [2, 0])
    mask(model, decomposition, [2, 0])(x).square().sum().backward()
    composed(x).square().sum().backward()
    kept = plan(model, decomposition, [2, 0]).kept
    for name, parameter in composed.named_parameters():
        gradient = model.get_parameter(name).grad
        rows, columns = kept[name].rows, kept[name].columns
        gradient = gradient if rows is None else gradient[rows]
        gradient = gradient if columns is None else gradient[:, columns]
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9)


def test_modes_and_frozen_parameters_stay():
    model = residual().train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    whole = watched(model)
    decomposition = random_modules(widths(whole, image(2, 3, 8, 8)), 4, 0.9)  # with something left of every layer
    for made in (compose(whole, decomposition, [1]), mask(whole, decomposition, [1]).model):
        assert made.training
        assert made.get_submodule("layer1.0.bn1").training
        assert not made.get_submodule("bn1").training
        assert not made.get_parameter("conv1.weight").requires_grad
        assert made.get_parameter("fc.weight").requires_grad


def test_flags_of_functional_dropout_stay_live():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 64), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.dropout(F.relu(self.first(x)), 0.5, self.training))

    model = watched(Dropping().eval(), torch.randn(2, 4))
    composed = compose(model, random_modules({"relu": 64}, 3, 0.8), [0, 1])
    x = torch.randn(2, 4)
    assert torch.equal(composed(x), composed(x))
    composed.train()
    assert not torch.equal(composed(x), composed(x))


def test_tied_weights_stay_tied():
    model = watched(lively(Odd()))
    composed = compose(model, random_modules(widths(model, image(1, 3, 8, 8)), 5, 0.5), [0])
    assert composed.get_parameter("left.weight") is composed.get_parameter("right.weight")


def test_deep_copies_keep_classes_and_masks():
    _, composed = composed_residual()
    x = image(2, 3, 8, 8)
    twin = copy.deepcopy(composed)
    assert isinstance(twin, ComposedModel)
    assert twin.classes == (2, 0)
    assert all(torch.equal(twin.masks[tap], keep) for tap, keep in composed.masks.items())
    assert torch.equal(twin(x), composed(x))
    assert twin.get_parameter("fc.weight") is not composed.get_parameter("fc.weight")


def test_it_is_a_plain_module_without_taps():
    model, composed = composed_residual()
    assert not any("tap" in type(module).__name__.lower() for module in composed.modules())
    assert set(composed.state_dict()) <= set(model.state_dict())
    assert isinstance(composed.get_submodule("layer1.0.relu1"), nn.ReLU)
    cut, whole = (each.get_parameter("layer2.0.conv1.weight").shape for each in (composed, model))
    assert cut[0] < whole[0]
    assert cut[1] < whole[1]


def test_it_is_where_the_model_is():
    """On the meta device, for want of another: every buffer of masks and alignments follows the weights."""
    model = watched(models.create("mobilenet", num_classes=4, width=0.1).to("meta"))
    x = torch.randn(2, 3, 32, 32, device="meta")
    decomposition = random_modules(widths(model, x), 4, 0.5)
    for make in (compose, mask):
        made = make(model, decomposition, [2, 0])
        assert {tensor.device.type for tensor in (*made.parameters(), *made.buffers())} == {"meta"}
        assert made(x).shape == (2, 2)


def test_it_compiles_without_breaks():
    _, composed = composed_residual()
    x = image(2, 3, 8, 8)
    compiled = torch.compile(composed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), composed(x), rtol=1e-10, atol=1e-10)


def test_it_can_be_exported():
    _, composed = composed_residual()
    x = image(2, 3, 8, 8)
    program = torch.export.export(composed, (x,), dynamic_shapes={"args": ({0: torch.export.Dim("n", min=2, max=64)},)})
    other = image(5, 3, 8, 8)
    torch.testing.assert_close(program.module()(other), composed(other), rtol=1e-10, atol=1e-10)


# ---- refusals -------------------------------------------------------------------------------------------------


def tiny() -> tuple[nn.Module, Decomposition]:
    model = watched(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(2, 3))
    return model, Decomposition({"1": torch.ones(3, 4, dtype=torch.bool)})


@pytest.mark.parametrize("make", [compose, mask])
@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ([], ValueError, "classes: expected at least one class, got none"),
        ([0, 1, 0], ValueError, r"classes: expected every class once, got \[0\] more than once"),
        ([1, 3], ValueError, r"classes: expected classes in \[0, 3\), got \[3\]"),
        ([-1], ValueError, r"classes: expected classes in \[0, 3\), got \[-1\]"),
        ([0.5], TypeError, r"classes: expected a sequence of class indices, got \[0.5\]"),
        (1, TypeError, "classes: expected a sequence of class indices, got 1"),
    ],
)
def test_classes_that_make_no_sense(make, classes, error, message):
    model, decomposition = tiny()
    with pytest.raises(error, match=message):
        make(model, decomposition, classes)


@pytest.mark.parametrize("make", [compose, mask])
def test_what_is_no_model(make):
    _, decomposition = tiny()
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        make("resnet18", decomposition, [0])


def test_model_without_taps():
    _, decomposition = tiny()
    message = r"decomposition: .* it lacks \[\], and the model lacks \['1'\]"
    with pytest.raises(ValueError, match=message):
        compose(nn.Linear(3, 3), decomposition, [0], example=torch.randn(2, 3))
    with pytest.raises(ValueError, match=message):
        mask(nn.Linear(3, 3), decomposition, [0])(torch.randn(2, 3))


def test_model_that_was_never_run_needs_an_example():
    model, decomposition = tiny()
    with pytest.raises(ValueError, match="example: expected an input of the model"):
        compose(copy.deepcopy(nn.Sequential(*model.children())), decomposition, [0])


@pytest.mark.parametrize("make", [compose, mask])
def test_decomposition_of_other_taps(make):
    model, _ = tiny()
    masks = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"decomposition: .* it lacks \['1'\], and the model lacks \['relu', 'x'\]"):
        make(model, Decomposition({"relu": masks, "x": masks}), [0])


def test_decomposition_of_other_sizes():
    model, _ = tiny()
    with pytest.raises(ValueError, match="decomposition: tap '1' has masks of 5 neurons, but the model has 4 there"):
        compose(model, Decomposition({"1": torch.ones(3, 5, dtype=torch.bool)}), [0])
    with pytest.raises(ValueError, match="decomposition: has 2 classes, but the model puts out 3 logits"):
        compose(model, Decomposition({"1": torch.ones(2, 4, dtype=torch.bool)}), [0])


class Deciding(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        x = self[1](self[0](x))
        if x.sum() > 0:
            x = x * 2
        return self[2](x)


class Counting(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[2](self[1](self[0](x))) * float(x.abs().max().item())


@pytest.mark.parametrize(("kind", "line"), [(Deciding, "if x.sum() > 0:"), (Counting, "return self[2]")])
def test_a_model_that_cannot_be_exported_is_told_its_line(kind, line):
    model = kind(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    decomposition = Decomposition({"1": torch.ones(3, 4, dtype=torch.bool)})
    place = rf"test_compose\.py:\d+ \({re.escape(line)}.*\)"
    with pytest.raises(
        ValueError, match=rf"model: {kind.__name__} cannot be exported in eval mode, because of .*{place}"
    ):
        compose(model, decomposition, [0], example=torch.randn(2, 3))


class Lengths(nn.Sequential):
    """Asks for the number of samples in ways that a graph can follow."""

    def forward(self, x: Tensor) -> Tensor:
        x = self[1](self[0](x)).view(len(x), -1)
        return self[2](x) + torch.zeros(x.shape[0], 1).expand(len(x), 3)


def test_the_number_of_samples_stays_free():
    model, decomposition = Lengths(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), tiny()[1]
    composed = compose(model, decomposition, [2, 0], example=torch.randn(2, 3))
    for samples in (1, 2, 5):
        x = torch.randn(samples, 3)
        torch.testing.assert_close(composed(x), mask(model, decomposition, [2, 0])(x))


def test_a_size_that_is_asked_for_as_a_number_is_fixed():
    class Fixed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](self[1](self[0](x)).view(int(x.shape[0]), 4))

    composed = compose(Fixed(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), tiny()[1], [0], example=torch.randn(2, 3))
    assert composed(torch.randn(2, 3)).shape == (2, 1)
    with pytest.raises(ValueError, match=r"input 0: expected shape \(2, 3\), got \(5, 3\)"):
        composed(torch.randn(5, 3))


def test_little_that_goes_is_warned_of():
    model = nn.Sequential(nn.Linear(30, 90), nn.ReLU(), nn.Linear(90, 3))
    decomposition = Decomposition({"1": (torch.arange(90) > 1).repeat(3, 1)})
    with pytest.warns(UserWarning, match=r"compose: 9[5-9]\.\d% of the parameters are left; composed.report\(\) says"):
        composed = compose(model, decomposition, [0, 1, 2], example=torch.randn(2, 30))
    assert re.search(r"^0 +88 of 90 +2728 of 2790", composed.report(), re.MULTILINE)


def test_model_with_several_outputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), F.relu(self.layer(x))

    decomposition, x = Decomposition({"relu": torch.arange(9).view(3, 3) % 2 == 0}), torch.randn(2, 3)
    model = watched(Two(), x)
    for output, columns in ((None, (2, 2)), (1, (3, 2)), ([0], (2, 3))):
        expected = mask(model, decomposition, [2, 0], output=output)(x)
        got = compose(model, decomposition, [2, 0], output=output)(x)
        assert tuple(each.shape[1] for each in got) == columns
        torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="output: expected one of"):
        compose(model, decomposition, [0], output="logits")


class Switched(nn.Module):
    """Does what its attributes say when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(3, 6), nn.Linear(6, 4)
        self.doubled, self.scale, self.steps = False, torch.tensor(2.0), [1]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.hidden(x)) * self.scale
        for step in self.steps:
            x = x + step
        return self.last(x) * (2 if self.doubled else 1)


@pytest.mark.parametrize("change", ["flag", "another tensor", "tensor in place", "list in place"])
def test_a_model_that_was_changed_is_read_again(change):
    model, x = Switched().eval(), torch.randn(5, 3)
    decomposition = random_modules(widths(watched(model), x), 4, 0.5)
    compose(model, decomposition, [0, 1], example=x)
    if change == "flag":
        model.doubled = True
    elif change == "another tensor":
        model.scale = torch.tensor(5.0)
    elif change == "tensor in place":
        model.scale.mul_(3)
    else:
        model.steps.append(4)
    composed = compose(model, decomposition, [2, 0], example=x)
    expected = mask(model, decomposition, [2, 0])
    torch.testing.assert_close(composed(x), expected(x), rtol=1e-5, atol=1e-5)


def test_a_model_that_is_as_it_was_is_read_once():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)).eval()
    x = torch.randn(5, 3, 2, 2)
    taps = moda.observe(model)
    with torch.no_grad():
        model(x)
    decomposition = random_modules(dict(zip(taps.names, taps.widths, strict=True)), 4, 0.5)
    first = composer_of(taps, decomposition, x)
    compose(taps, decomposition, [2, 0], example=x)
    assert composer_of(taps, decomposition, x) is first


class Tokens(nn.Module):
    """A label for every token: logits (N, T, 4), and something beside them that has as many columns."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(3, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.hidden(x))
        return {"logits": self.last(hidden), "hidden": hidden[..., :4]}


def test_logits_of_tokens() -> None:
    model = Tokens().eval()
    decomposition = random_modules(widths(watched(model), torch.randn(2, 6, 3)), 4, 0.4)
    classes = [3, 1]
    composed, masked = compose(model, decomposition, classes), mask(model, decomposition, classes)
    for shape in ((5, 7, 3), (4, 2, 3)):
        x = torch.randn(shape)
        got, expected = composed(x), masked(x)
        assert got["logits"].shape == (*shape[:2], 2)
        assert got["hidden"].shape == (*shape[:2], 4)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name])
    assert composed.get_parameter("last.weight").shape[0] == 2
    with pytest.raises(ValueError, match=r"logits of shape \(2, 4, 4\) do not tell which axis has the 4 classes"):
        masked(torch.randn(2, 4, 3))
    with pytest.raises(ValueError, match="do not tell which axis"):
        compose(model, decomposition, classes, example=torch.randn(2, 4, 3))


class FoldedHeads(nn.Module):
    """Attention-like: heads are folded into the batch, in one order or the other, where all of a head's neurons are needed."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.hidden, self.last, self.batch_first = nn.Linear(3, 12), nn.Linear(12, 4), batch_first

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, _ = x.shape
        heads = torch.relu(self.hidden(x)).view(samples, tokens, 4, 3)
        order = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        folded = torch.softmax(heads.permute(order).reshape(-1, tokens, 3), -1)
        if self.batch_first:
            unfolded = folded.view(samples, 4, tokens, 3).transpose(1, 2)
        else:
            unfolded = folded.view(4, samples, tokens, 3).permute(1, 2, 0, 3)
        return self.last(unfolded.reshape(samples, tokens, 12)).mean(1)


@pytest.mark.parametrize("masks", ["random", "whole heads", "heads and more"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_folded_into_the_batch_follow_its_size(batch_first, masks):
    model = FoldedHeads(batch_first).eval()
    x = torch.randn(2, 6, 3)
    taps = taps_of(watched(model, x))
    (tap,) = taps.names
    kept = random_modules({tap: 12}, 4, 0.4, seed=3).masks[tap]
    if masks != "random":
        kept = torch.zeros(4, 12, dtype=torch.bool)
        kept[:, 3:6], kept[1, 9:12], kept[1, :3] = True, True, True
        kept[3, 7] = masks == "heads and more"
    decomposition = Decomposition({tap: kept})
    composed, masked = compose(model, decomposition, [1, 3], example=x), mask(model, decomposition, [1, 3])
    for samples in (1, 2, 3, 7):
        other = torch.randn(samples, 6, 3)
        torch.testing.assert_close(composed(other), masked(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, wrong, x: compose(model, wrong, [0], example=x),
        lambda model, wrong, x: plan(model, wrong, [0], example=x),
        lambda model, wrong, _: mask(model, wrong, [0]),
        lambda model, wrong, x: measure.size(model, wrong, [0], example=x),
        lambda model, wrong, x: measure.module_sizes(model, wrong, example=x),
        lambda model, wrong, x: measure.overlap(model, wrong, 0, 1, example=x),
        lambda _, wrong, __: measure.neurons_kept(wrong, [0]),
    ],
)
@pytest.mark.parametrize(
    "wrong", [None, {"1": torch.ones(2, 4)}, "decomposition"], ids=lambda wrong: type(wrong).__name__
)
def test_what_is_no_decomposition_is_named(call, wrong):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(TypeError, match=f"decomposition: expected a moda.Decomposition, got {type(wrong).__name__}"):
        call(model, wrong, torch.randn(2, 3))
