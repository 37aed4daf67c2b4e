"""Plans and builds compositions of one model, whose graphs are read once."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from moda.composition.building import GraphBuilder, Pieces
from moda.composition.capture import Captured, CaptureError, Example, capture
from moda.composition.composed import ComposedModel, Facts, Route, parameters_of
from moda.composition.kept import Kept
from moda.composition.law import agree, changes, check, in_mode, plain_attributes, untouched
from moda.composition.movers import Labels
from moda.composition.observed import check_taps, example_of, names_every_tap
from moda.composition.planning import GraphPlan, Pick, merged, output_of
from moda.composition.reader import Reader
from moda.composition.report import Layer
from moda.composition.rules import Rule, Tap
from moda.composition.values import Bools, Grid, is_free, shape_of
from moda.decomposition.container import Decomposition, check_classes
from moda.inference import device_of
from moda.observation.attached import PART
from moda.observation.record import version_of
from moda.observation.taps import Taps
from moda.outputs import Output, class_dim, logit_places

__all__ = ["Composer", "Plan", "composer_of"]


@dataclass(frozen=True)
class Plan:
    """What a composition keeps of a model.

    Attributes:
        classes: in the order of the composed model's outputs.
        num_classes: of the whole model.
        masks: per tap (C,) bool, the neurons kept by at least one of the classes.
        kept: per entry of the model's state_dict the part that is kept; entries that are not listed are dropped.
        graphs: the plans of its graphs, by "eval" and "train".
    """

    classes: tuple[int, ...]
    num_classes: int
    masks: dict[str, Tensor]
    kept: dict[str, Kept]
    graphs: dict[str, GraphPlan]


class Composer:
    """Plans and builds compositions of one model.

    Args:
        taps: of the model, at the sites of the decomposition.
        example: what the model is called with, at least two samples.
        decomposition: whose sites and classes are composed.
        output: which outputs are logits, see `logit_places`.

    Raises:
        ValueError: taps or logits of the model are not those given, or it can be exported in neither mode; the message
            says which line of the model is in the way.
    """

    def __init__(self, taps: Taps, example: Example, decomposition: Decomposition, output: Output = None) -> None:
        self._model = weakref.ref(taps.model)
        self.example = example
        self.output = output
        self.num_classes = decomposition.num_classes
        self._masked = {site: mask.shape[1] for site, mask in decomposition.masks.items()}
        self._every = names_every_tap(decomposition)
        self._read_tensors()
        self.names: dict[str, tuple[str, ...]] = {}
        self.widths: dict[str, int] = {}
        self.refused: dict[str, str] = {}
        self.captured: dict[str, Captured] = {}
        self.readers: dict[str, Reader] = {}
        self.places: dict[str, dict[int, int]] = {}
        first: CaptureError | None = None
        moves: dict[Any, Labels] = {}
        for mode in ("eval", "train"):
            try:
                self._read(mode, taps, example, moves)
            except CaptureError as error:
                self.refused[mode] = str(error)
                first = first or error
        if not self.captured:
            assert first is not None
            raise first
        self._check_modes()

    @property
    def model(self) -> nn.Module:
        """The model, which a composer does not keep alive."""
        model = self._model()
        if model is None:
            raise RuntimeError("the model that this composer read is gone")
        return model

    def _read_tensors(self) -> None:
        """Shapes of parameters and buffers by name, and for each name the first one of the same tensor."""
        first: dict[int, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.first: dict[str, str] = {}
        self.parameters: set[str] = set()
        for name, tensor in parameters_of(self.model).items():
            self.shapes[name] = tuple(tensor.shape)
            self.first[name] = first.setdefault(id(tensor), name)
            if isinstance(tensor, nn.Parameter):
                self.parameters.add(name)

    def _read(self, mode: str, taps: Taps, example: Example, moves: dict[Any, Labels]) -> None:
        with in_mode(self.model, mode == "train"):
            self._run(mode, example)
            self.names[mode] = taps.names
            self.widths.update(zip(taps.names, taps.widths, strict=True))
            freedom = max((known.freedom for known in self.captured.values()), default=0)
            captured = capture(self.model, example, taps.marking, freedom)
        fixed = {name: t for name, t in parameters_of(self.model).items() if not t.is_floating_point()}
        self.captured[mode] = captured
        self.readers[mode] = Reader(captured.graph, {**fixed, **captured.constants}, moves)

    def _run(self, mode: str, example: Example) -> None:
        """Let taps know what the model does in this mode.

        Raises:
            CaptureError: what it gives depends on what it puts in place of its own attributes: a graph would not.
        """
        modules = dict(self.model.named_modules())
        before = {name: (plain_attributes(module), dict(module._buffers)) for name, module in modules.items()}
        held = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with untouched(self.model):
            state = torch.random.get_rng_state()
            first = self.model(*example.args, **example.kwargs)
            changed = [f"{name}.{own}".lstrip(".") for name, m in modules.items() for own in changes(m, *before[name])]
            if not changed:
                return
            torch.random.set_rng_state(state)
            for buffer, value in held:  # what is overwritten in place is followed
                buffer.copy_(value)
            if agree(first, self.model(*example.args, **example.kwargs)):
                return
        raise CaptureError(
            f"model: {type(self.model).__name__} gives something else each time it is called in {mode} mode, as it "
            f"assigns {', '.join(changed)}, which a composed model does not follow; overwrite buffers in place "
            "(self.name.copy_(...), self.name += 1), or use moda.mask"
        )

    def _check_modes(self) -> None:
        """A mode with other taps or outputs than the decomposition's is refused; both cannot be."""
        problems: list[ValueError] = []
        for mode in list(self.captured):
            try:
                self._check(mode, self.captured[mode])
            except ValueError as error:
                problems.append(error)
                self.refused[mode] = str(error)
                del self.captured[mode], self.readers[mode]
        if not self.captured:
            raise problems[0]

    def _check(self, mode: str, captured: Captured) -> None:
        names = self.names[mode]
        check_taps(names, [self.widths[name] for name in names], self._masked, self._every)
        values = output_of(captured.graph)
        shapes = [_fixed_shape(value) for value in values]
        places = logit_places(captured.outputs, shapes, self.num_classes, self.output)
        self.places[mode] = {place: class_dim(shapes[place], self.num_classes) for place in places}
        for rule in self.readers[mode].rules.values():
            if isinstance(rule, Tap) and rule.index >= len(names):
                raise ValueError(f"model: calls more activation functions in {mode} mode than were observed")

    # -- planning

    def plan(self, masks: Mapping[str, Tensor], classes: Sequence[int], *, published: bool = True) -> Plan:
        """The composition that keeps these neurons and classes.

        Args:
            masks: per site (C,) bool; taps that are no site keep all neurons.
            classes: class indices, each once, in the order the outputs are to have.
            published: see `moda.compose`.

        Raises:
            TypeError: `published` is no bool.
        """
        if not isinstance(published, bool):
            raise TypeError(f"published: expected a bool, got {type(published).__name__}")
        chosen = check_classes(classes, self.num_classes)
        masks = {
            name: masks[name].cpu() if name in masks else torch.ones(width, dtype=torch.bool)
            for name, width in self.widths.items()
        }
        extra: dict[str, dict[fx.Node, Bools]] = {mode: {} for mode in self.readers}
        while True:
            graphs = {
                mode: GraphPlan(
                    reader if published else reader.lean,
                    [masks[name].numpy() for name in self.names[mode]],
                    Pick(self.places[mode], np.asarray(chosen, dtype=np.int64), self.num_classes),
                    extra[mode],
                )
                for mode, reader in self.readers.items()
            }
            kept = self._kept(graphs)
            more = {mode: graph.mismatches(kept) for mode, graph in graphs.items()}
            if not any(more.values()):
                break
            for mode, found in more.items():
                extra[mode].update(found)
        return Plan(tuple(chosen), self.num_classes, masks, self._named(kept), graphs)

    def _kept(self, graphs: Mapping[str, GraphPlan]) -> dict[str, Kept]:
        """What the graphs together need of each parameter, buffer and constant, under the first of its names."""
        asked: dict[str, list[Grid]] = {}
        for graph in graphs.values():
            for name, grids in graph.states().items():
                asked.setdefault(name, []).extend(grids)
        return {name: Kept(merged(grids, self._shape(name))) for name, grids in asked.items()}

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        return next(tuple(c.constants[name].shape) for c in self.captured.values() if name in c.constants)

    def _named(self, kept: Mapping[str, Kept]) -> dict[str, Kept]:
        """Also under other names of the same tensors, with the counters of norms, in the model's own order."""
        named = {name: part for name, part in kept.items() if name not in self.shapes}
        for name, first in self.first.items():
            beside, _, own = name.rpartition(".")
            if first in kept:
                named[name] = kept[first]
            elif own == "num_batches_tracked" and f"{beside}.running_mean".lstrip(".") in kept:
                named[name] = Kept()
        return named

    # -- building

    def compose(
        self,
        taps: Taps,
        masks: Mapping[str, Tensor],
        classes: Iterable[int],
        class_names: Sequence[str] | None = None,
        *,
        published: bool = True,
    ) -> ComposedModel:
        """Plan, build and check; a model that does not keep the law is not handed out.

        Raises:
            RuntimeError: it does not keep the law.
        """
        composed = self.build(self.plan(masks, list(classes), published=published), class_names)
        check(composed, taps, self.example, self.names, self.output)
        left = sum(parameter.numel() for parameter in composed.parameters())
        whole = composed.facts.parameters
        dropped = sum(int((~mask).sum()) for mask in masks.values())
        if dropped and whole and left > 0.95 * whole:
            warnings.warn(
                f"compose: {left / whole:.1%} of the parameters are left; composed.report() says what stayed and why",
                stacklevel=3,
            )
        return composed

    def build(self, plan: Plan, class_names: Sequence[str] | None = None) -> ComposedModel:
        """The composed model that a plan describes; its parameters are copies of their own."""
        pieces = Pieces(set(self.shapes))
        routes = {}
        for mode, graph_plan in plan.graphs.items():
            captured = self.captured[mode]
            graph = GraphBuilder(graph_plan, plan.kept, pieces, self.names[mode]).build()
            routes[mode] = Route(graph, captured.inputs, captured.outputs, captured.fixed, captured.conditions)
        constants = {name: value for captured in self.captured.values() for name, value in captured.constants.items()}
        tensors, persistent = self._tensors(plan, constants)
        tensors.update({name: value.to(self._device()) for name, value in pieces.constants.items()})
        facts = Facts(
            classes=plan.classes,
            num_classes=plan.num_classes,
            masks=plan.masks,
            class_names=None if class_names is None else tuple(class_names),
            layers=tuple(self._layers(plan)),
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            refused=dict(self.refused),
        )
        training = (
            self.model.training if ("train" if self.model.training else "eval") in routes else not self.model.training
        )
        made = ComposedModel(tensors, persistent, pieces.modules, routes, facts, training=training)
        made.keep_frozen({name: module.training for name, module in self.model.named_modules()})
        return made

    def _device(self) -> torch.device:
        return device_of(self.model)

    def _tensors(self, plan: Plan, constants: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
        """Copies of what is kept, tied ones tied, and the names of those that a state_dict holds."""
        copies: dict[int, Tensor] = {}
        tensors: dict[str, Tensor] = {}
        own = parameters_of(self.model)
        for name, part in plan.kept.items():
            whole = own[name] if name in own else constants[name]
            if id(whole) not in copies:
                copies[id(whole)] = _copied(whole, part)
            tensors[name] = copies[id(whole)]
        saved = set(self.model.state_dict())
        return tensors, {name for name in tensors if name in saved}

    def _layers(self, plan: Plan) -> Iterator[Layer]:
        """What is left of each module with weights, and where dropped neurons were given back."""
        graph = plan.graphs.get("eval") or next(iter(plan.graphs.values()))
        homes: dict[str, list[str]] = {}
        for name in self.shapes:
            if name in self.parameters:
                homes.setdefault(name.rpartition(".")[0], []).append(name)
        for home, names in homes.items():
            widest = max(names, key=lambda name: (len(self.shapes[name]), prod(self.shapes[name])))
            shape = self.shapes[widest]
            rows = plan.kept[widest].shape(shape)[0] if widest in plan.kept and shape else 0
            left = sum(plan.kept[name].count(self.shapes[name]) for name in names if name in plan.kept)
            yield Layer(home, rows, shape[0] if shape else 0, left, sum(prod(self.shapes[name]) for name in names))
        yield from _whole_layers(graph)


def _whole_layers(graph: GraphPlan) -> Iterator[Layer]:
    """Operations that were given dropped neurons back."""
    for node, rule in graph.reader.rules.items():
        if rule.why and graph.is_used(node) and _refilled(graph, rule):
            place = node.meta.get("where", "")
            yield Layer(node.meta.get("path") or node.name, 0, 0, 0, 0, f"{rule.why}{f' ({place})' if place else ''}")


def _refilled(graph: GraphPlan, rule: Rule) -> bool:
    return any(
        source in graph.zeros and bool((graph.zeros[source] & graph.needed.get(source, graph.zeros[source])).any())
        for source in rule.sources
    )


def _fixed_shape(value: object) -> tuple[int, ...]:
    """The sizes of an output; -1 for those that follow the input, which are of no classes."""
    if not (isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)):
        return ()
    return tuple(-1 if is_free(value, dim) else size for dim, size in enumerate(shape_of(value)))


