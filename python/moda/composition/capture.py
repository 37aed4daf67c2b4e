"""The graph of a model that torch.export makes, as composition reads it: ATen operations without side effects.

`capture(model, example)` exports the model as it is (in its own train or eval mode) with a marker at every tap.
Afterwards blocks under `no_grad` and `autocast` are part of the one graph, values that the model overwrites in place
are values of their own, and parameters and buffers are leaves named as in the model's state_dict.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from moda.composition.composed import parameters_of
from moda.composition.conditions import is_readable, leaves_free
from moda.composition.einsum import write_out
from moda.composition.functional import UnfollowedError, make_functional, writes
from moda.composition.sizes import set_sizes
from moda.composition.values import is_free, shape_of
from moda.structure import Structure, flatten, flatten_output

__all__ = ["CaptureError", "Captured", "Example", "capture"]

INPUT = "input"


class CaptureError(ValueError):
    """A model that cannot be exported; the message says why, and where in the model."""


@dataclass(frozen=True)
class Example:
    """What a model is called with.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Any) -> Example:
        """An example as users give it: one tensor, a tuple of positional arguments, or a dict of keyword arguments."""
        if isinstance(given, Example):
            return given
        if isinstance(given, Mapping):
            return cls((), dict(given))
        return cls(tuple(given) if isinstance(given, tuple) else (given,))

    def flat(self) -> tuple[Structure, list[Tensor]]:
        """Its structure and its tensors."""
        return flatten((list(self.args), dict(self.kwargs)), "example")


@dataclass(frozen=True)
class Captured:
    """A model's graph.

    Attributes:
        graph: placeholders are the input tensors in order; `get_attr` nodes are parameters, buffers and constants; the
            output is a flat list. `node.meta["val"]` is a fake tensor, `node.meta["where"]` a line of the model.
        inputs: how the inputs are nested.
        outputs: how the outputs are nested.
        constants: tensors that the graph holds besides the model's own, by name.
        training: the mode the model was in.
        fixed: per input tensor its size where that is part of the graph, None where it may be any.
        conditions: on those that may be any, see `moda.composition.conditions`.
        freedom: which sizes torch.export was told to leave free, a place in `FREEDOMS`.
    """

    graph: fx.Graph
    inputs: Structure
    outputs: Structure
    constants: dict[str, Tensor]
    training: bool
    fixed: tuple[tuple[int | None, ...], ...]
    conditions: tuple[str, ...] = ()
    freedom: int = 0


class _Seen:
    """What a forward pass gave. (torch.export undoes what a module notes in its own attributes.)"""

    outputs: Structure | None = None


class _Flat(nn.Module):
    """A model whose inputs and outputs are flat."""

    def __init__(self, model: nn.Module, inputs: Structure) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.inputs = inputs
        self.seen = _Seen()

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        args, kwargs = self.inputs.rebuild(iter(inputs))
        self.seen.outputs, tensors = flatten_output(self.model(*args, **kwargs))
        return tensors


def capture(
    model: nn.Module,
    example: Example,
    marking: Callable[[], AbstractContextManager[Any]] = nullcontext,
    freedom: int = 0,
) -> Captured:
    """Export `model` in the mode it is in, calling it with `example`; buffers and random state stay as they are.

    Args:
        model: any module.
        example: at least two samples, so that the number of samples stays free.
        marking: gives a context in which taps put markers into the graph.
        freedom: the first of `FREEDOMS` to try: what did not work in one mode is not tried again in the other.

    Raises:
        CaptureError: torch.export cannot follow the model; the message has its reason and the line.
        TypeError: inputs or outputs hold something else than tensors and plain constants.
    """
    inputs, tensors = example.flat()
    flat = _Flat(model, inputs)
    reasons: list[Exception] = []
    with marking(), _exportable(model):
        for number in range(freedom, len(FREEDOMS)):
            try:
                captured = _captured(flat, tensors, number)
            except (KeyboardInterrupt, MemoryError, CaptureError):
                raise
            except Exception as error:  # torch.export raises whatever the model and its own parts raise
                reasons.append(error)
                continue
            if captured is not None:
                return captured
    raise CaptureError(_why(model, reasons[-1])) from reasons[-1]


FREEDOMS = ("all", "samples", "none")
"""Sizes of inputs that are tried to be left free, in this order."""


def _free_sizes(tensors: Sequence[Tensor], freedom: int) -> tuple[dict[int, Any], ...] | None:
    automatic = torch.export.Dim.AUTO
    if FREEDOMS[freedom] == "all":
        return tuple({dim: automatic for dim in range(x.dim()) if x.shape[dim] > 1} for x in tensors)
    if FREEDOMS[freedom] == "samples":
        return tuple({0: automatic} if x.dim() and x.shape[0] > 1 else {} for x in tensors)
    return None


