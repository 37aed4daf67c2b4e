"""Fine-tuning of modules on the classes that they are for, as MwT and NeMo do.

The union of some classes' modules keeps its K logits and gets a head `ReLU -> Linear(K, T)`. All of it is trained on
the samples of the T classes. The published code takes the epoch with the best accuracy on the *test* data; here it is
the best one on validation data, or the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from moda.composition.measure import accuracy
from moda.data.unpacking import Inputs, check_callable, check_loader, unpacked
from moda.decomposition.container import check_classes
from moda.inference import check_module, device_of
from moda.methods.base import Loader
from moda.settings import Settings, setting
from moda_kernels.validation import MOST_CLASSES, check_flag

OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class FineTuning(Settings):
    """How a module is fine-tuned. The defaults are those of MwT and of NeMo's ViT-S and convolutional networks."""

    epochs: int = setting(10, help="The passes over the samples of the module's classes.", at_least=1)
    learning_rate: float = setting(0.05, help="The learning rate before annealing.", above=0)
    horizon: int = setting(
        20, help="The epochs after which the cosine of the learning rate would have come to 0.", at_least=1
    )
    optimizer: str = setting("sgd", help="SGD with Nesterov momentum, or AdamW.", choices=OPTIMIZERS)
    momentum: float = setting(0.9, help="The momentum of SGD.", at_least=0, below=1)
    weight_decay: float = setting(0.0, help="The weight decay.", at_least=0)

    @classmethod
    def for_deit(cls) -> FineTuning:
        """Give the published settings of NeMo's DeiT-S."""
        return cls(learning_rate=5e-4, horizon=10, optimizer="adamw", weight_decay=0.05)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimiser of some parameters."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters,
            self.learning_rate,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            weight_decay=self.weight_decay,
        )


