"""The losses and counts of a batch spread over real processes, against one process that holds the whole batch."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moda_kernels import AttributionSums, FiringCounter, ModularLoss, backends, modular_losses, pool
from moda_kernels import distributed as moda_distributed
from tests.moda_kernels._helpers.rank_pool import RankPool

WORLD = 4
WEIGHTS = (1.0, 0.7, 0.3)
SHAPES = [(6, 3, 3), (9,), (4, 5), (3, 2, 2, 2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pool = RankPool(WORLD, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture
def world_of_one(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def make_batch(samples, classes, dtype=torch.float64, seed=0):
    """Activations of four layers, half of the values 0, one row all 0; arbitrary integers as labels."""
    generator = torch.Generator().manual_seed(seed)
    acts = [torch.randn(samples, *shape, generator=generator, dtype=torch.float64).relu().to(dtype) for shape in SHAPES]
    acts[1][samples // 2] = 0
    return acts, torch.randint(classes, (samples,), generator=generator)


def cut(acts, labels, sizes):
    """Each rank's (activations, labels) for consecutive shares of these sizes."""
    shares = zip(*(act.split(sizes) for act in acts), strict=True)
    return list(zip(map(list, shares), labels.split(sizes), strict=True))


def weighted(losses):
    return sum(weight * term for weight, term in zip(WEIGHTS, losses, strict=True))


def losses_and_gradients(acts, labels, **options):
    """What one process gets for what it holds: three numbers, and a gradient per layer."""
    acts = [act.clone().requires_grad_() for act in acts]
    losses = modular_losses(acts, labels, **options)
    return torch.stack(losses).detach(), torch.autograd.grad(weighted(losses), acts)


def rank_losses(rank, options, batch):
    """`way`: "owners" or "all_reduce" forces the exchange of present classes that would not pay with so few."""
    options = dict(options)
    way, usual = options.pop("way", None), moda_distributed.MESSAGE_BYTES
    moda_distributed.MESSAGE_BYTES = {"owners": -(2**62), "all_reduce": 2**62, None: usual}[way]
    try:
        return losses_and_gradients(*batch, group="world", **options)
    finally:
        moda_distributed.MESSAGE_BYTES = usual


def check_against_whole_batch(ranks, acts, labels, sizes, options, *, rtol=1e-10, atol=1e-12):
    """Same losses on every rank, bitwise; those of the whole batch; gradients W times those of the whole batch."""
    expected, gradients = losses_and_gradients([act.double() for act in acts], labels, backend="torch")
    results = ranks(rank_losses, options, by_rank=cut(acts, labels, sizes))
    for losses, _ in results:
        assert torch.equal(losses, results[0][0])
    torch.testing.assert_close(results[0][0].double(), expected, rtol=rtol, atol=atol)
    for layer, gradient in enumerate(gradients):
        got = torch.cat([result[1][layer] for result in results])
        assert got.dtype == acts[layer].dtype
        scale = WORLD * float(gradient.abs().max())
        torch.testing.assert_close(got.double(), WORLD * gradient, rtol=rtol, atol=atol + rtol * scale)


SPLITS = {
    "even": [16, 16, 16, 16],
    "uneven": [40, 1, 3, 20],
    "empty_ranks": [0, 61, 3, 0],
    "one_rank_has_all": [0, 0, 64, 0],
    "two_samples": [1, 0, 0, 1],
}


DENSE, PRESENT, OWNERS = {"num_classes": 60}, {"way": "all_reduce"}, {"way": "owners"}
ways = pytest.mark.parametrize("way", [DENSE, PRESENT, OWNERS], ids=["dense", "present", "owners"])


@ways
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS.keys())
def test_equals_the_whole_batch(ranks, sizes, way):
    for classes in (10, 60):
        acts, labels = make_batch(sum(sizes), classes)
        check_against_whole_batch(ranks, acts, labels, sizes, way)


@ways
def test_classes_missing_on_ranks(ranks, way):
    """Sorted labels: every rank has classes that no other one has."""
    acts, labels = make_batch(32, 9)
    check_against_whole_batch(ranks, acts, labels.sort().values, [8, 8, 8, 8], way)


@pytest.mark.parametrize("way", [PRESENT, OWNERS], ids=["present", "owners"])
def test_any_integers_as_labels(ranks, way):
    acts, labels = make_batch(40, 5)
    labels = torch.tensor([-(2**62), -1, 0, 7, 2**62])[labels]
    check_against_whole_batch(ranks, acts, labels, [10, 20, 0, 10], way)


