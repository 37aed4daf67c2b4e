"""Compares modularization methods on one model and data set: what each costs, and how good its modules are.

<out>/<model>/seed-<s>/standard/       a run without any method, which gradsplitter and cnnsplitter search
<out>/<model>/seed-<s>/<method>/       a run of a method that trains, or the modules of one that searches
<out>/<model>/seed-<s>/<method>.json   its figures
<out>/<model>/seed-<s>/weak/           a weak model, for replacements
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from moda import models
from moda.checks import integer, items, number, optional, record, text
from moda.composition import measure
from moda.composition.compose import compose
from moda.composition.replace import normalize
from moda.composition.replace import replace as replaced_by
from moda.data.batches import BatchLoader, EpochOrder, Passes
from moda.decomposition.container import Decomposition
from moda.decomposition.files import METADATA_FILE
from moda.files import Format, as_path, check_study_folder
from moda.inference import device_of, evaluating
from moda.methods import CNNSplitter, FineTuning, GradSplitter, fine_tune
from moda.methods.union import union_module
from moda.runs.config import GATED, METHODS, DataOptions, TrainingConfig
from moda.runs.finished import FinishedRun, decompose_run, kept_apart
from moda.runs.folder import RunFolder, create_model, load_data
from moda.runs.lock import locked
from moda.runs.metrics import read_metrics
from moda.settings import Settings, setting
from moda.study.reuse import TestSet
from moda.study.searching import SEARCHING, SearchSettings, search_run
from moda.study.subtasks import choose
from moda.study.trainings import check_same, trained

__all__ = [
    "ALL",
    "COMPARISON",
    "COMPARISON_FILE",
    "ComparisonSettings",
    "MethodFigures",
    "SizeFigures",
    "compare_methods",
    "compare_run",
    "means",
    "read_comparison",
]

ALL = (*METHODS, *SEARCHING)
_MODELS, _TRAINING, _METHODS, _TASKS = "Model and data", "Training", "Methods", "Sub-tasks"


@dataclass(frozen=True)
class ComparisonSettings(Settings, command="compare"):
    """What is compared, and on what."""

    methods: tuple[str, ...] = setting(
        ALL,
        help=f"The methods: all, or some of {', '.join(ALL)}, separated by commas.",
        choices=ALL,
        words={"all": ALL},
        panel=_METHODS,
    )
    models: tuple[str, ...] = setting(
        ("small_vgg",),
        help="The architectures, separated by commas.",
        choices=models.NAMES,
        panel=_MODELS,
        option="--model --models",
    )
    data: str = setting("digits", help="The data set, see moda train.", panel=_MODELS)
    data_root: str | None = setting(
        None, help="The folder that holds the data set; ./data if it is not given.", panel=_MODELS
    )
    data_options: Mapping[str, Any] = setting(
        {}, help="Further options of the data set, see `moda.data.load`.", panel=_MODELS, entries=DataOptions
    )
    width: float = setting(1.0, help="The multiplier of all hidden widths.", above=0, panel=_MODELS)
    seeds: tuple[int, ...] = setting((0,), help="The seeds, separated by commas.", at_least=0, panel=_TRAINING)
    epochs: int = setting(200, help="The epochs of each training.", at_least=1, panel=_TRAINING)
    batch_size: int = setting(128, help="The samples of a step.", at_least=1, panel=_TRAINING)
    learning_rate: float = setting(
        0.05, help="The learning rate before annealing.", above=0, panel=_TRAINING, option="--learning-rate --lr"
    )
    cohesion: float = setting(
        TrainingConfig.cohesion, help="With mwt: the weight of cohesion.", at_least=0, panel=_METHODS
    )
    coupling: float = setting(
        TrainingConfig.coupling, help="With mwt: the weight of coupling.", at_least=0, panel=_METHODS
    )
    contrast: float = setting(
        TrainingConfig.contrast, help="With nemo: the weight of the contrastive term.", at_least=0, panel=_METHODS
    )
    splitter_epochs: int = setting(
        GradSplitter.epochs, help="With gradsplitter: the epochs behind those of heads.", at_least=1, panel=_METHODS
    )
    splitter_rate: float = setting(
        GradSplitter.mask_rate,
        help="With gradsplitter: the learning rate while masks are trained, see moda modularize --mask-rate.",
        above=0,
        panel=_METHODS,
    )
    generations: int = setting(
        CNNSplitter.generations, help="With cnnsplitter: how many times candidates breed.", at_least=0, panel=_METHODS
    )
    population: int = setting(
        CNNSplitter.population, help="With cnnsplitter: the candidates of each class.", at_least=5, panel=_METHODS
    )
    fine_tuning: int = setting(
        FineTuning().epochs,
        help="With mwt and nemo: the epochs in which modules are fine-tuned; with 0 they are not.",
        at_least=0,
        panel=_METHODS,
    )
    sizes: tuple[int, ...] = setting(
        (2, 3, 5, 10), help="The numbers of classes of sub-tasks, separated by commas.", at_least=2, panel=_TASKS
    )
    per_size: int = setting(
        5, help="At most this many sub-tasks of each size, drawn at random.", at_least=1, panel=_TASKS
    )
    weak_epochs: int = setting(
        2,
        help="The epochs of the weak model, one class of which modules replace; with 0 none is replaced.",
        at_least=0,
        panel=_TASKS,
    )

    def config(self, model: str, seed: int, method: str) -> TrainingConfig:
        """Give the settings of a training; of one without any method for "standard" and for methods that search."""
        config = TrainingConfig(
            model=model,
            data=self.data,
            data_root=self.data_root,
            data_options=self.data_options,
            width=self.width,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            cohesion=self.cohesion,
            coupling=self.coupling,
            contrast=self.contrast,
            seed=seed,
            devices=1,
        )
        return config.changed(method=method) if method in METHODS else config.standard()


@dataclass(frozen=True)
class SizeFigures:
    """Means over the sub-tasks of one number of classes; accuracies are on the test samples of the classes.

    Attributes:
        classes: how many classes.
        tasks: how many sub-tasks.
        whole: the accuracy of the whole model, restricted to the classes.
        before: that of the composed modules as the method gives them.
        after: that after fine-tuning; None where it is no part of the method.
        size: the parameters of the composed modules over those of the whole model, without gates and new heads.
        kept: the neurons kept at the method's sites; of ensembles the sum over modules.
        flops: the operations of the composed modules over those of the whole model without gates.
        seconds: of fine-tuning, of one sub-task; None where there is none.
    """

    classes: int
    tasks: int
    whole: float
    before: float
    after: float | None
    size: float
    kept: float
    flops: float
    seconds: float | None


@dataclass(frozen=True)
class MethodFigures:
    """What one method came to on one model.

    Attributes:
        method: its name.
        model: the architecture.
        data: the data set.
        seed: of the training.
        accuracy: of the whole model on the test data, with gates where it has some.
        standard: that of a model trained without any method.
        module_size: the parameters of a module over those of the whole model, the mean over classes.
        kept: the neurons that a module keeps at the method's sites, the mean over classes.
        overlap: the parameters that two modules share over those of the whole model, the mean over pairs.
        calibrated: the gain in accuracy of a weak model when a module takes over one class through a calibration layer,
            the mean over classes; None where no weak model was given.
        calibrated_class: the gain in accuracy on that class alone.
        normalized: as `calibrated`, with the module's output min-max normalised in the class's place.
        normalized_class: as `calibrated_class` likewise.
        train_seconds: of the training of the whole model, tests included; None where it is not known.
        modularize_seconds: from the trained model to its modules; None where it is not known.
        sizes: by the number of classes.
    """

    method: str
    model: str
    data: str
    seed: int
    accuracy: float
    standard: float | None
    module_size: float
    kept: float
    overlap: float
    calibrated: float | None
    calibrated_class: float | None
    normalized: float | None
    normalized_class: float | None
    train_seconds: float | None
    modularize_seconds: float | None
    sizes: tuple[SizeFigures, ...]

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> MethodFigures:
        """Give the figures in a file's entries."""
        named = {name: entries[name] for name in cls.__dataclass_fields__ if name != "sizes"}
        return cls(
            **named, sizes=tuple(SizeFigures(**{name: size[name] for name in _size}) for size in entries["sizes"])
        )


