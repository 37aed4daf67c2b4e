"""The composed model: a module with the parameters and buffers that are left, under the names they had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor, fx, nn

from moda.composition.conditions import holds
from moda.composition.graphs import code_of, compiled, describe, restore
from moda.composition.report import Layer, table
from moda.structure import Structure, flatten

__all__ = ["ComposedModel", "Facts", "Route"]


@dataclass(frozen=True)
class Route:
    """How the model runs in one mode.

    Attributes:
        graph: takes the tensors of the inputs and gives those of the outputs.
        inputs: how the inputs are nested.
        outputs: how the outputs are nested.
        fixed: per input tensor the sizes that it must have; None where any will do.
        conditions: on those, see `moda.composition.conditions`.
    """

    graph: fx.Graph
    inputs: Structure
    outputs: Structure
    fixed: tuple[tuple[int | None, ...], ...]
    conditions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What a composed model knows of itself.

    Attributes:
        classes: in the order of the outputs.
        num_classes: of the whole model.
        masks: per tap of the whole model (C,) bool: the neurons kept.
        class_names: names of all classes of the whole model, if known.
        layers: what is left of each layer.
        parameters: of the whole model.
        refused: why the model cannot be trained, or cannot be evaluated, if so: by "train" or "eval".
    """

    classes: tuple[int, ...]
    num_classes: int
    masks: Mapping[str, Tensor]
    class_names: tuple[str, ...] | None = None
    layers: tuple[Layer, ...] = ()
    parameters: int = 0
    refused: Mapping[str, str] = field(default_factory=dict)


