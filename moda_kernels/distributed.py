"""The modular losses of a batch that is spread over processes: class sums across a process group.

Rank r of W holds N_r of the N samples. With flat rows n_i = all layers' normalised pooled activations side by side
(D = sum of C neurons) the losses of section 3 (design) need of the whole batch only

    S_k = sum over i in class k of n_i   (D,)      Q_k = sum over i in class k of |n_i|^2      m_k = samples of class k
    A   = 1/L sum over layers and samples of |a|_1 / C

because, with S = sum_k S_k, P_same and P_diff following from the m_k, and N = sum_k m_k,

    affinity    = 1 - 1/(2 L P_same) sum_k ( |S_k|^2 - Q_k )
    dispersion  =     1/(2 L P_diff) sum_k S_k . (S - S_k)
    compactness =     A / N

All of it is one buffer of K (D + 2) + 1 numbers and one all-reduce (sum) per step. Activations never travel.

**Which classes the K rows are.** With `num_classes=K` given, row k is class k: one collective, no synchronisation with
the host, capturable. Without it the ranks first exchange their labels (8 bytes a sample), and the rows are the classes
present in the global batch: K <= N rows for any integers as labels, at the price of a second, tiny collective and a
read on the host. docs/distributed.md says where one becomes cheaper than the other.

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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from moda_kernels import closed_form
from moda_kernels.backends import select
from moda_kernels.closed_form import EPS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group: TypeAlias = "ProcessGroup | Literal['world']"
"""A process group that this process is in, or "world": the default group, looked up at each use."""


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
        raise TypeError(f"group: expected a process group or 'world', got {group!r}")
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
        ValueError: the ranks disagree on the number of layers, their widths or dtypes, or on num_classes; on every
            rank. Without `num_classes` this is checked in every step; with it whenever a rank sees a layout for the
            first time, because reading the others' would be a synchronisation. Not under `torch.compile`.
    """
    pooled = _pool(layers, labels, backend)
    layout = _Layout(tuple(layer.shape[1] for layer in layers), tuple(layer.dtype for layer in layers), num_classes)
    if num_classes is None:
        index, rows = _present_classes(labels, layout, group)
    else:
        index, rows = labels.long(), num_classes
        if not torch.compiler.is_compiling():
            _agree_once(layout, labels.device, group)
    losses: tuple[Tensor, Tensor, Tensor] = _GlobalLosses.apply(index, rows, group, *pooled)  # type: ignore[no-untyped-call]
    return losses


def _pool(layers: Sequence[Tensor], labels: Tensor, backend: str) -> list[Tensor]:
    """Pooled activations by the chosen backend; an empty batch has nothing for a kernel to run on."""
    if labels.shape[0] == 0:
        return closed_form.pool(layers)
    pooled: list[Tensor] = select("pool", backend, layers).pool(layers)
    return pooled


class _GlobalLosses(torch.autograd.Function):
    """The three terms from local rows, with the one collective in the middle; formulas in the module's docstring.

    Written out rather than left to autograd so that no operation but the sums over a layer's neurons is launched once
    per layer.
    """

    @staticmethod
    def forward(ctx: Any, index: Tensor, classes: int, group: ProcessGroup, *pooled: Tensor) -> tuple[Tensor, ...]:
        widths = [rows.shape[1] for rows in pooled]
        values = torch.cat(pooled, 1)
        columns, column_weight = _columns(tuple(widths), values)
        squares = _sum_layers(values.square(), widths)
        inverse = torch.where(squares > 0, squares.clamp_min(EPS * EPS).rsqrt(), 0)
        rows = values * inverse[:, columns]

        buffer = values.new_zeros(classes * (len(columns) + 2) + 1)
        sums, own, sizes, magnitude = _views(buffer, classes, len(columns))
        _add_rows(sums, index, rows)
        own.index_add_(0, index, (squares * inverse.square()).sum(1))
        sizes.index_add_(0, index, values.new_ones(len(index)))
        magnitude.add_((values.abs().sum(0) * column_weight).sum())
        dist.all_reduce(buffer, group=group)

        samples, same_pairs, diff_pairs = _pair_counts(sizes)
        # In float64: where one class is nearly the whole batch, float32 would lose the others in the difference.
        others = (sums.sum(0, dtype=torch.float64) - sums).to(sums.dtype)
        layers = len(widths)
        same = (sums.square().sum(1) - own).sum() / (2 * layers)
        different = (sums * others).sum() / (2 * layers)
        affinity = torch.where(same_pairs > 0, 1 - same / same_pairs.clamp_min(1), 0)
        dispersion = torch.where(diff_pairs > 0, different / diff_pairs.clamp_min(1), 0)

        ctx.save_for_backward(values, squares, inverse, index, sums, others, samples, same_pairs, diff_pairs)
        ctx.widths, ctx.dtypes, ctx.ranks = widths, [rows.dtype for rows in pooled], dist.get_world_size(group)
        return affinity, dispersion, magnitude / samples.clamp_min(1)

    @staticmethod
    def backward(ctx: Any, affinity: Tensor, dispersion: Tensor, compactness: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the losses of a group are differentiable once: a second derivative needs the other ranks' gradients; "
                'without group, backend="torch" is differentiable twice'
            )
        values, squares, inverse, index, sums, others, samples, same_pairs, diff_pairs = ctx.saved_tensors
        columns, column_weight = _columns(tuple(ctx.widths), values)
        # W dF/dx, not dF/dx: the gradients are going to be averaged over the W ranks (module's docstring).
        scale = ctx.ranks / len(ctx.widths)
        of_same = torch.where(same_pairs > 0, -affinity * scale / same_pairs.clamp_min(1), 0)
        of_diff = torch.where(diff_pairs > 0, dispersion * scale / diff_pairs.clamp_min(1), 0)
        of_magnitude = compactness * ctx.ranks / samples.clamp_min(1)

        expanded = inverse[:, columns]
        rows = values * expanded
        gradient = (sums[index] - rows) * of_same + others[index] * of_diff
        # A row shorter than EPS is scaled by the constant 1 / EPS: no projection, as in closed_form.normalized_rows.
        along = torch.where(squares >= EPS * EPS, _sum_layers(gradient * rows, ctx.widths), 0)
        gradient = (gradient - along[:, columns] * rows) * expanded + values.sign() * (column_weight * of_magnitude)
        parts = torch.split(gradient, ctx.widths, 1)
        return (None, None, None, *(part.to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True)))