_share, _signed = number(0), optional(number())
_seconds = optional(number(0))
_size = {
    "classes": integer(1),
    "tasks": integer(1),
    "whole": number(0, 1),
    "before": number(0, 1),
    "after": optional(number(0, 1)),
    "size": _share,
    "kept": _share,
    "flops": _share,
    "seconds": _seconds,
}
FIGURES = Format(
    "moda-method-figures",
    {
        "method": text(),
        "model": text(),
        "data": text(),
        "seed": integer(0),
        "accuracy": number(0, 1),
        "standard": optional(number(0, 1)),
        "module_size": _share,
        "kept": _share,
        "overlap": _share,
        "calibrated": _signed,
        "calibrated_class": _signed,
        "normalized": _signed,
        "normalized_class": _signed,
        "train_seconds": _seconds,
        "modularize_seconds": _seconds,
        "sizes": items(record(_size)),
    },
)
COMPARISON = Format("moda-comparison", {"methods": items(record(FIGURES.fields))})
COMPARISON_FILE = "comparison.json"
"""The figures that a page shows, beside it."""


# ---- all methods --------------------------------------------------------------------------------------------------


def compare_methods(out: Path, settings: ComparisonSettings, *, progress: bool = True) -> list[MethodFigures]:
    """Train, modularize and measure with every method; what is done already is kept.

    Args:
        out: the folder of the comparison.
        settings: what to compare.
        progress: whether to show progress bars.

    Raises:
        ValueError: a method does not fit a model, or the folder holds runs with other settings, or something else.
        KeyboardInterrupt: Ctrl-C was pressed; the same call goes on from there.
    """
    found = []
    check_study_folder(out, COMPARISON_FILE, "*/seed-*")
    for model in settings.models:
        config = settings.config(model, settings.seeds[0], "standard")
        create_model(config, load_data(config))  # one that is not for these images is named before anything is made
    with locked(_made(out)):
        for model in settings.models:
            for seed in settings.seeds:
                folder = out / model / f"seed-{seed}"
                found += [_of_method(folder, settings, model, seed, method, progress) for method in settings.methods]
    return found


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _of_method(
    folder: Path, settings: ComparisonSettings, model: str, seed: int, method: str, progress: bool
) -> MethodFigures:
    path = folder / f"{method}.json"
    if path.exists():
        _check_run(folder, settings.config(model, seed, method), method)
        return MethodFigures.of(FIGURES.read(path))
    standard = trained(folder / "standard", settings.config(model, seed, "standard"), "cpu", progress=progress)
    if method in METHODS:
        finished = trained(folder / method, settings.config(model, seed, method), "cpu", progress=progress)
        seconds = _timed_decomposition(finished)
        decomposition = finished.decomposition()
    else:
        finished = standard
        decomposition, seconds = _searched(folder / method, standard, method, settings)
    weak = None
    if settings.weak_epochs:
        weak = trained(folder / "weak", _weak(settings, model, seed), "cpu", progress=progress)
    tuning = FineTuning(epochs=settings.fine_tuning) if settings.fine_tuning else None
    figures = measured(
        finished, decomposition, _tasks(settings, finished), standard=standard, weak=weak, fine_tuning=tuning
    )
    figures = replace(figures, modularize_seconds=seconds)
    FIGURES.write(path, asdict(figures))
    return figures


