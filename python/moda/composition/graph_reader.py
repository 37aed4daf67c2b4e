"""Reads a traced model: which rule of `moda.channels` each of its operations follows, from the graph alone."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from torch import fx, nn

from moda.composition.channels import Concat, Contraction, Elementwise, Flatten, Layout, Look, PerChannel, Rule, Whole
from moda.observation.taps import Tap

__all__ = ["GraphReader", "called"]

_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}
_NORMS: dict[type[nn.Module], int | None] = {
    nn.BatchNorm1d: None, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5, nn.SyncBatchNorm: None,
    nn.InstanceNorm1d: 3, nn.InstanceNorm2d: 4, nn.InstanceNorm3d: 5,
}  # fmt: skip
_POINTWISE: dict[type[nn.Module], bool] = {  # element by element: type -> keeps zero
    **dict.fromkeys(
        (
            nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
            nn.RReLU, nn.Tanh, nn.Softsign, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
        ),
        True,
    ),
    **dict.fromkeys((nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid, nn.Hardtanh), False),
}  # fmt: skip
_SPATIAL = (  # on the positions of every channel; zeros stay zeros
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d,
    nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
)  # fmt: skip
_POINTWISE_NAMES = {
    **dict.fromkeys(
        [
            "relu",
            "relu6",
            "leaky_relu",
            "elu",
            "selu",
            "celu",
            "gelu",
            "silu",
            "mish",
            "hardswish",
            "rrelu",
            "tanh",
            "softsign",
            "abs",
            "neg",
            "clone",
            "contiguous",
            "detach",
            "float",
            "half",
            "bfloat16",
            "double",
            "dropout",
            "dropout1d",
            "dropout2d",
            "dropout3d",
            "stochastic_depth",
        ],
        True,
    ),
    **dict.fromkeys(["sigmoid", "hardsigmoid", "softplus", "logsigmoid"], False),
}
_SPATIAL_NAMES = frozenset(
    [
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "interpolate",
    ]
)
_SUMS = frozenset(["add", "iadd", "sub", "isub"])
_PRODUCTS = frozenset(["mul", "imul", "multiply"])
_REDUCTIONS = frozenset(["mean", "sum", "amax"])


class GraphReader:
    """Gives every node of a graph its rule; nodes are read in execution order."""

    def __init__(self, modules: nn.Module, graph: fx.Graph, tap_widths: Mapping[str, int], num_classes: int) -> None:
        self.modules = modules
        self.tap_widths = tap_widths
        self.num_classes = num_classes
        self.shared = _shared_modules(modules, graph)
        self.rules: dict[fx.Node, Rule] = {}
        for node in graph.nodes:
            self.rules[node] = self._rule(node)

    def _layout(self, node: fx.Node) -> Layout:
        return self.rules[node].layout

    def _rule(self, node: fx.Node) -> Rule:
        if node.op == "output":
            return self._output(node)
        rule: Rule | None = None
        if node.op == "call_module":
            rule = self._module(node, self.modules.get_submodule(str(node.target)))
        elif node.op in ("call_function", "call_method"):
            rule = self._function(node, called(node))
        return rule or self._whole(node)

    def _whole(self, node: fx.Node, layout: Layout | None = None) -> Whole:
        inputs = tuple(u for u in node.all_input_nodes if self._layout(u).width is not None)
        tensors: tuple[str, ...] = ()
        if node.op == "call_module":
            names = self.modules.get_submodule(str(node.target)).state_dict()
            tensors = tuple(f"{node.target}.{name}" for name in names)
        elif node.op == "get_attr":
            tensors = (str(node.target),)
        widths = tuple(self._layout(u).width or 0 for u in inputs)
        return Whole(layout or Layout(), inputs, widths, tensors=tensors)

    def _output(self, node: fx.Node) -> Rule:
        value = node.all_input_nodes[0]
        width = self._layout(value).width
        if width is not None and width != self.num_classes:
            raise ValueError(
                f"decomposition: has {self.num_classes} classes, but the model puts out {width} logits; "
                "expected the decomposition of this model"
            )
        return PerChannel(Layout(self.num_classes), (value,), (self.num_classes,))

    # -- modules

    def _module(self, node: fx.Node, module: Any) -> Rule | None:
        if len(node.all_input_nodes) != 1 or len(node.args) + len(node.kwargs) != 1:
            return None
        value = node.all_input_nodes[0]
        kind = type(module)
        if isinstance(module, Tap):
            return self._tap(value, module)
        if str(node.target) in self.shared or _has_hooks(module):
            return None
        if kind in _CONVOLUTIONS:
            return self._convolution(node, value, module)
        if kind is nn.Linear:
            return self._linear(node, value, module)
        if kind in _NORMS:
            return self._norm(node, value, module)
        if kind in _POINTWISE:
            return self._per_channel(value, keeps_zero=_POINTWISE[kind])
        if kind in _SPATIAL:
            return None if getattr(module, "return_indices", False) else self._spatial(value, _pooled_size(module))
        if kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return self._flatten(node, value)
        return self._prelu(node, value, module) if kind is nn.PReLU else None

    def _tap(self, value: fx.Node, tap: Tap) -> Rule:
        layout, width = self._layout(value), self.tap_widths[tap.name]
        axis = 1 if layout.ndim == 2 else tap.neuron_dim
        if layout.width is None:
            return PerChannel(Layout(width, axis, layout.ndim), (value,), (width,), axis, tap=tap.name)
        if layout.axis != axis:
            raise ValueError(
                f"model: tap {tap.name!r} has its neurons at dim {axis}, but the layer before it at dim {layout.axis}"
            )
        if layout.width != width:
            raise ValueError(
                f"decomposition: tap {tap.name!r} has masks of {width} neurons, but the model has {layout.width} "
                "there; expected the decomposition of this model"
            )
        return PerChannel(layout, (value,), (width,), tap=tap.name)

    def _convolution(self, node: fx.Node, value: fx.Node, module: Any) -> Rule | None:
        if not self._offers(value, module.in_channels, axis=1):
            return None
        layout = Layout(module.out_channels, ndim=_CONVOLUTIONS[type(module)])
        return self._contraction(node, value, layout, module.in_channels, module.groups)

    def _linear(self, node: fx.Node, value: fx.Node, module: Any) -> Rule | None:
        if not self._offers(value, module.in_features, axis=-1):
            return None
        ndim = self._layout(value).ndim
        layout = Layout(module.out_features, axis=1 if ndim == 2 else -1, ndim=ndim)
        return self._contraction(node, value, layout, module.in_features, 1)

    def _contraction(self, node: fx.Node, value: fx.Node, layout: Layout, width: int, groups: int) -> Rule:
        tensors = _tensors(node, self.modules)
        return Contraction(
            layout, (value,), (width,), layout.axis, weight=tensors["weight"], bias=tensors.get("bias"), groups=groups
        )

    def _norm(self, node: fx.Node, value: fx.Node, module: Any) -> Rule | None:
        layout = self._layout(value)
        # Behind Linear the rank may be unknown; batch norm of its width then means (N, C).
        plain = isinstance(module, nn.BatchNorm1d) and layout.axis == -1 and layout.ndim is None
        if not plain and not self._offers(value, module.num_features, axis=1):
            return None
        if plain and layout.width not in (None, module.num_features):
            return None
        names = _tensors(node, self.modules)
        counter = names.pop("num_batches_tracked", None)
        ndim = 2 if plain and layout.width else _NORMS[type(module)] or layout.ndim
        return PerChannel(
            replace(layout, width=module.num_features, axis=1, ndim=ndim),
            (value,),
            (module.num_features,),
            keeps_zero=False,
            tensors=tuple(names.values()),
            others=(counter,) if counter else (),
        )

    def _prelu(self, node: fx.Node, value: fx.Node, module: Any) -> Rule | None:
        (weight,) = _tensors(node, self.modules).values()
        width = self._layout(value).width
        if width is None:
            return None
        if module.num_parameters == 1:
            return PerChannel(self._layout(value), (value,), (width,), others=(weight,))
        if not self._offers(value, module.num_parameters, axis=1):
            return None
        return PerChannel(self._layout(value), (value,), (width,), tensors=(weight,))

    def _offers(self, value: fx.Node, width: int, axis: int) -> bool:
        """Whether the value has `width` channels on that axis, or is not followed (then it is what it should be)."""
        layout = self._layout(value)
        return layout.width is None or (layout.width == width and (layout.axis == axis or layout.ndim == 2))

    def _per_channel(self, value: fx.Node, *, keeps_zero: bool = True) -> Rule | None:
        layout = self._layout(value)
        if layout.width is None:
            return None
        return PerChannel(layout, (value,), (layout.width,), keeps_zero=keeps_zero)

    def _spatial(self, value: fx.Node, positions: int | None = None) -> Rule | None:
        layout = self._layout(value)
        if layout.width is None or layout.axis != 1 or layout.ndim == 2:
            return None
        return PerChannel(replace(layout, positions=positions), (value,), (layout.width,))

    def _flatten(self, node: fx.Node, value: fx.Node) -> Rule | None:
        layout = self._layout(value)
        if layout.ndim == 2:
            return self._per_channel(value)
        if layout.width is None or layout.axis != 1:
            return self._whole(node, Layout(ndim=2))
        positions = layout.positions
        if positions is None:
            features = self._features(node)
            positions = features // layout.width if features and features % layout.width == 0 else None
        if positions is None:
            return self._whole(node, Layout(ndim=2))
        return Flatten(Layout(layout.width * positions, ndim=2), (value,), (layout.width,), positions=positions)

    def _features(self, node: fx.Node) -> int | None:
        """Number of features of a flattened value: what the first layer behind it that knows its width expects."""
        pending = list(node.users)
        while pending:
            user = pending.pop(0)
            if user.op == "output":
                return self.num_classes
            module = self.modules.get_submodule(str(user.target)) if user.op == "call_module" else None
            if isinstance(module, Tap):
                return self.tap_widths[module.name]
            if type(module) in (nn.Linear, nn.BatchNorm1d):
                return int(getattr(module, "in_features", 0) or module.num_features)  # type: ignore[union-attr, arg-type]
            if type(module) in _POINTWISE or (module is None and called(user) in _POINTWISE_NAMES):
                pending.extend(user.users)
        return None

    # -- functions and methods

    def _function(self, node: fx.Node, name: str) -> Rule | None:
        if name in _SUMS or name in _PRODUCTS:
            return self._elementwise(node, name in _PRODUCTS)
        value = first_argument(node)
        if value is None:
            return None
        if name in ("cat", "concat", "concatenate"):
            return self._concat(node)
        if any(self._layout(u).width is not None for u in node.all_input_nodes if u is not value):
            return None
        return self._unary(node, name, value)

    def _unary(self, node: fx.Node, name: str, value: fx.Node) -> Rule | None:
        if name in _POINTWISE_NAMES:
            return self._per_channel(value, keeps_zero=_POINTWISE_NAMES[name])
        if name in _SPATIAL_NAMES:
            return None if argument(node, "return_indices", 99) else self._spatial(value, _called_size(node, name))
        if name in _REDUCTIONS:
            return self._reduction(node, value)
        if name == "pad":
            return self._pad(node, value)
        if name == "flatten":
            return self._flatten(node, value) if _flattens_all(node) else None
        if name in ("view", "reshape"):
            return self._flatten(node, value) if self._views_as_flat(node, value) else None
        if name in ("size", "getattr", "dim"):
            return Look(Layout()) if self._spares_channels(node, value) else None
        return None

    def _concat(self, node: fx.Node) -> Rule | None:
        tensors = argument(node, "tensors", 0)
        if not isinstance(tensors, list | tuple) or not all(isinstance(u, fx.Node) for u in tensors):
            return None
        layouts = [self._layout(u) for u in tensors]
        first, widths = layouts[0], [layout.width for layout in layouts]
        dim = argument(node, "dim", 1, 0)
        on_channels = dim == 1 or (isinstance(dim, int) and first.ndim is not None and dim == 1 - first.ndim)
        same = all((layout.axis, layout.ndim) == (1, first.ndim) for layout in layouts)
        if not on_channels or not same or None in widths or len(set(tensors)) < len(tensors):
            return None
        known = tuple(width for width in widths if width is not None)
        return Concat(replace(first, width=sum(known)), tuple(tensors), known)

    def _elementwise(self, node: fx.Node, product: bool) -> Rule | None:
        values = [value for value in node.args[:2] if isinstance(value, fx.Node)]
        numbers = [value for value in node.args[:2] if isinstance(value, int | float)]
        if len(values) == 1 and len(numbers) == 1:
            return self._per_channel(values[0], keeps_zero=product)
        if len(values) != 2:
            return None
        layouts = [self._layout(value) for value in values]
        first, second = layouts
        if first.width is None or second.width is None or (first.axis, first.ndim) != (second.axis, second.ndim):
            return None
        if first.ndim is None and first.axis == 1:  # ranks may differ, and with them what is added to what
            return None
        widths = (first.width, second.width)
        if first.width != second.width and 1 not in widths:
            return None
        positions = first.positions if first.positions == second.positions else None
        if first.width < second.width:  # the wide one leads
            values, widths = values[::-1], widths[::-1]
        return Elementwise(
            replace(first, width=max(widths), positions=positions), tuple(values), widths, first.axis, product=product
        )

    def _reduction(self, node: fx.Node, value: fx.Node) -> Rule | None:
        """Mean, sum or maximum over positions."""
        layout = self._layout(value)
        dims = argument(node, "dim", 1)
        dims = [dims] if isinstance(dims, int) else dims
        if not isinstance(dims, list | tuple) or layout.width is None or layout.axis != 1:
            return None
        places = {_place(dim, layout.ndim) for dim in dims}
        if not all(place is not None and place >= 2 for place in places):
            return None
        keepdim = bool(argument(node, "keepdim", 2, False))
        ndim = layout.ndim
        everything = ndim is not None and len(places) == ndim - 2
        if ndim is not None and not keepdim:
            ndim -= len(places)
        return PerChannel(replace(layout, ndim=ndim, positions=1 if everything else None), (value,), (layout.width,))

    def _pad(self, node: fx.Node, value: fx.Node) -> Rule | None:
        """Padding of positions; with a value other than 0 the channel does not stay 0."""
        layout, amounts = self._layout(value), argument(node, "pad", 1)
        if layout.ndim is None or not isinstance(amounts, list | tuple) or len(amounts) > 2 * (layout.ndim - 2):
            return None
        rule = self._spatial(value)
        if not isinstance(rule, PerChannel):
            return None
        constant = argument(node, "mode", 2, "constant") == "constant"
        return replace(rule, keeps_zero=not constant or argument(node, "value", 3) in (None, 0))

    def _views_as_flat(self, node: fx.Node, value: fx.Node) -> bool:
        """`x.view(x.size(0), -1)`."""
        shape = node.args[1:]
        if len(shape) == 1 and isinstance(shape[0], list | tuple):
            shape = tuple(shape[0])
        if len(shape) != 2 or shape[1] != -1 or not isinstance(shape[0], fx.Node):
            return False
        source = _batch_size_of(shape[0])
        return source is not None and self._same_batch(value, source)

    def _same_batch(self, value: fx.Node, source: fx.Node) -> bool:
        """Whether `value` was made from `source` by operations that keep samples apart."""
        while value is not source:
            rule = self.rules[value]
            if isinstance(rule, Whole) or not rule.inputs:
                return False
            value = rule.inputs[0]
        return True

    def _spares_channels(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether a look at a value's shape does not see the number of channels."""
        layout = self._layout(value)
        name, what = called(node), argument(node, "dim", 1)
        if name == "dim" or (name == "getattr" and what in ("dtype", "device", "ndim")):
            return True
        if layout.width is None or layout.axis != 1:
            return layout.width is None
        if name == "size" and what is not None:
            return _is_spatial_or_batch(what, layout.ndim)
        if name == "getattr" and what != "shape":
            return False
        return all(
            called(user) == "getitem" and (not user.users or _is_spatial_or_batch(user.args[1], layout.ndim))
            for user in node.users
        )


