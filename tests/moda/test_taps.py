from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.ops import StochasticDepth

from moda import taps
from moda.taps import HookedModel, InstrumentedModel, Tap, TracingError, instrument
from moda_kernels import modular_losses

HERE = Path(__file__)


def line_of(marker: str) -> str:
    """`test_taps.py:<line>` of the line of this file that ends in `# <marker>`."""
    lines = HERE.read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"# {marker}")]
    return f"{HERE.name}:{number} in "


class Spy(TorchFunctionMode):
    """Keeps a copy of what each activation function gives, called by a module or not, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = function(*args, **(kwargs or {}))
        if function in (F.relu, F.hardtanh, F.relu6, F.hardswish):
            self.outputs.append(output.clone())
        return output


def spied(model: nn.Module, x: Tensor) -> list[Tensor]:
    with Spy() as spy:
        model(x)
    return spy.outputs


class Lambda(nn.Module):
    """conv -> the given function -> sum over positions."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x)).flatten(1)


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 5, 3),
        nn.Hardswish(inplace=True),
        nn.Dropout(0.5, inplace=True),
        nn.Flatten(),
        nn.Linear(5 * 4 * 4, 7),
        nn.ReLU(),
        nn.Linear(7, 4),
    )


def images(n: int = 4, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size)


# ---- models of the field ---------------------------------------------------------------------------------------

ZOO = {
    "resnet18": (17, 32, ["relu", "layer1.0.relu", "layer1.0.relu_1", "layer1.1.relu", "layer1.1.relu_1"]),
    "vgg11_bn": (10, 32, ["features.2", "features.6", "features.10", "features.13", "features.17"]),
    "densenet121": (121, 32, ["features.relu0", "features.denseblock1.denselayer1.relu1"]),
    "mobilenet_v2": (35, 32, ["features.0.2", "features.1.conv.0.2", "features.2.conv.0.2"]),
    "mobilenet_v3_small": (33, 32, ["features.0.2", "features.1.block.0.2", "features.1.block.1.activation"]),
}


def check_zoo_model(name: str, training: bool) -> None:
    count, size, first_names = ZOO[name]
    model = models.get_model(name, num_classes=5).train(training)
    twin = copy.deepcopy(model) if training else model  # in training each forward moves the batch norms
    x = images(2, size)
    torch.manual_seed(1)
    tapped = instrument(model)
    torch.manual_seed(1)
    y = tapped(x)
    seen = tapped.activations()
    torch.manual_seed(1)
    expected = spied(twin, x)
    assert len(seen) == len(tapped.taps) == count
    assert tapped.taps[: len(first_names)] == first_names
    assert len(set(tapped.taps)) == count
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", tap) for tap in tapped.taps)
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    if training:
        assert all(torch.equal(a, b) for a, b in zip(tapped.buffers(), twin.buffers(), strict=True))
    else:
        assert torch.equal(y, twin(x))


@pytest.mark.parametrize("name", ZOO)
def test_activations_of_a_zoo_model_are_what_its_activation_functions_give(name: str) -> None:
    check_zoo_model(name, training=False)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2", "mobilenet_v3_small"])
def test_the_same_in_training(name: str) -> None:
    check_zoo_model(name, training=True)