class HeadedModule(nn.Module):
    """A module of some classes with a head of its own: features -> ReLU -> Linear.

    Args:
        body: maps inputs to features (N, F); for convolutional networks these are the K logits.
        features: F.
        classes: class indices, in the order of the outputs.
        num_classes: of the whole model.
    """

    def __init__(self, body: nn.Module, features: int, classes: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.classes = tuple(check_classes(classes, num_classes))
        self.num_classes = num_classes
        self.body = body
        like = next(body.parameters())
        self.head = nn.Sequential(
            nn.ReLU(), nn.Linear(features, len(self.classes), device=like.device, dtype=like.dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs to the logits of the classes, (N, T)."""
        logits: Tensor = self.head(self.body(x))
        return logits


@dataclass(frozen=True)
class FineTunedEpoch:
    """What an epoch of fine-tuning came to.

    Attributes:
        loss: cross-entropy, the mean over steps.
        accuracy: on the data that the epoch is chosen by; None without any.
    """

    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class FineTuned:
    """What a fine-tuning came to.

    Attributes:
        epochs: in order.
        chosen: the epoch whose weights the module has now, from 0.
    """

    epochs: tuple[FineTunedEpoch, ...]
    chosen: int


def fine_tune(
    module: nn.Module,
    loader: Loader,
    classes: Sequence[int] | None = None,
    settings: FineTuning | None = None,
    *,
    validation: Loader | None = None,
    test: Loader | None = None,
    published: bool = False,
    report: Callable[[FineTunedEpoch], None] | None = None,
) -> FineTuned:
    """Train all of a module, in place, on the samples of its classes.

    With validation data the module ends with the weights of the epoch that is strictly more accurate than all before
    it, the first of equals; where no epoch gets a sample right (the published code stops there), and without validation
    data, with those of the last.

    Args:
        module: gives logits (N, T), one per class; it is in training mode while it is trained, so that norms and
            dropout are live, and in evaluation mode afterwards.
        loader: gives batches of (inputs, labels), labels being class indices of the whole model. Samples of other
            classes are left out of their batch; the published batches are of samples of the classes alone.
        classes: class indices in the order of the module's logits; None for the module's own `classes`.
        settings: None for the published ones.
        validation: chooses the epoch.
        test: chooses the epoch as in the published code, which is a look at the answers: with `published` alone.
        published: allow `test`.
        report: called with what every epoch came to.

    Raises:
        TypeError: `module` is no module, or an argument is not as above.
        ValueError: test data without `published`, or with validation data; unknown or no classes; or the loader
            gives no sample of them.
    """
    check_module(module, "module")
    if not any(True for _ in module.parameters()):
        raise ValueError("module: expected parameters to train, got none")
    if settings is not None and not isinstance(settings, FineTuning):
        raise TypeError(f"settings: expected FineTuning or None, got {type(settings).__name__}")
    settings = settings or FineTuning()
    check_loader(loader, again=settings.epochs > 1)
    for name, chooser in (("validation", validation), ("test", test)):
        if chooser is not None:
            check_loader(chooser, name=name, again=settings.epochs > 1)
    check_callable(report, "report")
    check_flag(published, "published")
    if test is not None and not published:
        raise ValueError(
            "test: choosing an epoch by test data is for published=True alone; give validation data instead"
        )
    if test is not None and validation is not None:
        raise ValueError("test, validation: expected one of them, got both")
    chosen_by = validation if test is None else test
    wanted = _classes_of(module, classes)
    optimizer = settings.make_optimizer(list(module.parameters()))
    schedule = CosineAnnealingLR(optimizer, settings.horizon)
    epochs: list[FineTunedEpoch] = []
    best, state = 0.0, None
    chosen = settings.epochs - 1
    for epoch in range(settings.epochs):
        loss = _train_epoch(module, loader, wanted, optimizer)
        schedule.step()
        share = None if chosen_by is None else accuracy(module, chosen_by, wanted)
        if share is not None and share > best:
            best, chosen = share, epoch
            state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        epochs.append(FineTunedEpoch(loss, share))
        if report is not None:
            report(epochs[-1])
    if state is not None:
        module.load_state_dict(state)
    module.eval()
    return FineTuned(tuple(epochs), chosen)


def _classes_of(module: nn.Module, classes: Sequence[int] | None) -> list[int]:
    own = getattr(module, "classes", None)
    if classes is None:
        if own is None:
            raise ValueError("classes: expected the classes of the module's logits, as the module does not name them")
        return list(own)
    wanted = check_classes(classes, MOST_CLASSES)
    if own is not None and list(own) != wanted:
        raise ValueError(f"classes: expected those of the module, {list(own)}, got {wanted}")
    return wanted


def _train_epoch(module: nn.Module, loader: Loader, classes: list[int], optimizer: torch.optim.Optimizer) -> float:
    module.train()
    total, steps = torch.zeros((), device=device_of(module)), 0
    for inputs, positions in _of_classes(loader, classes):
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs.to(device_of(module)).into(module), positions.to(device_of(module)))
        loss.backward()
        optimizer.step()
        total, steps = total + loss.detach(), steps + 1
    if steps == 0:
        raise ValueError(f"loader: expected samples of the classes {classes}, got none")
    return float(total) / steps


def _of_classes(loader: Loader, classes: list[int]) -> Iterator[tuple[Inputs, Tensor]]:
    """The samples of some classes, batch by batch, with the positions of their classes as labels."""
    order = torch.tensor(classes)
    for batch in loader:
        inputs, labels = unpacked(batch)
        match = labels.cpu()[:, None] == order
        rows = match.any(1)
        if bool(rows.all()):
            yield inputs, match.long().argmax(1)
        elif bool(rows.any()):
            yield _rows_of(inputs, rows), match.long().argmax(1)[rows]


def _rows_of(inputs: Inputs, rows: Tensor) -> Inputs:
    def chosen(value: object) -> object:
        return value[rows.to(value.device)] if isinstance(value, Tensor) and len(value) == len(rows) else value

    return Inputs(tuple(map(chosen, inputs.args)), {name: chosen(value) for name, value in inputs.kwargs.items()})
