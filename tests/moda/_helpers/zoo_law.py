"""The law of composition for a model of the zoo, and how close what is left of it comes to what can go at best."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import CheckpointError

import moda
from moda.composition.compose import plan
from moda.composition.composed import ComposedModel
from moda.composition.composer import Plan
from moda.composition.law import SLACK, is_random, nudge
from moda.decomposition.container import Decomposition
from moda.observation.taps import Taps
from moda.outputs import pick
from tests.moda._helpers.composing import random_modules
from tests.moda._helpers.zoo import Entry, tensors_of

SUBSETS = ((3, 1), (4, 0, 2))
SHARE = 0.163
"""Of the neurons a class keeps; the first subset keeps 30 % then, the second 41 %."""
EXAMPLE_BATCH, BATCH = 2, 5
ROUNDS, MANY = 4, 8
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass(frozen=True)
class Left:
    """Numbers of parameters, of those that a gradient reaches in the whole model.

    Attributes:
        whole: in the whole model.
        composed: in the composed one.
        lean: in the one composed with `published=False`.
        ideal: what the gradient says has to stay.
        even: the same, but for convolutions in groups, all of whose groups have one shape.
    """

    whole: int
    composed: int
    lean: int
    ideal: int
    even: int


@dataclass(frozen=True)
class Verdict:
    """What was found of one model.

    Attributes:
        errors: per mode the largest difference between composed and masked, relative to the largest output, over the
            class subsets; of modes in which the model gives the same twice.
        refused: per mode why it cannot be exported, where it cannot.
        left: of the first class subset.
        any_batch: whether the composed model takes another number of samples than the example's.
        shaky: modes in which the masked model itself changes by more than its errors where its activations change by
            their rounding: a batch norm over samples that hardly differ, say.
    """

    errors: dict[str, float]
    refused: dict[str, str]
    left: Left | None
    any_batch: bool = True
    shaky: tuple[str, ...] = ()


class NoTapsError(Exception):
    """A model without activations to mask."""


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` with parameters and running statistics that hide nothing: none at 0 or 1, none too small to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                spread = 0.2 if parameter.dim() < 2 or parameter.numel() < 2 else max(float(parameter.std()) / 2, 0.02)
                parameter += torch.randn(parameter.shape, generator=generator) * spread
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer += torch.randn(buffer.shape, generator=generator) * 0.3
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    """`model` with every probability of dropping something at 0, in whatever attribute it is."""
    for module in model.modules():
        for name, value in vars(module).items():
            kind = type(module).__name__.lower()
            drops = "drop" in name or (name == "p" and ("drop" in kind or "depth" in kind))
            if drops and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def made(entry: Entry, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A model of the zoo, lively, in eval mode."""
    return without_dropout(lively(entry.made(), seed)).to(dtype).eval()