def _copied(tensor: Tensor, kept: Kept) -> Tensor:
    part = kept.of(tensor.detach())
    if part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
        part = part.clone()
    return nn.Parameter(part, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


_COMPARED = (bool, int, float, complex, str, bytes, type(None), tuple, list, dict, set)

_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Composer]] = weakref.WeakKeyDictionary()


def composer_of(taps: Taps, decomposition: Decomposition, example: Any = None, output: Output = None) -> Composer:
    """The composer of a model; one made before is used again where nothing that it read has changed.

    Raises:
        ValueError: as `Composer`, or there is no example.
    """
    model = taps.model
    known = _KNOWN.get(model)
    if example is None and known is not None and taps.example is None:
        given = known[1].example
    else:
        given = example_of(taps, example)
    key = _key(model, given, decomposition, output)
    if known is None or known[0] != key:
        known = key, Composer(taps, given, decomposition, output)
        _KNOWN[model] = known
    return known[1]


def _key(model: nn.Module, example: Example, decomposition: Decomposition, output: Output) -> Any:
    """What a composer has read: equal where it is the same."""
    modules = tuple((id(module), module.training, *_attributes(module)) for module in model.modules())
    tensors = tuple((id(t), t.shape, t.dtype, t.device, t.requires_grad) for t in parameters_of(model).values())
    structure, inputs = example.flat()
    shapes = tuple((x.shape, x.dtype) for x in inputs)
    named = output if isinstance(output, str | int | None) else tuple(output)
    sites = tuple((site, mask.shape) for site, mask in decomposition.masks.items())
    return modules, tensors, structure, shapes, sites, names_every_tap(decomposition), named


def _attributes(module: nn.Module) -> Iterator[Any]:
    """A module's own plain attributes, by value, and its other ones, by which object they are."""
    for name, value in vars(module).items():
        if name.startswith("_") or name in ("training", PART):
            continue
        if isinstance(value, Tensor):
            yield name, id(value), version_of(value)
        else:
            yield name, (repr(value) if isinstance(value, _COMPARED) else id(value))