def test_state_dict_goes_both_ways_and_parameters_are_shared() -> None:
    model = models.mobilenet_v3_small(num_classes=5)
    tapped = instrument(model)
    assert list(tapped.state_dict()) == list(model.state_dict())
    assert [n for n, _ in tapped.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(p is q for p, q in zip(tapped.parameters(), model.parameters(), strict=True))
    assert all(p is q for p, q in zip(tapped.buffers(), model.buffers(), strict=True))

    other = models.mobilenet_v3_small(num_classes=5).eval()
    other.load_state_dict(tapped.state_dict())
    x = images(2, 32)
    assert torch.equal(other(x), tapped.eval()(x))
    fresh = instrument(models.mobilenet_v3_small(num_classes=5)).eval()
    fresh.load_state_dict(other.state_dict())
    assert torch.equal(other(x), fresh(x))


def test_the_model_itself_is_left_as_it_was() -> None:
    model = small_cnn()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    keys = [set(module.__dict__) for module in model.modules()]
    tapped = instrument(model)
    assert [module.training for module in model.modules()] == flags
    assert [set(module.__dict__) for module in model.modules()] == keys
    assert "_taps" not in dict(model.named_modules())
    model(images())
    with pytest.raises(RuntimeError, match="no activations recorded"):
        tapped.activations()


def test_gradients_through_activations_equal_those_of_hooks() -> None:
    torch.manual_seed(3)
    model = models.resnet18(num_classes=3)
    plain, tapped = copy.deepcopy(model), instrument(model)
    x = images(2, 32)
    y = tapped(x)
    loss = y.logsumexp(1).sum() + sum((a.abs().mean() * (i + 1) for i, a in enumerate(tapped.activations())))
    loss.backward()
    outputs: list[Tensor] = []
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    y = plain(x)
    other = y.logsumexp(1).sum() + sum((a.abs().mean() * (i + 1) for i, a in enumerate(outputs)))
    other.backward()
    assert torch.equal(loss, other)
    for (name, p), q in zip(tapped.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_unused_submodules_and_a_train_override_stay() -> None:
    class Block(nn.Sequential):
        def train(self, mode: bool = True) -> Block:
            super().train(mode)
            self[1].eval()
            return self

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)
            self.block = Block(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.block(x))

    tapped = instrument(Net())
    assert list(tapped.state_dict())[:2] == ["spare.weight", "spare.bias"]
    tapped.train()
    assert tapped.training
    assert not tapped.get_submodule("block.1").training
    before = tapped.get_submodule("block.1").running_mean.clone()
    tapped(images())
    assert torch.equal(tapped.get_submodule("block.1").running_mean, before)


# ---- what is a tap, and its name -------------------------------------------------------------------------------

RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu inplace": lambda x: F.relu(x, inplace=True),
    "F.relu inplace by position": lambda x: F.relu(x, True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "keyword": lambda x: F.relu(input=x),
}


@pytest.mark.parametrize("form", RELUS)
def test_every_form_of_relu_becomes_the_tap(form: str) -> None:
    tapped = instrument(Lambda(RELUS[form]))
    x = images()
    conv = tapped.get_submodule("conv")(x)
    y = tapped(x)
    (seen,) = tapped.activations()
    assert tapped.taps == ["relu"]
    assert torch.equal(seen, conv.clamp(min=0))
    assert torch.equal(y, seen.flatten(1))
    nodes = [node for node in tapped.graph.nodes if node.op.startswith("call_")]
    assert [str(node.target) for node in nodes if node.op == "call_module"] == ["conv", "_taps.0"]
    assert len(nodes) == 3  # nothing of the call itself is left
    assert tapped.get_submodule("_taps.0").inplace == ("inplace" in form or "_" in form or "in place" in form)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2, inplace=True),
    "elu": F.elu,
    "selu": torch.selu_,
    "celu": F.celu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: F.silu(x, inplace=True),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_activations_stay_and_are_followed_by_their_tap(name: str) -> None:
    tapped = instrument(Lambda(OTHERS[name]))
    x = images()
    expected = OTHERS[name](tapped.get_submodule("conv")(x))
    y = tapped(x)
    (seen,) = tapped.activations()
    assert tapped.taps == [name]
    assert torch.equal(seen, expected)
    assert torch.equal(y, expected.flatten(1))


@pytest.mark.parametrize(
    "kind", [nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus]
)
def test_activation_modules_are_tapped(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), kind(), nn.Linear(4, 2))
    tapped = instrument(model)
    x = torch.randn(5, 3)
    tapped(x)
    (seen,) = tapped.activations()
    assert tapped.taps == ["1"]
    assert torch.equal(seen, model[1](model[0](x)))


def test_gates_are_no_taps() -> None:
    gates = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh(), nn.Softmax(1))
    message = "model: found no call of an activation function to tap"
    with pytest.raises(ValueError, match=message):
        instrument(gates)
    with pytest.raises(ValueError, match=message):
        instrument(gates, method="hooks")


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.add_module("a/b c", nn.ReLU())
        self.block = Lambda(F.relu)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.relu(x) - 1)
        return self.block(self.relu(self._modules["a/b c"](x) - 1))


def test_names_are_paths_made_unique_and_safe() -> None:
    expected = ["relu", "relu_1", "a_b_c", "relu_2", "block.relu"]
    assert instrument(Named()).taps == expected
    assert instrument(Named()).taps == expected


def test_taps_are_safetensors_keys() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    masks = {name: torch.ones(2, dtype=torch.bool) for name in instrument(Named()).taps}
    assert safetensors.load(safetensors.save(masks)).keys() == masks.keys()


def test_a_relu_with_a_hook_is_kept_and_its_hook_fires() -> None:
    model = small_cnn()
    model[2].register_forward_hook(lambda _m, _i, out: out * 2)
    tapped = instrument(model)
    x = images()
    tapped(x)
    seen = tapped.activations()[0]
    assert torch.equal(seen, 2 * F.relu(copy.deepcopy(model[1]).train()(model[0](x))))


def test_a_tap_nobody_uses_survives_dead_code_elimination() -> None:
    def forked(x: Tensor) -> Tensor:
        F.gelu(x)
        return F.relu(x)

    tapped = instrument(Lambda(forked))
    tapped.graph.eliminate_dead_code()
    assert tapped.taps == ["gelu", "relu"]


