"""GradSplitter's training, against a run of the published code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moda.methods.base import Method, train
from moda.methods.gradsplitter import GradSplitter, PreparedSplitter, published_shared
from moda.models.simcnn import SimCNN

Golden = Callable[[str], dict[str, np.ndarray]]


class PublishedRun:
    """The run of the golden data: 2 epochs of heads, 5 of masks with heads, 2 of heads, on blown-up digits."""

    def __init__(self, golden: Golden) -> None:
        self.arrays = arrays = golden("peers/gs_train")
        images = (torch.tensor(arrays["x_u8"]).double() / 16)[:, None].repeat(1, 3, 1, 1)
        labels = torch.tensor(arrays["labels"])
        self.batches = [(images[rows], labels[rows]) for rows in arrays["batch_idx"].tolist()]
        self.validation = [(images[rows], labels[rows]) for rows in arrays["val_idx"].tolist()]
        model = SimCNN(arrays["conv_cfg"][:, 1].tolist(), (16, 16), 3, 3, 32, batch_norm=True)
        model.load_state_dict({k[6:]: torch.tensor(v) for k, v in arrays.items() if k.startswith("state/")})
        head_rate, mask_rate, weight, heads, epochs = arrays["hyper"].tolist()
        self.sites = tuple(f"relu_{index}" for index in range(13))
        self.method = GradSplitter(
            int(heads), int(epochs), head_rate=head_rate, mask_rate=mask_rate, weight=weight, sites=self.sites
        )
        self.prepared = self.method.prepare(model.double(), 3, images[:2])
        with torch.no_grad():
            for index, site in enumerate(self.sites):
                rows = [torch.tensor(arrays[f"m_init_{number}_{index}"]) for number in range(3)]
                self.prepared.splitter.mask(site).copy_(torch.stack(rows))
        prefix = "head_init/"
        self.prepared.splitter.heads.load_heads(
            [
                {
                    key[len(prefix) + 2 :]: torch.tensor(value)
                    for key, value in arrays.items()
                    if key.startswith(f"{prefix}{number}/")
                }
                for number in range(3)
            ]
        )


@pytest.fixture(scope="module")
def run(golden: Golden) -> PublishedRun:
    made = PublishedRun(golden)
    made.epochs = list(train(made.method, made.prepared, made.batches, made.validation))
    return made


def test_losses_of_every_epoch_are_the_published_ones(run: PublishedRun):
    expected = run.arrays["steps64"].mean(1)
    found = [(epoch.terms["task"], epoch.terms["kept share"]) for epoch in run.epochs]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    assert [epoch.phase == "modularize" for epoch in run.epochs] == (run.arrays["phase"] == 1).tolist()


def test_masks_and_heads_end_where_the_published_ones_do(run: PublishedRun):
    for index, site in enumerate(run.sites):
        for number in range(3):
            expected = run.arrays[f"m_final_{number}_{index}"]
            np.testing.assert_allclose(
                run.prepared.splitter.mask(site)[number].detach(), expected, rtol=1e-5, atol=1e-7
            )
    for number in range(3):
        for key, value in run.prepared.splitter.heads.of_class(number).state_dict().items():
            np.testing.assert_allclose(value, run.arrays[f"head_final/{number}/{key}"], rtol=1e-5, atol=1e-7)


def test_modules_and_figures_after_every_epoch_are_the_published_ones(run: PublishedRun):
    for epoch, kernels in zip(run.prepared.history, run.arrays["saved_kernels"], strict=True):
        np.testing.assert_array_equal(torch.cat([epoch.masks[site] for site in run.sites], 1), kernels)
    np.testing.assert_allclose([e.accuracy for e in run.prepared.history], run.arrays["val_acc"], rtol=1e-6)
    np.testing.assert_allclose([e.neurons for e in run.prepared.history], run.arrays["avg_kernel"], rtol=1e-6)


def test_the_network_underneath_stays_as_it_was(run: PublishedRun):
    for key, value in run.prepared.taps.model.state_dict().items():
        np.testing.assert_array_equal(value, run.arrays[f"state/{key}"].astype(value.numpy().dtype), err_msg=key)
    assert not any(parameter.requires_grad for parameter in run.prepared.taps.model.parameters())


def test_the_chosen_epoch_has_the_fewest_neurons_of_those_that_lose_little(run: PublishedRun):
    history, base = run.prepared.history, run.prepared.base_accuracy[0]
    for tolerance in (0.0, 0.05, 1.0):
        chosen = GradSplitter(tolerance=tolerance).choose(run.prepared)
        good = [epoch for epoch in history if epoch.accuracy >= base - tolerance]
        if good:
            assert chosen.neurons == min(epoch.neurons for epoch in good)
        else:
            assert chosen.accuracy == max(epoch.accuracy for epoch in history)


def test_modules_are_extracted_with_their_settings(run: PublishedRun):
    modules = run.method.extract(run.prepared, run.batches)
    assert modules.method == "gradsplitter"
    assert modules.sites == run.sites
    assert modules.settings["weight"] == run.method.weight
    chosen = run.method.choose(run.prepared)
    assert modules.metadata == {"epoch": chosen.epoch, "validation_accuracy": chosen.accuracy}
    for site in run.sites:
        kept = chosen.masks[site]
        np.testing.assert_array_equal(modules.masks[site][kept.any(1)], kept[kept.any(1)])


def test_it_is_a_method():
    assert isinstance(GradSplitter(), Method)


def test_the_published_schedule():
    phases = GradSplitter().phases()
    assert sum(phase.epochs for phase in phases) == 145
    assert [(phase.name, phase.epochs) for phase in phases[:3]] == [("heads", 5), ("modularize", 5), ("heads", 2)]
    assert len(phases) == 1 + 2 * 20
    parameter = nn.Parameter(torch.zeros(1))
    rates = [phase.optimizer([parameter]).param_groups[0]["lr"] for phase in phases[:3]]
    np.testing.assert_allclose(rates, [0.01, 0.001, 0.001])


def test_published_masks_are_shared_where_outputs_are_added(golden: Golden):
    owner = golden("peers/gs_splitter_rescnn")["owner"].tolist()
    expected = {f"relu_{index}": f"relu_{other}" for index, other in enumerate(owner) if index != other}
    assert published_shared("rescnn") == expected
    assert published_shared("vgg16") == {}


class TwoOutputs(nn.Module):
    """A network whose output is no (N, classes) tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x), x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradSplitter(epochs=0), "epochs: expected at least 1, got 0"),
        (lambda: GradSplitter(mask_rate=float("nan")), "mask_rate: expected a finite number greater than 0, got nan"),
        (lambda: GradSplitter(weight=-1), "weight: expected a finite number of at least 0, got -1"),
        (lambda: GradSplitter().prepare(TwoOutputs(), 2, torch.randn(2, 3)), "model: expected logits of shape"),
        (lambda: GradSplitter().choose(_untrained()), "prepared: expected a training, got none"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        make()


def _untrained() -> PreparedSplitter:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return GradSplitter().prepare(model, 2, torch.randn(2, 3))
