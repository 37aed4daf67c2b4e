"""Every argument of every public function, given values that are none: the error is ours and begins with its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moda_kernels import (
    AttributionSums,
    ClassSimilarity,
    FiringCounter,
    ModularLoss,
    class_means,
    class_similarity,
    modular_losses,
    norm_relu_pool,
    pool,
    relu_pool,
)
from tests.moda_kernels._helpers.wrong_arguments import FLAGS, NUMBERS, check_refused

LABELS = torch.tensor([0, 1, 0, 1])


def batch() -> Tensor:
    return torch.rand(4, 3, 2, 2)


def counter() -> FiringCounter:
    made = FiringCounter(2, threshold=0.5, sums=True)
    made.update([batch()], LABELS)
    return made


def attributions() -> AttributionSums:
    return AttributionSums(2)


Case = tuple[str, Callable[[Any], object], tuple[str, ...]]
NONE = ("None",)
NORM = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
CASES: dict[str, Case] = {
    "modular_losses": ("activations", lambda x: modular_losses(x, LABELS), ()),
    "modular_losses, labels": ("labels", lambda x: modular_losses([batch()], x), ()),
    "modular_losses, backend": ("backend", lambda x: modular_losses([batch()], LABELS, backend=x), ()),
    "modular_losses, group": ("group", lambda x: modular_losses([batch()], LABELS, group=x), NONE),
    "modular_losses, classes": ("num_classes", lambda x: modular_losses([batch()], LABELS, num_classes=x), NONE),
    "ModularLoss": ("affinity", lambda x: ModularLoss(x), NUMBERS),
    "ModularLoss, backend": ("backend", lambda x: ModularLoss(backend=x), ()),
    "ModularLoss, group": ("group", lambda x: ModularLoss(group=x), NONE),
    "ModularLoss, classes": ("num_classes", lambda x: ModularLoss(num_classes=x), NONE),
    "ModularLoss()": ("labels", lambda x: ModularLoss()([batch()], x), ()),
    "pool": ("activations", pool, ()),
    "pool, backend": ("backend", lambda x: pool([batch()], backend=x), ()),
    "relu_pool": ("x", relu_pool, ("a tensor", "a tensor without numbers")),
    "relu_pool, inplace": ("inplace", lambda x: relu_pool(batch(), inplace=x), FLAGS),
    "norm_relu_pool, weight": ("weight", lambda x: norm_relu_pool(batch(), **NORM, weight=x), NONE),
    "norm_relu_pool, mean": ("running_mean", lambda x: norm_relu_pool(batch(), x, NORM["running_var"]), ()),
    "norm_relu_pool, residual": ("residual", lambda x: norm_relu_pool(batch(), **NORM, residual=x), NONE),
    "norm_relu_pool, training": ("training", lambda x: norm_relu_pool(batch(), **NORM, training=x), FLAGS),
    "norm_relu_pool, eps": ("eps", lambda x: norm_relu_pool(batch(), **NORM, eps=x), NUMBERS),
    "class_means": ("num_classes", lambda x: class_means([batch()], LABELS, x), ()),
    "class_similarity": ("num_classes", lambda x: class_similarity([batch()], LABELS, x), ()),
    "class_similarity, labels": ("labels", lambda x: class_similarity([batch()], x, 2), ()),
    "ClassSimilarity, backend": ("backend", lambda x: ClassSimilarity(2, backend=x), ()),
    "FiringCounter": ("num_classes", FiringCounter, ()),
    "FiringCounter, threshold": ("threshold", lambda x: FiringCounter(2, threshold=x), NUMBERS),
    "FiringCounter, sums": ("sums", lambda x: FiringCounter(2, sums=x), FLAGS),
    "FiringCounter, backend": ("backend", lambda x: FiringCounter(2, backend=x), ()),
    "update": ("activations", lambda x: counter().update(x, LABELS), ()),
    "merge": ("other", lambda x: counter().merge(x), ()),
    "all_reduce": ("group", lambda x: counter().all_reduce(x), ()),
    "load_state_dict": ("state", lambda x: counter().load_state_dict(x), ()),
    "AttributionSums": ("num_classes", AttributionSums, ()),
    "AttributionSums, gradients": ("gradients", lambda x: attributions().update([batch()], x, LABELS), ()),
    **{
        f"a state's {name}": ("state", lambda x, name=name: counter().load_state_dict(counter().state_dict() | {name: x}), right)
        for name, right in {"counts.0": (), "sums.0": (), "class_sizes": (), "threshold": ("a 0-d tensor",)}.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_arguments(case):
    name, call, right = CASES[case]
    check_refused(name, call, right)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("counts.0", torch.full((2, 3), -1), r"state\['counts.0'\]: expected counts from 0 to the class's size"),
        ("counts.0", torch.full((2, 3), 3), r"state\['counts.0'\]: expected counts from 0 to the class's size"),
        ("class_sizes", torch.tensor([2, -2]), r"state\['class_sizes'\]: expected sizes of at least 0, got -2"),
        (
            "counts.0",
            torch.zeros(2, 3, dtype=torch.int64, device="meta"),
            r"state\['counts.0'\]: expected a tensor with",
        ),
        ("sums.0", torch.zeros(2, 3).to_sparse(), r"state\['sums.0'\]: expected a strided tensor"),
    ],
)
def test_a_state_that_no_batches_add_up_to(name, value, message):
    mine = counter()
    before = mine.counts[0].clone()
    with pytest.raises((TypeError, ValueError), match=message):
        mine.load_state_dict(mine.state_dict() | {name: value})
    assert torch.equal(mine.counts[0], before)