def test_transformer_layers_of_torch_are_whole_and_say_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with pytest.warns(UserWarning, match=r"inside torch\.nn\.TransformerEncoderLayer '2' are not tapped"):
        tapped = instrument(model)
    assert tapped.taps == ["1"]


# ---- what is recorded, and for how long ------------------------------------------------------------------------


def test_activations_are_handed_over_once() -> None:
    tapped = instrument(small_cnn())
    message = r"no activations recorded: call the model first, .* inside `with model\.recording\(\):`"
    with pytest.raises(RuntimeError, match=message):
        tapped.activations()
    tapped(images())
    assert [tuple(a.shape) for a in tapped.activations()] == [(4, 6, 6, 6), (4, 5, 4, 4), (4, 7)]
    with pytest.raises(RuntimeError, match=message):
        tapped.activations()


def test_a_new_forward_starts_a_new_record() -> None:
    tapped = instrument(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    tapped(torch.randn(2, 2))
    y = tapped(torch.randn(5, 2))
    (seen,) = tapped.activations()
    assert torch.equal(seen, y)
    tapped(torch.randn(2, 2))
    with torch.no_grad():
        tapped(torch.randn(2, 2))
    with pytest.raises(RuntimeError, match="no activations recorded"):
        tapped.activations()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_recording_records(mode: Callable[[], object]) -> None:
    tapped = instrument(small_cnn())
    with mode():
        tapped(images())
        with pytest.raises(RuntimeError, match="no activations recorded"):
            tapped.activations()
        with tapped.recording(), tapped.recording():
            tapped(images())
            assert len(tapped.activations()) == 3
        tapped(images())
        with pytest.raises(RuntimeError, match="no activations recorded"):
            tapped.activations()


def test_plain_inference_keeps_no_activation_alive() -> None:
    made: list[weakref.ref[Tensor]] = []
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    tapped = instrument(model)
    tapped.get_submodule("2").register_forward_pre_hook(lambda _m, x: made.append(weakref.ref(x[0])))
    with torch.no_grad():
        tapped(torch.randn(3, 4))
    assert made[0]() is None
    y = tapped(torch.randn(3, 4))  # with gradients it is kept until it is taken
    assert made[1]() is not None
    del y


def test_activations_die_with_the_step() -> None:
    tapped = instrument(small_cnn())
    gc.collect()
    gc.disable()  # by reference counting alone: no cycle may hold them
    try:
        loss = tapped(images()).sum()
        seen = tapped.activations()
        alive = [weakref.ref(a) for a in seen]
        loss = loss + sum(a.abs().mean() for a in seen)
        loss.backward()
        del loss, seen
        assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()


def test_deepcopy_after_a_step_is_independent() -> None:
    tapped = instrument(small_cnn()).eval()
    x = images()
    tapped(x).sum().backward()  # the record is still there: a deep copy must not trip over it
    clone = copy.deepcopy(tapped)
    assert isinstance(clone, InstrumentedModel)
    assert clone.taps == tapped.taps
    assert list(clone.state_dict()) == list(tapped.state_dict())
    with pytest.raises(RuntimeError, match="no activations recorded"):
        clone.activations()
    assert len(tapped.activations()) == 3
    y = tapped(x)
    tapped.activations()
    with torch.no_grad():
        for parameter in tapped.parameters():
            parameter.zero_()
    assert torch.equal(clone(x), y)
    assert len(clone.activations()) == 3
    with pytest.raises(RuntimeError, match="no activations recorded"):
        tapped.activations()
    again = copy.deepcopy(clone)
    assert torch.equal(again(x), y)
    assert len(again.activations()) == 3


def test_checkpointing_the_whole_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    tapped, plain = instrument(copy.deepcopy(model)), instrument(model)
    x = images()

    def step(run: Callable[[Tensor], Tensor], of: InstrumentedModel) -> Tensor:
        loss = run(x).logsumexp(1).sum()
        loss = loss + 3 * of.activations()[0].square().mean()
        loss.backward()
        return loss

    a = step(lambda x: checkpoint(tapped, x, use_reentrant=False), tapped)
    b = step(plain, plain)
    assert torch.equal(a, b)
    for p, q in zip(tapped.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    with pytest.raises(RuntimeError, match="no activations recorded"):
        tapped.activations()  # the recomputation recorded nothing
    checkpoint(tapped, x.requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="no activations recorded"):
        tapped.activations()


# ---- the neurons' axis -----------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """A block of a vision transformer: patches, norm, attention over tokens, MLP with GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.patches(x)).flatten(2).transpose(1, 2)
        z = self.norm(x)
        x = x + self.attention(z, z, z, need_weights=False)[0]
        x = F.silu(x + self.mlp(x))
        return self.head(x.mean(1))


def test_token_activations_have_their_neurons_moved_to_dim_1() -> None:
    model = Tokens().eval()
    tapped = instrument(model)
    x = images(2, 16)
    y = tapped(x)
    conv, hidden, out = tapped.activations()
    assert tapped.taps == ["relu", "mlp.2", "silu"]
    assert [tapped.get_submodule(f"_taps.{i}").neuron_dim for i in range(3)] == [1, -1, -1]
    assert (tuple(conv.shape), tuple(hidden.shape), tuple(out.shape)) == ((2, 8, 4, 4), (2, 12, 16), (2, 8, 16))
    z = conv.flatten(2).transpose(1, 2)
    n = model.norm(z)
    z = z + model.attention(n, n, n, need_weights=False)[0]
    torch.testing.assert_close(hidden, model.mlp[2](model.mlp[1](model.mlp[0](z))).transpose(1, 2))
    torch.testing.assert_close(out, F.silu(z + model.mlp(z)).transpose(1, 2))
    assert hidden._base is not None  # a view, not a copy
    torch.testing.assert_close(y, model(x))


class Chain(nn.Module):
    def __init__(self, first: nn.Module, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.between = first, between

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.between(self.first(x)))


AXES: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor], tuple[int, ...], int]] = {
    "linear on tokens": (nn.Linear(5, 7), lambda x: x, (2, 3, 5), -1),
    "behind dropout and scaling": (nn.Linear(5, 7), lambda x: F.dropout(x, 0.5, False) * 2 + 1, (2, 3, 5), -1),
    "layer norm": (nn.LayerNorm(5), lambda x: x, (2, 3, 5), -1),
    "layer norm over everything": (nn.Sequential(nn.Conv1d(3, 7, 1), nn.LayerNorm((7, 5))), lambda x: x, (2, 3, 5), 1),
    "functional layer norm": (nn.Identity(), lambda x: F.layer_norm(x, (5,)), (2, 3, 5), -1),
    "rms norm": (nn.RMSNorm(5), lambda x: x, (2, 3, 5), -1),
    "linear, function": (nn.Identity(), lambda x: F.linear(x, torch.ones(7, 5)), (2, 3, 5), -1),
    "conv1d": (nn.Conv1d(3, 7, 1), lambda x: x, (2, 3, 5), 1),
    "conv1d to tokens": (nn.Conv1d(3, 7, 1), lambda x: x.transpose(1, 2), (2, 3, 5), -1),
    "tokens to channels": (nn.Linear(5, 7), lambda x: x.transpose(-1, -2), (2, 3, 5), 1),
    "tokens to channels, function": (nn.Linear(5, 7), lambda x: torch.transpose(x, 1, 2), (2, 3, 5), 1),
    "permuted to channels last": (nn.Conv2d(3, 7, 1), lambda x: x.permute(0, 2, 3, 1), (2, 3, 5, 4), -1),
    "permuted twice": (
        nn.Conv2d(3, 7, 1),
        lambda x: x.permute((0, 2, 3, 1)).permute(0, 3, 1, 2),
        (2, 3, 5, 4),
        1,
    ),
    "batch norm": (nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(3)), lambda x: x, (2, 3, 5), 1),
    "flattened": (nn.Linear(5, 7), lambda x: x.flatten(1), (2, 3, 5), 1),
    "nothing with neurons": (nn.Identity(), lambda x: x, (2, 3, 5), 1),
    "sum with an embedding": (nn.Linear(5, 7), lambda x: torch.ones(1, 3, 7) + x, (2, 3, 5), -1),
}


