from __future__ import annotations

import re

import pytest
import torch

from moda_kernels import ClassSimilarity, class_similarity


def random_batch(samples, classes=3):
    torch.manual_seed(0)
    return [torch.randn(samples, 4, 3, 3).relu(), torch.randn(samples, 5).relu()], torch.randint(classes, (samples,))


def test_every_entry_by_hand():
    activations, labels = random_batch(samples=9)
    labels[labels == 1] = 0  # class 1 is empty
    labels[-1], labels[labels == 2] = 2, 0
    labels[-1] = 2  # class 2 has a single sample: no pair with itself
    for act, similarity in zip(activations, class_similarity(activations, labels, 3), strict=True):
        rows = torch.nn.functional.normalize(act.abs().flatten(2).mean(2) if act.dim() > 2 else act)
        cosine = rows @ rows.T
        for a in range(3):
            for b in range(3):
                pairs = [
                    cosine[i, j].item()
                    for i in range(9)
                    for j in range(9)
                    if labels[i] == a and labels[j] == b and (i < j if a == b else True)
                ]
                expected = sum(pairs) / len(pairs) if pairs else 0.0
                assert similarity[a, b].item() == pytest.approx(expected, abs=1e-6)


def test_batches_add_up():
    activations, labels = random_batch(samples=20)
    whole = class_similarity([act.double() for act in activations], labels, 3)
    parts = ClassSimilarity(3)
    for rows in (slice(0, 7), slice(7, 8), slice(8, 20)):
        parts.update([act[rows].double() for act in activations], labels[rows])
    for one, two in zip(whole, parts.result(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_bad_input_is_named():
    similarity = ClassSimilarity(2)
    with pytest.raises(RuntimeError, match="no batch was added"):
        similarity.result()
    similarity.update([torch.ones(2, 3)], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=re.escape("labels: expected classes in [0, 2), got 2")):
        similarity.update([torch.ones(2, 3)], torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=re.escape("activations: expected layers of [3] neurons as before, got [4]")):
        similarity.update([torch.ones(2, 4)], torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="num_classes: expected an int, got float"):
        ClassSimilarity(2.0)
    torch.testing.assert_close(similarity.result()[0], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