def _views(buffer: Tensor, classes: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sums (K, D), own (K,), sizes (K,), magnitude ()) inside the buffer that travels."""
    sums, own, sizes, magnitude = torch.split(buffer, [classes * width, classes, classes, 1])
    return sums.view(classes, width), own, sizes, magnitude[0]


def _add_rows(sums: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add each row to its class's sum, in an order that is the same from run to run.

    On CUDA `index_add_` is in order of arrival and `index_put_` sorted; on the CPU it is the other way round.
    """
    if sums.device.type == "cpu":
        sums.index_add_(0, index, rows)
    else:
        sums.index_put_((index,), rows, accumulate=True)


def _sum_layers(values: Tensor, widths: Sequence[int]) -> Tensor:
    """(N, D) -> (N, L): sums over each layer's neurons."""
    return torch.stack([part.sum(1) for part in torch.split(values, list(widths), 1)], 1)


def _pair_counts(sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, same-class and different-class pairs of the global batch; 0-d int64."""
    counts = sizes.round().long()
    samples = counts.sum()
    same_pairs = (counts * (counts - 1)).sum() // 2
    return samples, same_pairs, samples * (samples - 1) // 2 - same_pairs


def _columns(widths: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of the D columns: its layer (int64), and 1 / (L C), its weight in the mean over neurons and layers."""
    # Kept from step to step: a copy from the host is a synchronisation, and not allowed while a CUDA graph is captured.
    make = _make_columns if torch.compiler.is_compiling() else _cached_columns
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
        """63 bits of it."""
        return int.from_bytes(hashlib.blake2b(str(self).encode(), digest_size=8).digest(), "big") >> 1


@dataclass
class _Agreed:
    """What the ranks of a group have told each other so far; the same on all of them.

    Attributes:
        layouts: those that all ranks were seen to have.
        room: labels per rank that an exchange has room for; grows with the largest batch seen.
    """

    layouts: set[_Layout] = field(default_factory=set)
    room: int = 0


_agreed: WeakKeyDictionary[ProcessGroup, _Agreed] = WeakKeyDictionary()


def _agree_once(layout: _Layout, device: torch.device, group: ProcessGroup) -> None:
    """Raise on every rank if the ranks' layouts differ; costs a host read when this rank's layout is a new one."""
    agreed = _agreed.setdefault(group, _Agreed())
    if layout not in agreed.layouts:
        digests = _all_gather(torch.tensor([layout.digest()], device=device), group)
        _check_same(digests[:, 0].tolist(), layout, group)
        agreed.layouts.add(layout)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _present_classes(labels: Tensor, layout: _Layout, group: ProcessGroup) -> tuple[Tensor, int]:
    """Index of each local sample's class among the classes present in the group, ascending, and their number."""
    agreed = _agreed.setdefault(group, _Agreed())
    gathered, sizes = _exchange_labels(labels, layout, agreed.room, group)
    if max(sizes) > agreed.room:
        agreed.room = max(sizes)
        gathered, sizes = _exchange_labels(labels, layout, agreed.room, group)
    present = torch.unique(torch.cat([row[:size] for row, size in zip(gathered, sizes, strict=True)]))
    return torch.searchsorted(present, labels.long()), len(present)


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
        layouts = gather_objects(str(layout), group)
        raise ValueError(f"activations: expected the same layers on every rank, got {describe(layouts)}")


def gather_objects(value: Any, group: ProcessGroup) -> list[Any]:
    """Every rank's `value`, by rank in the group; pickled, so for set-up and errors, not for steps."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def describe(by_rank: Sequence[Any]) -> str:
    """`a on rank 0, 2; b on rank 1`."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(by_rank):
        ranks.setdefault(str(value), []).append(str(rank))
    return "; ".join(f"{value} on rank {', '.join(which)}" for value, which in ranks.items())


def sum_counts(counts: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Sums over the ranks of int64 tensors, in one collective; each on the device it came from."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else None
    buffer = torch.cat([count.flatten().to(device or counts[0].device) for count in counts])
    dist.all_reduce(buffer, group=group)
    parts = torch.split(buffer, [count.numel() for count in counts])
    return [part.view(count.shape).to(count.device) for part, count in zip(parts, counts, strict=True)]