@pytest.mark.parametrize("case", AXES)
def test_the_axis_follows_from_the_producer(case: str) -> None:
    first, between, shape, dim = AXES[case]
    tapped = instrument(Chain(first, between))
    x = torch.randn(shape)
    y = tapped(x)
    (seen,) = tapped.activations()
    assert tapped.get_submodule("_taps.0").neuron_dim == dim
    assert torch.equal(seen, y if dim == 1 else y.movedim(-1, 1))


def test_neurons_between_the_axes_are_refused() -> None:
    model = Chain(nn.Conv2d(3, 7, 1), lambda x: x.permute(0, 2, 1, 3))
    with pytest.raises(TracingError, match="its neurons are at dim -2; only dim 1 and the last one are known"):
        instrument(model)


# ---- in place --------------------------------------------------------------------------------------------------


def shifted(x: Tensor) -> Tensor:
    x = F.gelu(x)
    x += 1
    return x * 2


def scaled(x: Tensor) -> Tensor:
    x = F.gelu(x)
    x.mul_(3)
    return x * 2


def scaled_view(x: Tensor) -> Tensor:
    return F.gelu(x).flatten(1).mul_(3) * 2


def activated_again(x: Tensor) -> Tensor:
    return F.hardswish(F.gelu(x), inplace=True) * 2


