"""Decompositions: unions of modules, classes and masks that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moda.decomposition.container import Decomposition, check_classes
from moda.decomposition.settings import FiringRule
from tests.moda._helpers.decomposing import example


def test_select_is_the_union_of_the_modules():
    selected = example().select([2, 0])
    assert list(selected) == ["relu2", "relu1"]
    assert selected["relu2"].tolist() == [True, True, False, True]
    assert selected["relu1"].tolist() == [True, True]
    assert example().select([1])["relu2"].tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ([], ValueError, "classes: expected at least one class, got none"),
        ([0, 3], ValueError, r"classes: expected classes in \[0, 3\), got \[3\]"),
        ([-1], ValueError, r"classes: expected classes in \[0, 3\), got \[-1\]"),
        ([1, 0, 1], ValueError, r"classes: expected every class once, got \[1\] more than once"),
        ([0.5], TypeError, r"classes: expected a sequence of class indices, got \[0.5\]"),
        (2, TypeError, "classes: expected a sequence of class indices, got 2"),
        ("12", TypeError, "classes: expected a sequence of class indices, got '12'"),
        (None, TypeError, "classes: expected a sequence of class indices, got None"),
    ],
)
def test_bad_classes_are_named(classes, error, message):
    with pytest.raises(error, match=message):
        example().select(classes)


@pytest.mark.parametrize("classes", [(2, 0), np.array([2, 0]), torch.tensor([2, 0]), iter([2, 0])])
def test_classes_keep_their_order_in_any_kind_of_sequence(classes):
    assert check_classes(classes, 3) == [2, 0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"masks": [torch.ones(2, 2, dtype=torch.bool)]}, TypeError, "masks: expected a mapping .* got list"),
        ({"masks": {}}, ValueError, "masks: expected at least one site, got none"),
        ({"masks": {"a": torch.ones(2, 2)}}, TypeError, r"masks\['a'\]: expected a bool tensor, got torch.float32"),
        (
            {"masks": {"a": torch.ones(2, dtype=torch.bool)}},
            ValueError,
            r"masks\['a'\]: expected shape \(classes, neurons\), got \(2,\)",
        ),
        (
            {"masks": {"a": torch.ones(2, 2, dtype=torch.bool), "b": torch.ones(3, 2, dtype=torch.bool)}},
            ValueError,
            r"masks\['b'\]: expected 2 classes as in the first site, got 3",
        ),
    ],
)
def test_bad_masks_are_named(options, error, message):
    with pytest.raises(error, match=message):
        Decomposition(**options)


def test_a_decomposition_of_another_method_carries_its_own_settings(tmp_path):
    settings = {"threshold": "none", "layers": [1, 2], "inner": {"share": 0.5}}
    made = Decomposition(example().masks, method="mwt", settings=settings)
    made.save(tmp_path)
    loaded = Decomposition.load(tmp_path)
    assert (loaded.method, loaded.settings, loaded.combine) == ("mwt", settings, "rows")
    with pytest.raises(ValueError, match="settings: expected those of the rule 'firing', got {'threshold': 'none'"):
        FiringRule.of(loaded.settings)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"settings": FiringRule().settings() | {"threshold": 2}}, ValueError, r"threshold: .* in \[0, 1\], got 2"),
        (
            {"settings": FiringRule().settings() | {"more": 2}},
            ValueError,
            "settings: expected the entries rule, .*, more",
        ),
        (
            {"settings": {"rule": "firing"}},
            ValueError,
            "settings: expected the entries rule, threshold, min_fraction, got",
        ),
        ({"settings": [1]}, TypeError, "settings: expected an object, got list"),
        (
            {"settings": {"x": torch.ones(1)}},
            TypeError,
            "settings.*'x'.*: expected only what JSON can hold, got Tensor",
        ),
        ({"method": ""}, ValueError, "method: expected a non-empty string"),
        ({"method": 3}, TypeError, "method: expected a string, got int"),
        ({"combine": "sum"}, ValueError, "combine: expected one of rows, logit, probability, got 'sum'"),
    ],
)
def test_bad_settings_are_named(options, error, message):
    with pytest.raises(error, match=message):
        Decomposition(example().masks, **options)


@pytest.mark.parametrize("value", [torch.zeros(2), float("nan"), {1, 2}])
def test_metadata_that_json_cannot_hold_is_named(value):
    with pytest.raises(
        (TypeError, ValueError), match=r"metadata\['note'\]: expected (only what JSON can hold|a finite number)"
    ):
        Decomposition(example().masks, metadata={"note": value})