class ComposedModel(nn.Module):
    """The model of some classes, made by `moda.compose`: dropped neurons are absent.

    It is called as the model it was made from, and gives what that gives, with the outputs of the classes alone.
    Parameters and buffers have the names they had. `train()` and `eval()` switch between what the model does in
    training and in evaluation.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        persistent: set[str],
        modules: Mapping[str, nn.Module],
        routes: Mapping[str, Route],
        facts: Facts,
        *,
        training: bool = False,
    ) -> None:
        super().__init__()
        for name, module in modules.items():
            _place(self, name, module)
        for name, tensor in tensors.items():
            home, own = _home(self, name)
            _register(home, own, tensor, name in persistent)
        self._routes = dict(routes)
        self._facts = facts
        self._frozen: tuple[str, ...] = ()
        self._run: dict[str, Callable[..., Any]] = {}
        nn.Module.train(self, training)

    # -- what it is

    @property
    def facts(self) -> Facts:
        """What it knows of itself."""
        return self._facts

    @property
    def classes(self) -> tuple[int, ...]:
        """Class indices, in the order of the outputs."""
        return self._facts.classes

    @property
    def num_classes(self) -> int:
        """Number of classes of the whole model."""
        return self._facts.num_classes

    @property
    def masks(self) -> dict[str, Tensor]:
        """Per tap of the whole model (C,) bool: the neurons kept."""
        return dict(self._facts.masks)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, in the order of the outputs; None if they are not known."""
        names = self._facts.class_names
        return None if names is None else tuple(names[c] for c in self.classes)

    @property
    def routes(self) -> dict[str, Route]:
        """How it runs, by "train" and "eval"."""
        return dict(self._routes)

    def report(self) -> str:
        """Every layer with the neurons and parameters that are left, and what stayed whole and why."""
        left = sum(parameter.numel() for parameter in self.parameters())
        return table(self._facts.layers, left, self._facts.parameters)

    def keep_frozen(self, modes: Mapping[str, bool]) -> None:
        """Let modules that the model held in evaluation mode while it was in training stay so in training.

        Args:
            modes: per module of the model whether it was in training mode.
        """
        if modes.get(""):
            self.freeze([name for name, mode in modes.items() if not mode])

    def freeze(self, names: Iterable[str]) -> None:
        """Let these of its modules stay in evaluation mode in training."""
        held = dict(self.named_modules())
        self._frozen = tuple(name for name in names if name in held)
        self.train(self.training)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Modules that stay in evaluation mode in training."""
        return self._frozen

    def activations(self) -> dict[str, nn.Module]:
        """The activation modules that its graphs call, by name."""
        names = {str(n.target) for r in self._routes.values() for n in r.graph.nodes if n.op == "call_module"}
        return {name: self.get_submodule(name) for name in sorted(names)}

    # -- running

    def train(self, mode: bool = True) -> ComposedModel:
        """Switch to training, or to evaluation; modules that the model kept frozen stay in evaluation mode.

        Raises:
            RuntimeError: the model could not be exported in that mode; the message says why.
        """
        key = "train" if mode else "eval"
        if key not in self._routes:
            why = self._facts.refused.get(key, "it has no such graph")
            raise RuntimeError(f"this composed model cannot be put into {key} mode: {why}")
        super().train(mode)
        for name in self._frozen if mode else ():
            self.get_submodule(name).train(False)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model it was made from; outputs of the classes alone."""
        key = "train" if self.training else "eval"
        route = self._routes.get(key)
        if route is None:
            raise RuntimeError(f"this composed model has no graph for {key} mode: {self._facts.refused.get(key, '')}")
        tensors = _tensors_of(route, args, kwargs)
        run = self._run.get(key)
        if run is None:
            run = self._run[key] = compiled(code_of(route.graph, _state_of(self), _module))
        return route.outputs.rebuild(iter(run(self, *tensors)))

    def extra_repr(self) -> str:
        """Classes."""
        return f"classes={list(self.classes)} of {self.num_classes}"

    # -- copies

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_run"] = {}
        state["_routes"] = {
            key: (describe(route.graph), route.inputs, route.outputs, route.fixed, route.conditions)
            for key, route in self._routes.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        routes = state["_routes"]
        self._routes = {key: Route(restore(nodes), *rest) for key, (nodes, *rest) in routes.items()}


def _tensors_of(route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    given, tensors = flatten((list(args), kwargs), "input")
    if given != route.inputs:
        given, tensors = _in_order(route, args, kwargs)
    if given != route.inputs:
        raise TypeError(
            f"input: expected what the model was composed with, {_said(route.inputs)}, got {_said(given)}; compose it "
            "again with an example like this call"
        )
    for place, (tensor, sizes) in enumerate(zip(tensors, route.fixed, strict=True)):
        if tensor.dim() != len(sizes) or any(
            want is not None and have != want for have, want in zip(tensor.shape, sizes, strict=True)
        ):
            expected = ", ".join("any" if size is None else str(size) for size in sizes)
            raise ValueError(f"input {place}: expected shape ({expected}), got {tuple(tensor.shape)}")
    if route.conditions:
        _check_conditions(route, tuple(tuple(tensor.shape) for tensor in tensors))
    return tensors


def _check_conditions(route: Route, sizes: tuple[tuple[int, ...], ...]) -> None:
    if not all(type(size) is int for shape in sizes for size in shape) or _meets(route.conditions, sizes):
        return  # sizes that are being traced are checked by who traces
    broken = next(condition for condition in route.conditions if not holds(condition, sizes))
    raise ValueError(
        f"input: its sizes, {', '.join(map(str, sizes))}, are not such as the model was composed with: {broken}; "
        "compose it again with an example of these sizes"
    )


@lru_cache(maxsize=1024)
def _meets(conditions: tuple[str, ...], sizes: tuple[tuple[int, ...], ...]) -> bool:
    return all(holds(condition, sizes) for condition in conditions)


def _in_order(route: Route, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Structure, list[Tensor]]:
    """With keyword arguments in the order that they were composed with."""
    order = route.inputs.parts[1].keys
    if set(kwargs) != set(order):
        return flatten((list(args), kwargs), "input")
    return flatten((list(args), {key: kwargs[key] for key in order}), "input")


def _said(structure: Structure) -> str:
    if structure.kind == "tensor":
        return "a tensor"
    if structure.kind == "constant":
        return repr(structure.value)
    keys = structure.keys or (None,) * len(structure.parts)
    parts = [f"{key}={_said(part)}" if key else _said(part) for key, part in zip(keys, structure.parts, strict=True)]
    return f"{structure.kind}({', '.join(parts)})"


def _home(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds something of this name, made if need be, and the name in it."""
    *path, own = name.split(".")
    for part in path:
        if part not in root._modules:
            root._modules[part] = nn.Module()
        child = root._modules[part]
        assert child is not None
        root = child
    return root, own


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    home, own = _home(root, name)
    home._modules[own] = module


def _module(name: str) -> str:
    return "self" + "".join(f"._modules[{part!r}]" for part in name.split(".") if part)


def _state_of(root: nn.Module) -> Callable[[str], str]:
    """How code gets at a parameter or buffer: by the dicts that hold it, as any name is allowed there."""

    def state(name: str) -> str:
        home, own = _home(root, name)
        return f"{_module(name.rpartition('.')[0])}.{'_parameters' if own in home._parameters else '_buffers'}[{own!r}]"

    return state


def _register(home: nn.Module, name: str, tensor: Tensor, persistent: bool) -> None:
    """Into the dicts themselves, as a model may call its own tensors what a composed model calls its properties."""
    if isinstance(tensor, nn.Parameter):
        home._parameters[name] = tensor
        return
    home._buffers[name] = tensor
    if not persistent:
        home._non_persistent_buffers_set.add(name)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones under each of their names."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors
