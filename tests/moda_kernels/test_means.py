from __future__ import annotations

import re

import pytest
import torch

from moda_kernels import class_means

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_means_by_hand(dtype, device):
    torch.manual_seed(0)
    activations = [torch.randn(9, 4, 3, 3).to(device, dtype), torch.randn(9, 5).to(device, dtype)]
    labels = torch.tensor([0, 3, 0, 3, 3, 1, 0, 0, 3], device=device)  # class 2 is empty
    for activation, means in zip(activations, class_means(activations, labels, 4), strict=True):
        rows = activation.double().abs().flatten(2).mean(2) if activation.dim() > 2 else activation.double()
        assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for k in range(4):
            members = rows[labels == k]
            expected = members.mean(0) if len(members) else torch.zeros_like(rows[0])
            torch.testing.assert_close(means[k].double(), expected, rtol=1e-5, atol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=re.escape("labels: expected classes in [0, 2), got 2")):
        class_means([torch.ones(2, 3)], torch.tensor([0, 2]), 2)
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        class_means([torch.ones(2, 3)], torch.tensor([0, 0]), 0)
