"""The settings of a training run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")
ROUTES = ("auto", "grouped", "fused")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")

TERMS = ("affinity", "dispersion", "compactness")
"""The weights of the modular terms."""

# Settings that a resumed training may change: they decide how it runs, not what it computes.
RUNTIME_SETTINGS = frozenset(
    {
        "data_root",
        "accelerator",
        "devices",
        "strategy",
        "timeout",
        "num_workers",
        "log_every_steps",
        "checkpoint_every_steps",
        "keep_every_epochs",
        "tensorboard",
    }
)


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides what a training run computes, and how it runs. The defaults are the paper's.

    SGD with momentum and Nesterov, no weight decay, cosine annealing to 0 over `epochs` stepped once per epoch, the
    last partial batch kept, no model selection (arXiv 2411.01074). With all three weights 0 the model is trained the
    standard way: it is not instrumented and no modular term is computed.

    Attributes:
        model: a name of `moda.models.NAMES`.
        data: a name of `moda.data.NAMES`.
        data_root: folder that data sets are read from; None: the default of `moda.data`.
        data_options: further options of that data set, see `moda.data.load`.
        width: width multiplier of the model.
        affinity: weight of the affinity term (the paper's alpha).
        dispersion: weight of the dispersion term (beta).
        compactness: weight of the compactness term (gamma).
        epochs: passes over the training data.
        batch_size: samples per optimiser step, over all processes together.
        learning_rate: before annealing.
        momentum: of SGD, with Nesterov's correction where it is not 0.
        seed: of initial weights, data order, augmentation and the split of data sets that come without one.
        precision: "32-true", "bf16-mixed", "16-mixed" (GPU only) or "64-true".
        backend: of the modular loss, see `moda_kernels.backends`.
        route: "grouped", "fused" or "auto": what the taps record for the loss, see `moda.instrument`.
        accelerator: "auto", "cpu", "gpu", "cuda" or "mps".
        devices: how many devices (on the CPU: processes) to train on; under torchrun it says so.
        strategy: how the training is spread over them: "ddp" (with "auto", if there are several), "fsdp" (FSDP2,
            weights shared out), or another of Lightning's.
        timeout: seconds that processes wait for one another before they give up.
        num_workers: processes that load data beside the training one.
        log_every_steps: write a row of steps.csv every so many steps; 0: never. Each row costs one synchronisation.
        checkpoint_every_steps: beside one checkpoint per epoch, one every so many steps; 0: none.
        keep_every_epochs: keep the weights of every so many epochs under checkpoints/; 0: none.
        tensorboard: also write TensorBoard files (needs the package `tensorboard`).

    Raises:
        TypeError, ValueError: a field is of a wrong type or out of range; the message names it.
    """

    model: str = "small_vgg"
    data: str = "digits"
    data_root: str | None = None
    data_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    width: float = 1.0
    affinity: float = 1.0
    dispersion: float = 1.0
    compactness: float = 0.3
    epochs: int = 200
    batch_size: int = 128
    learning_rate: float = 0.05
    momentum: float = 0.9
    seed: int = 42
    precision: str = "32-true"
    backend: str = "auto"
    route: str = "auto"
    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    timeout: float = 600.0
    num_workers: int = 0
    log_every_steps: int = 50
    checkpoint_every_steps: int = 0
    keep_every_epochs: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _CHECKS[field.name](field.name, getattr(self, field.name)))

    @property
    def modular(self) -> bool:
        """Whether any modular term has a weight."""
        return any(getattr(self, term) for term in TERMS)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """What `to_dict` gave; fields that are missing get their defaults.

        Raises:
            TypeError, ValueError: a field is unknown, of a wrong type or out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{unknown[0]}: unknown setting; expected one of {', '.join(known)}")
        return cls(**values)

    def standard(self) -> TrainingConfig:
        """A copy that trains the standard way: all three modular terms have weight 0."""
        return self.changed(**dict.fromkeys(TERMS, 0.0))

    def changed(self, **values: Any) -> TrainingConfig:
        """A copy with other values in some fields."""
        return dataclasses.replace(self, **values)


_Check = Callable[[str, Any], Any]


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name}: expected a non-empty string")
    return value


def _optional_text(name: str, value: Any) -> str | None:
    return None if value is None else _text(name, value)


def _options(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a mapping, got {type(value).__name__}")
    for key, option in value.items():
        nested = (
            option.values() if isinstance(option, Mapping) and all(isinstance(k, str) for k in option) else [option]
        )
        if not isinstance(key, str) or not all(isinstance(item, str | int | float | bool | None) for item in nested):
            raise TypeError(f"{name}[{key!r}]: expected a string, number, true, false or null, got {option!r}")
    return {key: dict(option) if isinstance(option, Mapping) else option for key, option in value.items()}


def _one_of(choices: tuple[str, ...]) -> _Check:
    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        return str(value)

    return check


def _integer(minimum: int) -> _Check:
    def check(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
        if value < minimum:
            raise ValueError(f"{name}: expected at least {minimum}, got {value}")
        return value

    return check


def _number(minimum: float, *, above: bool = False, below: float = math.inf) -> _Check:
    def check(name: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        low = value > minimum if above else value >= minimum
        if not (math.isfinite(value) and low and value < below):
            bound = f"greater than {minimum:g}" if above else f"of at least {minimum:g}"
            bound += f" and less than {below:g}" if math.isfinite(below) else ""
            raise ValueError(f"{name}: expected a finite number {bound}, got {value}")
        return float(value)

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected true or false, got {value!r}")
    return value


_CHECKS: dict[str, _Check] = {
    "model": _text,
    "data": _text,
    "data_root": _optional_text,
    "data_options": _options,
    "width": _number(0, above=True),
    "affinity": _number(0),
    "dispersion": _number(0),
    "compactness": _number(0),
    "epochs": _integer(1),
    "batch_size": _integer(1),
    "learning_rate": _number(0, above=True),
    "momentum": _number(0, below=1),
    "seed": _integer(0),
    "precision": _one_of(PRECISIONS),
    "backend": _text,
    "route": _one_of(ROUTES),
    "accelerator": _one_of(ACCELERATORS),
    "devices": _integer(1),
    "strategy": _text,
    "timeout": _number(0, above=True),
    "num_workers": _integer(0),
    "log_every_steps": _integer(0),
    "checkpoint_every_steps": _integer(0),
    "keep_every_epochs": _integer(0),
    "tensorboard": _flag,
}
