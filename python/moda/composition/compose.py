"""Masking and composing: the model of some classes, with the dropped neurons at 0 or physically absent.

    compose(model, decomposition, classes)(x) == mask(model, decomposition, classes)(x)

for every traced model, any masks and any classes (in evaluation mode, up to rounding).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from moda.composition.channels import Kept
from moda.composition.slicing import Alignment, Plan, check_model, plan
from moda.decomposition.container import Decomposition, check_classes
from moda.observation.taps import InstrumentedModel, Tap

__all__ = [
    "Align",
    "ComposedModel",
    "MaskTap",
    "MaskedModel",
    "PickClasses",
    "SubtaskModel",
    "build",
    "compose",
    "mask",
]


class SubtaskModel(fx.GraphModule):
    """A traced model of some classes, without taps: column j of its output is class `classes[j]`."""

    @property
    def classes(self) -> tuple[int, ...]:
        """Class indices, in the order of the outputs."""
        return tuple(self.meta["classes"])

    @property
    def num_classes(self) -> int:
        """Number of classes of the whole model."""
        return int(self.meta["num_classes"])

    @property
    def masks(self) -> dict[str, Tensor]:
        """Per tap of the whole model (C,) bool: the neurons kept."""
        return dict(self.meta["masks"])


class MaskedModel(SubtaskModel):
    """Made by `mask`: the whole model, dropped neurons at 0."""


class ComposedModel(SubtaskModel):
    """Made by `compose`: dropped neurons are absent."""


class Align(nn.Module):
    """Takes some channels of a value, in a given order, and puts zeros where there is none to take."""

    source: Tensor
    target: Tensor

    def __init__(self, alignment: Alignment) -> None:
        super().__init__()
        self.axis = alignment.axis
        self.width = alignment.width
        self.fills = len(alignment.source) < alignment.width
        self.register_buffer("source", torch.from_numpy(alignment.source.copy()), persistent=False)
        self.register_buffer("target", torch.from_numpy(alignment.target.copy()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *) -> (N, width, *), or along the last axis."""
        taken = x.index_select(self.axis, self.source)
        if not self.fills:
            return taken
        shape = list(x.shape)
        shape[self.axis] = self.width
        return x.new_zeros(shape).index_copy(self.axis, self.target, taken)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{len(self.source)} channels into {self.width}"