@ways
def test_int32_labels(ranks, way):
    acts, labels = make_batch(16, 5)
    check_against_whole_batch(ranks, acts, labels.int(), [4] * 4, way)


@ways
@pytest.mark.parametrize("labels", [torch.zeros(12), torch.arange(12)], ids=["no_different_pair", "no_same_pair"])
def test_a_kind_without_pairs_gives_zero(ranks, labels, way):
    acts, _ = make_batch(12, 2)
    check_against_whole_batch(ranks, acts, labels.long(), [3] * 4, way)


@ways
def test_no_samples_at_all(ranks, way):
    acts, labels = make_batch(2, 3)
    empty = [([act[:0] for act in acts], labels[:0])] * WORLD
    for losses, gradients in ranks(rank_losses, way, by_rank=empty):
        assert losses.tolist() == [0, 0, 0]
        assert [tuple(gradient.shape) for gradient in gradients] == [(0, *shape) for shape in SHAPES]


@ways
def test_who_holds_which_sample_does_not_matter(ranks, way):
    acts, labels = make_batch(32, 6)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    shuffled = [act[order] for act in acts], labels[order]
    first = ranks(rank_losses, way, by_rank=cut(acts, labels, [8] * 4))
    second = ranks(rank_losses, way, by_rank=cut(*shuffled, [20, 1, 0, 11]))
    torch.testing.assert_close(first[0][0], second[0][0], rtol=1e-12, atol=0)
    for layer in range(len(SHAPES)):
        there, back = (torch.cat([result[1][layer] for result in results]) for results in (first, second))
        torch.testing.assert_close(there[order], back, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes(ranks, dtype):
    """Sums are float32. Gradients come back in the activations' dtype, rounded to it: half an ulp."""
    acts, labels = make_batch(64, 10, dtype)
    rtol = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    expected, _ = losses_and_gradients([act.double() for act in acts], labels, backend="torch")
    for options in (DENSE, PRESENT, OWNERS):
        losses = ranks(rank_losses, options, by_rank=cut(acts, labels, [16] * 4))[0][0]
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses.double(), expected, rtol=5e-6, atol=1e-6)
        check_against_whole_batch(ranks, acts, labels, [16] * 4, options, rtol=rtol, atol=1e-6)


def test_layers_of_different_dtypes(ranks):
    acts, labels = make_batch(16, 4)
    acts = [
        act.to(dtype)
        for act, dtype in zip(acts, [torch.bfloat16, torch.float32, torch.float64, torch.float32], strict=True)
    ]
    expected, _ = losses_and_gradients([act.double() for act in acts], labels)
    losses, gradients = ranks(rank_losses, {}, by_rank=cut(acts, labels, [4] * 4))[0]
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    assert [gradient.dtype for gradient in gradients] == [act.dtype for act in acts]


