"""Observing activations without a trace: forward hooks on activation modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moda.observation.calls import ACTIVATION_MODULES
from moda.observation.names import NO_ACTIVATION, unique_name
from moda.observation.neuron_axis import module_neuron_dim
from moda.observation.recorder import Receiver, Recorder, inside_backward, neurons_second


class _VersionedRecorder(Recorder):
    """A recorder that notices when an activation was overwritten between its note and its hand-over."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._versions: list[int] = []

    def begin(self) -> None:
        """Start the record of a forward pass."""
        self.clear()
        self.names, self._versions = [], []

    def add(self, name: str, value: Tensor) -> None:
        """Note the next activation."""
        kept = value.clone() if value.is_inference() else value  # inference tensors tell no version
        self.names.append(name)
        self._versions.append(_version(kept))
        self.note(len(self.names) - 1, kept)

    def take(self) -> list[Tensor]:
        """As `Recorder.take`; RuntimeError if an activation is no longer what it was."""
        values = super().take()
        for name, version, value in zip(self.names, self._versions, values, strict=True):
            if _version(value) != version:
                raise RuntimeError(
                    f"activation {name!r} was overwritten in place after it was recorded; make the operation that "
                    "follows it work out of place (inplace=False)"
                )
        return values


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


class HookedModel(nn.Module):
    """A model whose activation modules are observed by hooks; made by `instrument(model, method="hooks")`.

    It is the same kind of model (a subclass of the model's own class that shares submodules, parameters, buffers
    and state_dict keys with it) with `taps`, `activations()` and `recording()`. Hooks are in place only during its
    own forward pass. Neurons are the last axis where the module with neurons that ran last before the activation
    has them there. Functional activations are not seen, `mask` and `compose` do not accept it, and it is not
    meant for torch.compile.
    """

    _recorder: _VersionedRecorder

    @property
    def taps(self) -> list[str]:
        """Names of the activation calls of the last recorded forward pass, in order; RuntimeError before one."""
        if not self._recorder.names:
            raise RuntimeError("taps: known only after the first recorded forward pass of a hooked model")
        return list(self._recorder.names)

    def activations(self) -> list[Tensor]:
        """As `InstrumentedModel.activations`; RuntimeError also if the model overwrote an activation in place."""
        return self._recorder.take()

    @contextmanager
    def recording(self, receiver: Receiver | None = None) -> Iterator[None]:
        """As `InstrumentedModel.recording`."""
        with self._recorder.forcing(receiver):
            yield

    @contextmanager
    def overwriting(self) -> Iterator[None]:
        """As `InstrumentedModel.overwriting`, but hooks replace no ReLU: nothing changes."""
        yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own forward."""
        watch = _Watch(self)
        try:
            return super().forward(*args, **kwargs)  # the model's own class comes next
        finally:
            watch.end()


def hooked(model: nn.Module) -> HookedModel:
    """A `HookedModel` of `model`; ValueError if it has no activation module."""
    if not any(isinstance(module, ACTIVATION_MODULES) for module in model.modules()):
        raise ValueError(NO_ACTIVATION)
    made = copy.copy(model)
    made.__class__ = type(f"Hooked{type(model).__name__}", (HookedModel, type(model)), {})
    made.__dict__["_recorder"] = _VersionedRecorder()
    return cast(HookedModel, made)


class _Watch:
    """The hooks of one forward pass of a hooked model."""

    def __init__(self, model: HookedModel) -> None:
        self.recorder = model._recorder
        self.names: set[str] = set()
        self.neuron_dim = 1  # of the module with neurons of its own that ran last
        self.handles: list[RemovableHandle] = []
        if inside_backward():
            return
        self.recorder.clear()
        if self.recorder.recording:
            self.recorder.begin()
            self._watch(model)

    def _watch(self, model: HookedModel) -> None:
        for path, module in model.named_modules():
            if isinstance(module, ACTIVATION_MODULES):
                self.handles.append(module.register_forward_hook(self._noting(path)))
            elif (dim := module_neuron_dim(module)) is not None:
                self.handles.append(module.register_forward_hook(self._passing(dim)))

    def _noting(self, path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(_module: nn.Module, _inputs: Any, value: Tensor) -> None:
            self.recorder.add(unique_name(path, self.names), neurons_second(value, self.neuron_dim))

        return note

    def _passing(self, dim: int) -> Callable[[nn.Module, Any, Any], None]:
        def passing(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            self.neuron_dim = dim

        return passing

    def end(self) -> None:
        """Take the hooks away again."""
        for handle in self.handles:
            handle.remove()
