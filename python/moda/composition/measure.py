"""Measures of modules and composed models: size, overlap, floating-point operations, accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moda.composition.compose import plan
from moda.composition.composer import Composer, Plan, composer_of
from moda.composition.kept import Kept
from moda.composition.observed import observed
from moda.data.unpacking import Inputs, Unpack, check_callable, check_loader, unpacked
from moda.decomposition.container import Decomposition, check_classes, check_decomposition, chosen_classes
from moda.decomposition.heads import head_parameters
from moda.inference import check_module, device_of, evaluating
from moda.observation.taps import Taps
from moda.outputs import Output, check_output, logits_of
from moda_kernels.validation import MOST_CLASSES, check_strided, shown

__all__ = [
    "accuracy",
    "flops",
    "mean_over_pairs",
    "module_sizes",
    "neurons_kept",
    "overlap",
    "overlap_matrix",
    "plan_size",
    "size",
]

Counting = Literal["published", "parameters"]


def size(
    model: nn.Module | Taps,
    decomposition: Decomposition,
    classes: Iterable[int],
    *,
    example: Any = None,
    published: bool = True,
) -> float:
    """Parameters of `moda.compose(model, decomposition, classes, published=...)` over those of the whole model.

    Weights, biases and affine parameters of norms count, buffers do not (MODA, "composed model size"; of one class it
    is the "module size"). Of an ensemble all modules count in full, heads included, as published: what two of them
    share counts twice. Nothing is built.

    Raises:
        TypeError, ValueError: as `moda.compose`.
    """
    check_decomposition(decomposition)
    if decomposition.combine == "rows":
        return plan_size(_module(model), plan(model, decomposition, classes, example=example, published=published))
    chosen = chosen_classes(decomposition, classes)
    return float(module_sizes(model, decomposition, example=example, published=published)[chosen].sum())


def module_sizes(
    model: nn.Module | Taps, decomposition: Decomposition, *, example: Any = None, published: bool = True
) -> Tensor:
    """(K,) float64: the `size` of every class's module.

    Raises:
        TypeError, ValueError: as `moda.compose`.
    """
    composer = _composer(model, decomposition, example)
    heads = head_parameters(decomposition.heads) / _whole(_module(model))
    plans = [_module_plan(composer, decomposition, k, published) for k in range(decomposition.num_classes)]
    return torch.tensor([plan_size(_module(model), each) + heads for each in plans], dtype=torch.float64)


def _module_plan(composer: Composer, decomposition: Decomposition, number: int, published: bool = True) -> Plan:
    """One class's module; under a head it keeps the logits of all classes."""
    rows = range(decomposition.num_classes) if decomposition.heads else [number]
    return composer.plan(decomposition.select([number]), list(rows), published=published)


def neurons_kept(decomposition: Decomposition, classes: Iterable[int]) -> float:
    """Neurons of a composition over those of the whole model, at the decomposition's sites ("kernels kept").

    Of a union every neuron counts once; of an ensemble once for each module that has it, as published, so that the
    share may exceed 1. Layers without a site do not count.

    Raises:
        TypeError, ValueError: see `check_classes`.
    """
    chosen = chosen_classes(decomposition, classes)
    groups = [chosen] if decomposition.combine == "rows" else [[number] for number in chosen]
    kept = sum(int(mask.sum()) for group in groups for mask in decomposition.select(group).values())
    return kept / sum(mask.shape[1] for mask in decomposition.masks.values())


def _composer(model: nn.Module | Taps, decomposition: Decomposition, example: Any) -> Composer:
    check_decomposition(decomposition)
    with observed(model, decomposition.sites) as taps:
        return composer_of(taps, decomposition, example)


def _module(model: nn.Module | Taps) -> nn.Module:
    return model.model if isinstance(model, Taps) else model


def plan_size(model: nn.Module, plan: Plan) -> float:
    """`size` of a composition that is planned already."""
    shapes = _shapes(model, "parameters")
    return sum(kept.count(shapes[name]) for name, kept in plan.kept.items() if name in shapes) / _whole(model)


