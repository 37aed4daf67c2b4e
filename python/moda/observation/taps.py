"""Observe the activations of a model while its own code runs: `observe(model)` and the handle that it gives.

*What is tapped.* Every call of a hidden activation (see activations.py), as a module, also one called twice, as a
function of `torch` or `torch.nn.functional`, or as a tensor method, in place or not.

*Names.* The path of the activation module (`layer1.0.relu`), or for a function the path of the module that calls it and
the function's name (`layer1.0.relu`); `_1`, `_2`, ... is appended where a name is taken, in execution order. Characters
other than letters, digits, `_`, `-` and `.` become `_`, so a name serves as a file name.

*How.* Activation modules become a subclass of their own class: the same objects, with the same state and hooks. Calls
of functions are seen by a `TorchFunctionMode`, entered by the modules that make such calls. The first forward pass in
each mode (train and eval) is a probe: see probe.py. Nothing is recorded while the model is exported, traced, run on
tensors without memory or inside a functional transform; the model is then the plain one.

*When.* A forward pass is recorded where gradients are enabled, or inside `recording()`. The recomputation of gradient
checkpointing is not recorded.
"""

from __future__ import annotations

import copy
import random
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from moda.checks import one_of
from moda.observation.activations import Known
from moda.observation.attached import PART, Caller, Norm, Part, Root, Site, Whole, attach, detach, part_of
from moda.observation.labels import dim_of_samples
from moda.observation.names import nothing_tapped
from moda.observation.own import look_at, look_away
from moda.observation.plan import Plan
from moda.observation.probe import Probe, tensors_of
from moda.observation.record import Record, inside_backward
from moda.observation.run import (
    FUSED_FROM_BYTES,
    GPU_BOUND_FROM_BYTES,
    NEVER,
    NORMS_FUSED_FROM_BYTES,
    After,
    Function,
    FunctionMode,
    Receiver,
    Run,
    is_replayed,
)
from moda_kernels.validation import check_flag, shown

Route = Literal["grouped", "fused", "auto"]

__all__ = ["Route", "Taps", "accelerate", "observe", "observing", "taps_of"]