@ways
def test_a_rare_class_is_not_lost_in_float32(ranks, way):
    """One sample against 39999 of another class: dispersion follows from that one alone, in the difference S - S_k."""
    generator = torch.Generator().manual_seed(4)
    acts = [torch.rand(40_000, 8, generator=generator) + 1]
    acts[0][17] = torch.tensor([1.0, 0.1, 0.7, 0.3, 0.01, 0.2, 0.9, 0.4])
    labels = torch.zeros(40_000, dtype=torch.int64)
    labels[17] = 1
    expected, _ = losses_and_gradients([act.double() for act in acts], labels)
    losses, _ = ranks(rank_losses, way, by_rank=cut(acts, labels, [10_000] * 4))[0]
    torch.testing.assert_close(losses.double()[1], expected[1], rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", ["torch", "reference", "native", "triton"])
def test_every_backend_and_the_fused_route(ranks, backend):
    """Grouped: the backend pools. Fused: rows come pooled from the tap."""
    if backend == "triton" or not backends()[backend]:
        pytest.skip(f"{backend}: does not run here; on a GPU it is checked by test_nccl")
    acts, labels = make_batch(32, 6, torch.float32)
    for layers in (acts, pool(acts)):
        options = {"backend": backend, "num_classes": 6}
        check_against_whole_batch(ranks, layers, labels, [9, 7, 16, 0], options, rtol=1e-5, atol=1e-6)


# Subgroups


def rank_subgroups(rank, members, options, batch):
    """Every rank makes all groups, in the same order, and uses its own."""
    groups = [dist.new_group(group) for group in members]
    mine = next(group for group, who in zip(groups, members, strict=True) if rank in who)
    return losses_and_gradients(*batch, group=mine, **options)


@pytest.mark.parametrize("members", [[[0, 2], [1, 3]], [[0, 1, 3], [2]], [[0], [1], [2], [3]]], ids=str)
def test_subgroups(ranks, members):
    acts, labels = make_batch(32, 5)
    shares = cut(acts, labels, [8, 10, 6, 8])
    for num_classes in (None, 5):
        results = ranks(rank_subgroups, members, {"num_classes": num_classes}, by_rank=shares)
        for group in members:
            together = [torch.cat([shares[rank][0][layer] for rank in group]) for layer in range(len(SHAPES))]
            expected, gradients = losses_and_gradients(together, torch.cat([shares[rank][1] for rank in group]))
            for layer, gradient in enumerate(gradients):
                got = torch.cat([results[rank][1][layer] for rank in group])
                torch.testing.assert_close(got, len(group) * gradient, rtol=1e-10, atol=1e-14)
            for rank in group:
                torch.testing.assert_close(results[rank][0], expected, rtol=1e-12, atol=1e-14)


def rank_outside(rank, batch):
    group = dist.new_group([0])
    if rank == 0:
        return "member"
    return losses_and_gradients(*batch, group=group)


def test_a_process_outside_of_the_group(ranks):
    acts, labels = make_batch(8, 3)
    member, *others = ranks.outcomes(rank_outside, by_rank=cut(acts, labels, [2] * 4))
    assert member == "member"
    for error in others:
        assert error.kind == "ValueError"
        assert error.message == "group: expected a group with this process in it, got one without"


# What travels


def rank_traffic(rank, num_classes, batch):
    """(collective, elements) of every collective of a first and a second step, the second one's backward apart."""
    sent = []

    def recorded(name):
        original = getattr(dist, name)

        def collective(*args, **kwargs):
            tensor = args[1] if isinstance(args[0], list) else args[0]
            sent.append((name, tensor.numel(), tensor.dtype))
            return original(*args, **kwargs)

        return collective

    names = ["all_reduce", "all_gather", "all_to_all_single"]
    originals = {name: getattr(dist, name) for name in names}
    phases = []
    try:
        for name in names:
            setattr(dist, name, recorded(name))
        group = dist.new_group()
        for _ in range(2):
            acts = [act.clone().requires_grad_() for act in batch[0]]
            loss = weighted(modular_losses(acts, batch[1], group=group, num_classes=num_classes))
            phases.append(sent.copy())
            sent.clear()
        loss.backward()
        phases.append(sent.copy())
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return phases


def test_one_collective_a_step(ranks):
    """K (D + 2) + 2 numbers once in forward, nothing in backward; labels beside it only where K is not known."""
    acts, labels = make_batch(32, 5, torch.float32)
    shares = cut(acts, labels, [8] * 4)
    width = sum(shape[0] for shape in SHAPES)
    sums = ("all_reduce", 12 * (width + 2) + 2, torch.float32)
    for first, second, backward in ranks(rank_traffic, 12, by_rank=shares):
        assert first == [("all_gather", 2, torch.int64), sums]  # the check of the layers, once
        assert (second, backward) == ([sums], [])
    present = len(labels.unique())
    sums = ("all_reduce", present * (width + 2) + 2, torch.float32)
    for first, second, backward in ranks(rank_traffic, None, by_rank=shares):
        assert first == [("all_gather", 2, torch.int64), ("all_gather", 10, torch.int64), sums]
        assert (second, backward) == ([("all_gather", 10, torch.int64), sums], [])


def test_many_classes_go_by_their_owners(ranks):
    """64 classes, 16 on each rank: 2 x 16 rows travel, not 64, once the layers are wide enough to matter."""
    widths = [12000, 4000]
    generator = torch.Generator().manual_seed(2)
    acts = [torch.rand(64, width, generator=generator) for width in widths]
    shares = cut(acts, torch.arange(64), [16] * 4)
    for first, second, backward in ranks(rank_traffic, None, by_rank=shares):
        rows = [("all_to_all_single", 16 * 16001, torch.float32)]
        sums = [("all_reduce", 16001, torch.float64), ("all_reduce", 2, torch.float32)]
        assert (second, backward) == ([("all_gather", 18, torch.int64), *rows, *sums, *rows], [])
        assert first == [("all_gather", 2, torch.int64), *second]


# Errors


def disagreeing_batches(what):
    acts, labels = make_batch(8, 3, torch.float32)
    shares = cut(acts, labels, [2] * 4)
    others = list(shares[2][0])
    if what == "layers":
        others.pop()
    elif what == "width":
        others[1] = others[1][:, :5]
    elif what == "dtype":
        others[3] = others[3].double()
    shares[2] = (others, shares[2][1])
    return shares


def rank_disagreement(rank, num_classes, batch):
    group = dist.new_group()
    options = {"group": group, "num_classes": num_classes}
    try:
        losses_and_gradients(*batch, **options)
    except ValueError as error:
        acts, labels = make_batch(4, 3)
        return str(error), losses_and_gradients(acts, labels, group=group, num_classes=3)[0]  # the group is still good
    return "no error", None


@pytest.mark.parametrize("num_classes", [None, 3], ids=["present", "dense"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("layers", "4 layers (6 float32, 9 float32, 4 float32, 3 float32), num_classes={k} on rank 0, 1, 3; "
                   "3 layers (6 float32, 9 float32, 4 float32), num_classes={k} on rank 2"),
        ("width", "5 float32, 4 float32, 3 float32), num_classes={k} on rank 2"),
        ("dtype", "9 float32, 4 float32, 3 float64), num_classes={k} on rank 2"),
    ],
)  # fmt: skip
def test_ranks_that_disagree_get_an_error_and_no_hang(ranks, what, message, num_classes):
    results = ranks(rank_disagreement, num_classes, by_rank=disagreeing_batches(what))
    for text, after in results:
        assert text.startswith("activations: expected the same layers on every rank, got ")
        assert message.format(k=num_classes) in text
        torch.testing.assert_close(after, results[0][1], rtol=0, atol=0)


@pytest.mark.parametrize("other", [9, None])
def test_ranks_that_disagree_on_num_classes(ranks, other):
    shares = cut(*make_batch(8, 3, torch.float32), [2] * 4)
    by_rank = [(8, *shares[0]), (other, *shares[1]), (8, *shares[2]), (8, *shares[3])]
    for text, _ in ranks(rank_num_classes, by_rank=by_rank):
        assert re.search(rf"num_classes=8 on rank 0, 2, 3; .* num_classes={other} on rank 1", text)


def rank_num_classes(rank, batch):
    num_classes, *batch = batch
    return rank_disagreement(rank, num_classes, batch)


CHANGES = {
    "a layer less": lambda acts: (acts[:-1], 3),
    "widths exchanged": lambda acts: ([acts[1], acts[0], *acts[2:]], 3),  # the buffer is as long as before
    "a wider layer": lambda acts: ([acts[0].repeat(1, 9, *[1] * (acts[0].dim() - 2)), *acts[1:]], 3),
    "another dtype": lambda acts: ([acts[0].double(), *acts[1:]], 3),
    "more classes": lambda acts: (acts, 9),
    "labels of any kind": lambda acts: (acts, None),
}


def rank_changing(rank, what, who, first, batch):
    """Steps of one layout; then the ranks `who` have another one; then all have the first one, and all the other one."""
    group = dist.new_group()
    acts, labels = batch
    other, num_classes = CHANGES[what](acts)

    def step(activations, num_classes):
        return modular_losses(activations, labels, group=group, num_classes=num_classes).dispersion.item()

    before = [step(acts, first) for _ in range(2)]
    try:
        step(other, num_classes) if rank in who else step(acts, first)
    except ValueError as error:
        told = str(error)
    else:
        told = "no error"
    return before, told, step(acts, first), [step(other, num_classes) for _ in range(2)], step(acts, first)


@pytest.mark.parametrize("who", [[2], [0, 1, 3]], ids=["one", "all but one"])
@pytest.mark.parametrize(
    ("what", "first"), [(what, 3) for what in CHANGES] + [("a layer less", None), ("more classes", None)]
)
def test_layouts_that_change_after_the_first_step(ranks, what, who, first):
    """An error on every rank at once, by one number more in the all-reduce; the group is good afterwards."""
    acts, labels = make_batch(8, 3, torch.float32)
    results = ranks(rank_changing, what, who, first, by_rank=cut(acts, labels, [2] * 4))
    for before, told, again, changed, last in results:
        assert told.startswith("activations: expected the same layers on every rank, got ")
        assert re.search(rf" on rank {', '.join(map(str, who))}(;|$)", told)
        assert before == [again, again]
        assert last == again
        assert changed == [results[0][3][0]] * 2


def test_group_errors(world_of_one):
    acts, labels = make_batch(4, 3)
    with pytest.raises(TypeError, match=r"group: expected a process group or 'world', got 3"):
        modular_losses(acts, labels, group=3)
    with pytest.raises(ValueError, match=r"labels: expected classes in \[0, 2\), got 2"):
        modular_losses(acts, torch.tensor([0, 1, 2, 0]), group=world_of_one, num_classes=2)
    with pytest.raises(ValueError, match=r"num_classes: expected at least 1, got 0"):
        modular_losses(acts, labels, group=world_of_one, num_classes=0)
    with pytest.raises(ValueError, match=r"activations\[1\]: expected 4 samples as in labels, got 3"):
        modular_losses([acts[0], acts[1][:3]], labels, group=world_of_one)
    with pytest.raises(ValueError, match=r"activations\[0\]: .* got shape \(4, 0\)"):
        modular_losses([acts[1][:, :0]], labels, group=world_of_one)


def test_without_process_group():
    acts, labels = make_batch(4, 3)
    with pytest.raises(ValueError, match=r"group: expected an initialised process group, got none; call torch.dist"):
        modular_losses(acts, labels, group="world")
    with pytest.raises(ValueError, match=r"group: expected an initialised process group"):
        FiringCounter(3).all_reduce("world")


def test_an_empty_batch_is_an_error_without_a_group():
    acts, labels = make_batch(4, 3)
    with pytest.raises(ValueError, match="at least one sample"):
        modular_losses([act[:0] for act in acts], labels[:0])


# One process


def test_world_of_one(world_of_one):
    acts, labels = make_batch(24, 5)
    expected, gradients = losses_and_gradients(acts, labels)
    for group in ("world", world_of_one):
        losses, got = losses_and_gradients(acts, labels, group=group, num_classes=5)
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
        for ours, theirs in zip(got, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_tiny_and_zero_rows(world_of_one, dtype, tolerance):
    """Rows below the norm's floor, and rows whose squares are 0 in float32, as without a group."""
    acts = [torch.rand(6, 4, dtype=dtype), torch.rand(6, 3, dtype=dtype)]
    acts[0][1] *= 0.7e-12 / acts[0][1].norm()
    acts[0][2] *= 1e-30
    acts[1][3] = 0
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    expected, gradients = losses_and_gradients(acts, labels, backend="torch")
    losses, got = losses_and_gradients(acts, labels, group="world")
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(got, gradients, strict=True):
        row_scale = theirs.abs().amax(1, keepdim=True)
        assert ((ours - theirs).abs() <= tolerance * (row_scale + 0.01)).all()
    assert got[0][1].abs().max() > 1e9  # the floor's factor 1e12 is in it
    torch.testing.assert_close(got[1][3], torch.zeros(3, dtype=dtype))


def test_gradients_with_respect_to_each_term(world_of_one):
    acts, labels = make_batch(10, 3)
    acts = [act.requires_grad_() for act in acts]
    for term in range(3):
        expected = torch.autograd.grad(3 * modular_losses(acts, labels, backend="torch")[term], acts)
        got = torch.autograd.grad(3 * modular_losses(acts, labels, group="world")[term], acts)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-15)


def test_bitwise_equal_from_run_to_run(world_of_one):
    acts, labels = make_batch(64, 5, torch.float32)
    first, gradients = losses_and_gradients(acts, labels, group="world")
    again, repeated = losses_and_gradients(acts, labels, group="world")
    assert torch.equal(first, again)
    assert all(map(torch.equal, gradients, repeated))


def test_second_derivatives_are_an_error(world_of_one):
    acts, labels = make_batch(8, 3)
    loss = weighted(modular_losses([act.requires_grad_() for act in acts], labels, group="world"))
    with pytest.raises(RuntimeError, match="the losses of a group are differentiable once"):
        torch.autograd.grad(loss, acts[0], create_graph=True)


def test_inputs_stay_untouched_and_backward_repeats(world_of_one):
    acts, labels = make_batch(8, 3)
    copies = [act.clone() for act in acts]
    leaves = [act.requires_grad_() for act in acts]
    loss = weighted(modular_losses(leaves, labels, group="world"))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, acts, copies))