def called(node: fx.Node) -> str:
    """Name of the function or method of torch that a node calls (without the `_` of in-place forms); else ''."""
    if node.op == "call_method":
        return str(node.target).removesuffix("_")
    home = (getattr(node.target, "__module__", None) or "torch").split(".")[0]
    if node.op != "call_function" or home not in ("torch", "torchvision", "_operator", "builtins"):
        return ""
    return str(getattr(node.target, "__name__", "")).removesuffix("_")


def first_argument(node: fx.Node) -> fx.Node | None:
    """The value a call works on; of several, the first."""
    value: Any = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("tensors"))
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return value if isinstance(value, fx.Node) else None


def argument(node: fx.Node, name: str, place: int, default: Any = None) -> Any:
    """Argument of a call, by name or place."""
    return node.kwargs.get(name, node.args[place] if place < len(node.args) else default)


def _shared_modules(modules: nn.Module, graph: fx.Graph) -> set[str]:
    """Modules with state that other calls use too: they cannot be cut for one of them."""
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    uses = Counter(id(tensor) for path in calls for tensor in _state(modules.get_submodule(path)))
    uses.update(id(_attribute(modules, str(node.target))) for node in graph.nodes if node.op == "get_attr")
    return {path for path in calls if any(uses[id(tensor)] > 1 for tensor in _state(modules.get_submodule(path)))}


