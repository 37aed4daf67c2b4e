"""The modular losses of a batch that is spread over processes: class sums across a process group.

Rank r of W holds N_r of the N samples. With flat rows n_i = all layers' normalised pooled activations side by side
(D = sum of C neurons) the losses of section 3 (design) need of the whole batch only

    S_k = sum over i in class k of n_i   (D,)      Q_k = sum over i in class k of |n_i|^2      m_k = samples of class k
    A   = 1/L sum over layers and samples of |a|_1 / C

because, with S = sum_k S_k, P_same and P_diff following from the m_k, and N = sum_k m_k,

    affinity    = 1 - 1/(2 L P_same) sum_k ( |S_k|^2 - Q_k )
    dispersion  =     1/(2 L P_diff) sum_k S_k . (S - S_k)
    compactness =     A / N

All of it is one buffer and one all-reduce (sum) per step, of K (D + 2) + 2 numbers: the last one counts the ranks whose
layers are not those of the last step, so that all learn of it. Activations never travel.

**Which classes the K rows are.** With `num_classes=K` given, row k is class k: one collective, no synchronisation with
the host, capturable. Without it the ranks first exchange their labels (8 bytes a sample), and the rows are the G <= N
classes present in the global batch, for any integers as labels, at the price of a tiny collective and reads on the
host. Where G is much larger than what a single rank has of classes, not even these rows are all-reduced: each class
has an owner, to which ranks send their sums of it and which sends the total back to those who sent some (`_by_owner`).
A rank then sends and receives 2 rows per class of its own batch, whatever the number of ranks. docs/distributed.md says
where one way becomes cheaper than another.

**Gradient and world size.** Let F be the global loss, x_r what rank r holds, theta the weights, the same on all ranks.
Every rank computes the same F, from the same global sums, so the sums are all that its backward needs: there is no
collective in it. What one process with the whole batch computes is

    dF/dtheta = sum_r (dF/dx_r) (dx_r/dtheta)

Data parallel engines *average*: DDP and FSDP2 hand the optimiser 1/W sum_r grad_r, which makes the mean of the ranks'
losses the objective. So rank r's grad_r has to be W (dF/dx_r) (dx_r/dtheta), and the gradient given to the activations
here is **W dF/dx_r**, W being the size of `group`. Then

    1/W sum_r ( d CE_r/dtheta + W dF/dx_r dx_r/dtheta ) = d( 1/W sum_r CE_r + F )/dtheta

exactly: F's part for any N_r, and the mean over ranks of the local mean cross-entropies is the global mean if all N_r
are equal (else weigh the local mean by W N_r / N). With a subgroup of G ranks under a DDP over W ranks the objective
becomes the mean over the W / G groups of their losses. An engine that *sums* gradients over ranks takes the loss
divided by W. The factor is also what autograd's own rule gives for the sum over ranks of F (an all-reduce of the
ranks' upstream gradients), taken without that all-reduce because these are the same on every rank.

Sums are in the dtype of the widest layer's pooled activation (float32, or float64), counts in the same dtype: exact for
up to 2^24 samples of a class per batch in float32. Deterministic on the CPU and on CUDA, given a deterministic
all-reduce; under `torch.compile` Inductor chooses how to sum over a class.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from moda_kernels import closed_form
from moda_kernels.backends import select
from moda_kernels.closed_form import EPS
from moda_kernels.plain import is_traced
from moda_kernels.validation import shown

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAGNITUDE_UNIT = 2.0**-24
"""What A is counted in on its way: a sum over 2^24 samples of numbers near the dtype's largest is finite in it."""

Group: TypeAlias = "ProcessGroup | Literal['world']"
"""A process group that this process is in, or "world": the default group, looked up at each use."""


def check_group(group: Any) -> None:
    """Check that this is None, "world" (which may not be there yet) or what `torch.distributed.new_group` gives.

    Raises:
        TypeError: it is something else.
    """
    if group is None or (isinstance(group, str) and group == "world"):
        return
    outside = dist.is_available() and isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER
    if not outside and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group: expected a process group, 'world' or None, got {shown(group)}")


