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
dropout to the nearest operation that owns neurons: see neuron_axis.py. Activations are recorded with the neurons
at dim 1: `(N, C)` or `(N, C, *positions)`.

*In place.* A tap's output is what the activation call gave. Where the model overwrites it later, it overwrites a
clone: see overwrites.py. In-place ReLUs stay in place; others become it inside `model.overwriting()`.

*When.* A forward pass is recorded where gradients are enabled, or inside `model.recording()`; each one replaces the
record of the one before. The recomputation of gradient checkpointing is not recorded. Checkpoint the whole
instrumented model with `use_reentrant=False`: the reentrant kind runs the forward without gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from moda.observation.calls import (
    activation_name,
    called,
    calling_module,
    is_inplace,
    is_plain_relu,
    module_of,
    source_of,
    subject,
)
from moda.observation.hooks import HookedModel, hooked
from moda.observation.names import NO_ACTIVATION, unique_name
from moda.observation.neuron_axis import neuron_dim
from moda.observation.overwrites import is_spare, protect, users_after
from moda.observation.recorder import Receiver, Recorder, neurons_second
from moda.observation.run import FUSED_FROM_BYTES
from moda.observation.tracing import TracingError, refusal, trace
from moda_kernels import relu_pool

Route = Literal["grouped", "fused", "auto"]

__all__ = ["HookedModel", "InstrumentedModel", "Recorder", "Tap", "TracingError", "instrument"]


class Tap(nn.Module):
    """Where one activation call is observed: passes its value through, and notes it in the recorder.

    A tap with `relu=True` stands in the place of a ReLU call and applies it; any other activation stays in the
    graph and its tap follows it. `neuron_dim` is 1, or -1 where neurons are the last dim (`(N, T, C)`).
    `route` is explained at `instrument`.
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
        route: Route = "grouped",
    ) -> None:
        super().__init__()
        self.name = name
        self.index = index
        self.recorder = recorder
        self.neuron_dim = neuron_dim
        self.relu = relu
        self.inplace = inplace
        self.route = route
        self.overwrites = False  # also its input, where gradients are disabled: see InstrumentedModel.overwriting

    def forward(self, x: Tensor) -> Tensor:
        """`x` or relu(`x`), unchanged in shape."""
        y, seen = self.observe(x)
        self.recorder.note(self.index, seen)
        return y

    def observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tap's output, and what is recorded of it: the activation, or its pooled rows `(N, C)`."""
        if self._fuses(x):
            return relu_pool(x, inplace=self.inplace)
        inplace = self.inplace or (self.overwrites and not torch.is_grad_enabled())
        y = F.relu(x, inplace=inplace) if self.relu else x
        return y, neurons_second(y, self.neuron_dim)

    def _fuses(self, x: Tensor) -> bool:
        """Whether ReLU and pooling are one pass here; the same for a forward and for its recomputation."""
        if self.route == "grouped" or not self.relu or self.neuron_dim != 1 or x.dim() <= 2:
            return False
        if self.recorder.forced or not torch.is_grad_enabled():
            return False
        return self.route == "fused" or self._is_large(x)

    @staticmethod
    def _is_large(x: Tensor) -> bool:
        # A compiler fuses the pass over memory by itself.
        least = FUSED_FROM_BYTES.get(x.device.type, FUSED_FROM_BYTES["cuda"])
        return not torch.compiler.is_compiling() and x.numel() * x.element_size() >= least

    @property
    def may_return_input(self) -> bool:
        """Whether the output shares memory with the input."""
        return not self.relu or self.inplace

    def extra_repr(self) -> str:
        """Name and settings."""
        settings = f"neuron_dim={self.neuron_dim}, relu={self.relu}, inplace={self.inplace}, route={self.route!r}"
        return f"{self.name!r}, {settings}"


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
        return cast(Tap, cast(nn.ModuleList, self._modules["_taps"])[0]).recorder

    def activations(self) -> list[Tensor]:
        """Activations of the last forward pass, one per tap in execution order; hands them over and forgets them.

        Each is `(N, C)` or `(N, C, *positions)`, or pooled rows `(N, C)` where a tap fuses, attached to the autograd
        graph. Recorded with gradients enabled, or inside `recording()`; RuntimeError when there are none.
        """
        return self._recorder.take()

    @contextmanager
    def recording(self, receiver: Receiver | None = None) -> Iterator[None]:
        """Record inside this block also under `torch.no_grad()`.

        Args:
            receiver: called with every activation while the model runs, `receiver(index, activation)`, index in
                execution order; nothing is kept for `activations()`, so that memory is that of a plain forward pass.

        Raises:
            TypeError: `receiver` cannot be called.
        """
        with self._recorder.forcing(receiver):
            yield

    @contextmanager
    def overwriting(self) -> Iterator[None]:
        """Inside this block, without gradients, a ReLU overwrites its input where nobody else sees it.

        That is one that a convolution, linear layer, batch normalisation or addition made for this ReLU alone, and no
        hook looks at. A forward pass then writes less memory, which makes it faster; outputs and activations stay the
        same.
        """
        spare = [
            tap
            for node in self.graph.nodes
            if isinstance(tap := module_of(node, self), Tap) and tap.relu and is_spare(node.args[0], node, self)
        ]
        for tap in spare:
            tap.overwrites = True
        try:
            yield
        finally:
            for tap in spare:
                tap.overwrites = False


