"""Train modular, cut, recombine: modular training of neural networks in PyTorch (MODA, arXiv 2411.01074).

The names below are imported at their first use, so that `import moda` is quick and needs no optional package:

    instrument      a model whose activations can be observed (TracingError where it cannot be traced)
    count_firings   firing rates per class and neuron
    decompose       firing rates -> Decomposition: one module per class
    mask, compose   the model of some classes; composed, it is physically smaller
    save_composed, load_composed   a composed model's files
    replace         another model's module in a weak model's output
    measure         size, overlap, FLOPs, accuracy
    models, data    architectures and data sets by name
    training        the training loop on Lightning (needs the extra `train`)
    ModularCallback the modular loss in somebody's own LightningModule (needs the extra `train`)
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moda import data, measure, models, training
    from moda.callback import ModularCallback
    from moda.compose import compose, mask
    from moda.composed_files import load_composed, save_composed
    from moda.config import TrainingConfig
    from moda.decompose import Decomposition, FiringRates, count_firings, decompose
    from moda.replace import replace
    from moda.taps import InstrumentedModel, TracingError, instrument
    from moda_kernels import __version__

__all__ = [
    "Decomposition",
    "FiringRates",
    "InstrumentedModel",
    "ModularCallback",
    "TracingError",
    "TrainingConfig",
    "__version__",
    "compose",
    "count_firings",
    "data",
    "decompose",
    "instrument",
    "load_composed",
    "mask",
    "measure",
    "models",
    "replace",
    "save_composed",
    "training",
]

_MODULES = frozenset({"data", "measure", "models", "training"})
_HOME = {
    "Decomposition": "decompose",
    "FiringRates": "decompose",
    "InstrumentedModel": "taps",
    "ModularCallback": "callback",
    "TracingError": "taps",
    "TrainingConfig": "config",
    "compose": "compose",
    "count_firings": "decompose",
    "decompose": "decompose",
    "instrument": "taps",
    "load_composed": "composed_files",
    "mask": "compose",
    "replace": "replace",
    "save_composed": "composed_files",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"moda.{name}")
    if name == "__version__":
        return importlib.import_module("moda_kernels").__version__
    if name in _HOME:
        value = getattr(importlib.import_module(f"moda.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'moda' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Three functions bear the name of the file they live in. Importing the file binds its name in the package to the
    module; here it stays the function's.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
