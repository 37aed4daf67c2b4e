"""Observe the activations of a model: a tap behind every call of an activation function.

`instrument(model)` traces the model with `torch.fx`: modules of `torch.nn` stay whole, modules of the user's
are traced through. The result has the same parameters, buffers, submodules and state_dict keys (the very same
objects, not copies) and computes the same outputs; its taps live under `_taps.<i>` and own no state.

*What is tapped.* Every call of a hidden activation of the rectifier family: ReLU, ReLU6, LeakyReLU, PReLU,
RReLU, ELU, SELU, CELU, GELU, SiLU, Mish, Hardswish, Softplus, as a module (also one module called twice), a
function of `torch` or `torch.nn.functional`, or a tensor method, in place or not. Gates and squashing functions
(Sigmoid, Hardsigmoid, Tanh, Softmax) are no taps: what they put out are weights, not neurons that fire. Nor is
arithmetic that happens to rectify (`x.clamp(min=0)`, `x * torch.sigmoid(x)`).

*Names.* The path of the activation module (`layer1.0.relu`), or for a function the path of the module that calls
it and the function's name (`layer1.0.relu`); `_1`, `_2`, ... is appended where a name is taken, in execution
order. Characters other than letters, digits, `_`, `-` and `.` become `_`, so a name serves as a file name.

*Which axis holds the neurons.* Walking up from the activation through element-wise operations, pooling and
dropout to the nearest operation that owns neurons: behind a convolution, batch, group or instance norm they are
dim 1; behind `Linear`, `Bilinear`, `Embedding`, attention, a recurrent layer, or a layer or RMS norm over one
axis they are the last dim. A permutation on the way is followed; where nothing is found it is dim 1.
Activations are recorded with the neurons at dim 1: `(N, C)` or `(N, C, *positions)`.
"""

from __future__ import annotations

import copy
import inspect
import operator
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils import checkpoint
from torch.utils.hooks import RemovableHandle

__all__ = ["HookedModel", "InstrumentedModel", "Recorder", "Tap", "TracingError", "instrument"]

_ACTIVATION_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Softplus,
)  # fmt: skip
_ACTIVATION_NAMES = frozenset(
    "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish softplus".split()
)
_NO_ACTIVATION = (
    "model: found no call of an activation function to tap (ReLU, GELU, SiLU, Hardswish, ... as module, function "
    "or method; gates such as Sigmoid are not tapped)"
)


class TracingError(ValueError):
    """The model cannot be turned into a graph; the message names the line of the model that is the cause."""


class Recorder:
    """Holds what the taps of one model saw in its last forward pass, until `take` hands it over.

    Shared by all taps of a model. A deep copy is an empty recorder (shared by the copied taps), so that a model can
    be copied after a training step. Not thread-safe.
    """

    def __init__(self) -> None:
        self.forced = 0
        self._values: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Recorder:
        return Recorder()

    def note(self, index: int, value: Tensor) -> None:
        """Keep `value` as activation `index` of this forward pass, or forget the one of an earlier pass."""
        if _inside_backward():  # gradient checkpointing runs the forward again; its activations are nobody's
            return
        if self.recording:
            self._values[index] = value
        else:
            self._values.pop(index, None)

    @property
    def recording(self) -> bool:
        """Whether a forward pass run now is recorded."""
        return self.forced > 0 or torch.is_grad_enabled()

    def clear(self) -> None:
        """Forget what is recorded."""
        self._values.clear()

    def take(self) -> list[Tensor]:
        """The activations in execution order; forgets them. RuntimeError if there are none."""
        if not self._values:
            raise RuntimeError(
                "no activations recorded: call the model first, once for each call of activations(), with "
                "gradients enabled or inside `with model.recording():`"
            )
        values = [self._values[index] for index in sorted(self._values)]
        self.clear()
        return values

    @contextmanager
    def forcing(self) -> Iterator[None]:
        """Record also where gradients are disabled."""
        self.forced += 1
        try:
            yield
        finally:
            self.forced -= 1


