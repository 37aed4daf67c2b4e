"""Replaces a class of a weak model by a strong model's module, and measures what that does (arXiv 2411.01074)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moda.checks import Check, digest, integer, items, number, one_of, record, text
from moda.composition.compose import compose
from moda.composition.replace import Calibration, normalize, replace
from moda.data.batches import BatchLoader, EpochOrder
from moda.files import Format, FormatError, as_path, format_errors, sha256_of
from moda.inference import device_of, evaluating
from moda.runs.finished import FinishedRun

__all__ = [
    "STRATEGIES",
    "ReplacementResult",
    "class_accuracies",
    "current_strategy",
    "read_replacements",
    "replace_class",
    "results_file",
    "write_replacements",
]

RESULTS = "replacement.json"
STRATEGIES = ("calibrate", "normalize")

# What earlier releases called the same things.
FORMER_RESULTS = "repair.json"
_FORMER_STRATEGIES = {"moda": "calibrate", "cnnsplitter": "normalize"}

_accuracies = items(number(0, 1), least=2)
_RESULT: dict[str, Check] = {
    "strong_model": text(),
    "weak_model": text(),
    "strategy": one_of((*STRATEGIES, *_FORMER_STRATEGIES)),
    "mixed_class": integer(0),
    "class_name": text(empty=True),
    "epoch": integer(1),
    "checkpoint": text(),
    "before": _accuracies,
    "after": _accuracies,
    "strong_weights_sha256": digest,
    "masks_sha256": digest,
    "weak_weights_sha256": digest,
}
_MEANS = dict.fromkeys(("target_before", "target_after", "others_before", "others_after"), number(0, 1))
"""What follows from the accuracies, for who reads the file by other means."""
REPLACEMENTS = Format("moda-replacement", {"results": items(record(_RESULT, _MEANS))}, formerly="moda-repair")


@dataclass(frozen=True)
class ReplacementResult:
    """One weak model, before and after one of its classes was replaced. Accuracies are shares in [0, 1].

    Attributes:
        strong_model: the architecture that the module is from.
        weak_model: the architecture of the weak model.
        strategy: one of `STRATEGIES`.
        mixed_class: the index of the replaced class in the data set.
        class_name: its name.
        epoch: the epoch of the weak model's weights.
        checkpoint: what these weights are called in the study: "under-fitted", "over-fitted" or "final".
        before: the accuracy of the weak model on each of its classes; the replaced one is the last.
        after: the same of the model with the replaced class.
        strong_weights_sha256: the hash of the strong run's weights.
        masks_sha256: the hash of its modules.
        weak_weights_sha256: the hash of the weak model's weights.
    """

    strong_model: str
    weak_model: str
    strategy: str
    mixed_class: int
    class_name: str
    epoch: int
    checkpoint: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    strong_weights_sha256: str
    masks_sha256: str
    weak_weights_sha256: str

    @property
    def target(self) -> tuple[float, float]:
        """The accuracy of the replaced class, before and after (the paper's TC)."""
        return self.before[-1], self.after[-1]

    @property
    def others(self) -> tuple[float, float]:
        """The unweighted mean accuracy of the other classes, before and after (the paper's non-TC)."""
        count = len(self.before) - 1
        return sum(self.before[:-1]) / count, sum(self.after[:-1]) / count

    def to_dict(self) -> dict[str, Any]:
        """Give the result as JSON holds it, with the means beside the accuracies they are of."""
        (target_before, target_after), (others_before, others_after) = self.target, self.others
        return {
            **asdict(self),
            "before": list(self.before),
            "after": list(self.after),
            "target_before": target_before,
            "target_after": target_after,
            "others_before": others_before,
            "others_after": others_after,
        }


def replace_class(
    strong: FinishedRun,
    weak: FinishedRun,
    strategy: str = "calibrate",
    *,
    epoch: int | None = None,
    checkpoint: str = "final",
    calibration: Calibration | None = None,
) -> tuple[nn.Module, ReplacementResult]:
    """Replace the weak model's mixed-in class by the strong model's module, and test both.

    Args:
        strong: a decomposed run on the strong part of a data set.
        weak: a run on the weak part of the same data set; its last class is replaced.
        strategy: "calibrate" (MODA's) trains a linear layer on the weak training samples, in their order; "normalize"
            (CNNSplitter's) normalises by the strong training samples and trains nothing.
        epoch: the epoch of the weak weights, which keep_every_epochs has kept; None means the final ones.
        checkpoint: what to call these weights in the result.
        calibration: how "calibrate" trains; None means as published.

    Returns:
        The model with the replaced class (in evaluation mode) and its figures.

    Raises:
        ValueError: the runs do not fit together, or `strategy` is unknown.
        FormatError (a ValueError): the strong run is not decomposed, or there are no such weights.
    """
    strategy = current_strategy(strategy)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    mixed_class = _mixed_class(strong, weak)
    weights = _weights_file(weak, epoch)
    model = weak.run.load_model(weak.data).to(device_of(weak.model))
    model.load_state_dict(weak.run.load_weights(weights))
    test = list(weak.loader(weak.data.test))
    classes = weak.data.num_classes
    before = class_accuracies(model, test, classes)
    module = compose(strong.model, strong.decomposition(), [mixed_class])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(weak.run.config.seed)
        replaced: nn.Module
        if strategy == "calibrate":
            replaced = replace(model, module, classes - 1, weak.loader(weak.data.train), calibration)
        else:
            replaced = normalize(model, module, classes - 1, _seen_in_training(strong))
    origin = strong.provenance()
    result = ReplacementResult(
        strong_model=strong.run.config.model,
        weak_model=weak.run.config.model,
        strategy=strategy,
        mixed_class=mixed_class,
        class_name=weak.data.class_names[-1],
        epoch=weak.run.config.epochs if epoch is None else epoch,
        checkpoint=checkpoint,
        before=before,
        after=class_accuracies(replaced, test, classes),
        strong_weights_sha256=origin["weights_sha256"],
        masks_sha256=origin["masks_sha256"],
        weak_weights_sha256=sha256_of(weights),
    )
    return replaced.eval(), result


def current_strategy(name: str) -> str:
    """Give the present name of a strategy; earlier releases called them "moda" and "cnnsplitter"."""
    return _FORMER_STRATEGIES.get(name, name)


def _mixed_class(strong: FinishedRun, weak: FinishedRun) -> int:
    """Give the class that the two runs share, if they are the two sides of one study."""
    for name, finished in (("strong", strong), ("weak", weak)):
        part = finished.run.config.data_options.get("replacement", {}).get("part")
        if part != name:
            raise ValueError(
                f"{name}: {finished.run.path} was not trained on the {name} part of a data set; moda replace trains "
                f'such runs (data_options {{"replacement": {{"part": "{name}", "mixed_class": ...}}}})'
            )
    if strong.data.input_shape != weak.data.input_shape or strong.run.config.data != weak.run.config.data:
        described = [f"{one.run.config.data} of shape {one.data.input_shape}" for one in (strong, weak)]
        raise ValueError(f"weak: expected the data of the strong run, {described[0]}, got {described[1]}")
    return int(weak.run.config.data_options["replacement"]["mixed_class"])


def _weights_file(weak: FinishedRun, epoch: int | None) -> Path:
    run = weak.run
    if epoch is None or epoch == run.config.epochs:
        return run.weights
    path = run.checkpoints / f"epoch-{epoch:04d}.safetensors"
    if not path.exists():
        kept = sorted(int(name.stem.removeprefix("epoch-")) for name in run.checkpoints.glob("epoch-*.safetensors"))
        raise FormatError(
            f"{path}: no such file; {run.path} keeps epochs {', '.join(map(str, [*kept, run.config.epochs]))}"
        )
    return path


def _seen_in_training(strong: FinishedRun) -> BatchLoader:
    """Give the strong training samples as one epoch of its training saw them, augmented."""
    config = strong.run.config
    size = len(strong.data.train)  # type: ignore[arg-type]
    return BatchLoader(strong.data.train, EpochOrder(size, config.batch_size, config.seed))


def class_accuracies(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> tuple[float, ...]:
    """Compute the share of right answers among the samples of each class, in evaluation mode.

    Args:
        model: a model that gives scores (N, num_classes).
        loader: batches (inputs, labels).
        num_classes: the number of classes K.

    Raises:
        ValueError: there is no sample of a class.
    """
    right, total = (torch.zeros(num_classes, dtype=torch.int64) for _ in range(2))
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        for inputs, labels in loader:
            hits = model(inputs.to(device)).argmax(1).cpu() == labels
            right += torch.bincount(labels[hits], minlength=num_classes)
            total += torch.bincount(labels, minlength=num_classes)
    if not total.all():
        raise ValueError(
            f"loader: expected samples of every class, got none of {(total == 0).nonzero().flatten().tolist()}"
        )
    return tuple((right.double() / total).tolist())


def write_replacements(path: Path, results: Iterable[ReplacementResult]) -> None:
    """Write results as JSON, atomically."""
    REPLACEMENTS.write(path, {"results": [result.to_dict() for result in results]})


def read_replacements(path: str | Path) -> list[ReplacementResult]:
    """Read what `write_replacements` wrote, in this release or an earlier one.

    Raises:
        FormatError: the file is missing or malformed.
    """
    path = as_path("path", path)
    entries = [{name: entry[name] for name in _RESULT} for entry in REPLACEMENTS.read(path)["results"]]
    with format_errors(path):
        return [_result(entry) for entry in entries]


def _result(entry: dict[str, Any]) -> ReplacementResult:
    """Give the result that `entry` holds, every field of it."""
    accuracies = {name: tuple(entry[name]) for name in ("before", "after")}
    if len(accuracies["after"]) != len(accuracies["before"]):
        raise ValueError(
            f"after: expected {len(accuracies['before'])} accuracies as before, got {len(accuracies['after'])}"
        )
    return ReplacementResult(**{**entry, **accuracies, "strategy": current_strategy(entry["strategy"])})


def results_file(folder: Path) -> Path:
    """Give the path of the results in a study's folder; earlier releases called them repair.json."""
    former = folder / FORMER_RESULTS
    return former if former.exists() and not (folder / RESULTS).exists() else folder / RESULTS
