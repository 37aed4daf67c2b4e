"""Module replacement against the published RepairedModel's data."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from moda.composition.compose import compose
from moda.composition.replace import CalibratedModel, Calibration, NormalizedModel, normalize, replace
from moda.decomposition.container import Decomposition
from moda.observation.taps import observe


class Lookup(nn.Module):
    """Gives row i of a table for the input i: a model whose logits the test decides."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.clone())

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.table[index]


def linear(weight, bias, dtype):
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(dtype)
    layer.load_state_dict({"weight": torch.from_numpy(weight).to(dtype), "bias": torch.from_numpy(bias).to(dtype)})
    return layer


@pytest.mark.parametrize("case", range(4))
def test_golden_forward(golden, case):
    data = golden("repair_combined")
    positions = np.atleast_1d(data[f"patch_index_{case:02d}"]).tolist()
    for dtype, name, tolerance in [(torch.float64, "final_f64", 1e-12), (torch.float32, "final_f32", 1e-5)]:
        weak, strong = (torch.from_numpy(data[f"{kind}_{case:02d}"]).to(dtype) for kind in ("weak", "strong"))
        layer = linear(data[f"calib_weight_{case:02d}"], data[f"calib_bias_{case:02d}"], dtype)
        model = CalibratedModel(Lookup(weak), Lookup(strong), positions, layer)
        index = torch.arange(len(weak))
        np.testing.assert_array_equal(model.concatenated(index).float(), data[f"concat_{case:02d}"])
        expected = data[f"{name}_{case:02d}"]
        np.testing.assert_allclose(model(index).detach(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "bits", "rtol", "atol"), [(torch.float64, 64, 1e-9, 1e-10), (torch.float32, 32, 1e-4, 1e-5)]
)
def test_golden_calibration_training(golden, monkeypatch, dtype, bits, rtol, atol):
    data = golden("repair_combined")
    steps, size = data["train_labels"].shape
    weak, strong = (torch.from_numpy(data[f"train_{k}"]).flatten(0, 1).to(dtype) for k in ("weak", "strong"))
    labels = torch.from_numpy(data["train_labels"])
    loader = [(torch.arange(b * size, (b + 1) * size), labels[b]) for b in range(steps)]
    # The published initial weights in place of our random ones.
    monkeypatch.setattr(nn.init, "normal_", lambda w, std: w.data.copy_(torch.from_numpy(data["train_init_weight"])))
    monkeypatch.setattr(nn.init, "zeros_", lambda b: b.data.copy_(torch.from_numpy(data["train_init_bias"])))
    lr, momentum, nesterov = data["train_hyper"].tolist()
    assert nesterov == 1
    settings = Calibration(epochs=int(data["train_epochs"]), lr=lr, momentum=momentum)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    repaired = replace(Lookup(weak), Lookup(strong), int(data["train_patch_index"]), loader, settings)
    torch.set_default_dtype(default)
    layer = repaired.calibration
    np.testing.assert_allclose(layer.weight.detach(), data[f"train_final_weight{bits}"], rtol=rtol, atol=atol)
    np.testing.assert_allclose(layer.bias.detach(), data[f"train_final_bias{bits}"], rtol=rtol, atol=atol)


def test_golden_normalisation(golden):
    data = golden("repair_combined")
    bound = torch.from_numpy(data["norm_bound_strong"])
    module = Lookup(torch.cat([bound, torch.from_numpy(data["norm_strong"])]))
    weak = Lookup(torch.from_numpy(data["norm_weak"])[torch.arange(len(module.table)) % 6])
    weak.table.data[len(bound) :] = torch.from_numpy(data["norm_weak"])
    batches = [(part, None) for part in torch.arange(len(bound)).split(16)]
    model = normalize(weak, module, int(data["norm_patch_index"]), batches)
    np.testing.assert_allclose(model.bounds, data["norm_bounds"], rtol=1e-6)
    scores = model(torch.arange(len(bound), len(bound) + 6))
    np.testing.assert_allclose(scores.detach(), data["norm_final"], rtol=1e-5, atol=1e-6)