def _inside_backward() -> bool:
    # torch.compile cannot trace the question; what it compiles is a forward pass.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Tap(nn.Module):
    """Where one activation call is observed: passes its value through, and notes it in the recorder.

    A tap with `relu=True` stands in the place of a ReLU call and applies it; any other activation stays in the
    graph and its tap follows it. `neuron_dim` is 1, or -1 where neurons are the last dim (`(N, T, C)`).
    """

    _is_impure = True  # fx: a tap whose output nobody uses is no dead code

    def __init__(
        self,
        name: str,
        index: int,
        recorder: Recorder,
        *,
        neuron_dim: int = 1,
        relu: bool = False,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.index = index
        self.recorder = recorder
        self.neuron_dim = neuron_dim
        self.relu = relu
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """`x` or relu(`x`), unchanged in shape."""
        y, seen = self.observe(x)
        self.recorder.note(self.index, seen)
        return y

    def observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tap's output, and what is recorded of it: `(N, C)` or `(N, C, *positions)`."""
        y = F.relu(x, inplace=self.inplace) if self.relu else x
        return y, _neurons_second(y, self.neuron_dim)

    def extra_repr(self) -> str:
        """Name and what differs from the default."""
        return f"{self.name!r}, neuron_dim={self.neuron_dim}, relu={self.relu}, inplace={self.inplace}"


def _neurons_second(value: Tensor, neuron_dim: int) -> Tensor:
    return value if neuron_dim == 1 or value.dim() <= 2 else value.movedim(neuron_dim, 1)


class InstrumentedModel(fx.GraphModule):
    """A traced model with taps; made by `instrument`.

    Submodules, parameters and buffers are those of the model it was made from, under the same names; training one
    trains the other. Methods and plain attributes of the model's own class are not carried over.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "InstrumentedModel") -> None:
        super().__init__(root, graph, class_name)
        # GraphModule keeps what the graph uses, in the order of use, in bare containers. Take the model's own
        # containers instead: all of them, in their order, so that keys, their order and train() stay as they were.
        made = {name: buffer for name, buffer in self._buffers.items() if name not in root._buffers}
        self._modules = dict(root._modules)
        self._parameters = dict(root._parameters)
        self._buffers = {**root._buffers, **made}
        self._non_persistent_buffers_set = root._non_persistent_buffers_set | made.keys()

    def _deepcopy_init(self) -> Callable[..., None]:
        return InstrumentedModel.__init__

    def _tap_modules(self) -> list[Tap]:
        return [
            tap
            for node in self.graph.nodes
            if node.op == "call_module" and isinstance(tap := self.get_submodule(node.target), Tap)
        ]

    @property
    def taps(self) -> list[str]:
        """Names of the taps in execution order."""
        return [tap.name for tap in self._tap_modules()]

    @property
    def _recorder(self) -> Recorder:
        recorder = self._modules["_taps"][0].recorder  # type: ignore[index]
        assert isinstance(recorder, Recorder)  # noqa: S101
        return recorder

    def activations(self) -> list[Tensor]:
        """Activations of the last forward pass, one per tap in execution order; hands them over and forgets them.

        Each is `(N, C)` or `(N, C, *positions)`, attached to the autograd graph. Recorded with gradients enabled,
        or inside `recording()`; RuntimeError when there are none.
        """
        return self._recorder.take()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record inside this block also under `torch.no_grad()`."""
        with self._recorder.forcing():
            yield


def instrument(model: nn.Module, *, method: Literal["fx", "hooks"] = "fx") -> InstrumentedModel | HookedModel:
    """`model` with a tap behind every activation call; parameters, buffers and state_dict keys are shared with it.

    `method="fx"` traces the model into an `InstrumentedModel`. ReLU calls are replaced by their tap, other
    activation calls are followed by theirs. A value that the model overwrites in place after a tap has seen it
    is cloned before, so that the record stays what the activation was. Flags that follow `self.training`
    (`F.dropout(x, training=self.training)`) stay live under train() and eval().

    Forward hooks of modules that stay whole keep firing (a ReLU with hooks is kept and followed by its tap).

    `method="hooks"` gives a `HookedModel`, for models that cannot be traced: it sees activation *modules* only,
    and `mask` and `compose` do not accept it.

    Raises:
        TypeError: `model` is no `nn.Module`, or a wrapper (DataParallel, DistributedDataParallel, torch.compile):
            instrument the model inside, then wrap.
        ValueError: `model` is instrumented already, or calls no activation function.
        TracingError: the model cannot be traced faithfully: control flow that depends on data, different
            behaviour in train and eval mode, random tensors, gradient checkpointing or hooks inside the model, an
            in-place change of an activation that other parts of the model see.
    """
    _check_model(model)
    if method == "hooks":
        return _hooked(model)
    if method != "fx":
        raise ValueError(f"method: expected 'fx' or 'hooks', got {method!r}")
    graph, constants = _trace(model)
    shell = _shell(model, constants)
    _insert_taps(shell, graph)
    if not len(shell.get_submodule("_taps")):
        raise ValueError(_NO_ACTIVATION)
    _protect_records(shell, graph)
    return InstrumentedModel(shell, graph)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, InstrumentedModel | HookedModel):
        raise ValueError("model: is instrumented already; use it as it is, or instrument the plain model")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch._dynamo.OptimizedModule)
    if isinstance(model, wrappers):
        raise TypeError(
            f"model: is wrapped in {type(model).__name__}; instrument the model inside it, then wrap the result"
        )


