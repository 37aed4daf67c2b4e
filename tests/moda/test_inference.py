"""Modes of computing are put back."""

from __future__ import annotations

import pytest
import torch

import moda
from moda import models
from moda.inference import whole_float32


def test_float32_is_whole_inside_alone():
    def settings() -> list[object]:
        return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]

    before = settings()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with whole_float32():
            assert settings() == [False, False]
        assert settings() == [True, before[1]]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before[0]
    assert settings() == before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this PyTorch has the older settings alone")
def test_float32_is_whole_beside_the_newer_settings():
    conv, rnn = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = conv.fp32_precision, rnn.fp32_precision
    conv.fp32_precision, rnn.fp32_precision = "ieee", "tf32"  # the older setting can no longer be read
    try:
        with whole_float32():
            assert (conv.fp32_precision, rnn.fp32_precision) == ("ieee", "ieee")
        assert (conv.fp32_precision, rnn.fp32_precision) == ("ieee", "tf32")
    finally:
        conv.fp32_precision, rnn.fp32_precision = before


@pytest.mark.gpu
def test_composition_on_a_gpu():
    """Where convolutions multiply in TF32, the law is checked in float32."""
    model = models.create("resnet18", num_classes=4, width=0.25, image_size=32).cuda().eval()
    images = torch.randn(8, 3, 32, 32, device="cuda")
    with moda.observe(model, example=images) as taps:
        widths = dict(zip(taps.names, taps.widths, strict=True))
    decomposition = moda.Decomposition({name: torch.rand(4, width) < 0.5 for name, width in widths.items()})
    composed = moda.compose(model, decomposition, [1, 2], example=images)
    assert composed(images).shape == (8, 2)
