"""A training step that is captured once in a CUDA graph and replayed: no time of the host's but for the optimiser."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from moda.observation.run import replayed
from moda.observation.taps import taps_of

Outputs: TypeAlias = "Tensor | tuple[Tensor, ...]"

WARMUPS = 3

DEVICE = "cuda"
"""The type of the devices that have graphs."""

CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing", "use_checkpoint")
"""What models of transformers, timm and MONAI call the switch of gradient checkpointing."""


class GraphedStep:
    """A training step: forward, losses and backward replayed as one CUDA graph, then the optimiser.

    On small images an eager step on a GPU takes the host longer than the GPU. The first steps run eagerly, on a side
    stream; then one is captured, and from there on every batch of that shape is copied to where the graph reads it. A
    batch of another shape (the last of an epoch) and a model in another mode run eagerly. So does every step where a
    graph cannot be had, and `reason` says why: on the CPU, with several processes' gradients or weights, with gradient
    checkpointing, where random numbers are drawn on the host (LayerDrop by `random`), or with a model that synchronises
    with the host. A model whose way depends on other state of Python's captures the way that it took: do not graph it.
    What is done to the model later (hooks, observing, another dtype) does not reach the graph; modules in another mode,
    parameters frozen or thawed, and parameters in other memory do: those steps run eagerly.

    Learning rates, gradient clipping and gradient scaling are not part of the graph: schedulers, `clip_norm` and
    `scaler` do what they do in an eager loop. Gradients are made anew in every step, so batches are not accumulated.

    Args:
        model: what is trained; observed models too.
        loss: takes the tensors of a batch, runs the model and returns the loss, a 0-d tensor, or a tuple of it and
            other tensors to be had of each step. Autocast belongs in it.
        optimizer: any of PyTorch's.
        scaler: scales the loss, skips steps with infinite gradients, and is updated.
        clip_norm: the largest norm of all gradients together, as in `torch.nn.utils.clip_grad_norm_`.
        warmups: eager steps before the capture; at least 1, because a graph takes what a first step makes.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> step = GraphedStep(model, lambda x: model(x).square().mean(), torch.optim.SGD(model.parameters(), lr=0.1))
        >>> value = step(torch.ones(3, 4))
        >>> step.reason
        'no graph on the CPU'
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Outputs],
        optimizer: torch.optim.Optimizer,
        *,
        scaler: torch.amp.GradScaler | None = None,
        clip_norm: float | None = None,
        warmups: int = WARMUPS,
    ) -> None:
        _check(model, loss, optimizer)
        if isinstance(warmups, bool) or not isinstance(warmups, int) or warmups < 1:
            raise ValueError(f"warmups: expected a whole number of at least 1, got {warmups!r}")
        if clip_norm is not None and not (isinstance(clip_norm, (int, float)) and clip_norm > 0):
            raise ValueError(f"clip_norm: expected a number above 0 or None, got {clip_norm!r}")
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.scaler, self.clip_norm = scaler, clip_norm
        self._left = warmups
        self._captured: _Captured | None = None
        self._stream: torch.cuda.Stream | None = None
        self.reason = refusal(model)

    @property
    def graphed(self) -> bool:
        """Whether a graph is there to be replayed."""
        return self._captured is not None

    def __call__(self, *batch: Tensor) -> Outputs:
        """Take a step on the tensors of a batch; returns what the loss does, detached and unscaled.

        Raises:
            TypeError: something in the batch is no tensor, or the loss gives something else than a 0-d tensor, alone or
                before other tensors.
        """
        outputs = self.backward(*batch)
        self._update()
        return outputs

    def backward(self, *batch: Tensor) -> Outputs:
        """Compute the gradients of a batch anew, and leave clipping and the optimiser to the caller.

        Returns and raises what calling the step does. With a scaler, gradients are scaled.
        """
        for index, tensor in enumerate(batch):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"batch: expected tensors, got {type(tensor).__name__} at {index}")
        if not self.reason and not all(tensor.device.type == DEVICE for tensor in batch):
            self.reason = "no graph on the CPU"
        if self.reason:
            return self._eager(batch)
        captured = self._captured
        if captured is None:
            if self._left > 0:
                return self._warm(batch)
            captured = self._capture(batch)
        if captured is None or not captured.fits(batch):
            return self._eager(batch)
        captured.replay(batch)
        return _detached(captured.outputs, copied=True)

    def _warm(self, batch: tuple[Tensor, ...]) -> Outputs:
        """Compute gradients eagerly before the capture, and see whether the host takes part."""
        self._left -= 1
        before = _host_numbers()
        with self._beside(), replayed():
            outputs = self._eager(batch)
        if _host_numbers() != before:
            self.reason = "no graph where a step draws random numbers on the host"
        return outputs

    def _eager(self, batch: tuple[Tensor, ...]) -> Outputs:
        self.optimizer.zero_grad()  # the graph keeps its own gradients
        return self._backward(batch)

    def _backward(self, batch: tuple[Tensor, ...]) -> Outputs:
        outputs = self.loss(*batch)
        value = outputs[0] if isinstance(outputs, tuple) and outputs else outputs
        if not isinstance(value, Tensor) or value.dim() > 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"loss: expected a 0-d tensor, got {got}")
        if isinstance(outputs, tuple) and not all(isinstance(other, Tensor) for other in outputs):
            raise TypeError(f"loss: expected tensors, got {', '.join(type(other).__name__ for other in outputs)}")
        (value if self.scaler is None else self.scaler.scale(value)).backward()
        return _detached(outputs)

    def _update(self) -> None:
        if self.clip_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters(), self.clip_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On a stream of our own, which everything before has reached, and which everything after waits for."""
        current = torch.cuda.current_stream()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _capture(self, batch: tuple[Tensor, ...]) -> _Captured | None:
        generators = torch.cuda.default_generators
        before = [generator.get_state() for generator in generators]
        try:
            self._captured = self._captured_step(batch)
        except Exception as error:  # whatever the user's code raises: the step then runs eagerly, and shows it
            self.reason = f"capturing failed: {type(error).__name__}: {error}".splitlines()[0]
            # A capture that failed leaves its mark on the generators, which then refuse to give numbers.
            for generator, state in zip(generators, before, strict=True):
                fresh = torch.Generator(device=generator.device)
                fresh.set_state(state)
                generator.graphsafe_set_state(fresh)
            self.optimizer.zero_grad()
            taps = taps_of(self.model)
            if taps is not None:
                taps.clear()  # of what was recorded before the failure
        return self._captured

    def _captured_step(self, batch: tuple[Tensor, ...]) -> _Captured:
        inputs = tuple(tensor.detach().clone() for tensor in batch)
        self.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with replayed(), torch.cuda.graph(graph, stream=self._stream):
            outputs = self._backward(inputs)
        return _Captured(graph, inputs, outputs, self.model)


def refusal(model: nn.Module) -> str:
    """Say why no graph of a model's steps can be had, as far as its modules tell; empty if they tell of nothing."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            return "no graph under DistributedDataParallel"
        if isinstance(module, FSDPModule):
            return "no graph of a model whose weights are shared out"
        if any(getattr(module, name, None) is True for name in CHECKPOINTING):
            return "no graph with gradient checkpointing, which reads the state of the random numbers on the host"
    return ""