# ---- tracing ---------------------------------------------------------------------------------------------------

_OWN_FILES = (str(Path(torch.__file__).parent), __file__)


class _Proxy(fx.Proxy):
    """Traces `x += y` as the in-place operation it is; torch.fx by itself makes a new value of it."""


def _trace_inplace(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], Any]:
    def method(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


_INPLACE_OPERATORS = {
    getattr(operator, name)
    for name in "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul".split()
}
for _function in _INPLACE_OPERATORS:
    setattr(_Proxy, f"__{_function.__name__}__", _trace_inplace(_function))


class _Tracer(fx.Tracer):
    """Notes the user's line behind every node, and refuses what a trace would silently lose."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        frames = list(_frames(sys._getframe()))
        node.meta["source"] = _innermost_line(frames)
        inside = [i for i, frame in enumerate(frames) if frame.f_code.co_filename == checkpoint.__file__]
        if inside:
            why = "gradient checkpointing inside the model would be lost"
            raise _refusal(why, _innermost_line(frames[inside[-1] :]))
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self.is_leaf_module(m, self.path_of_module(m)):
            _refuse_hooks(m, self.path_of_module(m))
        return super().call_module(m, forward, args, kwargs)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """From `frame` outwards, to where tracing began."""
    while frame is not None and frame.f_code is not _trace_in_mode.__code__:
        yield frame
        frame = frame.f_back


def _innermost_line(frames: Sequence[FrameType]) -> str:
    return next((_line(frame) for frame in frames if _is_users(frame)), "")


def _is_users(frame: FrameType) -> bool:
    return not frame.f_code.co_filename.startswith((*_OWN_FILES, "<"))


def _line(frame: FrameType, line: int | None = None) -> str:
    return f"{frame.f_code.co_filename}:{line or frame.f_lineno} in {frame.f_code.co_name}"


def _line_of(traceback: TracebackType | None) -> str:
    """Last line outside of torch that the exception passed through."""
    line = ""
    while traceback is not None:
        if _is_users(traceback.tb_frame):
            line = _line(traceback.tb_frame, traceback.tb_lineno)
        traceback = traceback.tb_next
    return line


def _refusal(why: str, source: str) -> TracingError:
    where = f"{source}: " if source else ""
    return TracingError(
        f"model: cannot be traced faithfully: {where}{why}. Change that line, or use "
        'instrument(model, method="hooks"), which sees activation modules only'
    )


def _refuse_hooks(module: nn.Module, path: str) -> None:
    if module._forward_hooks or module._forward_pre_hooks:
        which = f"module {path!r}" if path else "the model"
        raise _refusal(f"{which} has forward hooks, which a traced graph does not call", "")


def _trace(model: nn.Module) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Graph of `model` with live training flags, and the tensors that its forward makes from constants."""
    graph, constants = _trace_in_mode(model, training=True)
    other, other_constants = _trace_in_mode(model, training=False)
    _merge_modes(graph, other)
    for name, value in constants.items():
        same = name in other_constants and torch.equal(value, other_constants[name])
        if not same:
            node = next(node for node in graph.nodes if node.target == name)
            raise _refusal("a tensor made here differs from call to call; a trace would freeze it", node.meta["source"])
    for module in model.modules():
        if type(module).__name__.startswith("Transformer") and type(module).__module__.startswith("torch.nn"):
            warnings.warn(
                f"model: activations inside torch.nn.{type(module).__name__} are not tapped (it stays whole)",
                stacklevel=3,
            )
            break
    return graph, constants


def _trace_in_mode(model: nn.Module, training: bool) -> tuple[fx.Graph, dict[str, Tensor]]:
    flags = [(module, module.training) for module in model.modules()]
    before = set(model.__dict__)
    try:
        _refuse_hooks(model, "")
        for module, _ in flags:
            module.training = training  # not train(): a module may override it
        graph = _Tracer().trace(model)
    except TracingError:
        raise
    except Exception as error:
        raise _refusal(f"{type(error).__name__}: {error}".rstrip("."), _line_of(error.__traceback__)) from error
    finally:
        for module, flag in flags:
            module.training = flag
        made = {name: model.__dict__.pop(name) for name in set(model.__dict__) - before}
    return graph, {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _merge_modes(train: fx.Graph, evaluation: fx.Graph) -> None:
    """Make `train` follow the training flag where that is the only difference between the two graphs."""
    pairs = dict(zip(evaluation.nodes, train.nodes, strict=False))
    for other, node in pairs.items():
        same = (node.op, node.target) == (other.op, other.target)
        try:
            if not same:
                raise _DiffersError
            merge = _ModeMerger(train, node, pairs)
            node.args, node.kwargs = merge(node.args, other.args), merge(node.kwargs, other.kwargs)
        except _DiffersError:
            why = "the model does different things in train and eval mode"
            raise _refusal(why, node.meta["source"] or other.meta["source"]) from None


class _DiffersError(Exception):
    pass


class _ModeMerger:
    """Arguments of a node of the train graph, compared with those of its twin in the eval graph."""

    def __init__(self, graph: fx.Graph, node: fx.Node, twins: dict[fx.Node, fx.Node]) -> None:
        self.graph, self.node, self.twins = graph, node, twins

    def __call__(self, train: Any, other: Any) -> Any:
        if type(train) is not type(other):
            raise _DiffersError
        if isinstance(train, fx.Node):
            self._require(self.twins.get(other) is train)
            return train
        if isinstance(train, bool) and train != other:
            return self._live_flag(train)
        if isinstance(train, slice):
            parts = [self(getattr(train, end), getattr(other, end)) for end in ("start", "stop", "step")]
            return slice(*parts)
        if isinstance(train, dict):
            self._require(train.keys() == other.keys())
            return {key: self(value, other[key]) for key, value in train.items()}
        if isinstance(train, tuple | list):
            self._require(len(train) == len(other))
            merged = [self(*pair) for pair in zip(train, other, strict=True)]
            return type(train)(*merged) if hasattr(train, "_fields") else type(train)(merged)
        self._require(repr(train) == repr(other))
        return train

    @staticmethod
    def _require(same: bool) -> None:
        if not same:
            raise _DiffersError

    def _live_flag(self, in_training: bool) -> fx.Node:
        path = _calling_module(self.node)
        with self.graph.inserting_before(self.node):
            flag = self.graph.create_node("get_attr", f"{path}.training" if path else "training")
            flag.meta = dict(self.node.meta)
            return flag if in_training else self.graph.call_function(operator.not_, (flag,))


def _calling_module(node: fx.Node) -> str:
    """Path of the module whose forward made this node; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else ""


def _shell(model: nn.Module, constants: dict[str, Tensor]) -> nn.Module:
    """A bare module with the content of `model` under the same names, to which taps can be added."""
    shell = nn.Module()
    shell.__dict__.update({name: value for name, value in model.__dict__.items() if name not in shell.__dict__})
    shell.training = model.training
    shell._modules = dict(model._modules)
    shell._parameters = dict(model._parameters)
    shell._buffers = dict(model._buffers)
    shell._non_persistent_buffers_set = set(model._non_persistent_buffers_set)
    for name, value in constants.items():
        shell.register_buffer(name, value, persistent=False)
    shell.add_module("_taps", nn.ModuleList())
    return shell


# ---- taps ------------------------------------------------------------------------------------------------------


def _activation_functions() -> dict[Callable[..., Any], str]:
    """torch's activation functions, in-place forms too: function -> name."""
    return {
        function: name
        for name in sorted(_ACTIVATION_NAMES)
        for place in (F, torch)
        for form in (name, f"{name}_")
        if (function := getattr(place, form, None)) is not None
    }


_ACTIVATION_FUNCTIONS = _activation_functions()


def _activation_name(node: fx.Node, modules: nn.Module) -> str | None:
    """Name of the activation function this node calls ("" for a module), None if it calls none."""
    if node.op == "call_module":
        return "" if isinstance(modules.get_submodule(str(node.target)), _ACTIVATION_MODULES) else None
    if node.op == "call_function" and callable(node.target):
        return _ACTIVATION_FUNCTIONS.get(node.target)
    name = str(node.target).removesuffix("_")
    return name if node.op == "call_method" and name in _ACTIVATION_NAMES else None


def _insert_taps(modules: nn.Module, graph: fx.Graph) -> None:
    recorder, names = Recorder(), set[str]()
    taps: nn.ModuleList = modules.get_submodule("_taps")  # type: ignore[assignment]
    for node in list(graph.nodes):
        function = _activation_name(node, modules)
        if function is None:
            continue
        path = str(node.target) if not function else ".".join(filter(None, (_calling_module(node), function)))
        tap = Tap(_unique_name(path, names), len(taps), recorder, neuron_dim=_neuron_dim(node, modules))
        taps.append(tap)
        _place(tap, node, modules, graph)


def _unique_name(path: str, names: set[str]) -> str:
    base = name = re.sub(r"[^A-Za-z0-9_.-]", "_", path)
    count = 0
    while name in names:
        count += 1
        name = f"{base}_{count}"
    names.add(name)
    return name


def _place(tap: Tap, call: fx.Node, modules: nn.Module, graph: fx.Graph) -> None:
    """Let the tap take the place of a ReLU call, or follow another activation call."""
    inplace = _is_inplace(call, modules)
    value = _first_tensor(call)
    tap.relu = _is_plain_relu(call, modules)
    tap.inplace = tap.relu and inplace
    with graph.inserting_after(call):
        node = graph.call_module(f"_taps.{tap.index}", (value if tap.relu else call,))
    node.meta = dict(call.meta)
    call.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    if inplace:  # whoever uses the overwritten value later sees the activation
        for user in _users_after(value, node):
            user.replace_input_with(value, node)
    if tap.relu:
        graph.erase_node(call)


def _is_plain_relu(call: fx.Node, modules: nn.Module) -> bool:
    if call.op == "call_module":
        module = modules.get_submodule(str(call.target))
        hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        return type(module) is nn.ReLU and not (hooked or module._backward_pre_hooks)
    return _activation_name(call, modules) == "relu"


def _first_tensor(node: fx.Node) -> fx.Node:
    """The value a call works on: its first argument, or the keyword `input`, `x`, `self`."""
    value = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    for keyword in () if node.args else ("input", "x", "self"):
        value = node.kwargs.get(keyword, value)
    if not isinstance(value, fx.Node):
        raise _refusal(f"{node.target} is called on a constant", node.meta.get("source", ""))
    return value


def _users_after(value: fx.Node, node: fx.Node) -> list[fx.Node]:
    return [user for user in value.users if user is not node and node < user]


# ---- which axis holds the neurons ------------------------------------------------------------------------------

_NEURONS_SECOND = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.batch_norm,
    F.instance_norm, F.group_norm, torch.conv1d, torch.conv2d, torch.conv3d, torch.batch_norm, torch.group_norm,
}  # fmt: skip
_NEURONS_LAST = {F.linear, F.bilinear, F.embedding, F.multi_head_attention_forward}
_LAST_MODULES = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase)
_OTHER_AXES = frozenset(
    "flatten unflatten reshape view view_as reshape_as mean sum amax amin einsum matmul bmm rearrange".split()
)