def rectified_again(x: Tensor) -> Tensor:
    return F.relu(F.gelu(x), inplace=True) * 2


def written_out(x: Tensor) -> Tensor:
    y = F.gelu(x)
    torch.add(y, 1, out=y)
    return y * 2


def dropped(x: Tensor) -> Tensor:
    return F.dropout(F.gelu(x), 0.5, True, inplace=True)


IN_PLACE = [shifted, scaled, scaled_view, activated_again, rectified_again, written_out, dropped]


@pytest.mark.parametrize("function", IN_PLACE)
def test_a_record_is_not_overwritten_by_the_model(function: Callable[[Tensor], Tensor]) -> None:
    model = Lambda(function)
    tapped = instrument(model)
    x = images()
    conv = model.conv(x)
    with torch.no_grad(), tapped.recording():
        torch.manual_seed(5)
        y = tapped(x)
        seen = tapped.activations()
        torch.manual_seed(5)
        assert torch.equal(y, model(x))
    assert torch.equal(seen[0], F.gelu(conv))


def test_an_inplace_relu_whose_result_is_not_used_by_name() -> None:
    def rectified(x: Tensor) -> Tensor:
        F.relu(x, inplace=True)
        return x * 2

    tapped = instrument(Lambda(rectified))
    x = images()
    y = tapped(x)
    assert torch.equal(y, 2 * tapped.activations()[0].flatten(1))
    taps = [node for node in tapped.graph.nodes if str(node.target) == "_taps.0"]
    assert len(taps[0].users) == 1  # a mask on the tap reaches what follows


@pytest.mark.parametrize("activation", [F.hardswish, F.relu])
def test_a_record_is_not_overwritten_through_a_view_made_before(activation: Callable[..., Tensor]) -> None:
    def through_view(x: Tensor) -> Tensor:
        view = x.view(x.shape)
        activation(x, inplace=True)
        view *= 3
        return view * 2

    model = Lambda(through_view)
    tapped = instrument(model)
    x = images()
    with torch.no_grad(), tapped.recording():
        assert torch.equal(tapped(x), model(x))
        assert torch.equal(tapped.activations()[0], activation(model.conv(x)))


def test_residual_sums_stay_in_place() -> None:
    graph = instrument(models.resnet18()).graph
    assert [node for node in graph.nodes if node.target == "clone"] == []
    assert sum(getattr(node.target, "__name__", "") == "iadd" for node in graph.nodes) == 8


def test_overwritten_memory_that_is_used_again_is_refused() -> None:
    def aliased(x: Tensor) -> Tensor:
        x = F.gelu(x)
        view = x.view(-1)
        x += 1  # the overwriting line
        return view * 2  # the line that sees it

    message = (
        rf"{line_of('the overwriting line')}aliased: an activation is overwritten in place here, and its memory is "
        rf"used again at \S*{line_of('the line that sees it')}aliased"
    )
    with pytest.raises(TracingError, match=message):
        instrument(Lambda(aliased))


# ---- train and eval --------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Every training flag here is a constant in a plain torch.fx trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.depth = StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.conv(x), self.mean, self.var, training=self.training)
        x = F.relu(x)
        x = self.depth(F.dropout(x, 0.5, self.training))
        x = torch.dropout(x, 0.5, train=not self.training)
        return F.dropout(x, 0.25, True)


def test_training_flags_stay_live() -> None:
    model = Functional()
    tapped = instrument(model)
    x = images()
    for training in (True, False, True):
        model.train(training)
        tapped.train(training)
        state = copy.deepcopy(model.state_dict())
        torch.manual_seed(4)
        y = model(x)
        changed = copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        torch.manual_seed(4)
        assert torch.equal(tapped(x), y)
        assert all(torch.equal(a, b) for a, b in zip(tapped.state_dict().values(), changed.values(), strict=True))
    flags = [node.target for node in tapped.graph.nodes if str(node.target).endswith("training")]
    assert flags == ["training", "training", "depth.training", "training"]
    assert torch.equal(copy.deepcopy(tapped).eval().get_submodule("conv").weight, model.conv.weight)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        if self.training:
            return x + 1  # the train line
        return x * 2


def test_different_graphs_in_train_and_eval_are_refused() -> None:
    message = f"{line_of('the train line')}forward: the model does different things in train and eval mode"
    with pytest.raises(TracingError, match=message):
        instrument(Branching())


def test_a_number_that_depends_on_the_mode_is_refused() -> None:
    class Scaling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) * (1.0 if self.training else 0.5)

    with pytest.raises(TracingError, match="does different things in train and eval mode"):
        instrument(Scaling())


