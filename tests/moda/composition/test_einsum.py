"""Einstein sums are cut as the matrix products are that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda.composition.compose import compose
from moda.composition.einsum import write_out
from moda.composition.masking import mask
from tests.moda._helpers.composing import lively, random_modules, watched, widths

SUMS = [
    ("nc,cd->nd", [(4, 5), (5, 6)]),
    ("nc,dc->dn", [(4, 5), (6, 5)]),
    ("dc,nc->nd", [(6, 5), (4, 5)]),
    ("...c,cd", [(2, 3, 5), (5, 6)]),
    ("ntd,dhk->nhtk", [(2, 3, 5), (5, 2, 4)]),
    ("nhtk,hkd->ntd", [(2, 3, 4, 5), (3, 5, 6)]),
    ("nhtd,nhsd->nhts", [(2, 3, 4, 5), (2, 3, 6, 5)]),
    ("nthd,nshd->nhts", [(2, 4, 3, 5), (2, 6, 3, 5)]),
    ("...td,...sd->...ts", [(2, 3, 4, 5), (2, 3, 6, 5)]),
    ("nc,nd->ncd", [(2, 3), (2, 4)]),
    ("n,n->n", [(3,), (3,)]),
    ("i,j", [(3,), (4,)]),
    ("nc,nc->n", [(2, 3), (2, 3)]),
    ("nc,nc->", [(2, 3), (2, 3)]),
    ("ntc->nc", [(2, 3, 4)]),
    ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)]),
    ("na,nb,kab->nk", [(2, 3), (2, 4), (5, 3, 4)]),
    ("ij,k->i", [(2, 3), (4,)]),
    ("ii->i", [(3, 3)]),  # a diagonal, which stays as it is
    ("nc,nd->nd", [(2, 1), (2, 4)]),
    ("nc,nc->nc", [(2, 1), (2, 4)]),  # broadcast, which stays as it is
]


@pytest.mark.parametrize("parameters", [(), (0,), (1,)])
@pytest.mark.parametrize(("equation", "shapes"), SUMS)
def test_a_sum_that_is_written_out_gives_what_it_gave(equation, shapes, parameters):
    """Whichever of the operands depend on the input."""
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    graph = torch.fx.Graph()
    nodes = []
    for place, value in enumerate(values):
        op = "get_attr" if place in parameters else "placeholder"
        node = graph.create_node(op, f"x{place}")
        node.meta["val"] = value
        nodes.append(node)
    call = graph.call_function(torch.ops.aten.einsum.default, (equation, nodes))
    call.meta["val"] = torch.einsum(equation, values)
    graph.output(call)
    write_out(graph)
    graph.lint()
    written = not any(node.target is torch.ops.aten.einsum.default for node in graph.nodes)
    assert written == (equation not in ("ii->i", "nc,nc->nc"))
    held = nn.Module()
    for place in parameters:
        if place < len(values):
            held.register_buffer(f"x{place}", values[place])
    module = torch.fx.GraphModule(held, graph)
    given = [value for place, value in enumerate(values) if place not in parameters]
    torch.testing.assert_close(module(*given), torch.einsum(equation, values))


class Attention(nn.Module):
    """Heads by einsum, with packed parameters, as many write it; a dense layer by einsum and one by tensordot."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(6, 16)), nn.Parameter(torch.randn(16, 6))
        self.query, self.key, self.value = (nn.Parameter(torch.randn(6, 2, 4)) for _ in range(3))
        self.out, self.head = nn.Parameter(torch.randn(2, 4, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (torch.einsum("ntd,dhk->nthk", x, w) for w in (self.query, self.key, self.value))
        weights = torch.einsum("nthk,nshk->nhts", query, key).softmax(-1)
        x = x + torch.einsum("nhts,nshk,hkd->ntd", weights, value, self.out)
        hidden = F.gelu(torch.einsum("ntd,df->ntf", x, self.up))
        return self.head((x + torch.tensordot(hidden, self.down, dims=1)).mean(1))


def test_parameters_of_sums_are_cut():
    model, x = lively(Attention()), torch.randn(2, 5, 6, dtype=torch.float64)
    decomposition = random_modules(widths(watched(model, x), x), 3, 0.4)
    composed = compose(model, decomposition, [2, 1])
    kept = int(composed.masks["gelu"].sum())
    assert 0 < kept < 16
    assert composed.get_parameter("up").shape == (6, kept)
    assert composed.get_parameter("down").shape == (kept, 6)
    for samples, tokens in ((2, 5), (3, 4)):
        other = torch.randn(samples, tokens, 6, dtype=torch.float64)
        expected = mask(model, decomposition, [2, 1])(other)
        torch.testing.assert_close(composed(other), expected, rtol=1e-9, atol=1e-9)