def test_autocast(world_of_one):
    acts, labels = make_batch(16, 4, torch.bfloat16)
    plain, _ = losses_and_gradients(acts, labels, group="world", num_classes=4)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = losses_and_gradients(acts, labels, group="world", num_classes=4)
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)


def test_module(world_of_one):
    acts, labels = make_batch(16, 4)
    loss = ModularLoss(1.0, 0.7, 0.3, group="world", num_classes=4)
    expected = modular_losses(acts, labels)
    torch.testing.assert_close(loss(acts, labels), weighted(expected), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.stack(loss.last), torch.stack(expected), rtol=1e-12, atol=1e-14)
    assert repr(loss).endswith("backend='auto', group='world', num_classes=4)")
    assert repr(copy.deepcopy(loss)) == repr(loss)
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        ModularLoss(num_classes=0)


# torch.compile


def rank_compiled(rank, batch):
    group = dist.new_group([0, 1])
    if rank > 1:
        return None

    def step(acts, labels):
        return weighted(modular_losses(acts, labels, group=group, num_classes=5))

    acts = [act.clone().requires_grad_() for act in batch[0]]
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(acts, batch[1])
    return loss.detach(), torch.autograd.grad(loss, acts)


def test_compiled_whole(ranks):
    acts, labels = make_batch(24, 5)
    expected, gradients = losses_and_gradients(acts, labels)
    results = ranks(rank_compiled, by_rank=cut(acts, labels, [8, 16, 0, 0]))[:2]
    for loss, _ in results:
        torch.testing.assert_close(loss, weighted(expected), rtol=1e-12, atol=0)
    for layer, gradient in enumerate(gradients):
        got = torch.cat([result[1][layer] for result in results])
        torch.testing.assert_close(got, 2 * gradient, rtol=1e-10, atol=1e-14)


