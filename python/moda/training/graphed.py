"""A training step that is captured once in a CUDA graph and replayed: no time of the host's but for the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moda.observation.run import replayed
from moda.observation.taps import taps_of

WARMUPS = 3


class GraphedStep:
    """A training step: forward, losses and backward replayed as one CUDA graph, then the optimiser.

    On small images an eager step on a GPU takes the host longer than the GPU. The first steps run eagerly, on a side
    stream; then one is captured, and from there on every batch of that shape is copied to where the graph reads it. A
    batch of another shape (the last of an epoch) and a model in another mode run eagerly. So does every step where a
    graph cannot be had, and `reason` says why: on the CPU, under `DistributedDataParallel`, or with a model that
    synchronises with the host or takes another way from batch to batch in a manner that capturing shows. A model whose
    way depends on Python's own state (LayerDrop by `random`) captures the way that it took: do not graph it.

    Learning rates, gradient clipping and gradient scaling are not part of the graph: schedulers, `clip_norm` and
    `scaler` do what they do in an eager loop. Gradients are made anew in every step, so batches are not accumulated.

    Args:
        model: what is trained; observed models too.
        loss: takes the tensors of a batch, runs the model and returns the loss, a 0-d tensor. Autocast belongs in it.
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
        loss: Callable[..., Tensor],
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
        self.reason = ""
        self._left = warmups
        self._captured: _Captured | None = None
        self._stream: torch.cuda.Stream | None = None
        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            self.reason = "no graph under DistributedDataParallel"

    @property
    def graphed(self) -> bool:
        """Whether a graph is there to be replayed."""
        return self._captured is not None

    def __call__(self, *batch: Tensor) -> Tensor:
        """Take a step on the tensors of a batch; returns the loss, detached and unscaled.

        Raises:
            TypeError: something in the batch is no tensor, or the loss gives something else than a 0-d tensor.
        """
        for index, tensor in enumerate(batch):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"batch: expected tensors, got {type(tensor).__name__} at {index}")
        if not self.reason and not all(tensor.is_cuda for tensor in batch):
            self.reason = "no graph on the CPU"
        if self.reason:
            return self._eager(batch)
        captured = self._captured
        if captured is None:
            if self._left > 0:
                self._left -= 1
                with self._beside(), replayed():
                    return self._eager(batch)
            captured = self._capture(batch)
        if captured is None or not captured.fits(batch, self.model.training):
            return self._eager(batch)
        captured.replay(batch)
        self._update()
        return captured.value.clone()

    def _eager(self, batch: tuple[Tensor, ...]) -> Tensor:
        self.optimizer.zero_grad()  # the graph keeps its own gradients
        value = self._backward(batch)
        self._update()
        return value

    def _backward(self, batch: tuple[Tensor, ...]) -> Tensor:
        value = self.loss(*batch)
        if not isinstance(value, Tensor) or value.dim() > 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"loss: expected a 0-d tensor, got {got}")
        (value if self.scaler is None else self.scaler.scale(value)).backward()
        return value.detach()

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
            value = self._backward(inputs)
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters]
        return _Captured(graph, inputs, value, parameters, gradients, self.model.training)


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
        self,
        graph: torch.cuda.CUDAGraph,
        inputs: tuple[Tensor, ...],
        value: Tensor,
        parameters: list[nn.Parameter],
        gradients: list[Any],
        training: bool,
    ) -> None:
        self.graph, self.inputs, self.value = graph, inputs, value
        self.parameters, self.gradients, self.training = parameters, gradients, training

    def fits(self, batch: tuple[Tensor, ...], training: bool) -> bool:
        """Whether the graph computes this batch's step."""
        return (
            training == self.training
            and len(batch) == len(self.inputs)
            and all(
                mine.shape == theirs.shape and mine.dtype == theirs.dtype and mine.device == theirs.device
                for mine, theirs in zip(self.inputs, batch, strict=True)
            )
        )

    def replay(self, batch: tuple[Tensor, ...]) -> None:
        """Run the graph on this batch; the parameters' gradients are the graph's afterwards."""
        for mine, theirs in zip(self.inputs, batch, strict=True):
            mine.copy_(theirs, non_blocking=True)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        self.graph.replay()
