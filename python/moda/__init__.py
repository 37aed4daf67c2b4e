"""Train modular, decompose, recombine: modular training of neural networks in PyTorch (MODA, arXiv 2411.01074).

Functions and classes:

    observe         taps on a model whose own code goes on to run
    accelerate      standard training with batch norm and ReLU as one operation
    count_firings   firing rates per class and neuron
    attribute       how much of a class's margin goes through each neuron; activation_shares, without gradients
    decompose       firing rates, attributions or shares -> Decomposition: one module per class
    modularize      a network, a method of `methods` and data -> one module per class
    mask, compose   the model of some classes; composed, it is physically smaller
    save_composed, load_composed   a composed model's files
    replace         another model's module in a weak model's output
    ModularCallback the modular loss in somebody's own LightningModule (needs the extra `train`)

Modules:

    models, data    architectures and data sets by name
    methods         MODA, MwT, NeMo, GradSplitter, CNNSplitter behind one interface
    measure         size, overlap, FLOPs, accuracy
    export          a composed model as a torch.export or ONNX file
    runs            the settings and the folder of a training run
    training        the training loop on Lightning (needs the extra `train`)
    hf              a callback for Hugging Face's Trainer (needs transformers)
    study           reuse, replacement, sweeps and analysis over trained runs
    report, demo    pages of figures, and the demonstration (need the extra `train`)
    bench           the benchmarks of this machine

Each is imported at its first use, so that `import moda` is quick and needs no optional package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moda.lazy import submodules

if TYPE_CHECKING:
    from moda import bench, data, demo, hf, methods, models, report, runs, study, training
    from moda.composition import export, measure
    from moda.composition.compose import compose
    from moda.composition.files import load_composed, save_composed
    from moda.composition.masking import mask
    from moda.composition.replace import replace
    from moda.decomposition.attribution import attribute
    from moda.decomposition.container import Decomposition
    from moda.decomposition.counting import activation_shares, count_firings
    from moda.decomposition.rates import FiringRates
    from moda.decomposition.rule import decompose
    from moda.decomposition.scores import ActivationShares, Attributions
    from moda.methods.running import modularize
    from moda.observation.taps import Taps, accelerate, observe
    from moda.runs.config import TrainingConfig
    from moda.training.callback import ModularCallback
    from moda_kernels import __version__

__all__ = [
    "ActivationShares",
    "Attributions",
    "Decomposition",
    "FiringRates",
    "ModularCallback",
    "Taps",
    "TrainingConfig",
    "__version__",
    "accelerate",
    "activation_shares",
    "attribute",
    "bench",
    "compose",
    "count_firings",
    "data",
    "decompose",
    "demo",
    "export",
    "hf",
    "load_composed",
    "mask",
    "measure",
    "methods",
    "models",
    "modularize",
    "observe",
    "replace",
    "report",
    "runs",
    "save_composed",
    "study",
    "training",
]

_HOME = {
    "ActivationShares": "moda.decomposition.scores",
    "Attributions": "moda.decomposition.scores",
    "Decomposition": "moda.decomposition.container",
    "FiringRates": "moda.decomposition.rates",
    "ModularCallback": "moda.training.callback",
    "Taps": "moda.observation.taps",
    "TrainingConfig": "moda.runs.config",
    "__version__": "moda_kernels",
    "accelerate": "moda.observation.taps",
    "activation_shares": "moda.decomposition.counting",
    "attribute": "moda.decomposition.attribution",
    "compose": "moda.composition.compose",
    "count_firings": "moda.decomposition.counting",
    "decompose": "moda.decomposition.rule",
    "export": "moda.composition",
    "load_composed": "moda.composition.files",
    "mask": "moda.composition.masking",
    "measure": "moda.composition",
    "modularize": "moda.methods.running",
    "observe": "moda.observation.taps",
    "replace": "moda.composition.replace",
    "save_composed": "moda.composition.files",
}


_submodule = submodules(__name__)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    return _submodule(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
