"""The Triton kernels of attributions, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from moda_kernels import closed_form
from moda_kernels.tally import Tally
from moda_kernels.triton_kernels import attribution
from tests.moda_kernels._helpers.triton_oracle import DEVICES, HALF, assert_three_way

pytestmark = pytest.mark.parametrize("device", DEVICES)

# A tile's rest, one row a program, rows of every tile shape and beyond, 2 to the 31 aside; channels_last in parts.
SHAPES = [(3,), (2049,), (5, 1), (4, 2, 2), (6, 3, 5), (3, 8, 8), (2, 15, 17), (2, 1030)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_three_ways(shape, dtype, device):
    x, g = (torch.randn(3, *shape, device=device).to(dtype) for _ in range(2))
    pairs = [(x, g)]
    if x.dim() > 2:
        last = x.movedim(1, -1).contiguous().movedim(-1, 1)
        pairs += [(last, g), (x[:, :, ::2], g[:, :, ::2])]
    for activation, gradient in pairs:
        rows = attribution.attributions(activation, gradient)
        assert rows.dtype == torch.float32
        truth = closed_form.attributions(activation.double(), gradient.double())
        same = closed_form.attributions(activation, gradient)
        assert_three_way(rows, same, truth, f"{tuple(activation.shape)} {dtype}", ulps=16)


def test_long_maps_are_split_and_their_signs_kept(device):
    """Halves that cancel: the magnitude belongs to the sum of the parts."""
    positions = 2 * attribution.layouts.SPAN
    x = torch.ones(1, positions, 4, device=device).movedim(-1, 1)
    g = torch.ones_like(x)
    g[:, 1, positions // 2 :] = -1
    g[:, 2] = -1
    assert attribution.layouts.arrange(x)[1].splits == 2
    assert attribution.attributions(x, g).tolist() == [[positions, 0, positions, positions]]


def test_sums_per_class(device):
    x, g = torch.randn(2, 70, 5, 3, 3, device=device)
    labels = (torch.arange(70, device=device) * 7) % 5 - 1  # class 4 is none of the four, -1 none at all
    results = []
    for add in (attribution.add_attributions, closed_form.add_attributions):
        sums = [torch.ones(3, 5, device=device) for _ in range(2)]
        sizes, invalid = torch.ones(3, dtype=torch.int64, device=device), torch.tensor(2, device=device)
        add([x, x[:, :, 0, 0]], [g, g[:, :, 0, 0]], labels, Tally((), sizes, invalid, sums))
        results.append((sums, sizes.tolist(), int(invalid)))
    assert results[0][1:] == results[1][1:]
    for mine, expected in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_opcheck(device):
    x, g = torch.randn(2, 3, 4, 5, 5, device=device)
    arguments = (x.to(memory_format=torch.channels_last), g)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.moda_kernels.attributions, arguments, test_utils=checks)
