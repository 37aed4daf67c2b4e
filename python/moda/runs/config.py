"""The settings of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moda import data as datasets
from moda import models
from moda.decomposition.settings import RULES, BudgetRule, FiringRule
from moda.decomposition.targets import TARGETS
from moda.methods.mwt import MwT
from moda.methods.nemo import NeMo
from moda.settings import Settings, setting, settings_of

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
ROUTES = ("auto", "grouped", "fused")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
AUTO, ON, OFF = GRAPHS = ("auto", "on", "off")
"""Steps are captured in a CUDA graph where they can be, or it is an error if they cannot, or never."""
TERMS = ("affinity", "dispersion", "compactness")
"""The weights of the modular terms of MODA."""
GATED = (MwT.name, NeMo.name)
"""Methods that train gates beside the model."""
METHODS = ("moda", *GATED)
"""Methods that modularize a model while it is trained."""
GATE_TERMS = {MwT.name: ("cohesion", "coupling"), NeMo.name: ("contrast",)}
"""The weights of the terms of methods that train gates."""

_DATA, _OBJECTIVE, _OPTIMISATION = "Model and data", "Objective", "Optimisation"
_MACHINE, _FILES = "Machine", "Files"


@dataclass(frozen=True)
class DataOptions(Settings, command="train"):
    """The further options of data sets that commands offer; `moda.data.load` says which data set takes which."""

    image_size: int | None = setting(
        None,
        help="Images are resized to this many pixels a side (digits, imagefolder).",
        commands=("train", "replace", "compare"),
    )
    class_list: str | None = setting(
        None, help="This file lists the classes (imagefolder).", commands=("train", "import")
    )
    download: bool = setting(
        False, help="Fetch the data set if it is not there (cifar10, cifar100, svhn).", option="--download"
    )


@dataclass(frozen=True)
class TrainingConfig(Settings, command="train"):
    """Everything that decides what a training run computes, and how it runs. The defaults are the paper's.

    Models are trained by SGD with momentum (Nesterov's) and without weight decay; the learning rate is annealed to 0 by
    a cosine over `epochs`, one step per epoch; the last partial batch is kept and no model is selected (arXiv
    2411.01074). With all three weights 0 the model is trained the standard way: it is not observed and no modular term
    is computed. With another method than "moda" these weights have no meaning, and the method's own have.
    """

    model: str = setting(
        "small_vgg",
        help=f"The architecture: {', '.join(models.NAMES)}.",
        panel=_DATA,
        commands=("train", "import"),
    )
    data: str = setting(
        "digits", help=f"The data set: {', '.join(datasets.NAMES)}.", panel=_DATA, commands=("train", "import")
    )
    data_root: str | None = setting(
        None,
        help="The folder that holds the data set; ./data if it is not given.",
        panel=_DATA,
        commands=("train", "import"),
        runtime=True,
    )
    data_options: Mapping[str, Any] = setting(
        {},
        help="Further options of the data set, see `moda.data.load`.",
        panel=_DATA,
        commands=("train", "import"),
        entries=DataOptions,
    )
    width: float = setting(
        1.0, help="The multiplier of all hidden widths.", above=0, panel=_DATA, commands=("train", "import")
    )
    method: str = setting(
        "moda",
        help=f"The modularization method: {', '.join(METHODS)}.",
        choices=METHODS,
        panel=_OBJECTIVE,
    )
    affinity: float = setting(1.0, help="The weight of the affinity term.", at_least=0, panel=_OBJECTIVE)
    dispersion: float = setting(1.0, help="The weight of the dispersion term.", at_least=0, panel=_OBJECTIVE)
    compactness: float = setting(0.3, help="The weight of the compactness term.", at_least=0, panel=_OBJECTIVE)
    cohesion: float = setting(MwT.cohesion, help="With mwt: the weight of cohesion.", at_least=0, panel=_OBJECTIVE)
    coupling: float = setting(MwT.coupling, help="With mwt: the weight of coupling.", at_least=0, panel=_OBJECTIVE)
    contrast: float = setting(
        NeMo.contrast, help="With nemo: the weight of the contrastive term.", at_least=0, panel=_OBJECTIVE
    )
    temperature: float = setting(
        NeMo.temperature, help="With nemo: the temperature of the contrastive term.", above=0, panel=_OBJECTIVE
    )
    teacher: str | None = setting(
        None,
        help="With nemo and deit_small: the folder of a finished run on the same data, from whose model this one "
        "learns beside the labels (in the paper a standard resnet18).",
        panel=_OBJECTIVE,
    )
    epochs: int = setting(200, help="The number of passes over the training data.", at_least=1, panel=_OPTIMISATION)
    batch_size: int = setting(
        128, help="The samples of a step, over all processes together.", at_least=1, panel=_OPTIMISATION
    )
    learning_rate: float = setting(
        0.05,
        help="The learning rate before annealing.",
        above=0,
        panel=_OPTIMISATION,
        option="--learning-rate --lr",
    )
    momentum: float = setting(
        0.9, help="The momentum of SGD, Nesterov's where it is not 0.", at_least=0, below=1, panel=_OPTIMISATION
    )
    seed: int = setting(
        42,
        help="The seed of initial weights, data order, augmentation, and the split of data that has none of its own.",
        at_least=0,
        panel=_OPTIMISATION,
    )
    precision: str = setting(
        "32-true",
        help=f"The precision of training: {', '.join(PRECISIONS)}; 16-mixed needs a GPU.",
        choices=PRECISIONS,
        panel=_MACHINE,
    )
    backend: str = setting(
        "auto", help="The backend that computes the modular loss, see moda doctor.", panel=_OBJECTIVE
    )
    route: str = setting(
        "auto",
        help=f"What the taps record for the loss: {', '.join(ROUTES)}.",
        choices=ROUTES,
        panel=_OBJECTIVE,
    )
    accelerator: str = setting(
        "auto",
        help=f"The kind of device to train on: {', '.join(ACCELERATORS)}.",
        choices=ACCELERATORS,
        panel=_MACHINE,
        runtime=True,
    )
    graph: str = setting(
        AUTO,
        help=f"Whether steps on a GPU are captured in a CUDA graph and replayed: {', '.join(GRAPHS)}; auto: where they "
        "can be, and where not it says why.",
        choices=GRAPHS,
        panel=_MACHINE,
        runtime=True,
    )
    devices: int = setting(
        1,
        help="The number of GPUs, or of processes on the CPU; under torchrun, torchrun says it.",
        at_least=1,
        at_most=1 << 16,
        panel=_MACHINE,
        runtime=True,
    )
    strategy: str = setting(
        "auto",
        help="How training is spread over several devices: ddp, fsdp (FSDP2, which shares the weights out), or another "
        "of Lightning's; auto is ddp.",
        panel=_MACHINE,
        runtime=True,
    )
    timeout: float = setting(
        600.0,
        help="The seconds for which processes wait for one another before they give up.",
        above=0,
        at_most=1e7,
        panel=_MACHINE,
        runtime=True,
    )
    num_workers: int = setting(
        0,
        help="The processes that load data beside the one that trains.",
        at_least=0,
        at_most=1024,
        panel=_MACHINE,
        option="--workers",
        runtime=True,
    )
    log_every_steps: int = setting(
        50,
        help="A row is written to steps.csv every so many steps, which costs a synchronisation; with 0 never.",
        at_least=0,
        panel=_FILES,
        option="--log-every",
        runtime=True,
    )
    checkpoint_every_steps: int = setting(
        0,
        help="Beside the checkpoint of each epoch, one is written every so many steps; with 0 none.",
        at_least=0,
        panel=_FILES,
        option="--checkpoint-every",
        runtime=True,
    )
    keep_every_epochs: int = setting(
        0,
        help="The weights of every so many epochs are kept under checkpoints/; with 0 none.",
        at_least=0,
        panel=_FILES,
        option="--keep-every",
        runtime=True,
    )
    tensorboard: bool = setting(
        False,
        help="Also write TensorBoard files (this needs the package tensorboard).",
        panel=_FILES,
        option="--tensorboard/--no-tensorboard",
        runtime=True,
    )

    @property
    def modular(self) -> bool:
        """Whether gates are trained, or any modular term has a weight."""
        return self.gated or any(getattr(self, term) for term in TERMS)

    @property
    def gated(self) -> bool:
        """Whether the method trains gates beside the model."""
        return self.method in GATED

    @property
    def terms(self) -> tuple[str, ...]:
        """The weights of the terms that the method has beside cross-entropy."""
        return GATE_TERMS.get(self.method, TERMS)

    def standard(self) -> TrainingConfig:
        """Give a copy that trains the standard way: no gates, and all three modular terms have weight 0."""
        return self.changed(method="moda", **dict.fromkeys(TERMS, 0.0))


RUNTIME_SETTINGS = frozenset(name for name, declared in settings_of(TrainingConfig).items() if declared.runtime)
"""Settings that a resumed training may change: they decide how it runs, not what it computes."""


@dataclass(frozen=True)
class DecompositionSettings(Settings, command="decompose"):
    """How a run is decomposed into modules. The defaults are the paper's."""

    rule: str = setting(
        FiringRule.NAME,
        help="What neurons are chosen by: the published firing rates, shares of activation, or attributions.",
        choices=RULES,
    )

    threshold: float = setting(
        FiringRule.threshold, help="The firing rate from which a class keeps a neuron.", at_least=0, at_most=1
    )
    min_fraction: float = setting(
        FiringRule.min_fraction, help="The least share of a layer's neurons that a class keeps.", at_least=0, at_most=1
    )
    epsilon: str = setting(
        f"{BudgetRule.epsilon:g}",
        help="With shares or attributions: the share of a class's scores that is dropped, or `auto` for the largest "
        "that training data which is kept apart allows.",
    )
    tolerance: float = setting(
        0.5, help="With --epsilon auto: the percentage points that modules of two classes may lose.", at_least=0
    )
    target: str = setting("margin", help="With attributions: what is attributed.", choices=tuple(TARGETS))
    backend: str = setting("auto", help="The backend that counts, see moda doctor.")
    augmented: bool = setting(
        False, help="Count on augmented images, as the published code does.", option="--augmented"
    )