def resolve_group(group: Any) -> ProcessGroup:
    """The process group meant by `group`.

    Raises:
        TypeError: `group` is neither a process group nor "world".
        ValueError: no process group has been initialised, or this process is not in the group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "group: expected an initialised process group, got none; call torch.distributed.init_process_group first "
            "and start the processes with torchrun"
        )
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: expected a group with this process in it, got one without")
    if isinstance(group, dist.ProcessGroup):
        return group
    if not (isinstance(group, str) and group == "world"):
        raise TypeError(f"group: expected a process group or 'world', got {shown(group)}")
    world = dist.GroupMember.WORLD
    if world is None:  # pragma: no cover
        raise ValueError("group: expected an initialised default group, got none")
    return world


def grouped_losses(
    layers: Sequence[Tensor], labels: Tensor, *, backend: str, group: ProcessGroup, num_classes: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(affinity, dispersion, compactness) of the batch that the ranks of `group` hold together.

    Every rank calls this with its samples, of which there may be none. Arguments are as in
    `moda_kernels.modular_losses`, checked there.

    Raises:
        ValueError: the ranks disagree on the number of layers, their widths or dtypes, or on num_classes, in this step;
            on every rank. On a GPU, with `num_classes`, reading what the others say would be a synchronisation: there a
            rank whose layout changes raises alone, and the others get NaN. Not under `torch.compile`.
    """
    pooled = _pool(layers, labels, backend)
    layout = _Layout(tuple(layer.shape[1] for layer in layers), tuple(layer.dtype for layer in layers), num_classes)
    owners = None
    if num_classes is None:
        present = _present_classes
        if torch.compiler.is_compiling():  # not a decorator: asking for it imports the compiler, which is slow
            present = torch.compiler.disable(present)
        index, rows, owners = present(labels, layout, group)
    else:
        index, rows = labels.long(), num_classes
        if not torch.compiler.is_compiling():
            dtype = functools.reduce(torch.promote_types, [layer.dtype for layer in pooled])
            _agree_on_sums(_Sums(layout, _numbers(rows, sum(layout.widths)), dtype), labels, group)
    known = None if torch.compiler.is_compiling() else layout
    losses: tuple[Tensor, Tensor, Tensor] = _GlobalLosses.apply(  # type: ignore[no-untyped-call]
        index, rows, owners, known, group, *pooled
    )
    return losses


def _pool(layers: Sequence[Tensor], labels: Tensor, backend: str) -> list[Tensor]:
    """Pooled activations by the chosen backend; an empty batch has nothing for a kernel to run on."""
    if labels.shape[0] == 0:
        return closed_form.pool(layers)
    return select("pool", backend, layers).pool(layers)