# ---- models that cannot be traced ------------------------------------------------------------------------------


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        if x.sum() > 0:  # the deciding line
            return x
        return -x


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + torch.randn(3))  # the random line


class Checkpointing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)  # the checkpoint line


class Indexing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        x[:, 0] = 0  # the index line
        return x


UNTRACEABLE = {
    "deciding": (Deciding, "symbolically traced variables cannot be used as inputs to control flow"),
    "random": (Noisy, "a tensor made here is random; a trace would freeze it"),
    "checkpoint": (Checkpointing, "gradient checkpointing inside the model would be lost"),
    "index": (Indexing, "does not support item assignment"),
}


@pytest.mark.parametrize("case", UNTRACEABLE)
def test_an_untraceable_model_is_told_its_line_and_the_other_route(case: str) -> None:
    kind, why = UNTRACEABLE[case]
    model = kind()
    flags = [set(module.__dict__) for module in model.modules()]
    with pytest.raises(TracingError) as caught:
        instrument(model)
    message = str(caught.value)
    assert message.startswith("model: cannot be traced faithfully: ")
    assert f"{line_of(f'the {case} line')}forward: " in message
    assert why in message
    assert message.endswith('use instrument(model, method="hooks"), which sees activation modules only')
    assert [set(module.__dict__) for module in model.modules()] == flags
    assert all(module.training for module in model.modules())


def test_hooks_of_modules_that_are_traced_through_are_refused() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    handle = model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(TracingError, match="module '0' has hooks, which a traced graph does not call"):
        instrument(model)
    handle.remove()
    model.register_full_backward_hook(lambda *_: None)
    with pytest.raises(TracingError, match="the model has hooks, which a traced graph does not call"):
        instrument(model)


def test_a_constant_made_in_forward_follows_the_model_but_not_into_its_state() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = torch.tensor([1.0, 2.0, 3.0])
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.linear(x) + torch.arange(3.0) * self.plain)

    model = Positions()
    tapped = instrument(model)
    x = torch.randn(2, 3)
    assert list(tapped.state_dict()) == list(model.state_dict())
    assert torch.equal(tapped(x), model(x))
    clone = copy.deepcopy(tapped)
    assert torch.equal(clone(x), model(x))
    assert list(clone.state_dict()) == list(model.state_dict())
    assert clone.double()(x.double()).dtype == torch.float64


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        instrument("resnet18")
    with pytest.raises(ValueError, match="method: expected 'fx' or 'hooks', got 'magic'"):
        instrument(small_cnn(), method="magic")
    with pytest.raises(ValueError, match="route: expected 'grouped', 'fused' or 'auto', got 'scenic'"):
        instrument(small_cnn(), route="scenic")
    with pytest.raises(ValueError, match=r"route: expected 'grouped' with method='hooks' .*, got 'fused'"):
        instrument(small_cnn(), method="hooks", route="fused")
    with pytest.raises(ValueError, match="model: is instrumented already"):
        instrument(instrument(small_cnn()))
    with pytest.raises(ValueError, match="model: is instrumented already"):
        instrument(instrument(small_cnn(), method="hooks"))
    with pytest.raises(TypeError, match="model: is wrapped in DataParallel; instrument the model inside it"):
        instrument(nn.DataParallel(small_cnn()))
    with pytest.raises(TypeError, match="model: is wrapped in OptimizedModule; instrument the model inside it"):
        instrument(torch.compile(small_cnn(), backend="eager"))


# ---- beside the rest of PyTorch --------------------------------------------------------------------------------


def test_autocast() -> None:
    model = small_cnn().eval()
    tapped = instrument(model)
    x = images()
    with torch.autocast("cpu", torch.bfloat16):
        y = tapped(x)
        assert torch.equal(y, model(x))
        seen = tapped.activations()
        expected = spied(model, x)
    assert {a.dtype for a in seen} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_channels_last_stays() -> None:
    tapped = instrument(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())).to(memory_format=torch.channels_last)
    tapped(images().to(memory_format=torch.channels_last))
    assert tapped.activations()[0].is_contiguous(memory_format=torch.channels_last)


