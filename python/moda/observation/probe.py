"""The first forward pass: which calls are activations, where their neurons are, and what happens to them later.

The model's own code runs, and gives what it would give; every call of a torch function is followed.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from moda.observation.activations import (
    FUNCTIONS,
    ActivationFunction,
    function_called,
    function_of,
    is_left_whole,
    plain_class,
)
from moda.observation.attached import Caller, Norm, Part, Root, Site, Whole, part_of
from moda.observation.deferred import hooks_on_saved_tensors, is_plain_norm
from moda.observation.handle import Handle
from moda.observation.labels import SEQUENCES, Node, Ref, fold_of, map_refs
from moda.observation.layout import Layout
from moda.observation.names import unique_name
from moda.observation.plan import Plan, Tap
from moda.observation.record import version_of
from moda.observation.run import NEVER, Call, QuietMode, Run, any_global_hooks, has_hooks

_INDEX_ELEMENTS = 1 << 20  # tensors of integers up to this size are kept, for operations that index with them
# Producers of new memory: what only a ReLU reads of them, it may overwrite.
_MAKERS = frozenset((
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "batch_norm",
    "add", "__add__", "__radd__",
))  # fmt: skip
_ADDITIONS = frozenset(("add", "__add__", "__radd__", "__iadd__"))
_METADATA = frozenset((
    "size", "dim", "ndimension", "stride", "numel", "nelement", "is_contiguous", "is_floating_point", "__len__",
    "get_device", "element_size", "storage_offset", "is_complex", "type",
))  # fmt: skip


@dataclass
class _Found:
    """An activation call as far as it is known."""

    name: str
    layout: Layout
    width: int
    index: int
    function: str
    overwritten: bool = False
    spare: bool = False

    def tap(self) -> Tap:
        return Tap(self.name, self.index, self.width, self.layout, self.function, self.overwritten, self.spare)


class _NormResult:
    """The result of a batch norm, and whether its input has been left alone."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module = module  # that is the norm, or calls the function that is
        self._x = weakref.ref(x)
        self._version = x._version

    @property
    def input_is_intact(self) -> bool:
        """Whether nobody has overwritten the input so far; what is gone cannot be."""
        x = self._x()
        return x is None or x._version == self._version


@dataclass
class _Watched:
    """Memory that activations lie in, and how often it was overwritten so far, where that is known."""

    reference: StorageWeakRef
    version: int
    activations: list[_Found]


@dataclass(frozen=True)
class _Normed:
    """An activation behind a batch norm: the norm, axes of the activation, and what must have one reader each."""

    module: nn.Module
    dims: int
    read_once: tuple[Node, ...]


