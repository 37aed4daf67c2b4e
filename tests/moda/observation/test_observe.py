"""An observed model is the plain model, and its taps see what its activation functions give."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moda
from moda.observation.taps import taps_of
from moda_kernels import ModularLoss
from tests.moda._helpers.tapping import Tokens, images, small_cnn, spied


class Functions(nn.Module):
    """A convolution, tokens, and the same function called twice by one module, once in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x)).flatten(2).transpose(1, 2)
        return self.c(F.gelu(self.b(x)).mean(1).relu_())


MODELS: dict[str, Callable[[], nn.Module]] = {"modules": small_cnn, "functions": Functions, "tokens": Tokens}


@pytest.mark.parametrize("route", ["grouped", "fused", "auto"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_an_observed_model_is_the_plain_one(name: str, training: bool, route: str) -> None:
    torch.manual_seed(0)
    plain = MODELS[name]().train(training)
    observed = copy.deepcopy(plain)
    taps = moda.observe(observed, route=route)
    for _ in range(3):
        x = images()
        results = []
        for model in (plain, observed):
            torch.manual_seed(7)
            y = model(x)
            y.square().sum().backward()
            results.append((y, torch.get_rng_state(), [p.grad for p in model.parameters()], list(model.buffers())))
        taps.activations()
        (y, state, gradients, buffers), (other, other_state, other_gradients, other_buffers) = results
        assert torch.equal(y, other)
        assert torch.equal(state, other_state)
        assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(buffers, other_buffers, strict=True))


def test_activations_are_what_the_functions_give() -> None:
    model = Functions()
    taps = moda.observe(model, route="grouped")
    x = images()
    expected = spied(copy.deepcopy(model), x)
    for _ in range(2):
        model(x)
        seen = taps.activations()
        assert taps.names == ("relu", "gelu", "relu_1")
        assert taps.widths == (4, 8, 8)
        assert [tuple(value.shape) for value in seen] == [(4, 4, 6, 6), (4, 8, 36), (4, 8)]
        assert torch.equal(seen[0], expected[0])


def test_replacing_puts_values_in_their_place() -> None:
    model = Functions().eval()
    taps = moda.observe(model)
    x = images()
    y = model(x)
    taps.clear()
    with taps.replacing(lambda _index, value: value * 1.0):
        assert torch.equal(model(x), y)
    with taps.replacing(lambda index, value: value * (index != 2)):
        assert torch.equal(model(x), model.c.bias.expand(4, 2))
    with pytest.raises(ValueError, match="function: expected a tensor of shape"), taps.replacing(lambda _i, v: v[:1]):
        model(x)


def test_saved_it_is_plain_and_a_copy_has_taps_of_its_own() -> None:
    model = small_cnn().eval()
    taps = moda.observe(model, example=images())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in small_cnn().modules()]
    clone = copy.deepcopy(model)
    of_clone = taps_of(clone)
    assert of_clone is not None
    assert of_clone is not taps
    x = images()
    assert torch.equal(clone(x), model(x))
    assert len(of_clone.activations()) == len(taps.activations()) == 3


def test_removing_leaves_no_trace() -> None:
    model = Tokens()
    attributes = {module: (type(module), set(vars(module))) for module in model.modules()}
    with moda.observe(model) as taps:
        model(images())
        assert len(taps.activations()) == 3
    assert {module: (type(module), set(vars(module))) for module in model.modules()} == attributes


def test_an_example_leaves_no_trace_but_the_plan() -> None:
    model, x = small_cnn(), images(1)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    taps = moda.observe(model, example=x)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert taps.names == ("2", "4", "8")


def swish(x: Tensor, beta: float = 1.0) -> Tensor:
    return x * torch.sigmoid(beta * F.softplus(x))


class Rectifier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) - 0.1 * F.relu(-x)


class WithOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(3, 4), Rectifier(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(swish(self.act(self.a(x)), beta=2.0))


def test_activations_of_the_users_own_are_tapped_as_wholes() -> None:
    model, x, code = WithOwn(), torch.randn(5, 3), swish.__code__
    y, hidden = model(x), model.act(model.a(x))
    expected = [hidden, swish(hidden, beta=2.0)]
    with moda.observe(model, activations=(Rectifier, swish)) as taps:
        for _ in range(2):
            assert torch.equal(model(x), y)
            assert taps.names == ("act", "swish")
            assert all(torch.equal(a, b) for a, b in zip(taps.activations(), expected, strict=True))
        with taps.replacing(lambda index, value: value * (index == 0)):
            assert torch.equal(model(x), model.b.bias.expand(5, 2))
        assert torch.equal(swish(hidden, beta=2.0), expected[1])  # outside of the model
    assert swish.__code__ is code
    assert torch.equal(swish(hidden, beta=2.0), expected[1])
    with pytest.raises(TypeError, match="activations: expected classes of modules and functions written in Python"):
        moda.observe(model, activations=(torch.sigmoid,))


def test_nobody_who_compiles_nothing_waits_for_the_compiler():
    program = (
        "import sys, torch; there = 'torch._dynamo' in sys.modules; import moda; "
        "model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)); "
        "taps = moda.observe(model); model(torch.randn(4, 3)).sum().backward(); taps.activations(); "
        "moda.count_firings(taps, [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))], 2); "
        "assert there or 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Bags(nn.Module):
    """Words of all samples one after the other, and where each sample's begin."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.last = nn.EmbeddingBag(30, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor, offsets: Tensor) -> Tensor:
        return self.last(F.relu(self.hidden(self.words(words, offsets))))


@pytest.mark.parametrize("named", [False, True])
def test_samples_may_be_bags_of_words(named: bool) -> None:
    torch.manual_seed(0)
    batches = [
        (torch.randint(30, (11,)), torch.tensor([0, 4, 4, 9]), torch.tensor([2, 0, 1, 2])),
        (torch.randint(30, (5,)), torch.tensor([0, 2]), torch.tensor([1, 0])),
    ]

    def run(model: nn.Module, words: Tensor, offsets: Tensor) -> Tensor:
        return model(words, offsets=offsets) if named else model(words, offsets)

    model = Bags()
    taps = moda.observe(model)
    for words, offsets, labels in batches:
        run(model, words, offsets)
        (activation,) = taps.activations()
        assert activation.shape == (len(offsets), 8)
        assert torch.isfinite(ModularLoss()([activation], labels))
    model.eval()
    rates = moda.count_firings(taps, [((words, offsets), labels) for words, offsets, labels in batches], 3)
    with torch.no_grad():
        fired = torch.cat([F.relu(model.hidden(model.words(*batch[:2]))) > 0 for batch in batches])
    labels = torch.cat([batch[2] for batch in batches])
    expected = torch.stack([fired[labels == k].float().mean(0) for k in range(3)])
    torch.testing.assert_close(rates.rates["relu"], expected)
    decomposition = moda.decompose(rates, 0.6)
    composed, masked = moda.compose(taps, decomposition, [2, 0]), moda.mask(model, decomposition, [2, 0])
    for words, offsets in (*(batch[:2] for batch in batches), (torch.randint(30, (4,)), torch.tensor([0]))):
        torch.testing.assert_close(run(composed, words, offsets), run(masked, words, offsets))


def test_two_inputs_of_one_number_a_sample_are_no_bags() -> None:
    class Pairs(Bags):
        def forward(self, words: Tensor, offsets: Tensor) -> Tensor:
            return self.last(F.relu(self.hidden(self.words(torch.stack((words, offsets), 1)))))

    model = Pairs()
    taps = moda.observe(model)
    model(torch.randint(30, (4,)), torch.tensor([0, 1, 2, 3]))
    assert taps.activations()[0].shape == (4, 8)


class Recurrent(nn.Module):
    """Words `(T, N)` and how many each sample has."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.cell = nn.Embedding(30, 6), nn.LSTM(6, 10)
        self.hidden, self.last = nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        hidden = F.relu(self.hidden(self.cell(self.words(words))[0]))
        inside = torch.arange(len(words))[:, None] < lengths
        return self.last((hidden * inside.unsqueeze(-1)).sum(0))


class Encoder(nn.Module):
    """PyTorch's own encoder for `(T, N, features)`."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0)
        self.encoder, self.last = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(x).mean(0))


@pytest.fixture
def no_fast_path():
    """PyTorch's fused road through its encoders is switched off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.usefixtures("no_fast_path")
@pytest.mark.parametrize("samples", [4, 6])  # another number than of words, and the same
@pytest.mark.parametrize("make", [Recurrent, Encoder])
def test_samples_may_lie_along_the_second_axis(make: Callable[[], nn.Module], samples: int) -> None:
    torch.manual_seed(0)
    model = make()
    plain = copy.deepcopy(model)
    if make is Recurrent:
        inputs: tuple[Tensor, ...] = torch.randint(30, (6, samples)), torch.randint(1, 7, (samples,))
    else:
        inputs = (torch.randn(6, samples, 8),)
    labels = torch.arange(samples) % 3
    taps = moda.observe(model, sample_dim=1)
    for training in (True, True, False):
        model.train(training), plain.train(training)
        torch.testing.assert_close(model(*inputs), plain(*inputs), rtol=0, atol=0)
        activations = taps.activations()
        assert [activation.shape for activation in activations] == [(samples, 8, 6)] * (1 if make is Recurrent else 2)
        model.zero_grad()
        ModularLoss()(activations, labels).backward()
    assert taps_of(copy.deepcopy(model)).sample_dim == 1
    batch = inputs if len(inputs) > 1 else inputs[0]
    rates = moda.count_firings(taps, [(batch, labels)], 3)
    for name, activation in zip(taps.names, activations, strict=True):
        fired = (activation.detach() > 0).flatten(2).any(2)
        expected = torch.stack([fired[labels == k].float().mean(0) for k in range(3)])
        torch.testing.assert_close(rates.rates[name], expected)
    decomposition = moda.decompose(moda.attribute(taps, [(batch, labels)], 3), epsilon=0.2)
    composed = moda.compose(taps, decomposition, [2, 0])
    masked = moda.mask(model, decomposition, [2, 0])
    torch.testing.assert_close(composed(*inputs), masked(*inputs))
    one = tuple(x[..., :1] if make is Recurrent else x[:, :1] for x in inputs)
    composed = moda.compose(taps, decomposition, [2, 0], example=one)  # of one sample, and free to take others
    torch.testing.assert_close(composed(*inputs), masked(*inputs))


@pytest.mark.parametrize("axis", [-1, True, "samples", 0.0, None])
def test_axes_of_samples_are_checked(axis: object) -> None:
    with pytest.raises(TypeError, match=r"sample_dim: expected an axis of the inputs, counted from 0, got"):
        moda.observe(small_cnn(), sample_dim=axis)


def test_an_axis_that_no_input_has_is_refused() -> None:
    taps = moda.observe(small_cnn(), sample_dim=5)
    with pytest.raises(ValueError, match=r"sample_dim: expected an axis of the inputs, got 5 for \(4, 3, 8, 8\)"):
        taps.model(torch.randn(4, 3, 8, 8))


def test_a_closed_encoder_says_how_to_open_it() -> None:
    taps = moda.observe(Encoder(), sample_dim=1)
    taps.model(torch.randn(6, 4, 8))
    assert all("torch.backends.mha.set_fastpath_enabled(False)" in reason for reason in taps.skipped.values())
    with pytest.raises(RuntimeError, match="none of its activations could be tapped"):
        taps.activations()