class Taps:
    """The taps of an observed model; made by `observe`. Also a context manager, which removes them at its end.

    Attributes:
        model: the observed model.
        example: up to two samples of the probe's input, `(args, kwargs)`; None before it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        route: Route = "auto",
        activations: tuple[Any, ...] = (),
        sample_dim: int = 0,
        neuron_dim: int | Mapping[str, int] | None = None,
        sites: tuple[str, ...] = (),
        fuse_norms: bool = True,
        reading: bool = True,
    ) -> None:
        self.model = model
        self.route: Route = route
        self.fuse_norms = fuse_norms
        self.reading = reading  # whether forward passes with gradients are recorded
        self.known = Known(activations, sites)
        self.sample_dim = sample_dim
        self.neuron_dim = neuron_dim
        self.example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.key = f"taps {next(_keys)}"  # a text, which a compiler takes for a constant whatever it has seen before
        _handles[self.key] = self
        self.lasting = True  # whether it is there until `remove`
        self._own = tuple(activations)
        self._sites = sites
        self._plans: list[Plan | None] = [None, None]  # of eval and of train mode
        self._known_modes = [False, False]  # a compiler that looked at the plans would not see new ones
        self._run: Run | None = None
        self._record = Record()
        self._mode = FunctionMode(self)
        self._forced = 0
        self._receiver: Receiver | None = None
        self._function: Function | None = None
        self._fusing = False  # whether norms are fused where activations are replaced
        self._marking = False
        self._after: After | None = None
        self._overwriting = False
        self._paused: list[tuple[nn.Module, Part]] = []
        self._attached: dict[int, weakref.ref[nn.Module]] = {}  # by id: classes may say that all modules are equal
        self._removed = False  # nothing is attached then, even if that happens in a forward pass that goes on

    # ---- what is known ---

    @property
    def _training(self) -> int:
        """1 in training mode, else 0: an index, for which the compiler of PyTorch 2.11 takes no bool."""
        return int(self.model.training)

    @property
    def _plan(self) -> Plan:
        plan = self._plans[self._training] or self._plans[1 - self._training]
        if plan is None:
            raise RuntimeError(
                "taps: known only after the first forward pass of the observed model; run it once, or pass example= to "
                "moda.observe"
            )
        return plan

    @property
    def probed(self) -> bool:
        """Whether a forward pass has shown which taps there are."""
        return any(plan is not None for plan in self._plans)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the taps in execution order, in the mode (train or eval) that the model is in."""
        return self._plan.names

    def name_of(self, index: int) -> str:
        """The name of a tap, also while the forward pass that is the probe runs."""
        run = self._run
        return run.found[index].name if isinstance(run, Probe) else self.names[index]

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each tap."""
        return tuple(tap.width for tap in self._plan.taps)

    @property
    def skipped(self) -> dict[str, str]:
        """Why calls of activations are not tapped, by the names that they would have."""
        return dict(self._plan.skipped)

    @property
    def joins_norms(self) -> bool:
        """Whether a batch norm and the activation behind it may be one operation."""
        return self.fuse_norms and (self.route != "grouped" or self._fusing)

    # ---- what is recorded ---

    @property
    def _keeps(self) -> bool:
        """Whether what a pass records is kept: nobody takes it at once, or puts something else in its place."""
        return self._receiver is None and self._function is None

    def activations(self) -> list[Tensor]:
        """What was recorded since the last call of this method, one tensor per tap in execution order; forgets it.

        Each is `(N, C)` or `(N, C, *positions)`, or pooled rows `(N, C)` where a tap fuses, attached to the autograd
        graph.

        Raises:
            RuntimeError: nothing is recorded; or two forward passes are, outside `adding()`; or an activation was
                overwritten, or computed in a reentrant checkpoint.
        """
        if not (self.reading or self.recorded):
            raise RuntimeError("model: is accelerated, and nothing of it is recorded; use moda.observe for that")
        plan = self._plan
        if not plan.taps:
            raise RuntimeError(nothing_tapped(plan.skipped))
        return self._record.take(plan.names)

    @property
    def recorded(self) -> bool:
        """Whether there is something to read."""
        return bool(self._record.values)

    def clear(self) -> None:
        """Forget what is recorded."""
        self._record.clear()

    @contextmanager
    def recording(self, receiver: Receiver | None = None) -> Iterator[None]:
        """Record inside this block also under `torch.no_grad()`; never pooled rows.

        Args:
            receiver: called with every activation while the model runs, `receiver(index, activation)`, index in
                execution order; nothing is kept for `activations()`, so that memory is that of a plain forward pass.

        Raises:
            TypeError: `receiver` cannot be called.
        """
        if receiver is not None and not callable(receiver):
            raise TypeError(f"receiver: expected a function of (index, activation), got {type(receiver).__name__}")
        outer, self._receiver = self._receiver, receiver
        self._forced += 1
        try:
            yield
        finally:
            self._forced -= 1
            self._receiver = outer

    @contextmanager
    def replacing(self, function: Function, *, fuse_norms: bool = False) -> Iterator[None]:
        """Put `function(index, activation)` in each activation's place in the model; nothing is recorded meanwhile.

        Activations have their neurons at dim 1, `(N, C)` or `(N, C, *positions)`; what takes their place has the same
        shape. Activations are not pooled.

        Args:
            function: gives what takes an activation's place.
            fuse_norms: where gradients are enabled, let batch norm and the activation behind it be one operation, as
                in training, also in eval mode; unless the model is observed with `fuse_norms=False`.

        Raises:
            TypeError: `function` cannot be called, or `fuse_norms` is no bool.
            ValueError: in a forward pass: another shape, or other activation calls than in the first one.
        """
        if not callable(function):
            raise TypeError(f"function: expected a function of (index, activation), got {type(function).__name__}")
        check_flag(fuse_norms, "fuse_norms")
        outer = self._function, self._fusing
        self._function, self._fusing = function, fuse_norms
        try:
            yield
        finally:
            self._function, self._fusing = outer

    @contextmanager
    def marking(self) -> Iterator[None]:
        """Let activations pass the operator `moda::tap`, so that an exported graph shows them; nothing is recorded."""
        outer, self._marking = self._marking, True
        try:
            yield
        finally:
            self._marking = outer

    @contextmanager
    def overwriting(self) -> Iterator[None]:
        """Inside this block, without gradients, a ReLU overwrites its input where nobody else sees it.

        That is one that a convolution, linear layer, batch normalisation or addition made for this ReLU alone, in a
        model without hooks. A forward pass then writes less memory, which makes it faster; outputs and activations stay
        the same.
        """
        outer, self._overwriting = self._overwriting, not _hooked(self.model)
        try:
            yield
        finally:
            self._overwriting = outer

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Inside this block, samples of further forward passes are appended to those recorded before."""
        outer, self._record.adding = self._record.adding, True
        try:
            yield
        finally:
            self._record.adding = outer

    def after_recording(self, function: After | None) -> None:
        """Let `function(args, kwargs, output)` give what a recorded forward pass puts out.

        It runs when the forward pass is over, so that it may call `activations()`: a loss can be added there to one
        that the model puts out itself. None ends it.

        Raises:
            TypeError: `function` cannot be called.
        """
        if function is not None and not callable(function):
            raise TypeError(f"function: expected one of (args, kwargs, output), got {type(function).__name__}")
        self._after = function

    # ---- the end ---

    def remove(self) -> None:
        """Make the model again exactly what it was; a second call does nothing."""
        for module, part in self._parts():
            if part.taps is self:
                detach(module)
        self._attached = {}
        self._removed = True
        look_away(self.known.functions, self)
        self._record.clear()

    def _parts(self) -> list[tuple[nn.Module, Part]]:
        modules = [module for reference in self._attached.values() if (module := reference()) is not None]
        return [(module, part) for module in modules if (part := part_of(module)) is not None]

    def _pause(self, *, keeping: bool = False) -> None:
        """Detach from the model until `_resume`; what is recorded is forgotten, or kept."""
        self._paused = self._parts()
        recorded = self._record
        if keeping:
            self._record = Record()
        self.remove()
        self._record = recorded

    def _resume(self) -> None:
        self._removed = False
        look_at(self.known.functions, self)
        for module, part in self._paused:
            self._attach(module, part)

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_exception: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        known = self._plans[self._training] or self._plans[1 - self._training]
        count = "not probed yet" if known is None else f"{len(known.taps)} taps"
        return f"Taps({type(self.model).__name__}, {count}, route={self.route!r})"

    # ---- forward passes ---

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run | None:
        """What a forward pass that begins is for; None where taps have nothing to do."""
        if self._run is not None:  # the model calls itself
            return None
        compiling = torch.compiler.is_compiling()
        changes = self._function is not None or self._marking
        # torch.compiler.is_exporting() asks this, but is always true in what PyTorch 2.11 and older compile.
        exporting = torch.compiler._is_exporting_flag
        apart = exporting or (not compiling and _apart(args, kwargs))
        if apart and not changes:
            return None
        training = self._training
        if compiling and not apart and not self._known_modes[training]:
            _probe_while_compiling(self, args, kwargs)
        plan = self._plans[training]
        backward = not compiling and inside_backward()
        gradients = torch.is_grad_enabled()
        recorded = ((gradients and self.reading) or self._forced > 0) and not (backward or apart or self._marking)
        if plan is None and apart:
            raise RuntimeError("taps: run the observed model once before it is exported or traced, or pass example=")
        if plan is None or (plan.provisional and not apart and not compiling):
            run = None if backward else self._probe(plan, training, args, kwargs, recorded)
            if run is not None or plan is None:
                return run
        pooled = gradients and not (self._forced or changes)
        norms = (pooled and training) or (gradients and self._fusing and not self._forced)
        norms = norms and self.joins_norms and not (compiling or backward or apart)
        if not (recorded or changes or backward or norms or (self._overwriting and not gradients)):
            return None
        record = self._record if recorded and self._keeps else None
        if backward:
            record = Record()  # the recomputation of a checkpoint does what was done, for nobody
        run = Run(
            plan,
            training,
            _samples(tensors_of(args, kwargs), self.sample_dim) if plan.folded else 0,
            record=record,
            receiver=self._receiver if recorded else None,
            function=self._function,
            marking=self._marking,
            fuse_from=self._fuse_from(plan, args, kwargs, compiling) if pooled and self.reading else NEVER,
            norms_from=_fused_from(NORMS_FUSED_FROM_BYTES, plan, args, kwargs, self.sample_dim) if norms else NEVER,
            overwriting=self._overwriting and not gradients and not changes,
        )
        for site in plan.repeated:
            site.hits = 0
        if record is not None:
            record.begin()
        self._run = run
        return run

    def _fuse_from(self, plan: Plan | None, args: tuple[Any, ...], kwargs: dict[str, Any], compiling: bool) -> float:
        """From how many bytes of an activation on ReLU and pooling are one pass."""
        if self.route == "grouped" or (not compiling and torch._C._len_torch_dispatch_stack() > 0):
            return NEVER
        if self.route == "fused":
            return 0
        if compiling:  # a compiler fuses the pass over memory by itself
            return NEVER
        return _fused_from(FUSED_FROM_BYTES, plan, args, kwargs, self.sample_dim)

    def _probe(
        self, plan: Plan | None, training: int, args: tuple[Any, ...], kwargs: dict[str, Any], recorded: bool
    ) -> Run | None:
        """The probe that this forward pass is; None if it would tell nothing more than `plan`."""
        inputs = tensors_of(args, kwargs)
        if self.sample_dim and inputs and all(value.dim() <= self.sample_dim for value in inputs):
            shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
            raise ValueError(f"sample_dim: expected an axis of the inputs, got {shown(self.sample_dim)} for {shapes}")
        samples = _samples(inputs, self.sample_dim)
        if plan is not None and samples < 2:
            return None
        pooled = torch.is_grad_enabled() and not (self._forced or self._function is not None)
        run = Probe(
            self,
            training,
            samples,
            inputs,
            record=self._record if recorded and self._keeps else None,
            receiver=self._receiver if recorded else None,
            function=self._function,
            fuse_from=self._fuse_from(plan, args, kwargs, compiling=False) if pooled and self.reading else NEVER,
        )
        if run.record is not None:
            run.record.begin()
        if self.example is None and samples > 0:
            self.example = _first_samples(args, kwargs, samples, self.sample_dim)
        self._run = run
        return run

    def _learn(self, training: int, plan: Plan) -> None:
        self._plans[training] = plan
        self._known_modes[training] = True

    def _attach(self, module: nn.Module, part: Part) -> None:
        if self._removed:
            return
        attach(module, part)
        self._attached[id(module)] = weakref.ref(module)

    # ---- copies ---

    def _copied(self, model: nn.Module, memo: dict[int, Any]) -> None:
        """A deep copy of the model was made: it gets taps of its own."""
        made = self._like(model)
        memo[id(self)] = made
        look_at(made.known.functions, made)
        made.example = self.example
        sites: dict[int, Site] = {}
        for module, twin in zip(self.model.modules(), model.modules(), strict=True):
            part = part_of(module)
            if part is not None and part.taps is self:
                _attach_copy(made, twin, part, sites)
        for training, plan in enumerate(self._plans):
            if plan is not None:
                repeated = tuple(sites[id(site)] for site in plan.repeated if id(site) in sites)
                made._learn(training, Plan(plan.taps, plan.skipped, repeated, plan.samples, plan.folded, plan.largest))

    def _like(self, model: nn.Module) -> Taps:
        return Taps(
            model,
            route=self.route,
            activations=self._own,
            sample_dim=self.sample_dim,
            neuron_dim=self.neuron_dim,
            sites=self._sites,
            fuse_norms=self.fuse_norms,
            reading=self.reading,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Taps:
        copied = copy.deepcopy(self.model, memo)
        made = taps_of(copied)
        if made is None:  # removed already
            made = self._like(copied)
        return made

    def __reduce__(self) -> Any:
        settings = {"route": self.route, "activations": self._own, "sites": self._sites, "reading": self.reading}
        axes = {"sample_dim": self.sample_dim, "neuron_dim": self.neuron_dim}
        return _attach_again, (self.model, {**settings, **axes, "fuse_norms": self.fuse_norms})


_keys = count()
_handles: weakref.WeakValueDictionary[str, Taps] = weakref.WeakValueDictionary()  # by their keys


def _attach_again(model: nn.Module, settings: dict[str, Any]) -> Taps:
    _check_model(model)
    return _attach_taps(Taps(model, **settings))


def _attach_copy(taps: Taps, module: nn.Module, part: Part | None, sites: dict[int, Site]) -> None:
    """Give the copy of a module the part of the original."""
    if isinstance(part, Root):
        _attach_copy(taps, module, part.inner, sites)
        taps._attach(module, Root(taps))
    elif isinstance(part, Site):
        taps._attach(module, _site_copy(taps, part, sites))
    elif isinstance(part, Caller):
        caller = Caller(taps)
        caller.functions = {name: _site_copy(taps, site, sites) for name, site in part.functions.items()}
        caller.norm = None if part.norm is None else _norm_copy(taps, part.norm)
        taps._attach(module, caller)
    elif isinstance(part, Whole):
        taps._attach(module, Whole(taps))
    elif isinstance(part, Norm):
        taps._attach(module, _norm_copy(taps, part))


def _norm_copy(taps: Taps, norm: Norm) -> Norm:
    made = Norm(taps)
    made.dims = list(norm.dims)
    return made


def _site_copy(taps: Taps, site: Site, sites: dict[int, Site]) -> Site:
    made = sites[id(site)] = Site(taps, opaque=site.opaque)
    for training, calls in enumerate(site.planned):
        made.plan(training, calls)
    return made


# ---- inputs ---


def _samples(inputs: list[Tensor], dim: int) -> int:
    """The size of the first input along `dim`; the bags, where that is words of all samples, which offsets divide."""
    first = next((value for value in inputs if value.dim() > 0), None)
    if first is not None and first.dim() == 1 and not (first.is_floating_point() or torch.compiler.is_compiling()):
        for value in inputs:
            if value is not first and _are_offsets(value, len(first)):
                return len(value)
    return _rows(inputs, dim)


def _rows(inputs: list[Tensor], dim: int) -> int:
    """The size of the first input along `dim`; no value is looked at."""
    first = next((value for value in inputs if value.dim() > 0), None)
    return 1 if first is None else first.shape[dim_of_samples(first.shape, dim)]


def _are_offsets(value: Tensor, words: int) -> bool:
    """Whether these are where bags of words begin, as `nn.EmbeddingBag` takes them."""
    if value.dim() != 1 or value.dtype not in (torch.int32, torch.int64) or not 0 < len(value) < words:
        return False
    return bool((value[0] == 0) & (value[1:] >= value[:-1]).all() & (value[-1] <= words))


def _first_samples(
    args: tuple[Any, ...], kwargs: dict[str, Any], samples: int, dim: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def first(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        part = value
        if value.layout == torch.strided and value.dim() > 0:
            axis = dim_of_samples(value.shape, dim)
            part = value.narrow(axis, 0, min(2, samples)) if value.shape[axis] == samples else value
        return part.detach().clone()

    first_args, first_kwargs = tree_map(first, (args, kwargs))
    return first_args, first_kwargs


_APART = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
_WITHOUT_MEMORY = (FakeTensor, torch.fx.Proxy)


def _apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the model is traced, transformed, or run on tensors without memory: no pass to be recorded."""
    if torch._C._is_tracing() or _functorch.peek_interpreter_stack() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() > 0 and any(torch._C._get_dispatch_mode(key) is not None for key in _APART):
        return True
    values = args if not kwargs else (*args, *kwargs.values())
    if any(isinstance(value, Mapping | list | tuple) for value in values):
        values = tuple(tree_leaves(values))
    return any(isinstance(value, _WITHOUT_MEMORY) for value in values)


def _hooked(model: nn.Module) -> bool:
    """Whether a hook could look at an input before it is overwritten."""
    registered = torch.nn.modules.module
    if registered._global_forward_hooks or registered._global_forward_pre_hooks:
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---- probing while the model is compiled ---


def _fused_from(
    on_cpu: int, plan: Plan | None, args: tuple[Any, ...], kwargs: dict[str, Any], sample_dim: int
) -> float:
    """From how many bytes of an activation on passes over it are joined, in a forward pass that is not compiled."""
    inputs = tensors_of(args, kwargs)
    if all(tensor.device.type == "cpu" for tensor in inputs):
        return on_cpu
    largest = 0 if plan is None else plan.largest / max(plan.samples, 1) * _rows(inputs, sample_dim)
    return 0 if is_replayed() or largest >= GPU_BOUND_FROM_BYTES else NEVER


def _probe_while_compiling(taps: Taps, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Probe with inputs of the same shapes; the compiler, which cannot trace a probe, sees a constant."""
    positional = tuple([_described(value) for value in args])
    named = tuple([(name, _described(value)) for name, value in kwargs.items()])
    _probe_with_shapes(taps.key, positional, named)


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), value.dtype, value.device.type, value.device.index
    return "constant", value


def _probe_with_shapes(key: str, positional: tuple[Any, ...], named: tuple[Any, ...]) -> bool:
    taps = _handles[key]
    args = tuple(_made(description) for description in positional)
    kwargs = {name: _made(description) for name, description in named}
    with torch._dynamo.config.patch(disable=True), _undone(taps.model):
        compiling, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, False
    try:
        _run_in_both_modes(taps, args, kwargs)
    finally:
        torch.compiler._is_compiling_flag = compiling
    return True


# What torch.compiler.assume_constant_result does, which would import the compiler for all who import this.
_probe_with_shapes._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _made(description: Any) -> Any:
    kind, *rest = description
    if kind == "constant":
        return rest[0]
    shape, dtype, device, index = rest
    device = torch.device(device, index) if index is not None else torch.device(device)
    return (
        torch.randn(shape, device=device).to(dtype)
        if dtype.is_floating_point
        else torch.zeros(shape, dtype=dtype, device=device)
    )


# ---- observe ---


def observe(
    model: nn.Module,
    *,
    route: Route = "auto",
    activations: tuple[Any, ...] = (),
    sample_dim: int = 0,
    neuron_dim: int | Mapping[str, int] | None = None,
    sites: Sequence[str] = (),
    fuse_norms: bool = True,
    example: Any = None,
) -> Taps:
    """Attach taps to a model: the very object given, whose own code goes on to run.

    An observed model gives what the plain one gives: outputs, buffers, gradients and random state, bit for bit where no
    norm is fused (see `fuse_norms`). Saved with `torch.save` it is the plain model; a deep copy has taps of its own.
    Observe first, then wrap (`torch.compile`, DistributedDataParallel).

    Args:
        model: any module.
        route: what taps of spatial ReLUs record for the loss; the loss is the same. "grouped": the activation; the loss
            pools all of them together. "fused": its pooled rows `(N, C)`, taken by `moda_kernels.relu_pool` while the
            ReLU has the values at hand, so that the loss makes no pass over memory of its own. "auto": fused on the
            CPU, and on a GPU where activations are large (`GPU_BOUND_FROM_BYTES`) or the step is replayed. Other taps,
            and all inside `recording()`, record the activation: pooled rows cannot tell which neurons passed a
            threshold.
        activations: classes of modules and functions of your own that are activations too.
        sample_dim: the axis of the inputs along which samples lie; 1 for `(T, N, ...)`, as `nn.LSTM` and
            `nn.Transformer` take them unless they are told `batch_first=True`. Inputs of fewer axes have them first.
        neuron_dim: the axis of neurons, where the probe cannot find it; or axes by names of taps.
        sites: paths of modules whose outputs are tapped in place of activations, as methods act on them: convolutions,
            linear layers, norms.
        fuse_norms: let batch norm (in training mode) and the ReLU behind it be one operation, and the addition that may
            stand between them; also ReLU6, and, without an addition, Hardswish, SiLU and GELU. On the CPU from
            `NORMS_FUSED_FROM_BYTES` bytes of activation on, on a GPU as route "auto" says. That saves time and memory,
            and gives the plain model's numbers to the dtype's rounding; with False they are the same bit for bit. Route
            "grouped" never does it.
        example: an input to probe with at once: a tensor, a tuple of positional arguments or a dict of keyword
            arguments. Buffers and random state are put back. Without it, the first forward pass is the probe.

    Raises:
        TypeError: `model` is no module, or a wrapper (DataParallel, DistributedDataParallel, torch.compile).
        ValueError: `model` is observed already; an argument is not as above; or the example shows no activation.
    """
    _check_model(model)
    one_of(("grouped", "fused", "auto"))("route", route)
    _check_activations(activations)
    if not isinstance(sample_dim, int) or isinstance(sample_dim, bool) or sample_dim < 0:
        raise TypeError(f"sample_dim: expected an axis of the inputs, counted from 0, got {shown(sample_dim)}")
    _check_neuron_dim(neuron_dim)
    _check_sites(model, sites)
    check_flag(fuse_norms, "fuse_norms")
    taps = Taps(
        model,
        route=route,
        activations=tuple(activations),
        sample_dim=sample_dim,
        neuron_dim=neuron_dim,
        sites=tuple(sites),
        fuse_norms=fuse_norms,
    )
    _attach_taps(taps)
    if example is not None:
        with _removed_on_error(taps):
            _run_example(taps, example)
            if not taps._plan.taps:
                raise ValueError(nothing_tapped(taps.skipped))
    return taps


def accelerate(model: nn.Module, *, example: Any = None) -> Taps:
    """Let a model train faster: batch norm and the activation behind it become one operation, and nothing is recorded.

    The operation is `moda_kernels.norm_relu_pool`, with the addition that may stand between the two (as in ResNets). It
    is used in training mode, where activations are large (`observe` says how large) and the first forward pass showed
    that the norm feeds nothing but this activation (`observe` says which ones). Losses, gradients and running
    statistics are the plain model's to the dtype's rounding. Hooks on either module, control flow, evaluation,
    `torch.compile`, checkpoints and everything else that asks for the norm's result by itself get what PyTorch
    computes. An observed model needs no call of this: `moda.observe` does the same.

    Args:
        model: any module; the very object is changed, and its own code goes on to run.
        example: as for `observe`.

    Returns:
        A handle, whose `remove()` makes the model plain again; also a context manager.

    Raises:
        TypeError, ValueError: as for `observe`, but a model without activations is fine.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> with accelerate(model, example=torch.zeros(2, 3, 8, 8)):
        ...     loss = model(torch.ones(64, 3, 32, 32)).mean()
        ...     loss.backward()
    """
    _check_model(model)
    taps = _attach_taps(Taps(model, reading=False))
    if example is not None:
        with _removed_on_error(taps):
            _run_example(taps, example)
    return taps


def _attach_taps(taps: Taps) -> Taps:
    """Attach a new handle to its model."""
    taps._attach(taps.model, Root(taps))
    look_at(taps.known.functions, taps)
    return taps


@contextmanager
def _removed_on_error(taps: Taps) -> Iterator[None]:
    try:
        yield
    except BaseException:
        taps.remove()
        raise


def taps_of(model: nn.Module) -> Taps | None:
    """The handle of an observed model; None for a plain one."""
    part = part_of(model)
    handle = part.taps if isinstance(part, Root) else None
    return handle if isinstance(handle, Taps) else None


@contextmanager
def observing(
    model: nn.Module | Taps, taps: Taps | None = None, *, sites: Iterable[str] | None = None
) -> Iterator[Taps]:
    """The taps of a model inside this block; afterwards it is observed as it was before, or not at all.

    A wrapper of DistributedDataParallel or torch.compile is looked into. With `taps`, those that an earlier block made
    are used again.

    Args:
        model: any module, observed or not; or its taps.
        taps: made by an earlier block for the same model and sites.
        sites: names of taps, or paths of modules whose outputs are to be tapped. A model that is observed elsewhere is
            observed there instead inside this block. None for the taps that are there, or activations.

    Raises:
        TypeError: `model` is neither a module nor the taps of one.
    """
    inner = _inside(model)
    present = model if isinstance(model, Taps) else taps_of(inner)
    wanted = None if sites is None else _module_sites(inner, tuple(sites), present)
    if present is not None and (wanted is None or set(wanted) == present.known.sites):
        yield present
        return
    if present is not None:
        present._pause(keeping=True)
    try:
        if taps is None or taps.model is not inner or (wanted is not None and set(wanted) != taps.known.sites):
            taps = observe(inner, route="grouped", sites=wanted or ())
            taps.lasting = False
            taps.example = None if present is None else present.example
        else:
            taps._resume()
        try:
            yield taps
        finally:
            taps._pause()
    finally:
        if present is not None:
            present._resume()


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def _inside(model: Any) -> nn.Module:
    """The module that taps are attached to."""
    if isinstance(model, Taps):
        return model.model
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    inner: Any = model
    while True:
        compiler: Any = sys.modules.get("torch._dynamo")  # imported by whoever compiled anything
        if compiler is not None and isinstance(inner, compiler.OptimizedModule):
            inner = inner._orig_mod
        elif isinstance(inner, _WRAPPERS):
            inner = inner.module
        else:
            found: nn.Module = inner
            return found


def _module_sites(model: nn.Module, names: tuple[str, ...], present: Taps | None) -> tuple[str, ...]:
    """The names, where they are paths of modules that are not all activations; none where they are names of taps."""
    modules = dict(model.named_modules())
    if not names or not all(name in modules for name in names):
        return ()
    known = Known(() if present is None else present._own)
    return () if all(known.is_module(modules[name], name) for name in names) else names


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, _WRAPPERS):
        raise TypeError(
            f"model: is wrapped in {type(model).__name__}; observe the model inside it (before it is wrapped)"
        )
    present = taps_of(model)
    if present is not None and not present.reading:
        raise ValueError("model: is accelerated already; remove() that first (moda.observe fuses norms as well)")
    if present is not None:
        raise ValueError(
            "model: is observed already; use the handle that moda.observe gave "
            "(moda.observation.taps.taps_of(model) returns it), or remove() it first"
        )
    observed = next((path for path, module in model.named_modules() if part_of(module) is not None), None)
    if observed is not None:
        raise ValueError(f"model: its module {observed!r} is observed already; remove() those taps first")


def _check_sites(model: nn.Module, sites: Sequence[str]) -> None:
    if isinstance(sites, str):
        raise TypeError(f"sites: expected a sequence of module paths, got the string {shown(sites)}")
    if not isinstance(sites, Sequence) or not all(isinstance(site, str) for site in sites):
        raise TypeError(f"sites: expected a sequence of module paths, got {shown(sites)}")
    known = {path for path, _ in model.named_modules() if path}
    unknown = [site for site in sites if site not in known]
    if unknown:
        raise ValueError(f"sites: expected paths of modules of the model, got {unknown[0]!r}")


def _check_neuron_dim(neuron_dim: Any) -> None:
    values = list(neuron_dim.values()) if isinstance(neuron_dim, Mapping) else [neuron_dim]
    if neuron_dim is not None and not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        raise TypeError(f"neuron_dim: expected an axis, or axes by names of taps, got {shown(neuron_dim)}")


def _check_activations(activations: Any) -> None:
    if isinstance(activations, str) or not isinstance(activations, Sequence):
        raise TypeError(f"activations: expected classes of modules and functions, got {type(activations).__name__}")
    wrong = [each for each in activations if not callable(each)]
    if wrong:
        raise TypeError(f"activations: expected classes of modules and functions, got {shown(wrong[0])} among them")


def _run_example(taps: Taps, example: Any) -> None:
    """Probe with an example, in the model's mode and then in the other one; leave no trace."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        kwargs = dict(example)
    else:
        args = tuple(example) if isinstance(example, tuple | list) else (example,)
    if not tensors_of(args, kwargs):
        raise TypeError(
            "example: expected a tensor, a tuple of positional arguments or a dict of keyword arguments, got "
            f"{type(example).__name__}"
        )
    _run_in_both_modes(taps, args, kwargs)


def _run_in_both_modes(taps: Taps, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Probe in the model's mode and then in the other one, which its first forward pass will probe if that fails."""
    model = taps.model
    modes = {module: module.training for module in model.modules()}
    with _undone(model), torch.no_grad():
        model(*args, **kwargs)
    try:
        with _undone(model), torch.no_grad():
            model.train(not model.training)
            model(*args, **kwargs)
    except Exception:
        taps._run = None
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Afterwards buffers, attributes of modules and random numbers are what they were."""
    before = {module: (dict(module.__dict__), dict(module._buffers)) for module in model.modules()}
    values = {id(buffer): (buffer, buffer.detach().clone()) for buffer in model.buffers()}
    state = random.getstate()
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[device.index or 0 for device in devices]):
            yield
    finally:
        random.setstate(state)
        parts = {module: part_of(module) for module in before}
        for module, (attributes, buffers) in before.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)
            if isinstance(module._buffers, dict):  # those of a scripted module are never others
                module._buffers.clear()
                module._buffers.update(buffers)
            if parts[module] is not None:
                module.__dict__[PART] = parts[module]
        with torch.no_grad():
            for buffer, value in values.values():
                buffer.copy_(value)