def _check_run(folder: Path, wanted: TrainingConfig, method: str) -> None:
    """Raise ValueError if the figures that are there are of a run with other settings."""
    run = folder / (method if method in METHODS else "standard")
    if (run / "config.json").exists():
        check_same(run, RunFolder.open(run).config, wanted)


def _weak(settings: ComparisonSettings, model: str, seed: int) -> TrainingConfig:
    return settings.config(model, seed, "standard").changed(epochs=settings.weak_epochs)


def _timed_decomposition(finished: FinishedRun) -> float:
    since = time.perf_counter()
    decompose_run(finished, progress=False)
    return time.perf_counter() - since


def _tasks(settings: ComparisonSettings, finished: FinishedRun) -> list[tuple[int, ...]]:
    most = finished.data.num_classes
    sizes = [size for size in settings.sizes if size <= most]
    return choose(most, sizes=sizes, per_size=settings.per_size) if sizes else []


def _searched(
    folder: Path, standard: FinishedRun, method: str, settings: ComparisonSettings
) -> tuple[Decomposition, float]:
    """Search a trained model for modules, or read those found before."""
    if not (folder / METADATA_FILE).exists():
        wanted = SearchSettings(
            method,
            epochs=settings.splitter_epochs,
            mask_rate=settings.splitter_rate,
            generations=settings.generations,
            population=settings.population,
        )
        state = folder.with_name(f"{method}-search.json")  # a search that was stopped goes on
        search_run(standard, wanted, state).save(folder)
        state.unlink(missing_ok=True)
    decomposition = Decomposition.load(folder)
    return decomposition, float(decomposition.metadata["seconds"])


def read_comparison(folder: str | Path) -> list[MethodFigures]:
    """Read what `compare_methods` wrote, model by model and seed by seed; nothing where there is none.

    Raises:
        FormatError (a ValueError): a file is malformed.
    """
    folder = as_path("folder", folder)
    paths = [path for method in ALL for path in folder.glob(f"*/seed-*/{method}.json")]
    found = [MethodFigures.of(FIGURES.read(path)) for path in paths]
    return sorted(found, key=lambda figures: (figures.model, figures.seed, ALL.index(figures.method)))