def _neuron_dim(activation: fx.Node, modules: nn.Module) -> int:
    """1 or -1, by the rule in the docstring of this file."""
    pending, seen = [_first_tensor(activation)], set[fx.Node]()
    permutations: dict[fx.Node, list[fx.Node]] = {pending[0]: []}
    while pending:
        node = pending.pop(0)
        if node in seen:
            continue
        seen.add(node)
        dim = _own_neuron_dim(node, modules)
        if dim is not None:
            return _follow(dim, permutations[node], activation)
        if _called(node) in _OTHER_AXES:
            continue
        moved = [node] if _called(node) in {"permute", "transpose", "swapaxes", "swapdims"} else []
        for source in node.all_input_nodes:
            permutations.setdefault(source, [*moved, *permutations[node]])
            pending.append(source)
    return 1


def _called(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _own_neuron_dim(node: fx.Node, modules: nn.Module) -> int | None:
    """Where this node's own output has its neurons; None if it has none of its own."""
    if node.op == "call_module":
        return _module_neuron_dim(modules.get_submodule(str(node.target)))
    if node.op != "call_function":
        return None
    if node.target in _NEURONS_SECOND:
        return 1
    if node.target in (F.layer_norm, F.rms_norm):
        shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
        return -1 if isinstance(shape, Sequence) and len(shape) == 1 else None
    return -1 if node.target in _NEURONS_LAST else None


def _module_neuron_dim(module: nn.Module) -> int | None:
    if isinstance(module, _ConvNd | _NormBase | nn.GroupNorm):
        return 1
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return -1 if len(module.normalized_shape) == 1 else None
    return -1 if isinstance(module, _LAST_MODULES) else None


def _follow(dim: int, permutations: list[fx.Node], activation: fx.Node) -> int:
    """Where dim 1 or -1 ends up after the permutations, in order."""
    for node in permutations:
        order = _axis_order(node)
        if order:
            place = order.index(dim % len(order))
            dim = place if place == 1 else place - len(order)
    if dim not in (1, -1):
        raise _refusal(
            f"the activation has its neurons at dim {dim}; expected dim 1 or the last one",
            activation.meta.get("source", ""),
        )
    return dim


def _axis_order(node: fx.Node) -> list[int]:
    """Where each axis of a permute or transpose comes from; [] if that is not known before the call."""
    axes = list(node.args[1:]) or [value for key, value in node.kwargs.items() if key != "input"]
    if len(axes) == 1 and isinstance(axes[0], Sequence):
        axes = list(axes[0])
    if not axes or not all(isinstance(axis, int) for axis in axes):
        return []
    if _called(node) == "permute":
        return [axis % len(axes) for axis in axes]
    rank = max(3, max(axes) + 1, -min(axes))  # a transpose does not tell: (N, C, T) unless its axes need more
    order = list(range(rank))
    first, second = axes
    order[first], order[second] = order[second], order[first]
    return order


# ---- values overwritten in place -------------------------------------------------------------------------------

_VIEWS = frozenset(
    "view view_as reshape reshape_as flatten unflatten squeeze unsqueeze transpose t permute expand expand_as chunk "
    "split tensor_split hsplit vsplit dsplit unbind narrow select getitem getattr contiguous detach to type float "
    "half double bfloat16 cpu cuda movedim moveaxis swapaxes swapdims unfold diagonal broadcast_to real imag alias "
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout stochastic_depth T mT".split()
)
_VIEW_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd, nn.AlphaDropout)