def _state(module: nn.Module) -> list[Any]:
    return [*module.parameters(), *module.buffers()]


def _attribute(modules: nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(modules)


def _tensors(node: fx.Node, modules: nn.Module) -> dict[str, str]:
    """The tensors of a module, by their own and by their full name."""
    names = modules.get_submodule(str(node.target)).state_dict()
    return {name: f"{node.target}.{name}" for name in names}


def _has_hooks(module: nn.Module) -> bool:
    """Hooks may change what a module computes (old-style weight norm or pruning does it by hooks)."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _place(dim: object, ndim: int | None) -> int | None:
    """An axis counted from the front, if that can be said."""
    if not isinstance(dim, int):
        return None
    return dim if dim >= 0 else (dim + ndim if ndim is not None else None)


def _is_spatial_or_batch(index: object, ndim: int | None) -> bool:
    """Whether an axis or a slice of axes leaves out the channel axis."""
    if isinstance(index, slice):
        start = _place(index.start, ndim)
        return start is not None and start >= 2 and index.step is None
    place = _place(index, ndim)
    return place is not None and place != 1


def _flattens_all(node: fx.Node) -> bool:
    return (argument(node, "start_dim", 1, 0), argument(node, "end_dim", 2, -1)) == (1, -1)


def _batch_size_of(node: fx.Node) -> fx.Node | None:
    """The value whose batch size this node is."""
    if called(node) == "size" and node.args[1:] == (0,):
        return first_argument(node)
    if called(node) == "getitem" and node.args[1] == 0 and isinstance(node.args[0], fx.Node):
        shape = node.args[0]
        whole = called(shape) == "size" and len(shape.args) == 1
        if whole or (called(shape) == "getattr" and shape.args[1] == "shape"):
            return first_argument(shape)
    return None


def _pooled_size(module: Any) -> int | None:
    """Positions per channel behind an adaptive pooling."""
    if not type(module).__name__.startswith("Adaptive"):
        return None
    return _positions(module.output_size, int(type(module).__name__[-2]))


def _called_size(node: fx.Node, name: str) -> int | None:
    if not name.startswith("adaptive"):
        return None
    return _positions(argument(node, "output_size", 1), int(name[-2]))


def _positions(size: object, dims: int) -> int | None:
    sizes = [size] * dims if isinstance(size, int) else size
    if not isinstance(sizes, list | tuple) or not all(isinstance(extent, int) for extent in sizes):
        return None
    return prod(sizes)