class _GlobalLosses(torch.autograd.Function):
    """The three terms from local rows, with the collective in the middle; formulas in the module's docstring.

    Written out rather than left to autograd so that no operations but those over a layer's neurons are launched once
    per layer.
    """

    @staticmethod
    def forward(
        ctx: Any,
        index: Tensor,
        classes: int,
        owners: _Owners | None,
        layout: _Layout | None,
        group: ProcessGroup,
        *pooled: Tensor,
    ) -> tuple[Tensor, ...]:
        widths = [rows.shape[1] for rows in pooled]
        values = torch.cat(pooled, 1)
        columns, column_weight = _columns(tuple(widths), values)
        # Rows are divided by their largest magnitude before they are squared, as in closed_form.normalized_rows.
        largest = _reduce_layers(values.abs(), widths, torch.amax)
        divisor = torch.where(largest == 0, 1, largest)
        scaled = values / divisor.index_select(1, columns)
        squares = _reduce_layers(scaled.square(), widths, torch.sum)
        floored = squares.sqrt() * largest < EPS
        inverse = torch.where(floored, largest / EPS, squares.rsqrt())
        rows = scaled * inverse.index_select(1, columns)
        local = _Local(
            index,
            rows=rows,
            own=(squares * inverse.square()).sum(1),
            magnitude=(values.abs() * (column_weight * MAGNITUDE_UNIT)).sum(),
        )
        total = (
            _all_reduced(local, classes, layout, group) if owners is None else _by_owner(local, classes, owners, group)
        )

        layers = len(widths)
        same = total.same / (2 * layers * total.same_pairs.clamp_min(1))
        different = total.different / (2 * layers * total.diff_pairs.clamp_min(1))
        affinity = torch.where(total.same_pairs > 0, 1 - same, 0)
        dispersion = torch.where(total.diff_pairs > 0, different, 0)
        compactness = closed_form.twice(total.magnitude / total.samples.clamp_min(1) * (0.5 / MAGNITUDE_UNIT))

        counts = (total.samples, total.same_pairs, total.diff_pairs)
        ctx.save_for_backward(values, rows, floored, inverse / divisor, index, total.sums, total.others, *counts)
        ctx.widths, ctx.dtypes, ctx.ranks = widths, [rows.dtype for rows in pooled], dist.get_world_size(group)
        return affinity, dispersion, compactness

    @staticmethod
    def backward(ctx: Any, affinity: Tensor, dispersion: Tensor, compactness: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the losses of a group are differentiable once: a second derivative needs the other ranks' gradients; "
                'without group, backend="torch" is differentiable twice'
            )
        values, rows, floored, inverse, index, sums, others, samples, same_pairs, diff_pairs = ctx.saved_tensors
        columns, column_weight = _columns(tuple(ctx.widths), values)
        # The gradient is W dF/dx, because engines average gradients over the W ranks (see the module's docstring).
        scale = ctx.ranks / len(ctx.widths)
        of_same = torch.where(same_pairs > 0, -affinity * scale / same_pairs.clamp_min(1), 0)
        of_diff = torch.where(diff_pairs > 0, dispersion * scale / diff_pairs.clamp_min(1), 0)
        of_magnitude = compactness * ctx.ranks / samples.clamp_min(1)

        expanded = inverse.index_select(1, columns)
        gradient = (sums.index_select(0, index) - rows) * of_same + others.index_select(0, index) * of_diff
        # A row shorter than EPS is scaled by the constant 1 / EPS, so its gradient has no projection.
        along = torch.where(floored, 0, _reduce_layers(gradient * rows, ctx.widths, torch.sum))
        gradient = (gradient - along.index_select(1, columns) * rows) * expanded + values.sign() * (
            column_weight * of_magnitude
        )
        parts = torch.split(gradient, ctx.widths, 1)
        return (None, None, None, None, None, *(part.to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True)))


@dataclass(frozen=True)
class _Local:
    """The local batch of this rank.

    Attributes:
        index: (N_r,) int64, the row of the class sums that each sample adds to.
        rows: (N_r, D) normalised.
        own: (N_r,) their squared norms.
        magnitude: () this rank's part of A.
    """

    index: Tensor
    rows: Tensor
    own: Tensor
    magnitude: Tensor

    def class_sums(self, classes: int) -> Tensor:
        """(classes, D + 1): sums of rows, and in the last column of their squared norms."""
        neurons = self.rows.shape[1]
        sums = self.rows.new_zeros(classes, neurons + 1)
        _add_rows(sums[:, :neurons], self.index, self.rows)
        _add_rows(sums[:, neurons], self.index, self.own)
        return sums


class _Total(NamedTuple):
    """The sums over all ranks.

    Attributes:
        sums: (classes, D) S_k, of the classes that `_Local.index` points to.
        others: (classes, D) S - S_k.
        same: () sum over all classes of |S_k|^2 - Q_k.
        different: () sum over all classes of S_k . (S - S_k).
        magnitude: () A, in units of MAGNITUDE_UNIT.
        samples, same_pairs, diff_pairs: () int64.
    """

    sums: Tensor
    others: Tensor
    same: Tensor
    different: Tensor
    magnitude: Tensor
    samples: Tensor
    same_pairs: Tensor
    diff_pairs: Tensor


def _numbers(classes: int, neurons: int) -> int:
    """Of the buffer that is all-reduced: sums, squares and sizes of classes, A, and how many ranks have changed."""
    return classes * (neurons + 2) + 2