# Whole trainings


class Net(nn.Module):
    """Two convolutions, a hidden linear layer; gives logits and the hidden activations."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, 3, stride=2)
        self.third = nn.Linear(12 * 9, 16)
        self.last = nn.Linear(16, 5)

    def forward(self, images):
        a = F.relu(self.first(images))
        b = F.relu(self.second(a))
        c = F.relu(self.third(b.flatten(1)))
        return self.last(c), [a, b, c]


def training_batches(sizes, dtype):
    generator = torch.Generator().manual_seed(3)
    for size in sizes:
        images = torch.randn(size, 2, 8, 8, generator=generator, dtype=torch.float64)
        yield images.to(dtype), torch.randint(5, (size,), generator=generator)


def train(model, batches, modular_loss, share=slice(None), ranks=1):
    """Weights and per-step (cross-entropy, terms) of SGD with momentum over the batches.

    The local mean cross-entropy is weighed by W N_r / N, so that its mean over ranks is the global mean; with equal
    shares that is a factor of 1.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    steps = []
    for images, labels in batches:
        mine = labels[share]
        logits, acts = model(images[share])
        cross_entropy = F.cross_entropy(logits, mine, reduction="sum") * ranks / len(labels)
        (cross_entropy + modular_loss(acts, mine)).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(torch.stack([cross_entropy.detach(), *modular_loss.last]))
    return torch.stack(steps)


