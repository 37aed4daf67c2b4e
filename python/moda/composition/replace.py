"""Module replacement: serve one class of a weak model by a module of a stronger one (arXiv 2411.01074).

Two strategies, both over frozen models:

- `replace` ("calibration", the paper's): the weak model's logits without those of the replaced classes, followed by the
  module's logits, go through one linear layer K -> K, the only thing trained.
- `normalize` (CNNSplitter's): the weak model's probabilities, with the replaced class's column overwritten by the
  module's logit, min-max normalised over given data. Nothing is trained.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda.checks import check_count, integer, number
from moda.data.unpacking import check_loader
from moda.inference import check_module, device_of
from moda_kernels.validation import check_labels


@dataclass(frozen=True)
class Calibration:
    """How the calibration layer is trained: SGD with Nesterov momentum, cosine annealing per epoch (published values).

    Attributes:
        epochs: passes over the calibration data, at least 1.
        lr: initial learning rate, > 0.
        momentum: Nesterov momentum, in (0, 1).
        init_std: standard deviation of the initial weights (normal, mean 0; the bias starts at 0), > 0.
    """

    epochs: int = 5
    lr: float = 0.05
    momentum: float = 0.9
    init_std: float = 0.01

    def __post_init__(self) -> None:
        """Every field is as the class's docstring says, or a TypeError or ValueError that names it."""
        check_count("epochs", self.epochs)
        for name in ("lr", "init_std"):
            if not number()(name, getattr(self, name)) > 0:
                raise ValueError(f"{name}: expected a finite number above 0, got {getattr(self, name)}")
        if not 0 < number()("momentum", self.momentum) < 1:
            raise ValueError(f"momentum: expected a number between 0 and 1, got {self.momentum}")


class _Frozen(nn.Module):
    """The weak model and the module: never trained, always in evaluation mode, part of the state_dict all the same."""

    def __init__(self, weak: nn.Module, module: nn.Module, position: Sequence[int]) -> None:
        super().__init__()
        self.weak = weak.requires_grad_(False).eval()
        self.module = module.requires_grad_(False).eval()
        self.position = tuple(position)

    def train(self, mode: bool = True) -> _Frozen:
        """As `nn.Module.train`, but for the frozen models, which stay in evaluation mode."""
        super().train(mode)
        self.weak.eval()
        self.module.eval()
        return self