def _all_reduced(local: _Local, classes: int, layout: _Layout | None, group: ProcessGroup) -> _Total:
    """Every rank gets the sums of all rows, by one all-reduce.

    Raises:
        ValueError: another rank's layout is not the `layout` of this one; not on a GPU, where A is NaN then.
    """
    neurons = local.rows.shape[1]
    buffer = local.rows.new_zeros(_numbers(classes, neurons))
    sums, own, sizes, magnitude, changed = torch.split(buffer, [classes * neurons, classes, classes, 1, 1])
    sums = sums.view(classes, neurons)
    _add_rows(sums, local.index, local.rows)
    _add_rows(own, local.index, local.own)
    # Sizes are whole numbers, whose order of addition does not matter. scatter_add_ refuses an index out of range on a
    # GPU too.
    sizes.scatter_add_(0, local.index, local.rows.new_ones(len(local.index)))
    magnitude.add_(local.magnitude)
    dist.all_reduce(buffer, group=group)
    if layout is not None and buffer.device.type == "cpu" and float(changed) > 0:
        raise _disagreement(layout, group)
    # A rank that has changed sends nothing else (`_announce`): what is summed up is not the batch.
    magnitude = torch.where(changed > 0, torch.nan, magnitude)
    # The total is in float64: where one class is nearly the whole batch, float32 would lose the others in the
    # difference.
    others = (sums.sum(0, dtype=torch.float64) - sums).to(sums.dtype)
    same, different = _pair_sums(sums, own, others)
    return _Total(sums, others, same, different, magnitude[0], *_pair_counts(sizes.round().long()))


def _by_owner(local: _Local, classes: int, owners: _Owners, group: ProcessGroup) -> _Total:
    """Every rank gets the sums of the classes that it has samples of, from the ranks that own these classes.

    Four collectives: sums to owners; S and A; the owners' parts of the losses; sums from owners.
    """
    neurons = local.rows.shape[1]
    mine = local.class_sums(classes)
    received = mine.new_empty(len(owners.received), neurons + 1)
    dist.all_to_all_single(received, mine, owners.receive, owners.send, group=group)
    owned = mine.new_zeros(owners.owned, neurons + 1)
    _add_rows(owned, owners.received, received)

    # S is added up in float64 from the very sums that it is compared with below; _all_reduced says why.
    whole = torch.cat([owned[:, :neurons].sum(0, dtype=torch.float64), local.magnitude.double()[None]])
    dist.all_reduce(whole, group=group)
    owned_others = (whole[:neurons] - owned[:, :neurons]).to(mine.dtype)
    pairs = torch.stack(_pair_sums(owned[:, :neurons], owned[:, neurons], owned_others))
    dist.all_reduce(pairs, group=group)

    sums = torch.empty_like(mine)
    dist.all_to_all_single(sums, owned.index_select(0, owners.received), owners.send, owners.receive, group=group)
    sums = sums[:, :neurons]
    others = (whole[:neurons] - sums).to(sums.dtype)
    same, different = pairs.unbind()
    return _Total(sums, others, same, different, whole[neurons].to(sums.dtype), *_pair_counts(owners.sizes))