def _is_inplace(node: fx.Node, modules: nn.Module) -> bool:
    """Whether the node overwrites its first argument (or `out`)."""
    if node.op == "call_module":
        return bool(getattr(modules.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_method", "call_function"):
        return False
    name = _called(node)
    if node.target in _INPLACE_OPERATORS or node.target is operator.setitem:
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    return node.op == "call_function" and bool(_argument(node, "inplace") or "out" in node.kwargs)


def _argument(node: fx.Node, name: str) -> Any:
    """Argument `name` of a function call, however it was given; None where the function has none."""
    if name in node.kwargs:
        return node.kwargs[name]
    try:
        parameters = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin without a signature: it takes `inplace` by no position
        return None
    place = parameters.index(name) if name in parameters else len(node.args)
    return node.args[place] if place < len(node.args) else None


def _overwritten(node: fx.Node) -> fx.Node:
    out = node.kwargs.get("out")
    return out if isinstance(out, fx.Node) else _first_tensor(node)


def _protect_records(modules: nn.Module, graph: fx.Graph) -> None:
    """Clone a tapped value before the model overwrites it, so that the record stays the activation.

    The clone takes the value's place from there on. Where the model goes on to see the overwritten memory by
    another name (a view made before), no clone can stand in for it: that is refused.
    """
    memory: dict[fx.Node, fx.Node] = {}  # node -> the first node whose memory it may share
    seen_by_taps: set[fx.Node] = set()  # memory that a tap has recorded
    for node in list(graph.nodes):
        inplace = _is_inplace(node, modules)
        if inplace and memory[_overwritten(node)] in seen_by_taps:
            copied = _clone_before(node, graph, memory)
            memory[copied] = copied
        if inplace:
            memory[node] = memory[_overwritten(node)]
        else:
            memory[node] = memory[node.all_input_nodes[0]] if _may_view(node, modules) else node
        if node.op == "call_module" and isinstance(modules.get_submodule(str(node.target)), Tap):
            seen_by_taps.add(memory[node])


def _may_view(node: fx.Node, modules: nn.Module) -> bool:
    """Whether the node's output may share memory with its first input."""
    if not node.all_input_nodes:
        return False
    if node.op == "call_module":
        module = modules.get_submodule(str(node.target))
        return isinstance(module, _VIEW_MODULES) or (isinstance(module, Tap) and not module.relu)
    return node.op in ("call_method", "call_function") and _called(node) in _VIEWS


def _clone_before(node: fx.Node, graph: fx.Graph, memory: dict[fx.Node, fx.Node]) -> fx.Node:
    """Let `node` overwrite a clone of its value, which later uses of the value then see."""
    value = _overwritten(node)
    others = [other for other in memory if other is not value and memory[other] is memory[value]]
    for user in (user for other in others for user in other.users if node < user):
        raise _refusal(
            "an activation is overwritten in place here and its old memory is used again later "
            f"({user.meta.get('source', '')})",
            node.meta.get("source", ""),
        )
    with graph.inserting_before(node):
        copied = graph.call_method("clone", (value,))
    copied.meta = dict(node.meta)
    for user in [node, *_users_after(value, node)]:
        user.replace_input_with(value, copied)
    return copied


# ---- the route without a trace ---------------------------------------------------------------------------------


class HookedModel(nn.Module):
    """A model whose activation modules are observed by hooks; made by `instrument(model, method="hooks")`.

    It is the same kind of model (a subclass of the model's own class that shares submodules, parameters, buffers
    and state_dict keys with it) with `taps`, `activations()` and `recording()`. Hooks are in place only during its
    own forward pass. Functional activations are not seen, `mask` and `compose` do not accept it, and it is not
    meant for torch.compile.
    """

    _recorder: Recorder
    _names: list[str]
    _written: list[tuple[Tensor, int]]

    @property
    def taps(self) -> list[str]:
        """Names of the activation calls of the last recorded forward pass, in order; RuntimeError before one."""
        if not self._names:
            raise RuntimeError("taps of a hooked model are known after its first recorded forward pass")
        return list(self._names)

    def activations(self) -> list[Tensor]:
        """As `InstrumentedModel.activations`. RuntimeError also if the model overwrote an activation in place."""
        values, written = self._recorder.take(), self._written
        self._written = []
        for name, (value, version) in zip(self._names, written, strict=True):
            if _version(value) != version:
                raise RuntimeError(
                    f"activation {name!r} was overwritten in place after it was recorded; set inplace=False "
                    "in the operation that follows it"
                )
        return values

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record inside this block also under `torch.no_grad()`."""
        with self._recorder.forcing():
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own forward."""
        watch = _Watch(self)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]  # the model's class comes next
        finally:
            watch.end()


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


class _Watch:
    """The hooks of one forward pass of a hooked model."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self.names: set[str] = set()
        self.neuron_dim = 1  # of the module with neurons of its own that ran last
        self.handles: list[RemovableHandle] = []
        if _inside_backward():
            return
        model._recorder.clear()
        model._written = []
        if not model._recorder.recording:
            return
        model._names = []
        self.handles = [
            module.register_forward_hook(hook)
            for path, module in model.named_modules()
            if (hook := self._hook_for(path, module)) is not None
        ]

    def _hook_for(self, path: str, module: nn.Module) -> Callable[..., None] | None:
        if isinstance(module, _ACTIVATION_MODULES):
            return lambda _module, _args, output: self._note(path, output)
        dim = _module_neuron_dim(module)
        return None if dim is None else lambda *_: setattr(self, "neuron_dim", dim)

    def _note(self, path: str, value: Tensor) -> None:
        model = self.model
        kept = value.clone() if value.is_inference() else value  # inference tensors do not tell if they changed
        model._names.append(_unique_name(path, self.names))
        model._written.append((kept, _version(kept)))
        model._recorder.note(len(model._names) - 1, _neurons_second(kept, self.neuron_dim))

    def end(self) -> None:
        for handle in self.handles:
            handle.remove()


def _hooked(model: nn.Module) -> HookedModel:
    if not any(isinstance(module, _ACTIVATION_MODULES) for module in model.modules()):
        raise ValueError(_NO_ACTIVATION)
    hooked = copy.copy(model)
    hooked.__class__ = type(f"Hooked{type(model).__name__}", (HookedModel, type(model)), {})
    hooked._recorder, hooked._names, hooked._written = Recorder(), [], []  # type: ignore[assignment]
    assert isinstance(hooked, HookedModel)  # noqa: S101
    return hooked