def test_golden_replacement_of_cnnsplitter(golden):
    """The class's own validation samples give the bounds, and its column of the weak probabilities is overwritten."""
    data = golden("peers/cs_patch")
    target, count = int(data["target"]), len(data["labels"])
    for number in range(4):
        own = torch.from_numpy(data[f"calib_{number}"])[:, None]
        module = Lookup(torch.cat([own, torch.from_numpy(data["module"])[:, number, None]]))
        weak = Lookup(torch.from_numpy(data["weak"]).repeat(2, 1)[: len(own) + count].roll(len(own) % count, 0))
        weak.table.data[len(own) :] = torch.from_numpy(data["weak"])
        model = normalize(weak, module, 5, [(torch.arange(len(own)),)])
        np.testing.assert_allclose(model.bounds, data["range_min_max"][number], rtol=1e-6)
        if number == target:
            scores = model(torch.arange(len(own), len(own) + count)).detach()
            np.testing.assert_allclose(scores, data["final"], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(scores.argmax(1), data["pred_after"])


@pytest.mark.parametrize("combine", ["logit", "probability"])
def test_a_module_that_stands_alone_answers_with_its_own_logit_or_probability(combine):
    """Modules of CNNSplitter and GradSplitter: what is calibrated or normalised is what each says of its own class."""
    torch.manual_seed(5)
    strong = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    inputs = torch.randn(9, 4)
    taps = observe(strong, example=inputs)
    heads = {
        "hidden.weight": torch.randn(3, 5, 3), "hidden.bias": torch.randn(3, 5),
        "output.weight": torch.randn(3, 1, 5), "output.bias": torch.randn(3, 1),
    }  # fmt: skip
    mask = torch.rand(3, 8) < 0.6
    mask[:, 0] = True
    modules = Decomposition(
        {taps.names[0]: mask}, combine=combine, **({"heads": heads} if combine == "probability" else {})
    )

    def answer(number: int) -> torch.Tensor:
        logits = strong[2](strong[1](strong[0](inputs)) * mask[number])
        if combine == "logit":
            return logits[:, number]
        hidden = (logits.relu() @ heads["hidden.weight"][number].T + heads["hidden.bias"][number]).relu()
        return (hidden @ heads["output.weight"][number].T + heads["output.bias"][number]).sigmoid()[:, 0]

    weak = nn.Linear(4, 3)
    labels = torch.arange(9) % 3
    model = normalize(weak, compose(taps, modules, [1]), 1, [(inputs[labels == 1],)])
    low, high = answer(1)[labels == 1].min(), answer(1)[labels == 1].max()
    expected = weak(inputs).softmax(1)
    expected[:, 1] = (answer(1) - low) / (high - low)
    torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)
    both = replace(weak, compose(taps, modules, [2, 0]), [2, 0], [(inputs, labels)])
    columns = torch.stack([weak(inputs)[:, 1], answer(2), answer(0)], 1)
    torch.testing.assert_close(both.concatenated(inputs), columns.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both(inputs), both.calibration(columns.detach()), rtol=1e-4, atol=1e-4)


def batch(n=12):
    torch.manual_seed(3)
    return [(torch.randn(n, 4), torch.randint(3, (n,))) for _ in range(4)]


def models():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), nn.Sequential(nn.Linear(4, 1), nn.BatchNorm1d(1))


def test_only_the_calibration_layer_learns():
    weak, module = models()
    before = copy.deepcopy((weak.state_dict(), module.state_dict()))
    repaired = replace(weak, module, 2, batch())
    assert [name for name, p in repaired.named_parameters() if p.requires_grad] == [
        "calibration.weight",
        "calibration.bias",
    ]
    repaired.train()
    assert repaired.training
    assert not repaired.weak[1].training  # dropout and batch norm of the frozen models stay in evaluation mode
    assert not repaired.module[1].training
    repaired(torch.randn(5, 4))
    for old, new in zip(before, (weak.state_dict(), module.state_dict()), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    clone = CalibratedModel(*copy.deepcopy(models()), [2], nn.Linear(3, 3))
    clone.load_state_dict(repaired.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(clone(x), repaired(x))


def test_calibration_lowers_the_loss_and_starts_from_the_seed():
    data = batch()
    weak, module = models()
    torch.manual_seed(0)
    short = replace(weak, module, 0, data, Calibration(epochs=1))
    torch.manual_seed(0)
    long = replace(weak, module, 0, data, Calibration(epochs=30))
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    losses = [nn.functional.cross_entropy(model(x), y).item() for model in (short, long)]
    assert losses[1] < losses[0]
    torch.manual_seed(0)
    again = replace(weak, module, 0, data, Calibration(epochs=30))
    assert torch.equal(again.calibration.weight, long.calibration.weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, m: replace(w, m, 3, batch()), "position: expected distinct outputs of the weak model in [0, 3), got [3]"),
        (lambda w, m: replace(w, m, [], batch()), "position: expected distinct outputs of the weak model in [0, 3), got []"),
        (lambda w, m: replace(w, m, [0, 1], batch()), "module: expected 2 outputs, one for each position, got 1"),
        (lambda w, m: replace(w, m, 0, []), "calibration_loader: expected at least one batch, got none"),
        (lambda w, m: replace(w, m, 0, [(torch.randn(2, 4), torch.tensor([0, 5]))]), "expected labels in [0, 3), got 5"),
        (lambda w, m: normalize(w, m, 0, []), "bounds_loader: expected at least one batch, got none"),
        (lambda w, m: normalize(w, m, 0, [(torch.ones(1, 4),)]), "bounds_loader: expected inputs with different logits"),
        (lambda w, m: normalize(w, m, -1, batch()), "position: expected distinct outputs of the weak model in [0, 3), got [-1]"),
        (lambda w, m: Calibration(epochs=0), "epochs: expected at least 1, got 0"),
        (lambda w, m: Calibration(lr=0), "lr: expected a finite number above 0, got 0"),
        (lambda w, m: Calibration(momentum=1), "momentum: expected a number between 0 and 1, got 1"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*models())


def test_normalized_scores_stay_between_the_bounds():
    weak, module = models()
    data = batch()
    scores = normalize(weak, module, 1, data)(torch.cat([x for x, _ in data])).detach()
    assert isinstance(normalize(weak, module, 1, data), NormalizedModel)
    assert scores[:, 1].min().item() == pytest.approx(0, abs=1e-6)
    assert scores[:, 1].max().item() == pytest.approx(1, abs=1e-6)
