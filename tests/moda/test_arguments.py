"""Arguments of public functions, given values that are none: the error is ours and begins with the argument's name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import moda
from moda.composition import measure
from moda.data.dirichlet import dirichlet_split
from moda.data.replacement import replacement_part
from moda.decomposition.budget import masks_from_scores, masks_from_shares
from moda.decomposition.choice import choose_epsilon
from moda.decomposition.files import load_scores, save_rates, save_scores
from moda.decomposition.rule import masks_from_rates
from moda.methods import CNNSplitter, GradSplitter, MwT, NeMo, fine_tune, union_module
from tests.moda_kernels._helpers.wrong_arguments import FLAGS, NUMBERS, check_refused

X, Y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
BATCHES = [(X[:6], Y[:6]), (X[6:], Y[6:])]
MODEL = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
RATES = moda.count_firings(MODEL, BATCHES, 3, progress=False)
SCORES = moda.attribute(MODEL, BATCHES, 3, progress=False)
MODULES = moda.decompose(RATES, 0.5)
MASKS = {"1": torch.ones(3, 4, dtype=torch.bool)}
SIZES = torch.tensor([4, 4, 4])
NONE, CALLED = ("None",), ("None", "a class", "a module")  # what can be called may be anybody's function
SEVERAL = ("a generator", "a set")
PLACES = ("None", "a string", "True", "-3", "half a character", "a long string")
COUNTS = ("a large integer",)
count, attribute, decompose = (
    partial(moda.count_firings, MODEL, BATCHES, 3, progress=False),
    partial(moda.attribute, MODEL, BATCHES, 3, progress=False),
    partial(moda.decompose, SCORES, epsilon="auto", model=MODEL, loader=BATCHES),
)

Case = tuple[str, Callable[[Any], object], tuple[str, ...]]
CASES: dict[str, Case] = {
    "count_firings, loader": ("loader", lambda x: moda.count_firings(MODEL, x, 3, progress=False), ()),
    "count_firings, classes": ("num_classes", lambda x: moda.count_firings(MODEL, BATCHES, x), ()),
    "count_firings, unpack": ("unpack", lambda x: count(unpack=x), CALLED),
    "count_firings, group": ("group", lambda x: count(group=x), NONE),
    "count_firings, progress": ("progress", lambda x: moda.count_firings(MODEL, BATCHES, 3, progress=x), FLAGS),
    "activation_shares, loader": ("loader", lambda x: moda.activation_shares(MODEL, x, 3), ()),
    "attribute, loader": ("loader", lambda x: moda.attribute(MODEL, x, 3, progress=False), ()),
    "attribute, classes": ("num_classes", lambda x: moda.attribute(MODEL, BATCHES, x, progress=False), ()),
    "attribute, backend": ("backend", lambda x: attribute(backend=x), ()),
    "attribute, output": ("output", lambda x: attribute(output=x), NONE),
    "load_scores": ("rule", lambda x: load_scores("x", x), ()),
    "save_scores": ("scores", lambda x: save_scores(x, "x"), ()),
    "save_rates": ("rates", lambda x: save_rates(x, "x"), ()),
    "decompose, scores": ("scores", moda.decompose, ()),
    "decompose, threshold": ("threshold", lambda x: moda.decompose(RATES, x), NONE),
    "decompose, epsilon": ("epsilon", lambda x: moda.decompose(SCORES, epsilon=x), NONE),
    "decompose, empty": ("allow_empty_classes", lambda x: moda.decompose(RATES, allow_empty_classes=x), FLAGS),
    "decompose, loader": ("loader", lambda x: moda.decompose(SCORES, epsilon="auto", model=MODEL, loader=x), ()),
    "decompose, progress": ("progress", lambda x: decompose(progress=x), FLAGS),
    "choose_epsilon, scores": ("scores", lambda x: choose_epsilon(x, MODEL, BATCHES), ()),
    "choose_epsilon, candidates": ("candidates", lambda x: choose_epsilon(SCORES, MODEL, BATCHES, candidates=x), ()),
    "masks_from_rates": ("rates", masks_from_rates, ("a tensor",)),
    "masks_from_shares": ("shares", masks_from_shares, ()),
    "masks_from_scores": ("scores", masks_from_scores, ()),
    "FiringRates, rates": ("rates", lambda x: moda.FiringRates(("1",), x, RATES.counts, SIZES), ()),
    "FiringRates, counts": ("counts", lambda x: moda.FiringRates(("1",), RATES.rates, {"1": x}, SIZES), ()),
    "FiringRates, sizes": ("class_sizes", lambda x: moda.FiringRates(("1",), RATES.rates, RATES.counts, x), ()),
    "Attributions, scores": ("scores", lambda x: moda.Attributions({"1": x}, SIZES), ()),
    "Attributions, sizes": ("class_sizes", lambda x: moda.Attributions(SCORES.scores, x), ()),
    "Decomposition": ("masks", moda.Decomposition, ()),
    "Decomposition, heads": ("heads", lambda x: moda.Decomposition(MASKS, heads=x), ()),
    "Decomposition, metadata": ("metadata", lambda x: moda.Decomposition(MASKS, metadata=x), ("a mapping",)),
    "select": ("classes", MODULES.select, SEVERAL),
    "compose": ("classes", lambda x: moda.compose(MODEL, MODULES, x, example=X), SEVERAL),
    "compose, output": ("output", lambda x: moda.compose(MODEL, MODULES, [0], example=X, output=x), (*PLACES, "strings", "[-1]", "[99]", "bytes")),
    "compose, names": ("class_names", lambda x: moda.compose(MODEL, MODULES, [0], example=X, class_names=x), NONE),
    "mask, output": ("output", lambda x: moda.mask(MODEL, MODULES, [0], output=x), (*PLACES, "strings", "[-1]", "[99]", "bytes")),
    "accuracy, model": ("model", lambda x: measure.accuracy(x, BATCHES), ("a module",)),
    "accuracy, loader": ("loader", lambda x: measure.accuracy(MODEL, x), ()),
    "overlap, counting": ("counting", lambda x: measure.overlap(MODEL, MODULES, 0, 1, x, example=X), ()),
    "mean_over_pairs": ("matrix", measure.mean_over_pairs, ()),
    "replace, loader": ("calibration_loader", lambda x: moda.replace(MODEL, MODEL, 0, x), ()),
    "replace, position": ("position", lambda x: moda.replace(MODEL, MODEL, x, BATCHES), ()),
    "observe, route": ("route", lambda x: moda.observe(nn.ReLU(), route=x), ()),
    "observe, activations": ("activations", lambda x: moda.observe(nn.ReLU(), activations=x), ("no entry",)),
    "observe, sites": ("sites", lambda x: moda.observe(nn.ReLU(), sites=x), ("no entry",)),
    "create": ("name", moda.models.create, ()),
    **{
        f"create, {size}": (size, lambda x, size=size: moda.models.create("resnet18", **{size: x}), NONE if size == "image_size" else ())
        for size in ("num_classes", "in_channels", "image_size")
    },
    "load": ("name", moda.data.load, ()),
    "load, root": ("root", lambda x: moda.data.load("digits", x), ("a string", "a long string")),
    "load, seed": ("seed", lambda x: moda.data.load("digits", seed=x), ()),
    "replacement_part": ("splits", lambda x: replacement_part(x, "strong", 0), ()),
    "dirichlet_split": ("labels", lambda x: dirichlet_split(x, 0), ()),
    "dirichlet_split, seed": ("seed", lambda x: dirichlet_split([0, 1] * 40, x, least=3), ()),
    "dirichlet_split, alpha": ("alpha", lambda x: dirichlet_split([0, 1] * 40, 0, least=3, alpha=x), NUMBERS),
    "MODA": ("affinity", lambda x: moda.methods.MODA(affinity=x), NUMBERS),
    "MwT": ("learning_rate", lambda x: MwT(learning_rate=x), NUMBERS),
    "NeMo": ("teacher", lambda x: NeMo(teacher=x), ("None", "a module")),
    "GradSplitter": ("hidden", lambda x: GradSplitter(hidden=x), COUNTS),
    "GradSplitter, shared": ("shared", lambda x: GradSplitter(shared=x), ()),
    "CNNSplitter": ("seed", lambda x: CNNSplitter(seed=x), ()),
    "CNNSplitter, thresholds": ("thresholds", lambda x: CNNSplitter(thresholds=x), ()),
    "CNNSplitter, ratios": ("sensitive_ratios", lambda x: CNNSplitter(sensitive_ratios=x), ()),
    "CNNSplitter, file": ("state_file", lambda x: CNNSplitter(state_file=x), ("None", "a string", "a long string")),
    "modularize, method": ("method", lambda x: moda.modularize(MODEL, x, BATCHES, 3), ()),
    "modularize, loader": ("loader", lambda x: moda.modularize(MODEL, MwT(), x, 3), ()),
    "modularize, classes": ("num_classes", lambda x: moda.modularize(MODEL, MwT(), BATCHES, x), ()),
    "fine_tune, settings": ("settings", lambda x: fine_tune(MODEL, BATCHES, [0], x), NONE),
    "union_module": ("decomposition", lambda x: union_module(MODEL, x, [0]), ()),
    "union_module, head": ("head", lambda x: union_module(MODEL, MODULES, [0], head=x), ()),
    "ModularCallback": ("loss", moda.ModularCallback, NONE),
    "save_composed": ("metadata", lambda x: moda.save_composed(MODEL, "x", x), ("None", "a mapping")),
    "save": ("folder", MODULES.save, ("a string", "a long string")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_arguments(case):
    name, call, right = CASES[case]
    check_refused(name, call, right)


def test_an_iterator_of_batches_is_refused_where_it_is_run_through_twice():
    for name, call in (
        ("loader", lambda batches: moda.modularize(MODEL, MwT(), batches, 3)),
        ("validation", lambda batches: moda.modularize(MODEL, MwT(), BATCHES, 3, validation=batches)),
        ("loader", lambda batches: fine_tune(nn.Linear(5, 3), batches, [0, 1, 2])),
    ):
        with pytest.raises(TypeError, match=rf"^{name}: expected batches that can be run through again"):
            call(iter(BATCHES))


def test_an_iterator_of_batches_and_of_classes_will_do_where_it_is_run_through_once():
    assert moda.count_firings(MODEL, iter(BATCHES), 3, progress=False).class_sizes.tolist() == [4, 4, 4]
    assert measure.accuracy(MODEL, BATCHES, iter([0, 1])) == measure.accuracy(MODEL, BATCHES, [0, 1])


@pytest.mark.parametrize("size", ["num_classes", "in_channels"])
def test_sizes_of_models_that_would_take_all_memory_are_refused_by_name(size):
    with pytest.raises(ValueError, match=rf"^{size}: expected a model of at most .* parameters, got 16777216"):
        moda.models.create("vgg16", **{size: 1 << 24})
