"""Size, overlap, operations and accuracy against counts by hand and by brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moda import models
from moda.composition import measure
from moda.composition.compose import compose, plan
from moda.composition.masking import mask
from moda.decomposition.container import Decomposition
from moda.observation.taps import taps_of
from tests.moda._helpers.composing import lively, random_modules, watched, widths


def small() -> tuple[nn.Module, Decomposition]:
    """2 -> 3 (norm, relu) -> 3 classes; parameters 6 + 3 + 6 + 9 + 3 = 27, buffers 3 + 3 + 1."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
    masks = torch.tensor([[True, True, False], [False, True, True], [True, True, True]])
    return watched(model, torch.randn(2, 2)), Decomposition({"2": masks})


def test_size_by_hand():
    """Two neurons and one class: 4 + 2 + 4 + 2 + 1 of 27 parameters."""
    model, decomposition = small()
    assert measure.size(model, decomposition, [0]) == 13 / 27
    assert measure.size(model, decomposition, [0, 1]) == (27 - 4) / 27
    assert measure.size(model, decomposition, [0, 1, 2]) == 1.0


def test_overlap_by_hand():
    """Classes 0 and 1 share neuron 1: weight 2, bias 1, norm 2; and of buffers its mean, its variance, the counter."""
    model, decomposition = small()
    assert measure.overlap(model, decomposition, 0, 1) == (5 + 3) / 27
    assert measure.overlap(model, decomposition, 0, 1, counting="parameters") == 5 / 27
    assert measure.overlap(model, decomposition, 0, 2) == (10 + 5) / 27
    # on the diagonal a module's own size, with its buffers in the published counting
    matrix = measure.overlap_matrix(model, decomposition, counting="parameters")
    assert matrix.diagonal().tolist() == [measure.size(model, decomposition, [c]) for c in range(3)]
    assert measure.overlap_matrix(model, decomposition)[0, 0] == (13 + 5) / 27


def kept_entries(model: nn.Module, decomposition: Decomposition, c: int) -> dict[str, Tensor]:
    """Per tensor a 0/1 tensor of its shape, by composing: entries are numbered, and the numbers that remain are looked up."""
    numbered = {name: torch.arange(1.0, v.numel() + 1).view(v.shape) for name, v in model.state_dict().items()}
    before = {name: v.clone() for name, v in model.state_dict().items()}
    model.load_state_dict(numbered)
    remaining = compose(model, decomposition, [c]).state_dict()
    model.load_state_dict(before)
    return {
        name: torch.isin(v, remaining[name].to(v.dtype)) if name in remaining else torch.zeros_like(v, dtype=torch.bool)
        for name, v in numbered.items()
    }


@pytest.mark.parametrize("name", ["small_vgg", "resnet18", "mobilenet"])
def test_overlap_by_brute_force(name):
    side = 8 if name == "small_vgg" else 16
    model = watched(lively(models.create(name, num_classes=4, width=0.1)))
    decomposition = random_modules(widths(model, torch.randn(1, 3, side, side, dtype=torch.float64)), 4, 0.4)
    entries = [kept_entries(model, decomposition, c) for c in range(4)]
    parameters = dict(model.named_parameters())
    full = sum(parameter.numel() for parameter in parameters.values())
    for counting in ("published", "parameters"):
        matrix = measure.overlap_matrix(model, decomposition, counting=counting)
        names = list(entries[0]) if counting == "published" else list(parameters)
        for a in range(4):
            for b in range(4):
                shared = sum(int((entries[a][n] & entries[b][n]).sum()) for n in names)
                assert matrix[a, b] == shared / full


def test_overlap_of_some_classes_in_an_order():
    model, decomposition = small()
    matrix = measure.overlap_matrix(model, decomposition)
    assert torch.equal(measure.overlap_matrix(model, decomposition, classes=[2, 0]), matrix[[2, 0]][:, [2, 0]])


def test_tied_weights_and_unused_layers():
    """A tensor under two names counts once; a layer that no call reaches is in no module."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight
            self.unused = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    model = watched(Tied(), torch.randn(2, 4))
    decomposition = Decomposition({"relu": torch.eye(4, dtype=torch.bool)})
    # both calls take row 0 alone, the first one all of its columns
    assert measure.size(model, decomposition, [0]) == 4 / 21
    assert measure.overlap(model, decomposition, 0, 1) == 0
    assert sum(parameter.numel() for parameter in compose(model, decomposition, [0]).parameters()) == 4


def test_a_hundred_classes_of_a_full_size_model():
    """Full-size VGG16 (34 million parameters) on the meta device: no weight is read."""
    with torch.device("meta"):
        model = models.vgg16(num_classes=100)
    watched(model, torch.empty(2, 3, 32, 32, device="meta"))
    sizes = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6 + [4096] * 2
    decomposition = random_modules(dict(zip(taps_of(model).names, sizes, strict=True)), 100, 0.3)
    matrix = measure.overlap_matrix(model, decomposition, counting="parameters")
    assert matrix.shape == (100, 100)
    assert torch.equal(matrix, matrix.T)
    assert matrix[7, 7] == measure.size(model, decomposition, [7])
    assert 0 < matrix[3, 5] < matrix[3, 3]


@pytest.mark.parametrize("call", [measure.overlap, measure.size])
def test_refusals_of_plans(call):
    model, decomposition = small()
    arguments = ([0, 3],) if call is measure.size else (0, 3)
    with pytest.raises(ValueError, match=r"classes: expected classes in \[0, 3\), got \[3\]"):
        call(model, decomposition, *arguments)
    with pytest.raises(ValueError, match="example: expected an input of the model"):
        call(nn.Linear(2, 2), decomposition, *((([0],)) if call is measure.size else (0, 1)))


def test_unknown_counting():
    model, decomposition = small()
    with pytest.raises(ValueError, match="counting: expected 'published' or 'parameters', got 'all'"):
        measure.overlap(model, decomposition, 0, 1, counting="all")


def test_flops_by_hand():
    """Convolution 2 x 5x5 positions x 4 outputs x 3x3x3; linear 2 x 4 x 7; per sample."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7)
    )
    model[1].eval()
    per_sample = 2 * 25 * 4 * 27 + 2 * 4 * 7
    assert measure.flops(model, torch.randn(1, 3, 7, 7)) == per_sample
    assert measure.flops(model, torch.randn(3, 3, 7, 7)) == 3 * per_sample
    assert model.training
    assert not model[1].training