def new_net(dtype):
    torch.manual_seed(7)
    return Net().to(dtype)


def rank_training(rank, engine, dtype, sizes, num_classes, world):
    group = dist.new_group(list(range(world)))
    if rank >= world:
        return None
    model = new_net(dtype)
    if engine == "ddp":
        trained = DistributedDataParallel(model, process_group=group)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in model.children():
            fully_shard(layer, mesh=mesh).set_force_sum_reduction_for_comms(True)  # as in moda.processes.shard
        trained = fully_shard(model, mesh=mesh)
        trained.set_force_sum_reduction_for_comms(True)
    loss = ModularLoss(1.0, 0.7, 0.3, group=group, num_classes=num_classes)
    steps = train(trained, training_batches(sizes, dtype), loss, slice(rank, None, world), world)
    weights = {
        name: getattr(value, "full_tensor", lambda v=value: v)().clone() for name, value in model.state_dict().items()
    }
    return steps, weights


# The last batch of 37 is shared 10, 9, 9, 9; the one of 3 leaves a rank without samples.
EVEN, UNEVEN = [64] * 10, [64] * 8 + [37, 3]


@pytest.mark.parametrize(
    ("engine", "dtype", "sizes", "num_classes", "world"),
    [
        ("ddp", torch.float64, EVEN, 5, 4),
        ("ddp", torch.float64, EVEN, None, 2),
        ("ddp", torch.float64, UNEVEN, None, 4),
        ("ddp", torch.float32, EVEN, 5, 4),
        ("fsdp", torch.float64, EVEN, 5, 4),
        ("fsdp", torch.float64, UNEVEN, 5, 4),
        ("fsdp", torch.float32, EVEN, None, 4),
    ],
    ids=lambda value: "uneven" if value is UNEVEN else "even" if value is EVEN else str(value).removeprefix("torch."),
)
def test_ten_steps_on_many_ranks_equal_those_on_one(ranks, engine, dtype, sizes, num_classes, world):
    """Losses and weights: to 1e-10 in float64; in float32 to 1e-4, what ten steps make of different rounding."""
    model = new_net(dtype)
    expected = train(model, training_batches(sizes, dtype), ModularLoss(1.0, 0.7, 0.3))
    results = ranks(rank_training, engine, dtype, sizes, num_classes, world)[:world]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    cross_entropies = torch.stack([steps[:, 0] for steps, _ in results]).mean(0)
    torch.testing.assert_close(cross_entropies, expected[:, 0], rtol=tolerance, atol=tolerance)
    for steps, weights in results:
        torch.testing.assert_close(steps[:, 1:], expected[:, 1:], rtol=tolerance, atol=tolerance)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=tolerance, atol=tolerance)