def inputs_of(entry: Entry, batch: int, seed: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a forward pass in this precision."""
    args, kwargs = entry.samples(batch, seed)
    cast = torch.utils._pytree.tree_map
    return cast(lambda x: _cast(x, dtype), (args, kwargs))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def verdict(
    entry: Entry,
    dtype: torch.dtype,
    subsets: Sequence[tuple[int, ...]] = SUBSETS,
    measure: bool = False,
    cast: bool = False,
) -> Verdict:
    """Compose the model for each class subset and compare with the masked one, on samples that it has not seen.

    For the first subset it is composed with `published=False`.
    With `cast` the last composed model and the masked one are compared in float32, too, after a cast of both: one
    export serves both precisions.

    Raises:
        ValueError: the model is refused.
        RuntimeError: it has no taps, or the law was found broken while composing.
    """
    model = made(entry, dtype)
    errors: dict[str, float] = {}
    shaky: set[str] = set()
    composed, any_batch = None, True
    with moda.observe(model) as taps:
        _run(model, *inputs_of(entry, EXAMPLE_BATCH, 1, dtype), training=False)
        if not taps.names:
            raise NoTapsError(taps.skipped)
        decomposition = random_modules(dict(zip(taps.names, taps.widths, strict=True)), entry.num_classes, SHARE)
        entry = replace(entry, output=_output(entry, model, dtype))
        for classes in reversed(subsets):
            published = classes != SUBSETS[0]
            composed = moda.compose(taps, decomposition, classes, output=entry.output, published=published)
            for mode in _steady(composed):
                error, own, any_batch = _error(entry, taps, decomposition, composed, mode == "train", dtype)
                errors[mode] = max(errors.get(mode, 0.0), error)
                if error > TOLERANCE[dtype] and error <= SLACK * own:
                    shaky.add(mode)
        assert composed is not None
        left = None
        if measure:
            plans = [plan(taps, decomposition, SUBSETS[0], output=entry.output, published=p) for p in (True, False)]
            left = _left(entry, model, plans, decomposition, dtype)
        if cast:
            model.float(), composed.float()
            for mode in _steady(composed):
                try:
                    error, own, _ = _error(entry, taps, decomposition, composed, mode == "train", torch.float32)
                except RuntimeError:
                    break  # its graph names the precision
                errors[f"{mode}, float32"] = error
                if error > TOLERANCE[torch.float32] and error <= SLACK * own:
                    shaky.add(f"{mode}, float32")
    return Verdict(errors, dict(composed.facts.refused), left, any_batch, tuple(sorted(shaky)))


def _error(
    entry: Entry, taps: Taps, decomposition: Decomposition, composed: ComposedModel, training: bool, dtype: torch.dtype
) -> tuple[float, float, bool]:
    """Relative error, that of the masked model under rounding, and whether another number of samples was fine."""
    masked = moda.mask(taps, decomposition, composed.classes, output=entry.output)
    for batch in (BATCH, EXAMPLE_BATCH):
        args, kwargs = inputs_of(entry, batch, 2, dtype)
        try:
            got = _run(composed, args, kwargs, training)
        except ValueError as error:
            if batch == EXAMPLE_BATCH or "input" not in str(error):
                raise
            continue
        expected = _run(masked, args, kwargs, training)
        error, own = relative_error(got, expected), 0.0
        if error > TOLERANCE[dtype]:
            with taps.replacing(_masked(taps, decomposition.select(composed.classes), nudge)):
                whole = _run(_Picked(taps.model, composed, entry.output), args, kwargs, training)
            own = relative_error(whole, expected)
        return error, own, batch == BATCH
    raise AssertionError


def _output(entry: Entry, model: nn.Module, dtype: torch.dtype) -> str | int | None:
    """Which output has the logits; none in particular where the model gives them alone in evaluation mode."""
    args, kwargs = inputs_of(entry, EXAMPLE_BATCH, 1, dtype)
    with torch.no_grad():
        return None if isinstance(model(*args, **kwargs), Tensor) else entry.output


def _steady(composed: ComposedModel) -> list[str]:
    """Modes in which it gives the same twice."""
    return [mode for mode, route in composed.routes.items() if not is_random(route.graph)]


class _Picked(nn.Module):
    """A model with the outputs of some classes alone."""

    def __init__(self, model: nn.Module, composed: ComposedModel, output: str | int | None) -> None:
        super().__init__()
        self.training = model.training
        self.model, self.composed, self.output = model, composed, output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return pick(self.model(*args, **kwargs), self.composed.classes, self.composed.num_classes, self.output)


def _run(model: nn.Module, args: Any, kwargs: Any, training: bool) -> list[Tensor]:
    before = model.training
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train(training)
    torch.manual_seed(3), random.seed(3)
    try:
        with torch.no_grad():
            return [tensor.clone() for tensor in tensors_of(model(*args, **kwargs))]
    finally:
        model.train(before)
        for buffer, value in buffers:
            buffer.copy_(value)


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference relative to the largest finite number of its tensor; infinite for other shapes."""
    if [x.shape for x in got] != [x.shape for x in expected]:
        return float("inf")
    worst = 0.0
    for one, other in zip(got, expected, strict=True):
        if not other.numel():
            continue
        finite = other[other.isfinite()].double().abs()
        scale = float(finite.max()) if finite.numel() else 1.0
        alike = (one == other) | (one.isnan() & other.isnan())
        apart = (one.double() - other.double()).abs().masked_fill(alike, 0).nan_to_num(float("inf"))
        worst = max(worst, float(apart.max()) / max(scale, 1e-30))
    return worst


# ---- what can go at best ---------------------------------------------------------------------------------------


def _left(
    entry: Entry, model: nn.Module, plans: Sequence[Plan], decomposition: Decomposition, dtype: torch.dtype
) -> Left | None:
    """Parameters left over the ideal structured cut.

    An entry of a parameter is *alive* if a derivative of an output by it is not exactly 0, for random inputs and random
    values of all parameters, several times, in evaluation or in training: a composed model does both. Entries that are
    alive in the whole model and not in the masked one can go; the ideal cut is without them. What is alive in neither
    goes with its rows and columns: corners of a kernel that only ever meet padding, say. Parameters that are not alive at all in the whole model, being unused or used without
    gradients, are left out. None where the taps do not go with the model's own recomputation in the backward pass.
    """
    try:
        alive, stays = _alive(entry, decomposition, list(plans[0].graphs), dtype)
    except CheckpointError:
        return None
    groups = {
        f"{name}.weight": m.groups for name, m in model.named_modules() if isinstance(m, _ConvNd) and not m.transposed
    }
    whole = ideal = even = 0
    left = [0] * len(plans)
    for name, parameter in model.named_parameters():
        before, after = alive[name], stays[name]
        if not before.any():
            continue
        whole += parameter.numel()
        for place, each in enumerate(plans):
            left[place] += each.kept[name].count(parameter.shape) if name in each.kept else 0
        ideal += (least := _ideal(before, after))
        even += max(least, _even(after, groups.get(name, 1)))
    return Left(whole, *left, ideal, even)


def _even(alive: Tensor, groups: int) -> int:
    """Entries of a convolution's weight if all groups that stay have one shape, as in a tensor they must."""
    if groups == 1 or not alive.any():
        return 0
    blocks = alive.reshape(groups, alive.shape[0] // groups, alive.shape[1], -1)
    rows, columns = blocks.any(-1).any(-1).sum(1), blocks.any(-1).any(1).sum(1)
    return int((rows > 0).sum() * rows.max() * columns.max()) * prod(alive.shape[2:])


def _ideal(before: Tensor, after: Tensor) -> int:
    """Entries that stay: those alive, and those that never are in rows and columns that stay."""
    undecided = ~before
    for dim in range(before.dim()):
        others = [other for other in range(before.dim()) if other != dim]
        was, stays = (alive.any(dim=others, keepdim=True) if others else alive for alive in (before, after))
        undecided = undecided & (~was | stays)
    return int((after | undecided).sum()) if after.any() else 0


def _alive(
    entry: Entry, decomposition: Decomposition, modes: Sequence[str], dtype: torch.dtype
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Per parameter the entries whose derivative is not 0: in the whole model, and in the masked one."""
    whole, masked = dict[str, Tensor](), dict[str, Tensor]()
    masks = decomposition.select(SUBSETS[0])
    kept = {tap: torch.ones_like(mask) for tap, mask in masks.items()}
    for seed in range(ROUNDS):
        model = made(entry, dtype, 100 + seed)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        for module in model.modules():
            if hasattr(module, "memory_efficient"):  # checkpoints do not go with taps that replace
                module.memory_efficient = False
        with moda.observe(model) as taps:
            _run(model, *inputs_of(entry, EXAMPLE_BATCH, 1, dtype), training=False)
            buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
            cases = ((whole, kept, range(entry.num_classes)), (masked, masks, SUBSETS[0]))
            for mode, (found, chosen, classes) in product(modes, cases):
                model.train(mode == "train")  # where batch norms see to it that hardly an activation is always 0
                for buffer, value in buffers:
                    buffer.copy_(value)
                args, kwargs = inputs_of(entry, MANY, seed, dtype)
                with taps.replacing(_masked(taps, chosen)):
                    picked = pick(model(*args, **kwargs), classes, entry.num_classes, entry.output)
                    outputs = [x for x in tensors_of(picked) if x.requires_grad]
                    _projected(outputs, torch.Generator().manual_seed(seed)).backward()
                for name, parameter in model.named_parameters():
                    alive = found.setdefault(name, torch.zeros(parameter.shape, dtype=torch.bool))
                    if parameter.grad is not None:
                        alive |= parameter.grad != 0
                model.zero_grad()
    return whole, masked


def _masked(
    taps: Taps, masks: Mapping[str, Tensor], after: Callable[[Tensor], Tensor] = lambda x: x
) -> Callable[[int, Tensor], Tensor]:
    return lambda index, x: after(x * masks[taps.name_of(index)].view(-1, *[1] * (x.dim() - 2)))


def _projected(outputs: Sequence[Tensor], generator: Generator) -> Tensor:
    parts = [(x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs]
    return torch.stack([part.double() for part in parts]).sum()
