from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moda.observation import taps
from moda.observation.taps import instrument
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
    monkeypatch.setitem(taps.FUSED_FROM_BYTES, "cpu", 6 * 6 * 6 * 6 * 4)
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