def _pair_sums(sums: Tensor, own: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    return (sums.square().sum(1) - own).sum(), (sums * others).sum()


def _add_rows(sums: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add each row to its class's sum, in an order that is the same from run to run.

    On CUDA `index_add_` is in order of arrival and `index_put_` sorted; on the CPU it is the other way round.
    """
    if sums.device.type == "cpu":
        sums.index_add_(0, index, rows)
    else:
        sums.index_put_((index,), rows, accumulate=True)


def _reduce_layers(values: Tensor, widths: Sequence[int], reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Reduce (N, D) to (N, L): the sum or the largest value over each layer's neurons."""
    return torch.stack([reduce(part, 1) for part in torch.split(values, list(widths), 1)], 1)


def _pair_counts(sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, same-class and different-class pairs of classes of these sizes; 0-d int64."""
    samples = sizes.sum()
    same_pairs = (sizes * (sizes - 1)).sum() // 2
    return samples, same_pairs, samples * (samples - 1) // 2 - same_pairs


def _columns(widths: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """The layer (int64) of each of the D columns, and 1 / (L C), its weight in the mean over neurons and layers."""
    # The columns are kept from step to step: a copy from the host synchronises, and is not allowed while a CUDA graph
    # is captured. Columns made by a trace or in inference mode cannot be used outside of it.
    keep = not (is_traced() or torch.is_inference_mode_enabled())
    make = _cached_columns if keep else _make_columns
    return make(widths, like.dtype, like.device)


def _make_columns(widths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    layer = [index for index, width in enumerate(widths) for _ in range(width)]
    weight = [1 / (len(widths) * width) for width in widths for _ in range(width)]
    return torch.tensor(layer, device=device), torch.tensor(weight, dtype=dtype, device=device)


_cached_columns = functools.lru_cache(maxsize=64)(_make_columns)


@dataclass(frozen=True)
class _Layout:
    """What the ranks have to agree on before their buffers can be added."""

    widths: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    num_classes: int | None

    def __str__(self) -> str:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in self.dtypes]
        layers = ", ".join(f"{width} {dtype}" for width, dtype in zip(self.widths, dtypes, strict=True))
        return f"{len(self.widths)} layers ({layers}), num_classes={self.num_classes}"

    def digest(self) -> int:
        """A hash of the layout, of 63 bits."""
        return int.from_bytes(hashlib.blake2b(str(self).encode(), digest_size=8).digest(), "big") >> 1


class _Sums(NamedTuple):
    """What ranks that have agreed on a layout all-reduce in every step.

    Attributes:
        layout: the layout.
        numbers: the length of the buffer.
        dtype: its dtype.
    """

    layout: _Layout
    numbers: int
    dtype: torch.dtype


@dataclass
class _Agreed:
    """What the ranks of a group have told each other so far; the same on all of them.

    Attributes:
        sums: what the last step has all-reduced; None if it began with an exchange of labels, or there was none.
        room: labels per rank that an exchange has room for; grows with the largest batch seen.
    """

    sums: _Sums | None = None
    room: int = 0


_agreed: WeakKeyDictionary[ProcessGroup, _Agreed] = WeakKeyDictionary()


def _agree_on_sums(sums: _Sums, labels: Tensor, group: ProcessGroup) -> None:
    """Raise on every rank if the ranks' layouts differ; costs collectives and host reads when this rank's has changed.

    A rank cannot know whether the others have changed too. So it takes part in the collective that they begin with if
    they have not, and learns from it.
    """
    agreed = _agreed.setdefault(group, _Agreed())
    if agreed.sums is not None and agreed.sums.layout == sums.layout:
        return
    _announce(agreed, sums.layout, labels.device, group)
    _exchange_labels(labels[:0], sums.layout, agreed.room, group)
    agreed.sums = sums


def _announce(agreed: _Agreed, layout: _Layout, device: torch.device, group: ProcessGroup) -> None:
    """Where the last step was an all-reduce, take part in one like it, and say that this rank's layout is another now.

    Raises:
        ValueError: not all ranks have changed.
    """
    if agreed.sums is None:
        return
    buffer = torch.zeros(agreed.sums.numbers, dtype=agreed.sums.dtype, device=device)
    buffer[-1] = 1
    dist.all_reduce(buffer, group=group)
    if round(float(buffer[-1])) < dist.get_world_size(group):
        if device.type == "cpu":
            raise _disagreement(layout, group)
        raise ValueError(f"activations: expected the layers of the last step as on other ranks, got {layout}")
    agreed.sums = None


@dataclass(frozen=True)
class _Owners:
    """Which rank adds up which class: of the G classes present, ascending, rank r owns r, r + W, r + 2 W, ...

    A rank sends its sums in the order of owners, and of classes within one.

    Attributes:
        send: rows for each owner.
        receive: rows from each rank.
        received: (sum of receive,) int64, the row among those owned that each row received adds to.
        owned: number of classes owned here.
        sizes: (G,) int64, samples of each class present.
    """

    send: list[int]
    receive: list[int]
    received: Tensor
    owned: int
    sizes: Tensor


MESSAGE_BYTES = 256 << 10
"""What could be sent while a message is under way: 8 us at 32 GB/s. Between 75 kB (25 Gbit/s) and 600 kB (NVLink)."""


def _present_classes(labels: Tensor, layout: _Layout, group: ProcessGroup) -> tuple[Tensor, int, _Owners | None]:
    """The row of each local sample's class among the rows to exchange, their number, and the owners, if that pays."""
    agreed = _agreed.setdefault(group, _Agreed())
    _announce(agreed, layout, labels.device, group)
    gathered, samples = _exchange_labels(labels, layout, agreed.room, group)
    if max(samples) > agreed.room:
        agreed.room = max(samples)
        gathered, samples = _exchange_labels(labels, layout, agreed.room, group)
    by_rank = [row[:size] for row, size in zip(gathered, samples, strict=True)]
    classes, class_of = torch.unique(torch.cat(by_rank), return_inverse=True)
    classes_by_rank = torch.split(class_of, samples)
    had = [torch.unique(of_rank) for of_rank in classes_by_rank]
    rank, present = dist.get_rank(group), len(classes)
    if not owners_pay(present, max(map(len, had)), sum(layout.widths), len(had)):
        return classes_by_rank[rank], present, None
    return _own(classes_by_rank[rank], had, rank, torch.bincount(class_of, minlength=present))


def owners_pay(present: int, most_of_a_rank: int, neurons: int, ranks: int) -> bool:
    """Whether the exchange by owner is worth its messages.

    Against an all-reduce of all present classes, a rank sends fewer bytes, but up to W messages more to and from owners
    each, and those of two small all-reduces.

    Args:
        present: classes in the global batch.
        most_of_a_rank: classes in the batch of the rank that has most.
        neurons: D.
        ranks: W.
    """
    all_reduced = 2 * present * (neurons + 2) * (ranks - 1) / ranks
    by_owner = (2 * most_of_a_rank + 4) * (neurons + 1) * (ranks - 1) / ranks
    return 4 * (all_reduced - by_owner) > 3 * ranks * MESSAGE_BYTES


def _own(class_of: Tensor, had: Sequence[Tensor], rank: int, sizes: Tensor) -> tuple[Tensor, int, _Owners]:
    """Each local sample's row, the number of rows, and the owners, where rank r has samples of classes `had[r]`."""
    ranks, mine = len(had), had[rank]
    in_order = mine[torch.argsort(mine % ranks, stable=True)]
    row_of = torch.empty_like(sizes)
    row_of[in_order] = torch.arange(len(in_order), device=sizes.device)
    to_me = [of_rank[of_rank % ranks == rank] for of_rank in had]
    owners = _Owners(
        send=torch.bincount(mine % ranks, minlength=ranks).tolist(),
        receive=[len(part) for part in to_me],
        received=torch.cat(to_me) // ranks,
        owned=len(range(rank, len(sizes), ranks)),
        sizes=sizes,
    )
    return row_of[class_of], len(mine), owners


def _exchange_labels(labels: Tensor, layout: _Layout, room: int, group: ProcessGroup) -> tuple[Tensor, list[int]]:
    """Every rank's labels (W, room) and number of samples; a rank with more than `room` sends the first ones.

    The layout's digest travels along, so that a disagreement is an error on every rank.
    """
    row = labels.new_zeros(2 + room, dtype=torch.int64)
    row[:2] = torch.tensor([layout.digest(), len(labels)])
    sent = labels[:room]
    row[2 : 2 + len(sent)] = sent
    gathered = _all_gather(row, group)
    header = gathered[:, :2].tolist()
    _check_same([digest for digest, _ in header], layout, group)
    return gathered[:, 2:], [size for _, size in header]


def _all_gather(row: Tensor, group: ProcessGroup) -> Tensor:
    """Every rank's row, (W, len(row))."""
    gathered = row.new_empty(dist.get_world_size(group), len(row))
    dist.all_gather(list(gathered.unbind(0)), row, group=group)
    return gathered


def _check_same(digests: Sequence[int], layout: _Layout, group: ProcessGroup) -> None:
    if len(set(digests)) > 1:
        raise _disagreement(layout, group)


def _disagreement(layout: _Layout, group: ProcessGroup) -> ValueError:
    """The error of ranks that disagree, all of which call this."""
    layouts = gather_objects(str(layout), group)
    return ValueError(f"activations: expected the same layers on every rank, got {describe(layouts)}")


def gather_objects(value: Any, group: ProcessGroup) -> list[Any]:
    """Every rank's `value`, by rank in the group. Values are pickled, which is too slow for every step."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def describe(by_rank: Sequence[Any]) -> str:
    """What the ranks hold, for an error: `a on rank 0, 2; b on rank 1`."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(by_rank):
        ranks.setdefault(str(value), []).append(str(rank))
    return "; ".join(f"{value} on rank {', '.join(which)}" for value, which in ranks.items())


def sum_tensors(tensors: Sequence[Tensor], dtype: torch.dtype, group: ProcessGroup) -> list[Tensor]:
    """Sums over the ranks, added in `dtype` in one collective; each of the dtype and on the device it came from."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else None
    buffer = torch.cat([tensor.flatten().to(device or tensors[0].device, dtype) for tensor in tensors])
    dist.all_reduce(buffer, group=group)
    parts = torch.split(buffer, [tensor.numel() for tensor in tensors])
    return [
        part.view(tensor.shape).to(tensor.device, tensor.dtype, copy=True)
        for part, tensor in zip(parts, tensors, strict=True)
    ]
