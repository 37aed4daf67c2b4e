"""The law of composition over a spread of the zoo's families (all of it: benchmarks/composition_zoo.py)."""

from __future__ import annotations

import pytest
import torch

from tests.moda._helpers.zoo import ZOO
from tests.moda._helpers.zoo_law import verdict

MODELS = [
    "torchvision/densenet",
    "torchvision/efficientnet_v2",
    "timm/flexivit_small",
    "timm/resmlp",
    "transformers/bert",
    "transformers/falcon",
]
OVER_IDEAL = 0.1
"""How much more than what the gradient says has to stay may be left."""


@pytest.mark.parametrize("name", MODELS)
def test_composed_models_equal_masked_ones_and_are_about_as_small_as_can_be(name: str) -> None:
    found = verdict(ZOO[name], torch.float64, measure=True)
    assert found.errors
    assert max(found.errors.values()) <= 1e-9
    assert found.any_batch
    assert found.left is not None
    assert found.left.composed < found.left.whole
    assert found.left.composed <= (1 + OVER_IDEAL) * found.left.ideal


@pytest.mark.parametrize("name", ["transformers/bert", "timm/flexivit_small"])
def test_composed_models_equal_masked_ones_in_single_precision(name: str) -> None:
    assert max(verdict(ZOO[name], torch.float32).errors.values()) <= 1e-5