def overlap(
    model: nn.Module | Taps,
    decomposition: Decomposition,
    a: int,
    b: int,
    counting: Counting = "published",
    *,
    example: Any = None,
) -> float:
    """Entries that the modules of classes `a` and `b` share, over the parameters of the whole model.

    Two modules share an entry if both keep the same position of the same tensor. Heads are of one module each.

    Args:
        model: any module, observed or not.
        decomposition: modules of this model.
        a: class index.
        b: class index.
        counting: "published" counts entries of the whole state_dict, as the authors' code does: running means and
            variances too, and `num_batches_tracked`, which all modules share; the denominator counts parameters
            only, so the overlap can exceed the size of either module. "parameters" counts parameters in both.
        example: see `moda.compose`.

    Raises:
        TypeError, ValueError: as `moda.compose`, or `counting` is neither.
    """
    chosen = [chosen_classes(decomposition, [c])[0] for c in (a, b)]
    return float(_overlaps(model, decomposition, chosen, counting, example)[0, 1])


def overlap_matrix(
    model: nn.Module | Taps,
    decomposition: Decomposition,
    classes: Iterable[int] | None = None,
    counting: Counting = "published",
    *,
    example: Any = None,
) -> Tensor:
    """`overlap` of every pair of classes.

    Args:
        model: any module, observed or not.
        decomposition: modules of this model.
        classes: class indices; all by default.
        counting: see `overlap`.
        example: see `moda.compose`.

    Returns:
        (K, K) float64, symmetric; on the diagonal what a module shares with itself, i.e. its own size (with
        "published" counting its buffers included).
    """
    every = range(decomposition.num_classes)
    chosen = check_classes(every if classes is None else classes, len(every))
    return _overlaps(model, decomposition, chosen, counting, example)


def mean_over_pairs(matrix: Tensor) -> float:
    """Mean of a (K, K) matrix over the pairs of different classes: of the entries off the diagonal; 0 for one class.

    Raises:
        TypeError, ValueError: it is no such matrix.

    >>> mean_over_pairs(torch.tensor([[1.0, 0.25], [0.75, 1.0]]))
    0.5
    """
    if not isinstance(matrix, Tensor):
        raise TypeError(f"matrix: expected a tensor, got {type(matrix).__name__}")
    check_strided(matrix, "matrix")
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.numel():
        raise ValueError(f"matrix: expected shape (classes, classes), got {tuple(matrix.shape)}")
    classes = len(matrix)
    return float((matrix.triu(1) + matrix.tril(-1).T).sum() / max(1, classes * (classes - 1)))


def _overlaps(
    model: nn.Module | Taps, decomposition: Decomposition, classes: Sequence[int], counting: Counting, example: Any
) -> Tensor:
    if not isinstance(counting, str) or counting not in ("published", "parameters"):
        raise ValueError(f"counting: expected 'published' or 'parameters', got {shown(counting)}")
    composer = _composer(model, decomposition, example)
    modules = [_module_plan(composer, decomposition, c).kept for c in classes]
    shared = np.zeros((len(classes), len(classes)))
    for name, shape in _shapes(_module(model), counting).items():
        shared += _shared_entries([module.get(name) for module in modules], shape)
    return torch.from_numpy(shared / _whole(_module(model)))