def test_flops_of_a_composed_model():
    model, decomposition = small()
    x = torch.randn(1, 2)
    assert measure.flops(model, x) == 2 * (6 + 9)
    assert measure.flops(compose(model, decomposition, [1]), x) == 2 * (2 * 2 + 2 * 1)


class Table(nn.Module):
    """Looks its logits up: sample i gives row i."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.logits[x]


LOGITS = [[9.0, 5, 1, 0], [0, 2, 8, 9], [1, 7, 6, 0], [4, 0, 1, 3], [0, 9, 1, 3]]
LABELS = torch.tensor([0, 2, 2, 3, 3])


def batches(size: int = 2) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.arange(5).split(size), LABELS.split(size), strict=True))


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (None, 1 / 5),  # 0, 3, 1, 0, 1
        ([0, 1, 2, 3], 1 / 5),
        ([3, 1, 0, 2], 1 / 5),  # all classes: still by class index
        ([0, 2], 3 / 3),  # 0, 2, 2: what beats class 2 is not asked
        ([2, 0], 3 / 3),
        ([2, 3], 3 / 4),  # 3, 2, 3, 3
        ([3], 2 / 2),
    ],
)
def test_accuracy_of_the_whole_model(classes, expected, size):
    model = Table(LOGITS)
    assert measure.accuracy(model, batches(size), classes) == expected
    assert model.training
    assert not any(model.modes)


def test_accuracy_of_as_many_logits_as_classes():
    """Column j is the j-th of the classes given."""
    model = Table([[row[3], row[2]] for row in LOGITS])
    assert measure.accuracy(model, batches(), [3, 2]) == 3 / 4
    assert measure.accuracy(model, batches(), [2, 3]) == 1 / 4


def test_accuracy_of_composed_and_masked_models_follows_their_classes():
    torch.manual_seed(3)
    model, decomposition = small()
    x, labels = torch.randn(64, 2), torch.randint(3, (64,))
    loader = [(x, labels)]
    model.eval()
    for make in (compose, mask):
        made = make(model, decomposition, [2, 1])
        members = labels > 0
        with torch.no_grad():
            right = torch.tensor([2, 1])[made(x[members]).argmax(1)] == labels[members]
        expected = int(right.sum()) / int(members.sum())
        assert 0 < expected < 1
        for classes in (None, [2, 1], [1, 2]):
            assert measure.accuracy(made, loader, classes) == expected


def test_only_samples_of_the_classes_are_computed():
    model = Table(LOGITS)
    measure.accuracy(model, batches(1), [3])
    assert len(model.modes) == 2


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "classes: expected at least one class, got none"),
        ([2, 2], r"classes: expected every class once, got \[2\] more than once"),
        ([-1], r"classes: expected classes in"),
        ([2, 5], r"classes: expected classes in \[0, 4\) as the model has 4 logits, got \[2, 5\]"),
        ([1], r"loader: expected samples of the classes \[1\], got none"),
    ],
)
def test_refusals_of_accuracy(classes, message):
    with pytest.raises(ValueError, match=message):
        measure.accuracy(Table(LOGITS), batches(), classes)


def test_accuracy_of_classes_that_a_composed_model_lacks():
    model, decomposition = small()
    with pytest.raises(ValueError, match=r"classes: expected classes of the model, \[1, 2\], got \[0\]"):
        measure.accuracy(compose(model, decomposition, [1, 2]), [(torch.randn(2, 2), torch.tensor([1, 0]))], [0, 1])


def test_a_plan_is_enough():
    model, decomposition = small()
    assert measure.plan_size(model, plan(model, decomposition, [0])) == 13 / 27


def test_mean_over_pairs() -> None:
    assert measure.mean_over_pairs(torch.tensor([[9.0, 1.0], [3.0, 9.0]])) == 2.0
    symmetric = torch.tensor([[1.0, 0.2, 0.4], [0.2, 1.0, 0.9], [0.4, 0.9, 1.0]], dtype=torch.float64)
    assert measure.mean_over_pairs(symmetric) == pytest.approx((0.2 + 0.4 + 0.9) / 3)
    assert measure.mean_over_pairs(torch.ones(1, 1)) == 0