@overload
def instrument(model: nn.Module, *, method: Literal["fx"] = "fx", route: Route = "grouped") -> InstrumentedModel: ...
@overload
def instrument(model: nn.Module, *, method: Literal["hooks"], route: Literal["grouped"] = "grouped") -> HookedModel: ...
def instrument(
    model: nn.Module, *, method: Literal["fx", "hooks"] = "fx", route: Route = "grouped"
) -> InstrumentedModel | HookedModel:
    """`model` with a tap behind every activation call; parameters, buffers and state_dict keys are shared with it.

    `method="fx"` traces the model into an `InstrumentedModel`. ReLU calls are replaced by their tap, other
    activation calls are followed by theirs. A value that the model overwrites in place after a tap has seen it
    is cloned before, so that the record stays what the activation was. Flags that follow `self.training`
    (`F.dropout(x, training=self.training)`) stay live under train() and eval().

    Forward hooks of modules that stay whole keep firing (a ReLU with hooks is kept and followed by its tap).

    `method="hooks"` gives a `HookedModel`, for models that cannot be traced: it sees activation *modules* only,
    and `mask` and `compose` do not accept it.

    `route` says what the taps of spatial ReLUs record for the loss; the loss is the same.
    `"grouped"`: the activation; the loss pools all of them together. `"fused"`: its pooled rows `(N, C)`, taken by
    `moda_kernels.relu_pool` while the ReLU has the values at hand, so that the loss makes no pass over memory of
    its own. `"auto"`: fused from `FUSED_FROM_BYTES` bytes of activation on, tap by tap and call by call. Other
    taps, and all inside `recording()`, record the activation whatever the route: pooled rows cannot tell which
    neurons passed a threshold.

    Raises:
        TypeError: `model` is no `nn.Module`, or a wrapper (DataParallel, DistributedDataParallel, torch.compile):
            instrument the model inside, then wrap.
        ValueError: `model` is instrumented already, or calls no activation function; `route` is unknown, or not
            `"grouped"` with hooks, which replace no ReLU.
        TracingError: the model cannot be traced faithfully: control flow that depends on data, different
            behaviour in train and eval mode, random tensors, gradient checkpointing or hooks inside the model, an
            in-place change of an activation that other parts of the model see.
    """
    _check_model(model)
    _check_choices(method, route)
    if method == "hooks":
        return hooked(model)
    graph, constants = trace(model)
    root = _shell(model, constants)
    taps = nn.ModuleList()
    root.add_module("_taps", taps)
    _insert_taps(graph, root, taps)
    for tap in taps:
        cast(Tap, tap).route = route
    if not len(taps):
        raise ValueError(NO_ACTIVATION)
    protect(graph, root, lambda node: isinstance(module_of(node, root), Tap))
    _warn_of_whole_modules(graph, root)
    return InstrumentedModel(root, graph)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, InstrumentedModel | HookedModel):
        raise ValueError("model: is instrumented already; use it as it is, or instrument the plain model")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        raise TypeError(
            f"model: is wrapped in {type(model).__name__}; instrument the model inside it, then wrap the result"
        )


def _check_choices(method: str, route: str) -> None:
    if method not in ("fx", "hooks"):
        raise ValueError(f"method: expected 'fx' or 'hooks', got {method!r}")
    if route not in ("grouped", "fused", "auto"):
        raise ValueError(f"route: expected 'grouped', 'fused' or 'auto', got {route!r}")
    if method == "hooks" and route != "grouped":
        raise ValueError(f"route: expected 'grouped' with method='hooks' (hooks replace no ReLU), got {route!r}")


def _warn_of_whole_modules(graph: fx.Graph, modules: nn.Module) -> None:
    """Say which modules of torch.nn hide activation calls inside."""
    for node in graph.nodes:
        name = type(module_of(node, modules)).__name__
        if name.startswith("Transformer"):
            warnings.warn(f"activations inside torch.nn.{name} {called(node)!r} are not tapped", stacklevel=3)


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
    return shell


def _insert_taps(graph: fx.Graph, modules: nn.Module, taps: nn.ModuleList) -> None:
    recorder, names = Recorder(), set[str]()
    for node in list(graph.nodes):
        function = activation_name(node, modules)
        if function is None:
            continue
        path = called(node) if not function else ".".join(filter(None, (calling_module(node), function)))
        value = _activated(node)
        taps.append(
            Tap(
                unique_name(path, names),
                len(taps),
                recorder,
                neuron_dim=_first_or_last(neuron_dim(value, modules), node),
                relu=is_plain_relu(node, modules),
                inplace=is_inplace(node, modules),
            )
        )
        _place(node, value, taps)


def _activated(call: fx.Node) -> fx.Node:
    value = subject(call)
    if value is None:
        raise refusal("an activation function is called on something that is no tensor of the graph", source_of(call))
    return value


def _first_or_last(dim: int, call: fx.Node) -> int:
    if dim not in (1, -1):
        raise refusal(f"its neurons are at dim {dim}; only dim 1 and the last one are known", source_of(call))
    return dim


def _place(call: fx.Node, value: fx.Node, taps: nn.ModuleList) -> None:
    """Let the newest tap take the place of a ReLU call, or follow another activation call."""
    tap = cast(Tap, taps[-1])
    graph = call.graph
    with graph.inserting_after(call):
        node = graph.call_module(f"_taps.{tap.index}", (value if tap.relu else call,))
    node.meta = dict(call.meta)
    call.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    if tap.inplace:  # whoever uses the overwritten value later sees the activation
        for user in users_after(value, node):
            user.replace_input_with(value, node)
    if tap.relu:
        graph.erase_node(call)
    else:
        tap.inplace = False
