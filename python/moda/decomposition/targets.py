"""What an attribution is the attribution of: one number per sample, made of its logits and its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

Target: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, K) and labels (N,) -> (N,)."""


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of the sample's class minus the mean of the others; of one class alone, its logit.

    What a module has to keep is that its class wins; a logit that rises with all others does not help.
    """
    own = logit(logits, labels)
    others = logits.shape[1] - 1
    return own - (logits.sum(1) - own) / others if others else own


def logit(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of the sample's class."""
    return logits.gather(1, labels[:, None])[:, 0]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of training. It is flat where the sample is safe, so that sure samples count for little."""
    return F.cross_entropy(logits, labels, reduction="none")


TARGETS: dict[str, Target] = {"margin": margin, "logit": logit, "cross_entropy": cross_entropy}


def named(target: str | Target) -> tuple[str, Target]:
    """The target and what to call it in a file.

    Raises:
        TypeError, ValueError: `target` is no name of `TARGETS` and no function.
    """
    if isinstance(target, str):
        if target not in TARGETS:
            raise ValueError(f"target: expected one of {', '.join(TARGETS)} or a function, got {target!r:.80}")
        return target, TARGETS[target]
    if not callable(target):
        raise TypeError(f"target: expected one of {', '.join(TARGETS)} or a function, got {type(target).__name__}")
    return getattr(target, "__qualname__", type(target).__name__), target


def evaluated(target: Target, logits: Tensor, labels: Tensor) -> Tensor:
    """The target of every sample, in float32 at least.

    Raises:
        TypeError, ValueError: it gives something else than one number per sample.
    """
    values = target(logits.float() if logits.dtype.itemsize < 4 else logits, labels)
    if not isinstance(values, Tensor):
        raise TypeError(f"target: expected a function that gives a tensor, got {type(values).__name__}")
    if values.shape != labels.shape:
        expected = f"({len(labels)},), one per sample"
        raise ValueError(f"target: expected a function that gives shape {expected}, got {tuple(values.shape)}")
    if not values.requires_grad:
        raise ValueError("target: expected a function of the logits, got values that do not depend on any tap")
    return values