def _host_numbers() -> tuple[Any, ...]:
    """Return the state of every generator of random numbers on the host."""
    of_numpy: Any = np.random.get_state()  # noqa: NPY002 - of those who use it
    _, keys, *rest = of_numpy
    return random.getstate(), keys.tobytes(), rest, torch.get_rng_state().numpy().tobytes()


def _detached(outputs: Outputs, *, copied: bool = False) -> Outputs:
    if isinstance(outputs, tuple):
        return tuple(output.detach().clone() if copied else output.detach() for output in outputs)
    return outputs.detach().clone() if copied else outputs.detach()


def _check(model: object, loss: object, optimizer: object) -> None:
    expected = (("model", model, nn.Module), ("optimizer", optimizer, torch.optim.Optimizer))
    for name, given, kind in expected:
        if not isinstance(given, kind):
            raise TypeError(f"{name}: expected a {kind.__module__}.{kind.__name__}, got {type(given).__name__}")
    if not callable(loss):
        raise TypeError(f"loss: expected a function of the tensors of a batch, got {type(loss).__name__}")


class _Captured:
    """A graph, and where it reads and writes."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, inputs: tuple[Tensor, ...], outputs: Outputs, model: nn.Module
    ) -> None:
        self.graph, self.inputs, self.outputs = graph, inputs, outputs
        self.modules, self.parameters = list(model.modules()), list(model.parameters())
        self.gradients = [parameter.grad for parameter in self.parameters]
        self.state = self._state()

    def fits(self, batch: tuple[Tensor, ...]) -> bool:
        """Whether the graph computes this batch's step, with the model as it is."""
        return (
            len(batch) == len(self.inputs)
            and all(
                mine.shape == theirs.shape and mine.dtype == theirs.dtype and mine.device == theirs.device
                for mine, theirs in zip(self.inputs, batch, strict=True)
            )
            and self.state == self._state()
        )

    def _state(self) -> tuple[list[bool], list[tuple[int, bool]]]:
        """Return what the graph holds fast: modules' modes, where parameters lie and whether they learn."""
        where = [(parameter.data_ptr(), parameter.requires_grad) for parameter in self.parameters]
        return [module.training for module in self.modules], where

    def replay(self, batch: tuple[Tensor, ...]) -> None:
        """Run the graph on this batch; the parameters' gradients are the graph's afterwards."""
        for mine, theirs in zip(self.inputs, batch, strict=True):
            mine.copy_(theirs, non_blocking=True)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.graph.replay()
