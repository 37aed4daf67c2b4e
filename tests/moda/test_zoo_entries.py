"""The zoo itself: many models of many families, each of which gives logits."""

from __future__ import annotations

import pytest
import torch

from tests.moda._helpers.zoo import FAMILIES, ZOO, Entry, tensors_of


def test_the_zoo_has_the_models_it_is_meant_to_have() -> None:
    assert len(ZOO) == sum(len(entries) for entries in FAMILIES.values()) >= 208
    assert len(FAMILIES["transformers"]) >= 28
    assert {family: len(entries) >= 39 for family, entries in FAMILIES.items()} == dict.fromkeys(FAMILIES, True)


@pytest.mark.parametrize("name", ["torchvision/fcn", "timm/resmlp", "transformers/bart", "written/nested_input"])
def test_an_entry_gives_the_same_model_and_samples_each_time_and_logits(name: str) -> None:
    entry: Entry = ZOO[name]
    outputs = []
    for _ in range(2):
        args, kwargs = entry.samples(3)
        with torch.no_grad():
            outputs.append(entry.made().eval()(*args, **kwargs))
    assert entry.logits(outputs[0]).shape[:2] == (3, entry.num_classes)
    assert all(torch.equal(a, b) for a, b in zip(*map(tensors_of, outputs), strict=True))