def means(found: Sequence[MethodFigures]) -> list[MethodFigures]:
    """Give the means over seeds, one for every model, data set and method in the order in which they come.

    A figure that not all seeds have is the mean over those that have it. `seed` is the first one. Several runs of one
    method with the same seed differ in something else, and stay apart.
    """
    groups: dict[tuple[str, str, str], list[MethodFigures]] = {}
    for figures in found:
        groups.setdefault((figures.model, figures.data, figures.method), []).append(figures)
    made: list[MethodFigures] = []
    for members in groups.values():
        alike = len({one.seed for one in members}) == len(members)
        made += [_mean_figures(members)] if alike else members
    return made


def _mean_figures(members: Sequence[MethodFigures]) -> MethodFigures:
    numbers: dict[str, Any] = {
        name: _mean(getattr(one, name) for one in members)
        for name, check in MethodFigures.__annotations__.items()
        if "float" in check
    }
    sizes: dict[int, list[SizeFigures]] = {}
    for size in (size for one in members for size in one.sizes):
        sizes.setdefault(size.classes, []).append(size)
    return replace(members[0], **numbers, sizes=tuple(_mean_sizes(group) for group in sizes.values()))


def _mean_sizes(members: Sequence[SizeFigures]) -> SizeFigures:
    names = [name for name, check in SizeFigures.__annotations__.items() if "float" in check]
    numbers: dict[str, Any] = {name: _mean(getattr(one, name) for one in members) for name in names}
    return replace(members[0], **numbers)


# ---- one method ---------------------------------------------------------------------------------------------------


def compare_run(folder: Path, settings: ComparisonSettings) -> MethodFigures:
    """Measure the modules of a decomposed run.

    Raises:
        FormatError (a ValueError): the run is not finished or not decomposed.
    """
    finished = FinishedRun.open(folder, "cpu")
    tuning = FineTuning(epochs=settings.fine_tuning) if settings.fine_tuning else None
    return measured(finished, finished.decomposition(), _tasks(settings, finished), fine_tuning=tuning)


