"""modular_losses and ModularLoss against the published implementation's data, float64 and each other."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moda_kernels
from moda_kernels import ModularLoss, modular_losses
from moda_kernels.reference import published_losses

GOLDEN_LOSSES = [
    "basic", "batch1", "batch128", "batch2_diff", "batch2_same", "dead", "dead_layer", "no_same_pair", "one_fc_layer",
    "one_same_pair", "signed", "single_class", "tiny_norm",
]  # fmt: skip
PLAIN_BACKENDS = ["torch", "reference"]


def golden_batch(data, dtype):
    acts = [torch.from_numpy(data[key]).to(dtype) for key in sorted(data) if key.startswith("act_")]
    return acts, torch.from_numpy(data["labels"])


def make_batch(shapes, samples, classes, dtype=torch.float64, seed=0):
    """Post-ReLU activations with about half of the values zero, and labels."""
    generator = torch.Generator().manual_seed(seed)
    acts = [torch.randn(samples, *shape, generator=generator, dtype=torch.float64).relu().to(dtype) for shape in shapes]
    return acts, torch.randint(classes, (samples,), generator=generator)


def weighted(losses, weights=(1.0, 0.7, 0.3)):
    return sum(w * term for w, term in zip(weights, losses, strict=True))


@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
@pytest.mark.parametrize("name", GOLDEN_LOSSES)
def test_golden_values(golden, name, backend):
    data = golden(f"losses_{name}")
    expected = np.nan_to_num(data["loss_f64"], nan=0.0)  # the published NaN (no pair) is our 0
    for dtype, rtol, atol in [(torch.float64, 1e-10, 1e-12), (torch.float32, 2e-5, 2e-6)]:
        acts, labels = golden_batch(data, dtype)
        got = np.array([term.item() for term in modular_losses(acts, labels, backend=backend)])
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
@pytest.mark.parametrize("name", GOLDEN_LOSSES)
def test_golden_gradients(golden, name, backend):
    data = golden(f"losses_{name}")
    acts, labels = golden_batch(data, torch.float64)
    acts = [act.requires_grad_() for act in acts]
    total = weighted(modular_losses(acts, labels, backend=backend), data["weights"])
    for index, grad in enumerate(torch.autograd.grad(total, acts)):
        expected = data[f"grad_{index:02d}"]
        living = acts[index].detach().numpy() != 0
        row_scale = np.abs(expected).reshape(len(labels), -1).max(1).reshape(-1, *[1] * (expected.ndim - 1))
        tolerance = 1e-8 * np.abs(expected) + 1e-11 + 1e-9 * row_scale
        assert (np.abs(grad.numpy() - expected) <= tolerance)[living].all()


def test_published_losses_give_the_published_nan(golden):
    for name in ["no_same_pair", "single_class", "batch1"]:
        data = golden(f"losses_{name}")
        acts, labels = golden_batch(data, torch.float64)
        got = np.array([term.item() for term in published_losses(acts, labels)])
        np.testing.assert_allclose(got, data["loss_f64"], rtol=1e-10, atol=1e-12, equal_nan=True)


def test_specification_vector():
    """The hand-sized example of the specification: three samples, a convolution of 2 channels and a linear layer of 3."""
    conv = torch.tensor([[[1.0, 3], [0, 0]], [[2, 2], [0, 2]], [[0, 0], [1, 1]]]).reshape(3, 2, 1, 2)
    linear = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 2]])
    labels = torch.tensor([0, 0, 1])
    got = [round(term.item(), 6) for term in modular_losses([conv, linear], labels)]
    assert got == [0.199233, 0.111803, 0.777778]


def test_gradcheck_and_gradgradcheck():
    # Signed values away from 0, where |x| has no derivative; rows of length 1 to cross the (N, C) and spatial paths.
    torch.manual_seed(1)
    labels = torch.tensor([0, 2, 0, 2, 5])
    shapes = [(5, 3), (5, 2, 2, 2), (5, 4, 3)]
    acts = [((torch.rand(shape) + 0.2) * torch.randn(shape).sign()).double().requires_grad_() for shape in shapes]

    def terms(*layers):
        return tuple(modular_losses(layers, labels, backend="torch"))

    assert torch.autograd.gradcheck(terms, acts)
    assert torch.autograd.gradgradcheck(terms, acts)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_agrees_with_reference_on_any_batch(data):
    samples = data.draw(st.integers(1, 9), label="N")
    classes = data.draw(st.integers(1, 5), label="classes")
    shapes = data.draw(
        st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3), label="layers"
    )
    acts, labels = make_batch(shapes, samples, classes, seed=data.draw(st.integers(0, 1000), label="seed"))
    dead = data.draw(st.lists(st.integers(0, samples - 1), max_size=3), label="dead rows")
    for act in acts:
        act[dead] = 0
    ours = [act.clone().requires_grad_() for act in acts]
    theirs = [act.clone().requires_grad_() for act in acts]
    mine, truth = modular_losses(ours, labels, backend="torch"), modular_losses(theirs, labels, backend="reference")
    torch.testing.assert_close(torch.stack([*mine]), torch.stack([*truth]), rtol=1e-10, atol=1e-12)
    got = torch.autograd.grad(weighted(mine), ours)
    expected = torch.autograd.grad(weighted(truth), theirs)
    for act, g, e in zip(acts, got, expected, strict=True):
        dead_rows = act.flatten(1).eq(0).all(1)
        torch.testing.assert_close(g[~dead_rows], e[~dead_rows], rtol=1e-8, atol=1e-11)
        assert (g[dead_rows] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    acts, labels = make_batch([(64, 9, 9), (200,)], samples=33, classes=4, dtype=dtype)
    got = modular_losses(acts, labels, backend="torch")
    truth = modular_losses([act.double() for act in acts], labels, backend="reference")
    assert {term.dtype for term in got} == {torch.float32}
    torch.testing.assert_close(torch.stack([*got]).double(), torch.stack([*truth]), rtol=2e-6, atol=1e-6)


def test_gradients_have_the_dtype_and_layout_of_the_activations():
    acts, labels = make_batch([(6, 4, 4), (8,)], samples=8, classes=3, dtype=torch.float16)
    acts[0] = acts[0].to(memory_format=torch.channels_last)
    acts = [act.requires_grad_() for act in acts]
    weighted(modular_losses(acts, labels)).backward()
    assert [act.grad.dtype for act in acts] == [torch.float16, torch.float16]
    wide = [act.detach().double().requires_grad_() for act in acts]
    weighted(modular_losses(wide, labels, backend="reference")).backward()
    for act, truth in zip(acts, wide, strict=True):
        torch.testing.assert_close(act.grad.double(), truth.grad, rtol=2e-3, atol=1e-6)


def strided_views(act):
    """The same values in other memory: channels_last, a transposed base, every second element of a larger tensor."""
    yield act.contiguous(memory_format=torch.channels_last)
    yield act.transpose(0, 3).contiguous().transpose(0, 3)
    wide = act.new_zeros(*act.shape[:-1], 2 * act.shape[-1])
    wide[..., ::2] = act
    yield wide[..., ::2]
    yield act[:, :, :1, :1].expand(-1, -1, *act.shape[2:])


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_any_strides(backend):
    (act,), labels = make_batch([(5, 4, 6)], samples=7, classes=3)
    for view in strided_views(act):
        got = modular_losses([view], labels, backend=backend)
        expected = modular_losses([view.clone(memory_format=torch.contiguous_format)], labels, backend="reference")
        torch.testing.assert_close(torch.stack([*got]), torch.stack([*expected]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("labels", "zero_terms"),
    [([3], ["affinity", "dispersion"]), ([0, 1, 2], ["affinity"]), ([4, 4, 4], ["dispersion"])],
)
@pytest.mark.parametrize("backend", [*PLAIN_BACKENDS, "auto"])
def test_no_pair_gives_zero_without_gradient(labels, zero_terms, backend):
    acts, _ = make_batch([(3, 2, 2), (5,)], samples=len(labels), classes=1)
    acts = [act.requires_grad_() for act in acts]
    losses = modular_losses(acts, torch.tensor(labels), backend=backend)
    for name in zero_terms:
        assert getattr(losses, name).item() == 0
        for grad in torch.autograd.grad(getattr(losses, name), acts, retain_graph=True, allow_unused=True):
            assert grad is None or (grad == 0).all()


def test_rare_pairs_survive_in_float32():
    """One same-class pair among 2000 samples: the sum over pairs is a 2000th of sum_k |s_k|^2."""
    generator = torch.Generator().manual_seed(0)
    act = torch.rand(2000, 6, generator=generator)
    labels = torch.arange(2000)
    labels[1] = 0
    row = torch.nn.functional.normalize(act[:2].double())
    expected = 1 - (row[0] @ row[1]).item()
    assert modular_losses([act], labels, backend="torch").affinity.item() == pytest.approx(expected, abs=2e-6)


def test_labels_of_any_value_and_int32():
    acts, labels = make_batch([(4, 3, 3)], samples=8, classes=3)
    expected = modular_losses(acts, labels)
    for other in [labels.int(), labels * 10**12 - 5, labels.neg()]:
        assert modular_losses(acts, other) == expected


def test_inputs_are_left_alone_and_backward_may_run_twice():
    acts, labels = make_batch([(4, 3, 3), (6,)], samples=8, classes=3)
    before = [act.clone() for act in acts]
    leaves = [act.requires_grad_() for act in acts]
    loss = weighted(modular_losses(leaves, labels))
    first = torch.autograd.grad(3.0 * loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for act, old, one, two in zip(acts, before, first, second, strict=True):
        assert torch.equal(act, old)
        torch.testing.assert_close(one, 3.0 * two, rtol=1e-12, atol=0)


def test_partial_requires_grad():
    acts, labels = make_batch([(4, 3, 3), (6,)], samples=8, classes=3)
    acts[1].requires_grad_()
    weighted(modular_losses(acts, labels)).backward()
    full = [act.detach().clone().requires_grad_() for act in acts]
    weighted(modular_losses(full, labels, backend="reference")).backward()
    assert acts[0].grad is None
    torch.testing.assert_close(acts[1].grad, full[1].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [*PLAIN_BACKENDS, "auto"])
def test_autocast_does_not_change_the_losses(dtype, backend):
    acts, labels = make_batch([(4, 3, 3), (6,)], samples=16, classes=3, dtype=torch.float32)
    expected = modular_losses(acts, labels, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        got = modular_losses(acts, labels, backend=backend)
    assert [a.item() for a in got] == [b.item() for b in expected]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiles_without_a_graph_break(backend):
    acts, labels = make_batch([(4, 3, 3), (6,)], samples=8, classes=3, dtype=torch.float32)
    loss = ModularLoss(backend=backend)

    def step(conv, linear, y):
        value = loss([conv, linear], y)
        return value, *torch.autograd.grad(value, [conv, linear])

    leaves = [act.requires_grad_() for act in acts]
    expected = step(*leaves, labels)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves, labels)
    grads = torch.autograd.grad(got, leaves)
    torch.testing.assert_close((got, *grads), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.compiles
def test_inductor_with_two_threads_on_the_cpu():
    """Its own `index_add` of computed rows adds once per thread, for layers this wide (see _opaque.py)."""
    (act,), labels = make_batch([(1024, 2, 2)], samples=128, classes=10, dtype=torch.float32)
    act.requires_grad_()
    torch.set_num_threads(2)
    loss = ModularLoss(backend="torch")
    expected = loss([act], labels)
    got = torch.compile(loss, fullgraph=True, dynamic=False)([act], labels)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(got, act)[0], torch.autograd.grad(expected, act)[0], rtol=1e-4, atol=1e-9
    )


def test_modular_loss_weights_and_last_terms():
    acts, labels = make_batch([(4, 3, 3), (6,)], samples=8, classes=3)
    acts = [act.requires_grad_() for act in acts]
    terms = modular_losses(acts, labels)
    loss = ModularLoss(0.5, 2.0, 0.1)
    assert loss.last is None
    value = loss(acts, labels)
    assert value.item() == pytest.approx(weighted(terms, (0.5, 2.0, 0.1)).item(), rel=1e-12)
    assert [t.item() for t in loss.last] == pytest.approx([t.item() for t in terms], rel=1e-12)
    assert not any(t.requires_grad for t in loss.last)
    assert repr(loss) == "ModularLoss(affinity=0.5, dispersion=2, compactness=0.1, backend='auto')"


def test_weight_zero_leaves_a_term_out_even_when_it_is_infinite():
    act = torch.full((4, 3), float("inf"))
    assert ModularLoss(0, 0, 0)([act], torch.tensor([0, 0, 1, 1])).item() == 0


@pytest.mark.parametrize(
    ("activations", "labels", "error", "message"),
    [
        ([], torch.zeros(2).long(), ValueError, "activations: expected at least one layer, got none"),
        (torch.zeros(2, 3), torch.zeros(2).long(), TypeError, "activations: expected a sequence of tensors, one per layer"),
        ([None], torch.zeros(2).long(), TypeError, "activations[0]: expected a tensor, got NoneType"),
        ([torch.zeros(2, 3).long()], torch.zeros(2).long(), TypeError, "activations[0]: expected a floating-point dtype"),
        ([torch.zeros(2)], torch.zeros(2).long(), ValueError, "activations[0]: expected shape (N, C) or (N, C, *spatial)"),
        ([torch.zeros(2, 0)], torch.zeros(2).long(), ValueError, "expected at least one sample, neuron and position"),
        ([torch.zeros(2, 3), torch.zeros(3, 3)], torch.zeros(2).long(), ValueError,
         "activations[1]: expected 2 samples as in labels, got 3"),
        ([torch.zeros(2, 3)], [0, 1], TypeError, "labels: expected a tensor, got list"),
        ([torch.zeros(2, 3)], torch.zeros(2), TypeError, "labels: expected dtype torch.int64 or torch.int32, got torch.float32"),
        ([torch.zeros(2, 3)], torch.zeros(2, 1).long(), ValueError, "labels: expected shape (N,), got (2, 1)"),
        ([torch.zeros(0, 3)], torch.zeros(0).long(), ValueError, "labels: expected at least one sample, got none"),
        ([torch.zeros(2, 3, device="meta")], torch.zeros(2).long(), ValueError,
         "activations[0]: expected device cpu as labels are on, got meta"),
    ],
)  # fmt: skip
def test_bad_input_is_named(activations, labels, error, message):
    with pytest.raises(error, match=re.escape(message)):
        modular_losses(activations, labels)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_bad_weight_is_named(weight):
    with pytest.raises(ValueError, match=f"dispersion: expected a finite weight of at least 0, got {weight}"):
        ModularLoss(dispersion=weight)


def test_public_names_exist():
    assert {name for name in moda_kernels.__all__ if not hasattr(moda_kernels, name)} == set()


@pytest.mark.parametrize("name", ["affinity", "dispersion", "compactness"])
@pytest.mark.parametrize("weight", [None, "1", True])
def test_a_weight_that_is_no_number(name, weight):
    with pytest.raises(TypeError, match=f"{name}: expected a number, got {type(weight).__name__}"):
        ModularLoss(**{name: weight})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([3], "one sample makes no pair"),
        ([-100] * 4, r"all of them are negative \(such as -100"),
        ([-1, -2], "negative"),
    ],
)
def test_a_batch_that_says_nothing_warns_once(labels, message):
    x, y = [torch.rand(len(labels), 3)], torch.tensor(labels)
    with pytest.warns(UserWarning, match=message):
        modular_losses(x, y)
    loss = ModularLoss()
    with pytest.warns(UserWarning, match=message):
        loss(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(x, y)
        modular_losses([torch.rand(2, 3)], torch.tensor([-100, 0]))