class Probe(Run):
    """A forward pass that is followed."""

    def __init__(self, taps: Handle, training: int, samples: int, inputs: list[Tensor], **purpose: Any) -> None:
        super().__init__(None, training, samples, **purpose)
        self.taps = taps
        self.watching = True
        self.paths = _paths(taps.model)
        self.found: list[_Found] = []
        self.largest = 0  # bytes of an activation
        self.skipped: dict[str, str] = {}
        self._names: set[str] = set()
        self._calls: dict[Site, list[_Found | None]] = {}
        self._stack: list[nn.Module] = [taps.model]
        self._nodes = WeakTensorKeyDictionary()
        self._memory: dict[int, _Watched] = {}
        self._spares: dict[int, tuple[StorageWeakRef, _Found]] = {}
        self._norms: dict[Node, _NormResult] = {}
        self._reads: dict[Node, int] = {}  # of results of norms, and of sums with them
        self._statistics = WeakTensorKeyDictionary()  # running ones, and the result of the norm that moved them on
        self._normed: list[_Normed] = []
        self._hooked = any_global_hooks()
        self._idle = False
        self._blind = torch.is_inference_mode_enabled()  # such tensors do not tell when they are overwritten
        for value in inputs:
            self._nodes[value] = Node.of_input(tuple(value.shape), samples, taps.sample_dim)

    # ---- running ---

    def conduct(self, forward: Callable[[], Any]) -> Any:
        """Run the forward pass; gives its output."""
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and asking would import the compiler
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for handle in (
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, always_call=True),
            ):
                stack.callback(handle.remove)
            self._attach_modules()
            stack.enter_context(_ProbeMode(self))
            return forward()

    def _attach_modules(self) -> None:
        known = self.taps.known
        for module, path in self.paths.items():
            if _own_part(module) is not None:
                continue
            if known.is_module(module, path):
                self.taps._attach(module, Site(self.taps, opaque=not _of_torch(module)))
            elif is_left_whole(module):
                self.taps._attach(module, Whole(self.taps))

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if module in self.paths:
            self._stack.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._stack[1:]:
            while self._stack.pop() is not module:
                pass
        if self._reads and has_hooks(module) and not is_plain_norm(module):  # hooks may keep what they see
            self._note_reads(tensors_of((args, output), {}))
        self._adopt(type(module).__name__, args, {}, output)

    def whole(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A module that is left whole has run: a layer with neurons, to the rest of the model."""
        self._adopt("multi_head_attention_forward", args, kwargs, output, anew=True)
        if isinstance(module, nn.TransformerEncoderLayer):
            name = unique_name(f"{self.paths.get(module, '')}.activation".lstrip("."), self._names)
            self.skipped[name] = (
                f"it is inside torch.nn.{plain_class(type(module)).__name__}, whose fused forward pass calls no "
                "activation function; torch.backends.mha.set_fastpath_enabled(False), called before the model is "
                "observed, opens it"
            )

    # ---- calls of activations ---

    def call_module(self, site: Site, module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: Any) -> Any:
        """An activation module is called."""
        function = function_of(module)
        inplace = bool(getattr(module, "inplace", False))
        path = self.paths.get(module, "")
        return self._activation(site, path, call, args, kwargs, function, inplace, self._hooked or has_hooks(module))

    def call_function(
        self, function: Call, known: ActivationFunction, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A function of torch is called that is an activation."""
        module = self._stack[-1]
        path = ".".join(filter(None, (self.paths[module], known.name)))
        caller = _own_part(module)
        if not isinstance(caller, Caller):
            caller = Caller(self.taps)
            self.taps._attach(module, caller)
        site = caller.functions.setdefault(known.name, Site(self.taps))
        inplace = known.overwrites(args, kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.follow(function, args, kwargs)

        return self._activation(site, path, call, args, kwargs, function_called(known.name, kwargs), inplace)

    def _activation(
        self,
        site: Site,
        path: str,
        call: Call,
        args: tuple[Any, ...],
        kwargs: Any,
        computed: str,
        inplace: bool,
        hooked: bool = False,
    ) -> Any:
        name = unique_name(path, self._names)
        calls = self._calls.setdefault(site, [])
        relu = computed == "relu"
        if computed and not hooked and args and isinstance(args[0], Tensor):
            self._note_normed(args[0])
        if relu and not hooked and args and isinstance(args[0], Tensor):
            found = self._fused_at_once(name, args[0])
            if found is not None:
                calls.append(found)
                return self._pooling(found, args[0], inplace)
        copied = self.changes and inplace and bool(args)
        with self._resting():
            given = (args[0].clone(), *args[1:]) if copied else args
        if copied and args[0] in self._nodes:
            self._nodes[given[0]] = self._nodes[args[0]]
        inside, self.inside = self.inside, True
        try:
            value = call(*given, **kwargs)
        finally:
            self.inside = inside
        found = self._found(name, value, computed)
        calls.append(found)
        if found is not None:
            if relu and not inplace and args and isinstance(args[0], Tensor):
                with self._resting():
                    self._note_spare(args[0], found)
            value = self._delivered(found, value)
        if copied:
            with self._resting():
                args[0].copy_(value)
            self._nodes[args[0]] = self._nodes.get(value)
            return args[0]
        return value

    def _fused_at_once(self, name: str, x: Tensor) -> _Found | None:
        """The tap of a ReLU of `x`, if this pass pools as later ones will: numbers then do not depend on the pass."""
        if self.record is None or self.fuse_from == NEVER:
            return None
        layout = self._unwatched_layout(name, x)
        if isinstance(layout, str):
            return None
        found = self._new(name, layout, x, "relu")
        with self._resting():
            fuses = self._fuses(found.tap(), x)
        if not fuses:
            return None
        self.found.append(found)
        return found

    def _pooling(self, found: _Found, x: Tensor, inplace: bool) -> Tensor:
        ref = self._ref(x)
        self._note_reads([x])
        with self._resting():
            y = self._fused(found.tap(), x, inplace)
        self._nodes[y] = Node(torch.relu, "relu", (ref,), {}, tuple(y.shape))
        self._watch(found, y)
        if inplace:
            self._note_overwritten(x, but=found)
        return y

    def _delivered(self, found: _Found, value: Tensor) -> Tensor:
        node = self._nodes.get(value)
        found.overwritten = True  # for all that is known, from here on
        with self._resting():
            delivered: Tensor = self.deliver(found.tap(), value)
        found.overwritten = False
        if delivered is not value and node is not None:
            self._nodes[delivered] = node
        self._watch(found, delivered)
        return delivered

    def _watch(self, found: _Found, value: Tensor) -> None:
        """Notice from here on when the memory of an activation is overwritten."""
        key, reference = _memory(value)
        known = self._memory.get(key)
        if known is None or known.reference.expired():
            known = self._memory[key] = _Watched(reference, 0, [])
        known.version = version_of(value)
        known.activations.append(found)

    @contextmanager
    def _resting(self) -> Iterator[None]:
        before, self._idle = self._idle, True
        try:
            yield
        finally:
            self._idle = before

    def _found(self, name: str, value: Any, function: str) -> _Found | None:
        layout = self._unwatched_layout(name, value)
        if isinstance(layout, str):
            self.skipped[name] = layout
            return None
        found = self._new(name, layout, value, function)
        self.found.append(found)
        return found

    def _new(self, name: str, layout: Layout, value: Tensor, function: str) -> _Found:
        self.largest = max(self.largest, value.numel() * value.element_size())
        return _Found(name, layout, value.shape[layout.neurons], len(self.found), function)

    def _unwatched_layout(self, name: str, value: Any) -> Layout | str:
        """As `_layout`, whose own operations are none of the model's."""
        with torch._C.DisableTorchFunction():
            return self._layout(name, value)

    def _layout(self, name: str, value: Any) -> Layout | str:
        """Where samples and neurons are, or why that is not known."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return "what it gives is no tensor of real numbers"
        dims = value.dim()
        if dims < 2:
            return f"what it gives has {dims} axes; samples and neurons take two"
        node = self._nodes.get(value)
        label = None if node is None else node.label("samples")
        rows = fold_of(label, self.samples)
        if self.samples == 0 and value.shape[0] == 0:
            axis, folded, outermost = 0, False, True
        elif label is None or rows is None:
            return "its rows are not known to belong to the samples of the input (it may be made of parameters alone)"
        else:
            axis, (folded, outermost) = label.axis, rows
        neurons = self._neurons(name, node, dims, axis)
        if neurons is None:
            return f"which of its axes holds neurons is not known; pass neuron_dim={{{name!r}: axis}}"
        if neurons == axis:
            return "its samples and its neurons are along the same axis"
        return Layout(dims, axis, neurons, folded, outermost)

    def _neurons(self, name: str, node: Node | None, dims: int, samples: int) -> int | None:
        told = self.taps.neuron_dim
        if isinstance(told, Mapping) and name in told:
            return int(told[name]) % dims
        label = None if node is None else node.label("neurons")
        if label is not None and label.axis != samples:
            return label.axis
        if dims == 2:
            return 1 - samples
        return int(told) % dims if isinstance(told, int) else None

    # ---- what is overwritten, and what may be ---

    def _note_spare(self, x: Tensor, found: _Found) -> None:
        node = self._nodes.get(x)
        if node is None or node.name not in _MAKERS or x._base is not None or isinstance(x, nn.Parameter):
            return
        key, reference = _memory(x)
        if x.untyped_storage().nbytes() == x.numel() * x.element_size():
            self._spares[key] = (reference, found)

    def _note_uses(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            key = _memory_key(tensor)
            if key is not None:
                self._spares.pop(key, None)

    def _note_overwritten(self, tensor: Tensor, but: _Found | None = None) -> None:
        known = self._watched(tensor)
        if known is not None and not known.reference.expired():
            known.version = max(known.version, version_of(tensor))
            for found in known.activations:
                found.overwritten = found.overwritten or found is not but

    def _note_version(self, tensor: Tensor, version: int) -> None:
        """An operation is given a tensor: one that nobody saw may have overwritten it before."""
        known = self._watched(tensor)
        if known is not None and version > known.version:
            self._note_overwritten(tensor)

    def _watched(self, tensor: Tensor) -> _Watched | None:
        key = _memory_key(tensor)
        return None if key is None else self._memory.get(key)

    # ---- norms that feed an activation ---

    def _note_norm(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A batch norm gave the result that `node` stands for."""
        if args and isinstance(args[0], Tensor) and not args[0].is_inference():
            self._norms[node] = _NormResult(self._stack[-1], args[0])
            self._reads[node] = 0
            for buffer in (*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")):
                if isinstance(buffer, Tensor):
                    self._statistics[buffer] = node

    def _note_sum(self, node: Node) -> None:
        """An addition gave the result that `node` stands for."""
        if any(isinstance(ref, Ref) and ref.node in self._norms for ref in node.args):
            self._reads[node] = 0

    def _note_reads(self, tensors: list[Tensor]) -> None:
        for node in [self._nodes.get(tensor) for tensor in tensors]:
            if node in self._reads:
                self._reads[node] += 1
        for node in [self._statistics.get(tensor) for tensor in tensors]:
            if node is not None and all(node not in normed.read_once for normed in self._normed):
                self._reads[node] += 1  # the activation, which would bring in the batch, comes too late

    def _note_normed(self, x: Tensor) -> None:
        """An activation without hooks is called with `x`: note the norm that it may be computed with."""
        node = self._nodes.get(x)
        if node is None or torch.is_grad_enabled() != self.gradients or hooks_on_saved_tensors():
            return
        total = node.name in _ADDITIONS and len(node.args) == 2 and not node.kwargs
        sources = [ref.node for ref in node.args if isinstance(ref, Ref)] if total else [node]
        if total and (len(sources) != 2 or len({ref.shape for ref in node.args}) != 1 or sources[0] is sources[1]):
            return
        for source in sources:
            found = None if source is None else self._norms.get(source)
            if found is not None and source is not None and found.input_is_intact:
                self._normed.append(_Normed(found.module, x.dim(), (source, node) if total else (source,)))
                return

    def _attach_norms(self) -> None:
        """Let the norms whose results an activation alone reads leave them to it; of modules that are called once."""
        calls = [found.module for found in self._norms.values()]
        fusible: dict[nn.Module, int] = {}
        for normed in self._normed:
            once = sum(module is normed.module for module in calls) == 1
            if once and all(self._reads[node] == 1 for node in normed.read_once):
                fusible[normed.module] = normed.dims
        as_functions = not all(is_plain_norm(module) for module in fusible)
        for module in self.paths:
            part = self._norm_part(module, module in fusible)
            if as_functions and part is None and module in calls and _own_part(module) is None:
                self.taps._attach(module, Norm(self.taps))  # what it calls is not taken for its parent's
            if part is not None:
                part.dims[self.training] = fusible.get(module, 0)

    def _norm_part(self, module: nn.Module, fusible: bool) -> Norm | None:
        """The part of a module that is a norm or calls one; it is attached if there is none yet and it is fusible."""
        part = _own_part(module)
        if part is None and fusible:
            part = Norm(self.taps) if is_plain_norm(module) else Caller(self.taps)
            self.taps._attach(module, part)
        if isinstance(part, Caller) and part.norm is None and fusible:
            part.norm = Norm(self.taps)
        return part.norm if isinstance(part, Caller) else part if isinstance(part, Norm) else None

    # ---- following ---

    def follow(self, function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of torch, and note what it gives."""
        name = _name(function)
        asked = name in _METADATA or name in _PROPERTIES
        tensors = list(_tensors(args)) + (list(_tensors(tuple(kwargs.values()))) if kwargs else [])
        if any(map(is_lazy, tensors)):  # a parameter that is about to be made
            return function(*args, **kwargs)
        before = [] if asked else [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]
        for tensor, version in before if self._memory else ():
            self._note_version(tensor, version)
        output = function(*args, **kwargs)
        if asked and not isinstance(output, Tensor):
            return output
        if name not in _METADATA:
            if self._spares:
                self._note_uses(tensors)
            if self._reads:
                self._note_reads(tensors)
        for tensor, version in before:
            if tensor._version != version:
                self._note_overwritten(tensor)
        if isinstance(output, Tensor):
            node = Node(function, name, self._refs(args), self._refs(kwargs), tuple(output.shape))
            self._nodes[output] = node
            if name == "batch_norm":
                self._note_norm(node, args, kwargs)
            elif name in _ADDITIONS:
                self._note_sum(node)
        elif isinstance(output, tuple | list) and not isinstance(output, torch.Size):
            refs, named = self._refs(args), self._refs(kwargs)
            for index, item in enumerate(output):
                if isinstance(item, Tensor):
                    self._nodes[item] = Node(function, name, refs, named, tuple(item.shape), index)
        return output

    def _refs(self, value: Any) -> Any:
        return map_refs(value, self._ref, Tensor)

    def _ref(self, tensor: Tensor) -> Ref:
        indexing = not tensor.is_floating_point() and tensor.numel() <= _INDEX_ELEMENTS
        return Ref(self._nodes.get(tensor), tuple(tensor.shape), tensor.detach() if indexing else None)

    def _adopt(self, name: str, args: Any, kwargs: Any, output: Any, *, anew: bool = False) -> None:
        """Take results that came about unseen for those of an operation; `anew` also those of other ones inside it."""
        for index, item in enumerate(output if isinstance(output, tuple | list) else (output,)):
            if isinstance(item, Tensor) and (anew or item not in self._nodes):
                node = Node(_unseen, name, self._refs(tuple(args)), self._refs(kwargs), tuple(item.shape), index)
                self._nodes[item] = node

    # ---- the end ---

    def finish(self, output: Any) -> None:
        """Make the plan of what was found."""
        for found in self.found if self._blind else ():
            found.overwritten = True
        outputs = tensors_of((output,), {})
        for tensor in outputs:
            self._note_version(tensor, version_of(tensor))
        self._note_reads(outputs)
        for reference, found in self._spares.values():
            found.spare = reference.expired()
        if self.taps.joins_norms:
            self._attach_norms()
        taps = tuple(found.tap() for found in self.found)
        for site, calls in self._calls.items():
            site.plan(self.training, tuple(None if call is None else taps[call.index] for call in calls))
        repeated = tuple(site for site, calls in self._calls.items() if len(calls) > 1)
        folded = any(tap.layout.folded for tap in taps)
        self.taps._learn(self.training, Plan(taps, dict(self.skipped), repeated, self.samples, folded, self.largest))


class _ProbeMode(QuietMode):
    def __init__(self, probe: Probe) -> None:
        self.probe = weakref.proxy(probe)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        probe = self.probe
        kwargs = kwargs or {}
        if probe._idle or _functorch.peek_interpreter_stack() is not None:  # inside vmap and the like nothing is known
            return func(*args, **kwargs)
        known = FUNCTIONS.get(func)
        if known is not None and not probe.inside and not probe.taps.known.sites:
            return probe.call_function(func, known, args, kwargs)
        return probe.follow(func, args, kwargs)


_PROPERTIES = frozenset((
    "shape", "device", "dtype", "requires_grad", "ndim", "layout", "is_cuda", "grad_fn", "is_leaf", "_version",
    "is_sparse", "is_quantized", "is_meta", "names", "output_nr", "_base", "itemsize", "nbytes", "is_cpu", "is_mps",
    "is_nested", "is_mkldnn", "name", "_backward_hooks", "retains_grad",
))  # fmt: skip


def _unseen(*_args: Any, **_kwargs: Any) -> None:
    """Stands for an operation that was not seen."""


@lru_cache(1024)
def _name(function: Any) -> str:
    name: str = getattr(function, "__name__", "").partition(".")[0]  # of an operator, `conv2d.default`
    if name == "__get__":
        return str(getattr(function.__self__, "__name__", ""))
    return name if name.startswith("__") else name.rstrip("_").removeprefix("_") or name


def _tensors(value: Any) -> Iterator[Tensor]:
    for item in value:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, SEQUENCES):
            yield from _tensors(item)


def _memory_key(tensor: Tensor) -> int | None:
    """What tells the tensor's memory from others'; None for a tensor, as sparse ones are, that has several."""
    return tensor.untyped_storage()._cdata if torch._C._has_storage(tensor) else None


def _memory(tensor: Tensor) -> tuple[int, StorageWeakRef]:
    storage = tensor.untyped_storage()
    return storage._cdata, StorageWeakRef(storage)


def _paths(model: nn.Module) -> dict[nn.Module, str]:
    return {module: path for path, module in model.named_modules()}


def _own_part(module: nn.Module) -> Part | None:
    part = part_of(module)
    return part.inner if isinstance(part, Root) else part


def _of_torch(module: nn.Module) -> bool:
    return plain_class(type(module)).__module__.startswith("torch.")


def tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """All tensors that a model is given."""
    if not kwargs and all(isinstance(value, Tensor) for value in args):  # so at most forward passes
        return list(args)
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


__all__ = ["Probe", "tensors_of"]
