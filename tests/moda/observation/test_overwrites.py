from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import models

from moda.observation.taps import TracingError, instrument
from tests.moda._helpers.tapping import Lambda, images, line_of


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


@pytest.mark.parametrize("function", [scaled, written_out])
def test_no_overwriting_is_dead_code(function: Callable[[Tensor], Tensor]) -> None:
    model = Lambda(function).eval()
    tapped = instrument(model)
    tapped.graph.eliminate_dead_code()
    tapped.recompile()
    x = images()
    with torch.no_grad():
        assert torch.equal(tapped(x), model(x))


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
        rf"{line_of('the overwriting line', __file__)}aliased: an activation is overwritten in place here, and its memory is "
        rf"used again at \S*{line_of('the line that sees it', __file__)}aliased"
    )
    with pytest.raises(TracingError, match=message):
        instrument(Lambda(aliased))