def _captured(flat: _Flat, tensors: Sequence[Tensor], freedom: int) -> Captured | None:
    """With these sizes left free; None if the conditions on them cannot be checked."""
    model = flat.model
    program = _run_export(flat, tensors, _free_sizes(tensors, freedom))
    conditions = _conditions(program, tensors)
    if conditions is None:
        return None
    outputs = flat.seen.outputs
    if outputs is None:
        raise CaptureError("model: torch.export did not run it")
    graph, constants = _inlined(program, model)
    _remove_unused(graph)
    _check(graph, model, set_sizes(graph, {**parameters_of(model), **constants}, tensors, conditions))
    make_functional(graph)
    write_out(graph)
    return Captured(graph, flat.inputs, outputs, constants, model.training, _fixed_sizes(graph), conditions, freedom)


def _conditions(program: torch.export.ExportedProgram, tensors: Sequence[Tensor]) -> tuple[str, ...] | None:
    """What sizes must meet for the graph to hold; None if that cannot be checked."""
    guards = [guard for guard in getattr(program, "_guards_code", []) if not _FIXED_SIZE.fullmatch(guard)]
    sizes = [tuple(x.shape) for x in tensors]
    if not all(is_readable(guard, sizes) for guard in guards):
        return None
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"][-len(sizes) :] if sizes else []
    free = [[is_free(node, dim) for dim in range(len(shape))] for node, shape in zip(inputs, sizes, strict=True)]
    return tuple(guards) if leaves_free(guards, sizes, free) else None


_FIXED_SIZE = re.compile(r"L\['inputs'\]\[\d+\]\.size\(\)\[\d+\] == \d+")


def _run_export(
    flat: _Flat, tensors: Sequence[Tensor], sizes: tuple[dict[int, Any], ...] | None
) -> torch.export.ExportedProgram:
    shapes = None if sizes is None else {"inputs": sizes}
    buffers = {name: buffer.clone() for name, buffer in flat.named_buffers()}
    with _quiet(), torch.random.fork_rng(devices=[]):
        program = torch.export.export(flat, tuple(tensors), dynamic_shapes=shapes, strict=False)
    for name, buffer in flat.named_buffers():  # exporting runs on fakes; a buffer that was written to is put back
        if buffer is not None and name in buffers and not _same(buffer, buffers[name]):
            buffer.copy_(buffers[name])
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its attempts; the last one's reason is in the error."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.device.type == "meta" or torch.equal(one, other)


def _why(model: nn.Module, error: Exception) -> str:
    if isinstance(error, UnfollowedError):
        return str(error)
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    first = re.split(r" For more information| \(Size-like symbols| Caused by:", text)[0][:300]
    place = _line_of(error)
    return (
        f"model: {type(model).__name__} cannot be exported in {'train' if model.training else 'eval'} mode"
        f"{f', because of {place}' if place else ''}: {type(error).__name__}: {first}; torch.export follows a forward "
        "pass whose Python control flow does not depend on the values of tensors: rewrite that line with torch "
        "operations (torch.where), or use moda.mask"
    )


def _line_of(error: BaseException | None) -> str:
    """The innermost line of the user's own code in a traceback, or in that of what caused it."""
    while error is not None:
        frames = [
            frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_OWN)
        ]
        if frames:
            return f"{frames[-1].filename}:{frames[-1].lineno} ({(frames[-1].line or '').strip()})"
        error = error.__cause__ or error.__context__
    return ""


_NOT_OWN = (
    *(str(Path(module.__file__ or "").parent) for module in (torch, contextlib)),
    *(str(Path(__file__).parents[1] / part) for part in ("composition", "observation")),
    "<",
)
"""Where code lies that is not the user's: PyTorch, Python's library, this package's taps, generated code."""


# ---- scripted submodules are run by their operations -----------------------------------------------------------


class _Scripted(nn.Module):
    """Calls a scripted module outside of the tracer's own calls of modules, which do not fit it."""

    def __init__(self, scripted: torch.jit.ScriptModule) -> None:
        super().__init__()
        for name, parameter in scripted.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in scripted.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        for name, child in scripted.named_children():
            self.add_module(name, child)
        object.__setattr__(self, "_scripted", scripted)
        self.training = scripted.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        scripted: Any = object.__getattribute__(self, "_scripted")
        return scripted._c.forward(*args, **kwargs) if hasattr(scripted, "_c") else scripted.forward(*args, **kwargs)