class CalibratedModel(_Frozen):
    """Weak logits without the replaced ones, then the module's logits, through one K -> K linear layer."""

    def __init__(self, weak: nn.Module, module: nn.Module, position: Sequence[int], calibration: nn.Linear) -> None:
        super().__init__(weak, module, position)
        self.calibration = calibration

    def concatenated(self, x: Tensor) -> Tensor:
        """(N, K): what goes into the calibration layer. The module's logits come last, whatever the position."""
        with torch.no_grad():
            weak, strong = self.weak(x), self.module(x)
        kept = [k for k in range(weak.shape[1]) if k not in self.position]
        return torch.cat([weak[:, kept], strong.to(weak.dtype)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, K) logits, in the weak model's order of classes."""
        logits: Tensor = self.calibration(self.concatenated(x))
        return logits


class NormalizedModel(_Frozen):
    """Weak probabilities with the replaced class's column overwritten by the module's min-max normalised logit."""

    bounds: Tensor

    def __init__(self, weak: nn.Module, module: nn.Module, position: int, bounds: Tensor) -> None:
        super().__init__(weak, module, [position])
        self.register_buffer("bounds", bounds)

    def forward(self, x: Tensor) -> Tensor:
        """(N, K) scores; the replaced column lies in [0, 1] on the data that gave the bounds."""
        scores = F.softmax(self.weak(x), dim=1)
        low, high = self.bounds
        scores[:, self.position[0]] = ((self.module(x)[:, 0] - low) / (high - low)).to(scores.dtype)
        return scores


def replace(
    weak: nn.Module,
    module: nn.Module,
    position: int | Sequence[int],
    calibration_loader: Iterable[Any],
    calibration: Calibration | None = None,
) -> CalibratedModel:
    """Serve the class at `position` by `module`, and train the calibration layer.

    The weak model and the module are frozen, so their logits are computed once and the epochs run over those:
    batches come in the order of one pass over the loader in every epoch, as in the published protocol.

    Args:
        weak: model with (N, K) logits; frozen in place.
        module: model with one logit per replaced class, (N, P), for the same inputs; frozen in place.
        position: index, or P indices, of the weak model's outputs that are replaced.
        calibration_loader: batches `(inputs, labels)` of all K classes; labels (N,) in [0, K).
        calibration: training settings; None for the published ones.

    Returns:
        A model with (N, K) logits. Both models stay part of its state_dict; only the calibration layer is trainable.

    Raises:
        ValueError: `position` is no set of outputs of the weak model, or does not match the module's outputs; the
            loader is empty or a label is outside [0, K).
    """
    _check_models(weak, module)
    if calibration is not None and not isinstance(calibration, Calibration):
        raise TypeError(f"calibration: expected Calibration or None, got {type(calibration).__name__}")
    settings = calibration or Calibration()
    positions = _positions(position)
    check_loader(calibration_loader, name="calibration_loader")
    batches = iter(calibration_loader)
    first = next(batches, None)
    if first is None:
        raise ValueError("calibration_loader: expected at least one batch, got none")
    device = device_of(weak)
    classes = _check_outputs(weak, module, positions, _parts(first, "calibration_loader")[0].to(device))
    layer = nn.Linear(classes, classes, device=device)
    nn.init.normal_(layer.weight, std=settings.init_std)
    nn.init.zeros_(layer.bias)
    replaced = CalibratedModel(weak, module, positions, layer)
    _calibrate(replaced, [_logits_of(replaced, batch) for batch in itertools.chain([first], batches)], settings)
    return replaced


def normalize(weak: nn.Module, module: nn.Module, position: int, bounds_loader: Iterable[Any]) -> NormalizedModel:
    """Overwrite the class at `position` by the module's logit, min-max normalised over `bounds_loader`.

    Args:
        weak: model with (N, K) logits; frozen in place.
        module: model with one logit, (N, 1); frozen in place.
        position: index of the weak model's output that is replaced.
        bounds_loader: batches whose first element is the inputs that give the bounds. The MODA paper's baseline
            takes the whole strong training set, CNNSplitter validation samples of the class alone.

    Raises:
        ValueError: `position` is no output of the weak model, the module has not one output, the loader is empty, or
            the module gives the same logit everywhere, so that there is nothing to normalise by.
    """
    _check_models(weak, module)
    check_loader(bounds_loader, name="bounds_loader")
    (position,) = _positions([position])
    device = device_of(weak)
    low, high = math.inf, -math.inf
    module.eval()
    for index, batch in enumerate(bounds_loader):
        inputs = _inputs(batch, "bounds_loader").to(device)
        if index == 0:
            _check_outputs(weak, module, [position], inputs)
        with torch.no_grad():
            logits = module(inputs)
        low, high = min(low, float(logits.min())), max(high, float(logits.max()))
    if low == math.inf:
        raise ValueError("bounds_loader: expected at least one batch, got none")
    if low == high:
        raise ValueError(f"bounds_loader: expected inputs with different logits of the module, got {low:g} for all")
    return NormalizedModel(weak, module, position, torch.tensor([low, high], device=device))


def _check_models(weak: Any, module: Any) -> None:
    check_module(weak, "weak")
    check_module(module, "module")


def _positions(position: Any) -> list[int]:
    given = [position] if isinstance(position, int) else position
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError(f"position: expected an index, or a sequence of them, got {type(position).__name__}")
    return [integer()("position", index) for index in given]


def _calibrate(replaced: CalibratedModel, batches: Sequence[tuple[Tensor, Tensor]], settings: Calibration) -> None:
    optimizer = torch.optim.SGD(
        replaced.calibration.parameters(), lr=settings.lr, momentum=settings.momentum, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.epochs)
    for _ in range(settings.epochs):
        for logits, labels in batches:
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(replaced.calibration(logits), labels))
            optimizer.step()
        schedule.step()


def _inputs(batch: Any, name: str) -> Tensor:
    """The inputs of a batch, its first part."""
    if not isinstance(batch, Sequence) or not batch or not isinstance(batch[0], Tensor):
        raise TypeError(f"{name}: expected batches (inputs, labels) of tensors, got {type(batch).__name__}")
    return batch[0]


def _parts(batch: Any, name: str) -> tuple[Tensor, Tensor]:
    """The inputs and the labels of a batch."""
    inputs = _inputs(batch, name)
    if len(batch) < 2:
        raise TypeError(f"{name}: expected batches (inputs, labels) of tensors, got one part")
    check_labels(batch[1])
    return inputs, batch[1]


def _logits_of(replaced: CalibratedModel, batch: Any) -> tuple[Tensor, Tensor]:
    device = replaced.calibration.weight.device
    inputs, labels = (part.to(device) for part in _parts(batch, "calibration_loader"))
    classes = replaced.calibration.out_features
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        wrong = labels[(labels < 0) | (labels >= classes)][0].item()
        raise ValueError(f"calibration_loader: expected labels in [0, {classes}), got {wrong}")
    return replaced.concatenated(inputs), labels


def _check_outputs(weak: nn.Module, module: nn.Module, positions: Sequence[int], inputs: Tensor) -> int:
    """K, if the positions are outputs of `weak` and the module has an output for each."""
    weak.eval()
    module.eval()
    with torch.no_grad():
        classes, replaced = (int(model(inputs).shape[1]) for model in (weak, module))
    if not positions or len(set(positions)) != len(positions) or not all(0 <= p < classes for p in positions):
        raise ValueError(f"position: expected distinct outputs of the weak model in [0, {classes}), got {positions}")
    if replaced != len(positions):
        raise ValueError(f"module: expected {len(positions)} outputs, one for each position, got {replaced}")
    return classes