def test_the_training_is_sensitive_to_the_factor():
    """Without the factor W the weights would be off by far more than the tolerance above."""
    model = new_net(torch.float64)
    train(model, training_batches(EVEN, torch.float64), ModularLoss(1.0, 0.7, 0.3))
    weaker = new_net(torch.float64)
    train(weaker, training_batches(EVEN, torch.float64), ModularLoss(0.25, 0.7 / 4, 0.3 / 4))
    assert (model.third.weight - weaker.third.weight).abs().max() > 1e-3


# Firing counts


def firing_batches():
    generator = torch.Generator().manual_seed(5)
    for size in [5, 4, 7, 1, 3]:
        acts = [torch.randn(size, *shape, generator=generator).relu() for shape in SHAPES]
        yield acts, torch.randint(6, (size,), generator=generator)


def rank_counts(rank, share):
    counter = FiringCounter(6, sums=True)
    for index, (acts, labels) in enumerate(firing_batches()):
        if index in share:
            counter.update(acts, labels)
    counter.all_reduce("world")
    return counter.counts, counter.class_sizes, counter.rates, counter.sums, counter.means


@pytest.mark.parametrize("shares", [[[0, 4], [1], [2], [3]], [[], [0, 1, 2, 3, 4], [], []]], ids=str)
def test_counts_over_ranks(ranks, shares):
    counter = FiringCounter(6, sums=True)
    for acts, labels in firing_batches():
        counter.update(acts, labels)
    results = ranks(rank_counts, by_rank=shares)
    for counts, sizes, rates, sums, means in results:
        assert all(map(torch.equal, sums, results[0][3]))  # bit by bit on every rank
        for mine, total in zip([*sums, *means], [*counter.sums, *counter.means], strict=True):
            assert mine.dtype == total.dtype
            torch.testing.assert_close(mine, total)
        assert all(map(torch.equal, counts, counter.counts))
        assert torch.equal(sizes, counter.class_sizes)
        assert all(map(torch.equal, rates, counter.rates))


def rank_attributions(rank, share):
    totals = AttributionSums(6)
    for index, (acts, labels) in enumerate(firing_batches()):
        if index in share:
            totals.update(acts, [act.flip(0) for act in acts], labels)
    totals.all_reduce("world")
    return totals.sums, totals.class_sizes


@pytest.mark.parametrize("shares", [[[0, 4], [1], [2], [3]], [[], [0, 1, 2, 3, 4], [], []]], ids=str)
def test_attributions_over_ranks(ranks, shares):
    totals = AttributionSums(6)
    for acts, labels in firing_batches():
        totals.update(acts, [act.flip(0) for act in acts], labels)
    results = ranks(rank_attributions, by_rank=shares)
    for sums, sizes in results:
        assert all(map(torch.equal, sums, results[0][0]))  # bit by bit on every rank
        assert torch.equal(sizes, totals.class_sizes)
        for mine, total in zip(sums, totals.sums, strict=True):
            assert mine.dtype == total.dtype
            torch.testing.assert_close(mine, total)


def rank_attribution_disagreement(rank):
    totals = AttributionSums(4)
    x = torch.ones(2, 3 + rank)
    totals.update([x], [x], torch.tensor([0, 1]))
    try:
        totals.all_reduce("world")
    except ValueError as error:
        return str(error)
    return "no error"


def test_attributions_that_disagree(ranks):
    for message in ranks(rank_attribution_disagreement):
        assert message.startswith("group: expected the same classes and layers on every rank, got ")
        assert "num_classes=4, neurons [4], sums ['float32'] on rank 1" in message