def _eager_scripts() -> AbstractContextManager[Any]:
    """Scripts run operation by operation, so that their gradients and free sizes are kept."""
    jit: Any = torch.jit
    context: AbstractContextManager[Any] = jit.optimized_execution(False)
    return context


@contextmanager
def _exportable(model: nn.Module) -> Iterator[None]:
    """With what torch.export cannot call, or would take for a number, replaced for a while."""
    with _eager_scripts(), ExitStack() as undo:
        _let_len_follow(model, undo)
        for parent in list(model.modules()):
            if isinstance(parent, torch.jit.ScriptModule):
                continue
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.jit.ScriptModule):
                    parent._modules[name] = _Scripted(child)
                    undo.callback(parent._modules.__setitem__, name, child)
        yield


def _let_len_follow(model: nn.Module, undo: ExitStack) -> None:
    """Let `len(x)` in the model's own code give a size that follows the input, where Python's gives a number."""
    names = {type(module).__module__ for module in model.modules()}
    for name in names:
        own = vars(sys.modules[name]) if name in sys.modules and not name.startswith("torch.") else None
        if own is not None and "len" not in own:
            own["len"] = _size_or_len
            undo.callback(own.pop, "len")


def _size_or_len(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else len(value)


# ---- one graph ------------------------------------------------------------------------------------------------


def _inlined(program: torch.export.ExportedProgram, model: nn.Module) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The program's graph with blocks inlined, inputs as placeholders and all other tensors as leaves."""
    signature = program.graph_signature
    states = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    own = _names(model)
    home = "_constants"
    while any(name.startswith(f"{home}.") for name in own.values()):
        home += "_"
    graph, constants = fx.Graph(), dict[str, Tensor]()
    leaves: dict[str, fx.Node] = {}
    values: dict[fx.Node, Any] = {}
    user_inputs = 0
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in {**states, **lifted}:
            name = states.get(node.name) or lifted[node.name]
            tensor = _tensor(program, name)
            known = own.get(id(tensor))
            if known is None:
                known = f"{home}.{len(constants)}_{'train' if model.training else 'eval'}"
                constants[known] = tensor.detach().clone()
            if known not in leaves:
                leaves[known] = graph.create_node("get_attr", known)
                leaves[known].meta["val"] = node.meta["val"]
            values[node] = leaves[known]
        elif node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
            values[node] = graph.placeholder(f"{INPUT}_{user_inputs}")
            values[node].meta["val"] = node.meta["val"]
            user_inputs += 1
        elif node.op == "placeholder":
            values[node] = node.meta.get("val")
    graph.output(list(_copy_nodes(program.graph, program.graph_module, graph, values, {})))
    return graph, constants


def _names(model: nn.Module) -> dict[int, str]:
    """The first name of every parameter and buffer, by its identity."""
    names: dict[int, str] = {}
    tensors = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in (pair for group in tensors for pair in group):
        names.setdefault(id(tensor), name)
    return names


def _tensor(program: torch.export.ExportedProgram, name: str) -> Tensor:
    held = program.state_dict.get(name)
    found: Tensor = held if held is not None else program.constants[name]
    return found


def _copy_nodes(
    source: fx.Graph, module: nn.Module, graph: fx.Graph, values: dict[fx.Node, Any], context: Mapping[str, Any]
) -> Any:
    """Copy calls into `graph`; returns what the source graph gives out."""
    result: Any = None
    for node in source.nodes:
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(module)
        elif node.op == "call_function":
            values[node] = _copy_call(node, graph, values, context)
        elif node.op == "output":
            result = _mapped(node.args[0], values)
    return result


def _copy_call(node: fx.Node, graph: fx.Graph, values: dict[fx.Node, Any], context: Mapping[str, Any]) -> Any:
    target: Any = node.target
    name = getattr(target, "__name__", "")
    if name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
        return _copy_block(node, graph, values, context, name)
    if target in _ASSERTIONS:
        return None
    args, kwargs = _mapped(node.args, values), _mapped(node.kwargs, values)
    if getattr(target, "__name__", "") == "getitem" and isinstance(args[0], list | tuple):
        return args[0][args[1]]
    if target in _SHAPED_AS:
        target, args = _SHAPED_AS[target], (args[0], _sizes_of(args[1], graph))
    made = graph.create_node("call_function", target, args, kwargs)
    made.meta = {"val": node.meta.get("val"), "where": where(node), "path": _path(node)}
    if "autocast" in context:
        made.meta["autocast"] = context["autocast"]
    return made


_ASSERTIONS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten.sym_constrain_range_for_size.default,
    torch.ops.aten.sym_constrain_range.default,
}