class MaskTap(nn.Module):
    """Multiplies the neurons of an activation by 0 or 1."""

    keep: Tensor

    def __init__(self, keep: Tensor, neuron_dim: int) -> None:
        super().__init__()
        self.neuron_dim = neuron_dim
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` with the dropped neurons at 0."""
        shape = [1] * x.dim()
        shape[self.neuron_dim] = -1
        return x * self.keep.view(shape)


class PickClasses(nn.Module):
    """The logits of some classes, in their order."""

    classes: Tensor

    def __init__(self, classes: Tensor) -> None:
        super().__init__()
        self.register_buffer("classes", classes, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """(N, K) -> (N, len(classes))."""
        return logits.index_select(1, self.classes)


def mask(model: InstrumentedModel, decomposition: Decomposition, classes: Iterable[int]) -> MaskedModel:
    """The whole model with every neuron that none of the classes keeps at 0, and the outputs of the classes.

    Shares parameters, buffers and submodules with `model`.

    Args:
        model: `moda.instrument(model)`.
        decomposition: modules of this model.
        classes: class indices, each once; the outputs (N, len(classes)) are in this order.

    Raises:
        TypeError, ValueError: as `compose`.
    """
    chosen = check_classes(classes, decomposition.num_classes)
    widths = {tap: kept.shape[1] for tap, kept in decomposition.masks.items()}
    check_model(model, widths, decomposition.num_classes)
    masks, device = decomposition.select(chosen), _device(model)
    graph = copy.deepcopy(model.graph)
    parts: dict[str, Any] = {"_logits": PickClasses(torch.tensor(chosen, device=device))}
    for node in list(graph.nodes):
        if (tap := _tap(model, node)) is not None:
            parts[f"_masks.{tap.index}"] = MaskTap(masks[tap.name].to(device), tap.neuron_dim)
            parts[str(node.target)] = nn.ReLU(inplace=tap.inplace) if tap.relu else nn.Identity()
            _follow_with(f"_masks.{tap.index}", node)
        elif node.op in ("call_module", "get_attr"):
            parts[str(node.target)] = operator.attrgetter(str(node.target))(model)
        elif node.op == "output":
            _follow_with("_logits", node.all_input_nodes[0])
    made = MaskedModel(parts, graph, "MaskedModel")
    _settle(made, model, {"classes": tuple(chosen), "num_classes": decomposition.num_classes, "masks": masks})
    return made


def compose(model: InstrumentedModel, decomposition: Decomposition, classes: Iterable[int]) -> ComposedModel:
    """The smaller model that holds the union of the classes' modules and puts out only their logits.

    It computes what `mask(model, decomposition, classes)` computes, with the dropped neurons physically absent:
    rows and columns of weights, entries of norms. Its parameters are copies of their own, trainable as those of
    `model` are, on the same device and in the same mode (train or eval); `model` is left as it is.

    Args:
        model: `moda.instrument(model)`.
        decomposition: modules of this model.
        classes: class indices, each once; the outputs (N, len(classes)) are in this order.

    Raises:
        TypeError: `model` is not an instrumented (traced) model, or `classes` is no sequence of integers.
        ValueError: no class, one twice or an unknown one; or the decomposition's taps, neurons or number of classes
            are not those of the model.
    """
    return build(model, plan(model, decomposition, classes))


def build(model: InstrumentedModel, plan: Plan) -> ComposedModel:
    """The composed model that a plan of this model describes."""
    graph = fx.Graph()
    parts: dict[str, Any] = {}
    copies: dict[int, Any] = {}  # id of a tensor or module of `model` -> its copy; keeps tied tensors tied
    values: dict[fx.Node, fx.Node] = {}
    aligner = _Aligner(graph, plan, parts, _device(model))
    for node in plan.graph.nodes:
        bring = partial(aligner.bring, node, values)
        tap = _tap(model, node)
        if tap is None:
            _add_part(model, node, plan, parts, copies)
            values[node] = graph.node_copy(node, bring)
        elif tap.relu:
            name = tap.name if tap.name not in parts else f"_activations.{tap.index}"
            parts[name] = nn.ReLU(inplace=tap.inplace)
            values[node] = graph.call_module(name, (bring(node.args[0]),))
        else:
            values[node] = bring(node.args[0])
    composed = ComposedModel(parts, graph, "ComposedModel")
    _settle(composed, model, {"classes": plan.classes, "num_classes": plan.num_classes, "masks": plan.masks})
    return composed


class _Aligner:
    """Puts `Align` modules where channels have to be moved; those that do the same to one value are one."""

    def __init__(self, graph: fx.Graph, plan: Plan, parts: dict[str, Any], device: torch.device) -> None:
        self.graph, self.plan, self.parts, self.device = graph, plan, parts, device
        self.made: dict[tuple[fx.Node, Any], fx.Node] = {}

    def bring(self, node: fx.Node, values: Mapping[fx.Node, fx.Node], argument: fx.Node) -> fx.Node:
        """What `node` is given for its original argument."""
        value, alignment = values[argument], self.plan.alignments.get((node, argument))
        if alignment is None:
            return value
        key = (value, alignment.key())
        if key not in self.made:
            name = f"_aligns.{len(self.made)}"
            self.parts[name] = Align(alignment).to(self.device)
            self.made[key] = self.graph.call_module(name, (value,))
        return self.made[key]


def _add_part(model: nn.Module, node: fx.Node, plan: Plan, parts: dict[str, Any], copies: dict[int, Any]) -> None:
    """The module or tensor that a node refers to, cut as planned."""
    path = str(node.target)
    if node.op not in ("call_module", "get_attr") or path in parts:
        return
    part = operator.attrgetter(path)(model)
    tensors = part.state_dict(keep_vars=True) if isinstance(part, nn.Module) else {"": part}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and id(tensor) not in copies:
            copies[id(tensor)] = _cut(tensor, plan.kept[f"{path}.{name}" if name else path])
    parts[path] = copy.deepcopy(part, copies)
    route = plan.routes[node]
    if isinstance(part, nn.Module) and route.output is not None:
        _resize(parts[path], len(route.inputs[0]), len(route.output))


def _cut(tensor: Tensor, kept: Kept) -> Tensor:
    """A copy of the kept part."""
    part = tensor.detach()
    for dim, indices in enumerate((kept.rows, kept.columns)):
        if indices is not None:
            part = part.index_select(dim, torch.from_numpy(indices).to(tensor.device))
    if part.data_ptr() == tensor.data_ptr():
        part = part.clone()
    return nn.Parameter(part, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


def _resize(module: nn.Module, inputs: int, outputs: int) -> None:
    """Make a sliced layer's own account of its size true."""
    if isinstance(module, _ConvNd):
        module.groups = inputs // module.weight.shape[1]
        module.in_channels, module.out_channels = inputs, outputs
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = inputs, outputs
    elif isinstance(module, _NormBase):
        module.num_features = outputs
    elif isinstance(module, nn.PReLU) and module.num_parameters > 1:
        module.num_parameters = outputs


def _settle(made: SubtaskModel, model: nn.Module, facts: Mapping[str, Any]) -> None:
    """Train or eval mode as the parts of `model` under the same names, and what the new model knows of itself."""
    made.graph.lint()
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in made.named_modules():
        module.training = modes.get(name, model.training)
    made.meta.update(facts)


def _tap(model: nn.Module, node: fx.Node) -> Tap | None:
    """The tap that a node calls, if it does."""
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, Tap) else None


def _follow_with(name: str, node: fx.Node) -> None:
    """Put a call of module `name` behind a node."""
    with node.graph.inserting_after(node):
        follower = node.graph.call_module(name, (node,))
    node.replace_all_uses_with(follower, delete_user_cb=lambda user: user is not follower)


def _device(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