def rank_counter_disagreement(rank, what):
    counter = FiringCounter(
        5 if what == "classes" and rank == 1 else 4,
        threshold=0.5 * (what == "threshold" and rank == 1),
        sums=what == "dtypes" or (what == "sums" and rank == 1),
    )
    widths = [3] if what == "layers" and rank == 1 else [3, 2]
    dtype = torch.float64 if what == "dtypes" and rank == 1 else torch.float32
    counter.update([torch.ones(2, width, dtype=dtype) for width in widths], torch.tensor([0, 1]))
    try:
        counter.all_reduce("world")
    except ValueError as error:
        return str(error), counter.class_sizes.sum().item()
    return "no error", None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("classes", "num_classes=5, threshold=0, neurons [3, 2] on rank 1"),
        ("threshold", "num_classes=4, threshold=0.5, neurons [3, 2] on rank 1"),
        ("layers", "num_classes=4, threshold=0, neurons [3] on rank 1"),
        ("sums", "num_classes=4, threshold=0, neurons [3, 2], sums ['float32', 'float32'] on rank 1"),
        ("dtypes", "num_classes=4, threshold=0, neurons [3, 2], sums ['float64', 'float64'] on rank 1"),
    ],
)
def test_counters_that_disagree(ranks, what, message):
    for text, seen in ranks(rank_counter_disagreement, what):
        assert text.startswith("group: expected the same classes, threshold, sums and layers on every rank, got ")
        assert message in text
        assert seen == 2


def rank_invalid_label(rank):
    counter = FiringCounter(3)
    counter.update([torch.ones(2, 4)], torch.tensor([0, 1]))
    if rank == 3:  # as a GPU, which does not look at once, would count a label that is out of range
        counter._invalid += 1
    counter.all_reduce("world")
    return counter.counts


def test_an_invalid_label_is_an_error_on_every_rank(ranks):
    for error in ranks.outcomes(rank_invalid_label):
        assert error.kind == "ValueError"
        assert error.message.startswith("labels: expected classes in [0, 3), got 1 samples")


# NVIDIA GPU


@pytest.fixture
def nccl(tmp_path):
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("num_classes", [None, 5])
def test_nccl(nccl, num_classes):
    """One process; every backend pools; bitwise equal from run to run."""
    acts, labels = make_batch(32, 5, torch.float32)
    expected, gradients = losses_and_gradients([act.double() for act in acts], labels)
    acts, labels = [act.cuda() for act in acts], labels.cuda()
    for backend in ("torch", "triton"):
        options = {"group": nccl, "num_classes": num_classes, "backend": backend}
        losses, got = losses_and_gradients(acts, labels, **options)
        torch.testing.assert_close(losses.cpu().double(), expected, rtol=5e-6, atol=1e-6)
        for ours, theirs in zip(got, gradients, strict=True):
            torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-7)
        again, repeated = losses_and_gradients(acts, labels, **options)
        assert torch.equal(losses, again)
        assert all(map(torch.equal, got, repeated))


@pytest.mark.gpu
def test_nccl_does_not_synchronise(nccl):
    acts, labels = make_batch(32, 5, torch.float32)
    acts, labels = [act.cuda() for act in acts], labels.cuda()
    losses_and_gradients(acts, labels, group=nccl, num_classes=5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses_and_gradients(acts, labels, group=nccl, num_classes=5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_nccl_counts(nccl):
    counter, expected = FiringCounter(6, sums=True), FiringCounter(6, sums=True)
    for acts, labels in firing_batches():
        expected.update(acts, labels)
        counter.update([act.cuda() for act in acts], labels.cuda())
    counter.all_reduce(nccl)
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(counter.counts, expected.counts, strict=True))
    for mine, total in zip(counter.sums, expected.sums, strict=True):
        torch.testing.assert_close(mine.cpu(), total)
    empty = FiringCounter(6)
    empty.all_reduce(nccl)
    assert empty.counts == []


@pytest.mark.gpu
def test_nccl_captured_step(nccl):
    """The whole step, collective included, as a CUDA graph: replayed on new data it gives what eager gives."""
    model, loss = new_net(torch.float32).cuda(), ModularLoss(group=nccl, num_classes=5)
    images, labels = (tensor.cuda() for tensor in next(training_batches([64], torch.float32)))

    def step():
        model.zero_grad(set_to_none=False)
        logits, acts = model(images)
        total = F.cross_entropy(logits, labels) + loss(acts, labels)
        total.backward()
        return total.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    images.copy_(torch.randn_like(images))
    labels.copy_(labels.flip(0))
    graph.replay()
    replayed = captured.clone(), [weight.grad.clone() for weight in model.parameters()]
    expected = step()
    torch.testing.assert_close(replayed[0], expected, rtol=1e-5, atol=1e-6)
    for ours, weight in zip(replayed[1], model.parameters(), strict=True):
        torch.testing.assert_close(ours, weight.grad, rtol=1e-4, atol=1e-6)