_SHAPED_AS = {
    torch.ops.aten.reshape_as.default: torch.ops.aten.reshape.default,
    torch.ops.aten.view_as.default: torch.ops.aten.view.default,
    torch.ops.aten.expand_as.default: torch.ops.aten.expand.default,
}
"""Calls that take a shape from another tensor, whose values they do not need."""


def _sizes_of(value: fx.Node, graph: fx.Graph) -> list[Any]:
    """The shape of a value as numbers, and calls that give those that follow the input."""
    sizes: list[Any] = []
    for dim, size in enumerate(value.meta["val"].shape):
        if not isinstance(size, int):
            call = graph.call_function(torch.ops.aten.sym_size.int, (value, dim))
            call.meta = {"val": size, "where": "", "path": ""}
            size = call
        sizes.append(size)
    return sizes


def _mapped(argument: Any, values: Mapping[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return values[argument]
    if isinstance(argument, list | tuple):
        return type(argument)(_mapped(item, values) for item in argument)
    if isinstance(argument, Mapping):
        return {key: _mapped(item, values) for key, item in argument.items()}
    return argument


def _copy_block(
    node: fx.Node, graph: fx.Graph, values: dict[fx.Node, Any], context: Mapping[str, Any], name: str
) -> Any:
    """A block under `no_grad` (its inputs are detached) or `autocast` (its calls are made under it)."""
    if name == "wrap_with_set_grad_enabled":
        enabled, (block, *inputs) = node.args[0], node.args[1:]
        inner = context
        given = [values[value] if isinstance(value, fx.Node) else value for value in inputs]
        if not enabled:
            given = [_detached(graph, value) for value in given]
    else:
        (device, dtype, on, cache), (block, *inputs) = node.args[:4], node.args[4:]
        inner = {**context, "autocast": (device, dtype, on, cache)}
        given = [values[value] if isinstance(value, fx.Node) else value for value in inputs]
    submodule: Any = values[block]  # type: ignore[index]
    holders = [n for n in submodule.graph.nodes if n.op == "placeholder"]
    inside = dict(zip(holders, given, strict=True))
    return _copy_nodes(submodule.graph, submodule, graph, inside, inner)


def _remove_unused(graph: fx.Graph) -> None:
    """Take out what nobody reads, such as the numbers that an assertion compares."""
    for node in reversed(graph.nodes):
        unused = node.op == "call_function" and not node.users and not writes(node)
        if unused and not getattr(node.target, "__name__", "").startswith(("batch_norm", "instance_norm")):
            graph.erase_node(node)


def _check(graph: fx.Graph, model: nn.Module, unknown: Sequence[fx.Node]) -> None:
    """Refuse what cannot be planned: sizes that are not known, and calls that are no operations."""
    for node in unknown:
        raise CaptureError(
            f"model: {type(model).__name__}: {node.meta.get('where') or node}: a size depends on the values of a "
            "tensor; write it with a fixed size (torch.where, a product with a mask)"
        )
    for node in graph.nodes:
        plain = isinstance(node.target, torch._ops.OpOverload | str) or getattr(node.target, "__module__", "") in (
            "_operator", "torch", "math", "builtins",
        )  # fmt: skip
        if not plain or getattr(node.target, "__name__", "").startswith("_add_batch_dim"):
            raise CaptureError(
                f"model: {type(model).__name__}: {node.meta.get('where') or node}: calls {node.target}, which is no "
                "operation that composition can read (vmap and other transforms are not)"
            )


def _detached(graph: fx.Graph, value: Any) -> Any:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
        return value
    made = graph.call_function(torch.ops.aten.detach.default, (value,))
    made.meta = {"val": value.meta["val"].detach(), "where": value.meta.get("where", ""), "path": ""}
    return made


def where(node: fx.Node) -> str:
    """The innermost line of the user's own code that made a node."""
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    places = [index for index, line in enumerate(trace) if line.startswith("File ")]
    if not places:
        return ""
    own = [index for index in places if "/torch/" not in trace[index]] or places
    return " ".join(trace[own[-1] : own[-1] + 2])


def _path(node: fx.Node) -> str:
    """Path of the module whose code made a node."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    path = str(entries[-1][0]) if entries else ""
    return path.removeprefix("L['self'].").removeprefix("model").removeprefix(".")


def _fixed_sizes(graph: fx.Graph) -> tuple[tuple[int | None, ...], ...]:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return tuple(
        tuple(None if is_free(node, dim) else size for dim, size in enumerate(shape_of(node))) for node in inputs
    )
