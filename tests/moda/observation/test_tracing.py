from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from moda.observation.taps import TracingError, instrument
from tests.moda._helpers.tapping import Checkpointing, Deciding, images, line_of


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
    message = f"{line_of('the train line', __file__)}forward: the model does different things in train and eval mode"
    with pytest.raises(TracingError, match=message):
        instrument(Branching())


def test_a_number_that_depends_on_the_mode_is_refused() -> None:
    class Scaling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) * (1.0 if self.training else 0.5)

    with pytest.raises(TracingError, match="does different things in train and eval mode"):
        instrument(Scaling())


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + torch.randn(3))  # the random line


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
    assert f"{line_of(f'the {case} line', inspect.getfile(kind))}forward: " in message
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
