from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda.observation import run, taps
from moda.observation.taps import observe
from moda_kernels import modular_losses
from tests.moda._helpers.tapping import closed_form_loss, images, spied


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
    grouped, fused = observe(copy.deepcopy(model), route="grouped"), copy.deepcopy(observe(model, route="fused"))
    x, labels = images(6).to(dtype), torch.tensor([0, 1, 2, 0, 1, 2])
    a, b = (closed_form_loss(of.model, of, x, labels) for of in (grouped, fused))
    torch.testing.assert_close(a, b)
    a.backward()
    b.backward()
    for p, q in zip(grouped.model.parameters(), fused.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    fused.model(x)
    assert shapes(fused.activations()) == FUSED_SHAPES


def test_a_fused_tap_records_the_mean_over_positions() -> None:
    model, x = Mixed(), images(6)
    expected = spied(model, x)
    fused = observe(model, route="fused")
    model(x)
    seen = fused.activations()
    torch.testing.assert_close(seen[0], F.relu(model.conv(x)).mean((2, 3)))
    assert torch.equal(seen[2], expected[2])  # the only spatial call that is no ReLU
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        seen = fused.activations()
        assert [a.dtype for a in seen] == [torch.float32] * 2 + [torch.bfloat16] * 3
        twin = Mixed()
        twin.load_state_dict(model.state_dict())
        grouped = observe(twin, route="grouped")
        twin(x)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    torch.testing.assert_close(
        torch.stack(modular_losses(seen, labels)), torch.stack(modular_losses(grouped.activations(), labels))
    )


def test_recording_gives_activations_whatever_the_route() -> None:
    model = Mixed()
    grouped, fused = observe(copy.deepcopy(model), route="grouped"), observe(model, route="fused")
    x = images(6)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), fused.recording():
            model(x)
            seen = fused.activations()
        grouped.model(x)
        assert shapes(seen) == FULL_SHAPES
        assert all(torch.equal(a, b) for a, b in zip(seen, grouped.activations(), strict=True))


def test_auto_goes_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
    automatic = observe(model, route="auto")
    monkeypatch.setattr(taps, "FUSED_FROM_BYTES", 6 * 6 * 6 * 6 * 4)
    for n, expected in ((5, (5, 6, 6, 6)), (6, (6, 6)), (7, (7, 6))):
        model(images(n))
        assert shapes(automatic.activations()) == [expected]
    model.half()
    model(images(6).half())
    assert shapes(automatic.activations()) == [(6, 6, 6, 6)]


@pytest.mark.gpu
def test_auto_fuses_on_a_gpu_what_the_host_does_not_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()).cuda()
    automatic = observe(model, route="auto")
    monkeypatch.setattr(taps, "GPU_BOUND_FROM_BYTES", 6 * 6 * 6 * 6 * 4)
    model(images(4).cuda())
    automatic.activations()
    for n, expected in ((5, (5, 6, 6, 6)), (6, (6, 6))):
        model(images(n).cuda())
        assert shapes(automatic.activations()) == [expected]
    with run.replayed():
        model(images(2).cuda())
    assert shapes(automatic.activations()) == [(2, 6)]
