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
from torch.utils.checkpoint import checkpoint
from torchvision import models

from moda.observation.taps import InstrumentedModel, Tap, instrument
from tests.moda._helpers.tapping import Lambda, closed_form_loss, images, small_cnn, spied

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


def test_a_tap_says_what_it_is() -> None:
    tap = instrument(small_cnn()).get_submodule("_taps.0")
    assert isinstance(tap, Tap)
    assert repr(tap) == "Tap('2', neuron_dim=1, relu=True, inplace=True, route='grouped')"


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


@pytest.mark.parametrize("method", ["fx", "hooks"])
def test_a_receiver_gets_every_activation_at_once_and_nothing_is_kept(method):
    model = instrument(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU()), method=method)
    x, received = torch.randn(5, 3), []
    with torch.no_grad(), model.recording(lambda index, activation: received.append((index, activation))):
        model(x)
        with model.recording():  # an inner block keeps again
            model(x)
        expected = model.activations()
        with pytest.raises(RuntimeError, match="no activations recorded"):
            model.activations()
    assert [index for index, _ in received] == [0, 1]
    assert all(torch.equal(mine, theirs) for (_, mine), theirs in zip(received, expected, strict=True))


class _Spare(nn.Module):
    """ReLUs whose input somebody else sees, and two whose input nobody does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.hooked = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.flat, self.linear = nn.Flatten(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = F.relu(x)  # the caller's
        y = F.relu(self.norm(self.conv(given)))  # spare
        z = F.relu(y + y)  # spare
        kept = self.conv(given)  # used again below
        z = z + F.relu(kept) + kept + F.relu(self.hooked(y))
        rows = self.flat(z.mean((2, 3)))
        return rows, self.linear(F.relu(rows))  # returned, and a view


def test_overwriting_changes_only_what_nobody_else_sees():
    torch.manual_seed(0)
    plain, x = _Spare().eval(), torch.randn(2, 3, 5, 5)
    seen: list[torch.Tensor] = []
    plain.hooked.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model, given = instrument(plain), x.clone()
    inputs: list[tuple[int, int]] = []
    for tap in model._tap_modules():
        tap.register_forward_hook(lambda _, args, y: inputs.append((args[0].data_ptr(), y.data_ptr())))

    def run() -> tuple[list[torch.Tensor], list[bool]]:
        inputs.clear()
        with model.recording():
            outputs = model(given)
        return [*outputs, *model.activations(), seen[-1].clone()], [before == after for before, after in inputs]

    with torch.no_grad():
        expected, places = run()
        assert not any(places)
        with model.overwriting():
            found, places = run()
        assert places == [False, True, True, False, False, False]
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs)
        assert not any(run()[1])
    with model.overwriting():  # gradients are enabled
        assert not any(run()[1])
    assert torch.equal(given, x)


def test_global_hooks_see_values_as_they_were():
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    nn.init.constant_(plain[0].bias, -9.0)
    model, seen = instrument(plain), list[torch.Tensor]()

    def look(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        if isinstance(module, nn.Linear):
            seen.append(output)

    with nn.modules.module.register_module_forward_hook(look), torch.no_grad(), model.overwriting():
        model(torch.zeros(2, 3))
    assert (seen[0] == -9).all()


def test_what_a_replaced_forward_keeps_is_not_overwritten():
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    kept = torch.full((2, 4), -1.0)
    model = instrument(plain)
    plain[0].forward = lambda x: kept  # type: ignore[method-assign]
    with torch.no_grad(), model.overwriting():
        assert (model(torch.zeros(2, 3)) == 0).all()
    assert (kept == -1).all()


@pytest.mark.parametrize("method", ["fx", "hooks"])
def test_a_receiver_that_cannot_be_called_is_named(method):
    model = instrument(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), method=method)
    message = r"receiver: expected a function of \(index, activation\), got int"
    with pytest.raises(TypeError, match=message), model.recording(3):
        pass
    model(torch.randn(2, 3))
    assert len(model.activations()) == 1  # as if nothing had been asked
