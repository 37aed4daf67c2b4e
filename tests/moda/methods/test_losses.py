"""The losses on gates: MwT's are the kernels' affinity and dispersion, NeMo's is contrastive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from moda.methods.contrastive import contrastive_loss, distillation_loss
from moda_kernels import modular_losses

Golden = Callable[[str], dict[str, np.ndarray]]


def gates_of(arrays: dict[str, np.ndarray], case: int, dtype: torch.dtype) -> list[Tensor]:
    names = sorted(name for name in arrays if name.startswith(f"gate_{case}_"))
    return [torch.tensor(arrays[name]).to(dtype).requires_grad_() for name in names]


def assert_gradients(gates: Sequence[Tensor], arrays: dict[str, np.ndarray], case: int) -> None:
    """As the golden data's README says, on rows that are not all zero."""
    for layer, gate in enumerate(gates):
        expected, dead = arrays[f"grad_{case}_{layer}"], arrays[f"dead_{case}_{layer}"]
        assert gate.grad is not None
        allowed = 1e-8 * np.abs(expected) + 1e-11 + 1e-9 * np.abs(expected).max(1, keepdims=True)
        assert (np.abs(gate.grad.numpy() - expected) <= allowed)[~dead].all(), layer
        assert np.isfinite(gate.grad.numpy()).all()


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
@pytest.mark.parametrize("case", range(8))
def test_cohesion_and_coupling_are_affinity_and_dispersion_of_gates(golden: Golden, case: int, backend: str):
    """Where a batch lacks pairs of a kind the published term is NaN with no gradient; here it is 0 with no gradient."""
    arrays = golden("peers/mwt_losses")
    gates = gates_of(arrays, case, torch.float64)
    losses = modular_losses(gates, torch.tensor(arrays[f"labels_{case}"]), backend=backend)
    expected = np.nan_to_num(arrays[f"loss64_{case}"][:2])
    terms = (losses.affinity, losses.dispersion)
    np.testing.assert_allclose([float(term.detach()) for term in terms], expected, rtol=1e-10, atol=1e-12)
    alpha, beta = arrays["weights"].tolist()
    total = alpha * losses.affinity + beta * losses.dispersion
    if not total.requires_grad:
        return
    total.backward()
    assert_gradients(gates, arrays, case)


@pytest.mark.parametrize("case", range(8))
def test_the_contrastive_loss_is_the_published_one(golden: Golden, case: int):
    arrays = golden("peers/nemo_losses")
    labels = torch.tensor(arrays[f"labels_{case}"])
    for place, temperature in enumerate(arrays[f"tau_{case}"].tolist()):
        gates = gates_of(arrays, case, torch.float64)
        loss = contrastive_loss(gates, labels, temperature)
        np.testing.assert_allclose(loss.detach(), arrays[f"contra64_{case}"][place], rtol=1e-10, atol=1e-12)
        each = [float(contrastive_loss([gate.detach()], labels, temperature)) for gate in gates]
        np.testing.assert_allclose(each, arrays[f"per_layer_{case}"][place], rtol=1e-10)
        single = contrastive_loss(gates_of(arrays, case, torch.float32), labels, temperature)
        np.testing.assert_allclose(single.detach(), arrays[f"contra32_{case}"][place], rtol=1e-5, atol=1e-6)
        if place == 0:
            loss.backward()
            assert_gradients(gates, arrays, case)


def test_layers_of_equal_width_give_what_they_give_alone():
    generator = torch.Generator().manual_seed(0)
    gates = [torch.rand(6, width, generator=generator, dtype=torch.float64) for width in (3, 5, 3, 3, 5)]
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    alone = torch.stack([contrastive_loss([gate], labels) for gate in gates]).mean()
    torch.testing.assert_close(contrastive_loss(gates, labels), alone)


def test_the_distillation_loss_is_the_published_one(golden: Golden):
    arrays = golden("peers/nemo_losses")
    logits, distilled, teacher = (
        torch.tensor(arrays[f"distill_{name}"]).double().requires_grad_(name != "teacher")
        for name in ("cls", "dist", "teacher")
    )
    loss = distillation_loss(logits, distilled, teacher, torch.tensor(arrays["distill_labels"]))
    np.testing.assert_allclose(loss.detach(), arrays["task64"], rtol=1e-10)
    loss.backward()
    np.testing.assert_allclose(logits.grad, arrays["task_grad_cls"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(distilled.grad, arrays["task_grad_dist"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("gates", "labels", "temperature", "error", "message"),
    [
        ([], torch.zeros(2, dtype=torch.long), 0.2, ValueError, "gates: expected those of at least one layer"),
        (
            [torch.rand(3, 2)],
            torch.zeros(2, dtype=torch.long),
            0.2,
            ValueError,
            r"gates\[0\]: expected shape \(2, neurons\)",
        ),
        (
            [torch.ones(2, 2, dtype=torch.long)],
            torch.zeros(2, dtype=torch.long),
            0.2,
            TypeError,
            r"gates\[0\]: expected a floating",
        ),
        ([torch.rand(2, 2)], torch.zeros(2), 0.2, TypeError, "labels: expected a tensor of integers"),
        (
            [torch.rand(2, 2)],
            torch.zeros(2, dtype=torch.long),
            0.0,
            ValueError,
            "temperature: expected a number above 0",
        ),
        ([torch.rand(2, 2)], torch.zeros(2, dtype=torch.long), float("nan"), ValueError, "temperature"),
    ],
)
def test_bad_arguments_are_named(gates, labels, temperature, error, message):
    with pytest.raises(error, match=message):
        contrastive_loss(gates, labels, temperature)
