"""The operator that marks taps: an identity in numbers and gradients, and a node of an exported graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moda.observation import marker


class Marked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.moda.tap(torch.relu(x), 3, 1)
        return y * 2


def test_it_is_an_identity_with_a_gradient():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(marker.mark(x, 0, 1), x)
    assert torch.autograd.gradcheck(lambda value: torch.ops.moda.tap(value, 1, -1), (x,))
    torch.library.opcheck(torch.ops.moda.tap, (x, 2, 1))


def test_it_stays_in_an_exported_graph():
    for mode in (True, False):
        program = torch.export.export(Marked().train(mode), (torch.randn(2, 3),), strict=False)
        (node,) = [node for node in program.graph.nodes if node.target is torch.ops.moda.tap.default]
        assert node.args[1:] == (3, 1)
        assert node.args[0].target is torch.ops.aten.relu.default
