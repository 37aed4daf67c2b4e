"""A wrong contender is found, named with its error, and not timed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moda.bench import gate, runner
from moda.bench.case import Case, Contender
from moda.bench.clock import Budget, HostClock, Timed
from moda.bench.counting import CountInputs, counting_case
from moda.bench.losses import LossInputs, Oracle, loss_case
from moda.bench.pooling import pooling_case
from moda.bench.results import MEASURED, SKIPPED, WRONG, Row
from moda_kernels import ModularLoss, closed_form, modular_losses
from moda_kernels.tally import Tally

CPU = torch.device("cpu")
TINY = Budget(least=2, most=2, seconds=0, warmups=0)
SHAPES = ((6, 5, 3, 3), (6, 4))


def _rows(case: Case) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for row in runner.run_case(case, HostClock(cache_bytes=1 << 12)):
        rows.setdefault(row.contender, []).append(row)
    return rows


def test_one_wrong_element_in_a_large_tensor_is_found() -> None:
    expected = torch.randn(100, 1000, generator=torch.Generator().manual_seed(0))
    wrong = expected.clone()
    wrong[7, 3] += 0.01
    assert gate.difference("x", expected.clone(), expected, 1e-4) == ""
    assert f"got {wrong[7, 3]:.6g}, expected {expected[7, 3]:.6g}" in gate.difference("x", wrong, expected, 1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_wrong(value: float) -> None:
    assert gate.difference("x", torch.tensor([1.0, value]), torch.ones(2), 1e-2) != ""


def test_shapes_and_counts_of_tensors_are_compared() -> None:
    assert "shape (2,)" in gate.difference("x", torch.ones(2), torch.ones(3), 1.0)
    assert "1 tensors" in gate.first_difference("x", [torch.ones(2)], [], 1.0)


def test_the_oracle_is_the_float64_loss_and_its_gradient() -> None:
    activations = [torch.randn(6, 3, 2).requires_grad_(), torch.randn(6, 4).requires_grad_()]
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    oracle = Oracle(activations, labels, ModularLoss())
    wide = [a.detach().double().requires_grad_() for a in activations]
    losses = modular_losses(wide, labels, backend="reference")
    gradients = torch.autograd.grad(losses.affinity + losses.dispersion + 0.3 * losses.compactness, wide)
    torch.testing.assert_close(oracle.losses, torch.stack([*losses]).detach(), rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(oracle.gradients, gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-7)


def test_a_backend_with_a_wrong_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = closed_form.grouped_losses
    monkeypatch.setattr(closed_form, "grouped_losses", lambda *given: (right(*given)[0] + 1e-2, *right(*given)[1:]))
    rows = _rows(loss_case("loss", "tiny", LossInputs(SHAPES, 2, CPU), TINY))
    assert [(row.status, row.phase, row.seconds) for row in rows["torch"]] == [(WRONG, "", None)]
    assert "losses" in rows["torch"][0].note
    assert [row.phase for row in rows["reference"]] == ["forward", "backward", "both"]
    assert all(row.status == MEASURED for row in rows["reference"])


def test_a_backend_with_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are right: only the last layer's gradient is scaled."""
    right = closed_form.grouped_losses

    def wrong(activations: tuple[Tensor, ...], segments: object) -> tuple[Tensor, ...]:
        last = activations[-1]
        return right((*activations[:-1], last.detach() + 1.01 * (last - last.detach())), segments)  # type: ignore[arg-type]

    monkeypatch.setattr(closed_form, "grouped_losses", wrong)
    (row,) = _rows(loss_case("loss", "tiny", LossInputs(SHAPES, 2, CPU), TINY))["torch"]
    assert row.status == WRONG
    assert "gradients[1]" in row.note


def test_a_wrong_pooled_activation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = closed_form.relu_pool
    monkeypatch.setattr(
        closed_form, "relu_pool", lambda x, inplace: (right(x, inplace)[0], right(x, inplace)[1] * 1.01)
    )
    monkeypatch.setattr("moda.bench.pooling.closed_form", _Right(right))
    rows = _rows(pooling_case((4, 3, 5, 5), CPU, TINY, dtype=torch.float32, compiling=False))
    assert rows["torch"][0].status == WRONG
    assert rows["torch"][0].note.startswith("pooled[0]")


class _Right:
    def __init__(self, relu_pool: object) -> None:
        self.relu_pool = relu_pool


def test_a_count_that_is_off_by_one_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = closed_form.count_firings

    def wrong(activations: object, labels: object, threshold: object, tally: Tally) -> None:
        right(activations, labels, threshold, tally)  # type: ignore[arg-type]
        tally.counts[1][1, 2] += 1

    monkeypatch.setattr(closed_form, "count_firings", wrong)
    rows = _rows(counting_case("tiny", CountInputs(SHAPES, 2, CPU), TINY))
    assert rows["torch"][0].status == WRONG
    assert rows["torch"][0].note.startswith("counts[1]")
    assert rows["reference"][0].status == MEASURED


def test_a_contender_that_fails_is_noted_with_its_error() -> None:
    def fails() -> str:
        raise RuntimeError("no such kernel\nmore")

    contenders = [Contender("broken", {"run": Timed(lambda _: None)}, fails), Contender("absent", skipped="not built")]
    rows = _rows(Case("suite", "case", "broken", lambda: contenders, TINY))
    assert (rows["broken"][0].status, rows["broken"][0].note) == (WRONG, "RuntimeError: no such kernel")
    assert (rows["absent"][0].status, rows["absent"][0].note) == (SKIPPED, "not built")