def _shared_entries(parts: Sequence[Kept | None], shape: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(K, K) entries of one tensor that two modules both keep: common positions along each axis, multiplied."""
    common = np.ones((len(parts), len(parts)))
    for dim, extent in enumerate(shape):
        held = np.zeros((len(parts), extent))
        for row, part in zip(held, parts, strict=True):
            if part is not None:
                indices = part.along(dim)
                row[:] = indices is None
                if indices is not None:
                    row[indices] = 1
        common *= held @ held.T
    if not shape:
        there = np.array([part is not None for part in parts], dtype=np.float64)
        common *= np.outer(there, there)
    return common


def _shapes(model: nn.Module, counting: Counting) -> dict[str, tuple[int, ...]]:
    """Shapes of the entries that count, by name; a tensor under two names counts once."""
    entries = model.state_dict(keep_vars=True)
    unique = {id(entry): name for name, entry in reversed(entries.items())}
    return {
        name: tuple(entry.shape)
        for name, entry in entries.items()
        if unique[id(entry)] == name and (counting == "published" or isinstance(entry, nn.Parameter))
    }


def _whole(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module, example_input: Tensor) -> int:
    """Floating-point operations of one forward pass in evaluation mode, by `torch.utils.flop_counter`.

    Matrix products and convolutions count, with 2 operations per multiply-add; element-wise operations, norms and
    pooling do not. (The paper's counter, fvcore, counts 1 per multiply-add and some norms and pooling besides:
    compare ratios.)

    Args:
        model: any module.
        example_input: one batch; the result is for all of its samples.

    Examples:
        >>> flops(nn.Linear(10, 5), torch.zeros(1, 10))
        100
    """
    counter = FlopCounterMode(display=False)
    with evaluating(model), torch.no_grad(), counter:
        model(example_input)
    return int(counter.get_total_flops())


def accuracy(
    model: nn.Module,
    loader: Iterable[Any],
    classes: Sequence[int] | None = None,
    *,
    unpack: Unpack | None = None,
    output: Output = None,
) -> float:
    """Share of samples whose highest logit is that of their class, in [0, 1], in evaluation mode.

    With `classes`, samples of other classes are left out, and only the logits of these classes compete. Which
    logit belongs to which class: a model from `compose` or `mask` knows it (`model.classes`); any other model with
    len(classes) logits is taken to give them in the order of `classes`; one with more, or one whose logits are just all
    the classes given, in the order of class indices.

    Args:
        model: gives logits (N, K); every submodule's train/eval mode is put back afterwards.
        loader: gives batches of inputs and labels (class indices, (N,)), in any form that `count_firings` takes.
        classes: class indices; by default all that the model gives.
        unpack: how to take a batch apart; see `count_firings`.
        output: which of several outputs are the logits, by key or place; by default the one called "logits".

    Raises:
        TypeError: a batch or what the model puts out is not as above.
        ValueError: no class, one twice, or one that the model has no logit for; or no sample of the classes.

    Examples:
        >>> logits, labels = torch.tensor([[2.0, 1.0, 3.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 1])
        >>> accuracy(nn.Identity(), [(logits, labels)])
        0.5
        >>> accuracy(nn.Identity(), [(logits, labels)], classes=[0, 1])  # the third logit does not compete
        1.0
    """
    check_module(model)
    check_loader(loader)
    check_callable(unpack, "unpack")
    check_output(output)
    if classes is None:
        classes = getattr(model, "classes", None)
    chosen = None if classes is None else _checked(classes, getattr(model, "classes", None))
    device = device_of(model)
    score = torch.zeros(2, dtype=torch.int64, device=device)  # right, all; read once, after the last batch
    with evaluating(model), torch.no_grad():
        for batch in loader:
            inputs, labels = _of_classes(*unpacked(batch, unpack), chosen)
            if len(labels):
                logits = logits_of(inputs.to(device).into(model), output=output)
                score += _score(model, logits, labels.to(device), chosen)
    right, total = score.tolist()
    if total == 0:
        raise ValueError(f"loader: expected samples of the classes {chosen or 'of the model'}, got none")
    return float(right / total)


def _checked(classes: Sequence[int], known: Sequence[int] | None) -> list[int]:
    chosen = check_classes(classes, MOST_CLASSES)
    unknown = [c for c in chosen if known is not None and c not in known]
    if unknown:
        raise ValueError(f"classes: expected classes of the model, {list(known or ())}, got {unknown}")
    return chosen


def _of_classes(inputs: Inputs, labels: Tensor, classes: list[int] | None) -> tuple[Inputs, Tensor]:
    """The samples of these classes, where picking them costs no synchronisation; `_score` leaves out the others."""
    if classes is None or labels.device.type != "cpu" or len(inputs.args) != 1 or inputs.kwargs:
        return inputs, labels
    images = inputs.args[0]
    if not isinstance(images, Tensor) or images.device.type != "cpu":
        return inputs, labels
    members = torch.isin(labels, torch.tensor(classes))
    return Inputs((images[members],), {}), labels[members]


def _score(model: nn.Module, logits: Tensor, labels: Tensor, classes: list[int] | None) -> Tensor:
    """(2,): right answers, and samples of the classes."""
    if classes is None:
        return torch.stack([(logits.argmax(1) == labels).sum(), labels.new_tensor(len(labels))])
    columns = _columns(classes, getattr(model, "classes", None), logits.shape[1])
    if columns is not None:
        logits = logits[:, columns]
    right = labels[:, None] == torch.tensor(classes, device=labels.device)
    hits = right.gather(1, logits.argmax(1, keepdim=True))
    return torch.stack([hits.sum(), right.sum()])


def _columns(classes: list[int], known: Sequence[int] | None, width: int) -> list[int] | None:
    """Where the logits of the classes are; None if they are all there is, in order."""
    if known is not None:
        return [list(known).index(c) for c in classes]
    if width == len(classes) and sorted(classes) != list(range(width)):
        return None
    if max(classes) >= width:
        raise ValueError(f"classes: expected classes in [0, {width}) as the model has {width} logits, got {classes}")
    return classes