def measured(
    finished: FinishedRun,
    decomposition: Decomposition,
    tasks: Sequence[Sequence[int]],
    *,
    standard: FinishedRun | None = None,
    weak: FinishedRun | None = None,
    fine_tuning: FineTuning | None = None,
) -> MethodFigures:
    """Measure modules.

    Args:
        finished: the run that they are of.
        decomposition: the modules.
        tasks: the classes of each sub-task.
        standard: a run without any method on the same data.
        weak: a run on the same data, one class of which modules replace.
        fine_tuning: how modules of methods that fine-tune are; None not to.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="compose: ")  # that little was cut is one of the figures
        return _measured(finished, decomposition, tasks, standard, weak, fine_tuning)


def _measured(
    finished: FinishedRun,
    decomposition: Decomposition,
    tasks: Sequence[Sequence[int]],
    standard: FinishedRun | None,
    weak: FinishedRun | None,
    fine_tuning: FineTuning | None,
) -> MethodFigures:
    test = TestSet.of(finished.data.test)
    config = finished.run.config
    classes = range(decomposition.num_classes)
    overlaps = measure.overlap_matrix(finished.taps, decomposition, counting="parameters")
    groups: dict[int, list[Sequence[int]]] = {}
    for task in tasks:
        groups.setdefault(len(task), []).append(task)
    tune = fine_tuning if decomposition.method in GATED else None
    seconds = decomposition.metadata.get("seconds")
    return MethodFigures(
        method=decomposition.method,
        model=config.model,
        data=config.data,
        seed=config.seed,
        accuracy=_accuracy(finished.whole, test),
        standard=None if standard is None else _accuracy(standard.model, test),
        module_size=float(measure.module_sizes(finished.taps, decomposition).mean()),
        kept=sum(measure.neurons_kept(decomposition, [k]) for k in classes) / len(classes),
        overlap=measure.mean_over_pairs(overlaps),
        **_replacements(finished, decomposition, weak, test),
        train_seconds=sum(row["seconds"] for row in read_metrics(finished.run.metrics)),
        modularize_seconds=None if seconds is None else float(seconds),
        sizes=tuple(_of_size(finished, decomposition, group, test, tune) for _, group in sorted(groups.items())),
    )


def _accuracy(model: nn.Module, test: TestSet, classes: Sequence[int] | None = None) -> float:
    return measure.accuracy(model, [(test.images, test.labels)], classes)


def _of_size(
    finished: FinishedRun,
    decomposition: Decomposition,
    tasks: Sequence[Sequence[int]],
    test: TestSet,
    fine_tuning: FineTuning | None,
) -> SizeFigures:
    whole_flops = measure.flops(finished.model, test.images[:1])
    rows = []
    for task in tasks:
        composed = compose(finished.taps, decomposition, task)
        after = seconds = None
        if fine_tuning is not None:
            after, seconds = _fine_tuned(finished, decomposition, task, test, fine_tuning)
        rows.append(
            (
                _accuracy(finished.whole, test, task),
                _accuracy(composed, test, task),
                after,
                measure.size(finished.taps, decomposition, task),
                measure.neurons_kept(decomposition, task),
                measure.flops(composed, test.images[:1]) / whole_flops,
                seconds,
            )
        )
    return SizeFigures(len(tasks[0]), len(tasks), *(_mean(column) for column in zip(*rows, strict=True)))  # type: ignore[arg-type]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _fine_tuned(
    finished: FinishedRun, decomposition: Decomposition, task: Sequence[int], test: TestSet, settings: FineTuning
) -> tuple[float, float]:
    """Accuracy and seconds; training samples that are kept apart choose the epoch."""
    part, held_out = (_of_classes(samples, task) for samples in kept_apart(finished.data.train))
    seed, size = finished.run.config.seed, finished.run.config.batch_size
    since = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = union_module(finished.taps, decomposition, task)
        fine_tune(
            module,
            Passes(BatchLoader(part, EpochOrder(len(part), size, seed))),
            settings=settings,
            validation=BatchLoader(held_out, EpochOrder(len(held_out), size, None)),
        )
    return _accuracy(module, test, task), time.perf_counter() - since


def _of_classes(samples: Subset[Any], classes: Sequence[int]) -> Subset[Any]:
    wanted = set(classes)
    return Subset(samples, [index for index in range(len(samples)) if int(samples[index][1]) in wanted])


class _Known(nn.Module):
    """Gives the logits that a model gave before, by the numbers of samples."""

    logits: Tensor

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.logits[numbers]


def _replacements(
    finished: FinishedRun, decomposition: Decomposition, weak: FinishedRun | None, test: TestSet
) -> dict[str, float | None]:
    """The gains when each class of a weak model is replaced in turn, by both strategies.

    Every model runs once, on training and test samples; whatever replaces is then made of known logits.
    """
    gains: dict[str, list[float]] = {name: [] for name in _GAINS}
    if weak is None:
        return dict.fromkeys(_GAINS)
    loader = weak.loader(weak.data.train_eval)
    labels = torch.cat([batch[1] for batch in loader])
    held_out = torch.tensor(kept_apart(weak.data.train_eval)[1].indices)
    numbers = torch.arange(len(labels) + len(test.labels))
    training, tested = numbers[: len(labels)], numbers[len(labels) :]
    batches = list(zip(*(part.split(weak.run.config.batch_size) for part in (training, labels)), strict=True))

    def known(model: nn.Module) -> _Known:
        return _Known(torch.cat([_logits(model, loader), test.logits(model)]))

    before = known(weak.model)
    for target in range(decomposition.num_classes):
        module = known(compose(finished.taps, decomposition, [target]))
        own = held_out[labels[held_out] == target]
        for strategy in ("calibrated", "normalized"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(finished.run.config.seed)
                made: nn.Module
                if strategy == "calibrated":
                    made = replaced_by(before, module, target, batches)
                elif len(own) and module(own).min() < module(own).max():
                    made = normalize(before, module, target, [(own,)])
                else:
                    continue  # a module that answers the same to everything has no range to be normalised by
            with torch.no_grad():
                after = made(tested)
            every, single = _gain(before(tested), after, test.labels, target)
            gains[strategy].append(every)
            gains[f"{strategy}_class"].append(single)
    return {name: _mean(values) for name, values in gains.items()}


def _logits(model: nn.Module, loader: Iterable[Any]) -> Tensor:
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        return torch.cat([model(batch[0].to(device)).cpu() for batch in loader])


_GAINS = ("calibrated", "calibrated_class", "normalized", "normalized_class")


def _gain(before: Tensor, after: Tensor, labels: Tensor, target: int) -> tuple[float, float]:
    """The gain in accuracy on all samples, and on those of one class."""
    right = [(logits.argmax(1) == labels).double() for logits in (before, after)]
    own = labels == target
    return float((right[1] - right[0]).mean()), float((right[1] - right[0])[own].mean())