def test_distributed_data_parallel(tmp_path: Path) -> None:
    tapped = instrument(small_cnn().eval())
    alone = copy.deepcopy(tapped)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tapped)
        x = images()
        for run, of in ((wrapped, wrapped.module), (alone, alone)):
            (run(x).sum() + sum(a.mean() for a in of.activations())).backward()
    finally:
        torch.distributed.destroy_process_group()
    for p, q in zip(tapped.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_functional_call() -> None:
    tapped = instrument(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    doubled = {name: 2 * p.detach() for name, p in tapped.named_parameters()}
    x = torch.randn(2, 3)
    y = torch.func.functional_call(tapped, doubled, (x,))
    torch.testing.assert_close(y, 2 * tapped(x))


def closed_form_loss(model: nn.Module, of: InstrumentedModel, x: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), labels)
    terms = modular_losses(of.activations(), labels, backend="torch")
    return loss + terms.affinity + terms.dispersion + 0.3 * terms.compactness


def test_one_compiled_step() -> None:
    tapped = instrument(small_cnn().eval())
    eager = copy.deepcopy(tapped)
    x, labels = images(6, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    compiled = torch.compile(closed_form_loss, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        a, b = compiled(tapped, tapped, x, labels), closed_form_loss(eager, eager, x, labels)
        torch.testing.assert_close(a, b)
        a.backward()
        b.backward()
    for p, q in zip(tapped.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    with pytest.raises(RuntimeError, match="no activations recorded"):
        tapped.activations()


def test_a_compiled_model_records_in_the_model_it_was_made_of() -> None:
    tapped = instrument(small_cnn().eval())
    eager = copy.deepcopy(tapped)
    x, labels = images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    compiled = torch.compile(tapped, backend="aot_eager", fullgraph=True)
    a, b = closed_form_loss(compiled, tapped, x, labels), closed_form_loss(eager, eager, x, labels)
    torch.testing.assert_close(a, b)
    a.backward()
    b.backward()
    for p, q in zip(tapped.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    compiled(x)
    with torch.no_grad():
        compiled(x)
        with pytest.raises(RuntimeError, match="no activations recorded"):
            tapped.activations()
        with tapped.recording():
            compiled(x)
        assert len(tapped.activations()) == 3


# ---- what the taps record for the loss -------------------------------------------------------------------------


class Mixed(nn.Module):
    """Spatial ReLUs in place and not, a Hardswish, a ReLU on tokens and one on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.tokens = nn.Linear(36, 10)
        self.rows = nn.Linear(60, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        x = x + F.relu(self.again(x), inplace=True)
        x = F.relu(self.tokens(F.hardswish(x).flatten(2)))
        return F.relu(self.rows(x.flatten(1)))


FUSED_SHAPES = [(6, 6), (6, 6), (6, 6, 6, 6), (6, 10, 6), (6, 7)]
FULL_SHAPES = [(6, 6, 6, 6), (6, 6, 6, 6), (6, 6, 6, 6), (6, 10, 6), (6, 7)]


def shapes(activations: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(a.shape) for a in activations]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_routes_give_the_same_loss_and_gradients(dtype: torch.dtype) -> None:
    model = Mixed().to(dtype)
    grouped, fused = instrument(copy.deepcopy(model)), copy.deepcopy(instrument(model, route="fused"))
    x, labels = images(6).to(dtype), torch.tensor([0, 1, 2, 0, 1, 2])
    a, b = closed_form_loss(grouped, grouped, x, labels), closed_form_loss(fused, fused, x, labels)
    torch.testing.assert_close(a, b)
    a.backward()
    b.backward()
    for p, q in zip(grouped.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    fused(x)
    assert shapes(fused.activations()) == FUSED_SHAPES


def test_a_fused_tap_records_the_mean_over_positions() -> None:
    fused = instrument(Mixed(), route="fused")
    x = images(6)
    expected = spied(fused, x)
    seen = fused.activations()
    torch.testing.assert_close(seen[0], F.relu(fused.get_submodule("conv")(x)).mean((2, 3)))
    assert torch.equal(seen[2], expected[0])  # the only call that is neither fused nor a ReLU
    with torch.autocast("cpu", torch.bfloat16):
        fused(x)
        seen = fused.activations()
        assert [a.dtype for a in seen] == [torch.float32] * 2 + [torch.bfloat16] * 3
        grouped = instrument(Mixed())
        grouped.load_state_dict(fused.state_dict())
        grouped(x)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    torch.testing.assert_close(
        torch.stack(modular_losses(seen, labels)), torch.stack(modular_losses(grouped.activations(), labels))
    )


def test_recording_gives_activations_whatever_the_route() -> None:
    fused, grouped = (instrument(Mixed(), route=route) for route in ("fused", "grouped"))
    grouped.load_state_dict(fused.state_dict())
    x = images(6)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), fused.recording():
            fused(x)
            seen = fused.activations()
        grouped(x)
        assert shapes(seen) == FULL_SHAPES
        assert all(torch.equal(a, b) for a, b in zip(seen, grouped.activations(), strict=True))


def test_auto_goes_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    automatic = instrument(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), route="auto")
    monkeypatch.setattr(taps, "FUSED_FROM_BYTES", 6 * 6 * 6 * 6 * 4)
    for n, expected in ((5, (5, 6, 6, 6)), (6, (6, 6)), (7, (7, 6))):
        automatic(images(n))
        assert shapes(automatic.activations()) == [expected]
    automatic.half()
    automatic(images(6).half())
    assert shapes(automatic.activations()) == [(6, 6, 6, 6)]


def test_the_fused_route_under_checkpointing() -> None:
    fused = instrument(Mixed(), route="fused")
    plain = copy.deepcopy(fused)
    x, labels = images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    closed_form_loss(lambda x: checkpoint(fused, x, use_reentrant=False), fused, x, labels).backward()
    closed_form_loss(plain, plain, x, labels).backward()
    for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    with pytest.raises(RuntimeError, match="no activations recorded"):
        fused.activations()


def test_the_fused_route_compiles() -> None:
    fused = instrument(Mixed(), route="fused")
    eager = copy.deepcopy(fused)
    x, labels = images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    compiled = torch.compile(closed_form_loss, backend="aot_eager", fullgraph=True)
    a, b = compiled(fused, fused, x, labels), closed_form_loss(eager, eager, x, labels)
    torch.testing.assert_close(a, b)
    a.backward()
    b.backward()
    for p, q in zip(fused.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


# ---- the route of hooks ----------------------------------------------------------------------------------------


class Wandering(Deciding):
    """Cannot be traced; calls one ReLU twice and one on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(self.conv(x))
        return self.act(self.linear(x.flatten(2)[:, :, :6]))

    def greet(self) -> str:
        return "hello"


def test_hooks_see_every_call_of_an_activation_module() -> None:
    model = Wandering()
    watched = instrument(model, method="hooks")
    assert isinstance(watched, HookedModel)
    assert isinstance(watched, Wandering)
    assert watched.greet() == "hello"
    with pytest.raises(RuntimeError, match="taps: known only after the first recorded forward pass"):
        _ = watched.taps
    x = images()
    expected = spied(model, x)
    y = watched(x)
    assert watched.taps == ["act", "act_1"]
    first, second = watched.activations()
    assert torch.equal(y, model(x))
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1].transpose(1, 2))  # tokens behind a Linear
    with pytest.raises(RuntimeError, match="no activations recorded"):
        watched.activations()
    model(x)  # the model itself records nothing
    with pytest.raises(RuntimeError, match="no activations recorded"):
        watched.activations()
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_share_state_and_copy_deep() -> None:
    model = Wandering()
    watched = instrument(model, method="hooks")
    assert list(watched.state_dict()) == list(model.state_dict())
    assert all(p is q for p, q in zip(watched.parameters(), model.parameters(), strict=True))
    x = images()
    y = watched(x)
    y.sum().backward()
    clone = copy.deepcopy(watched)
    with pytest.raises(RuntimeError, match="no activations recorded"):
        clone.activations()
    assert len(watched.activations()) == 2
    assert torch.equal(clone(x), y)
    assert len(clone.activations()) == 2
    with pytest.raises(RuntimeError, match="no activations recorded"):
        watched.activations()


def test_hooks_record_when_the_tracer_does() -> None:
    watched = instrument(Wandering(), method="hooks")
    watched(images())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            watched(images())
            with pytest.raises(RuntimeError, match="no activations recorded"):
                watched.activations()
            with watched.recording():
                y = watched(images())
                assert torch.equal(watched.activations()[1], y.transpose(1, 2))


def test_hooks_under_checkpointing_inside_the_model() -> None:
    watched = instrument(Checkpointing(), method="hooks")
    x = torch.randn(4, 3)
    y = watched(x)
    (seen,) = watched.activations()
    assert torch.equal(seen, y)
    (y.sum() + seen.square().sum()).backward()
    plain = copy.deepcopy(watched.block)
    plain.zero_grad()
    z = plain(x)
    (z.sum() + z.square().sum()).backward()
    torch.testing.assert_close(watched.block[0].weight.grad, plain[0].weight.grad)
    with pytest.raises(RuntimeError, match="no activations recorded"):
        watched.activations()


def test_hooks_notice_an_overwritten_activation() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Hardswish(), nn.Dropout(0.5, inplace=True))
    watched = instrument(model, method="hooks")
    watched(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="activation '1' was overwritten in place after it was recorded"):
        watched.activations()
    x = torch.randn(2, 3)
    with torch.inference_mode(), watched.recording():  # nothing tells there: it is copied
        watched(x)
        assert torch.equal(watched.activations()[0], F.hardswish(model[0](x)))


def test_a_tap_says_what_it_is() -> None:
    tap = instrument(small_cnn()).get_submodule("_taps.0")
    assert isinstance(tap, Tap)
    assert repr(tap) == "Tap('2', neuron_dim=1, relu=True, inplace=True, route='grouped')"
