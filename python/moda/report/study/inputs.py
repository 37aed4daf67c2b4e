"""Reads what a report is made from, folders of runs, studies and replacement studies, and groups runs that belong
together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moda.files import FormatError
from moda.hints import command_line
from moda.runs.config import RUNTIME_SETTINGS, TERMS, TrainingConfig
from moda.runs.folder import RunFolder
from moda.runs.metrics import read_metrics
from moda.study.analysis_files import read_analysis
from moda.study.digits import DESCRIPTION, STUDY
from moda.study.replacement import RESULTS, ReplacementResult, read_replacements, results_file
from moda.study.results_file import read_note
from moda.study.reuse import ReuseResult, read_results
from moda.study.reuse_run import KIND as REUSE_KIND
from moda.study.sweep import SWEPT, SweepPoint, read_sweep

__all__ = ["Inputs", "Replacement", "RunResults", "Setting", "read_inputs"]

MODEL_NAMES = {
    "small_vgg": "small VGG",
    "lenet5": "LeNet5",
    "vgg16": "VGG16",
    "resnet18": "ResNet18",
    "mobilenet": "MobileNet",
}
DATA_NAMES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "imagefolder": "a folder of images"}


@dataclass(frozen=True, eq=False)
class RunResults:
    """The results in one run's folder; what the folder lacks is None or empty.

    Attributes:
        folder: the run's folder.
        label: the name to show.
        config: the run's settings.
        metrics: the metrics, one row per epoch.
        analysis: analysis.json.
        reuse: the rows of reuse.csv.
        source: the threshold and hashes that `reuse`, or else `analysis`, was computed from.
        sweeps: the points of each sweep, by the name of the varied setting.
    """

    folder: Path
    label: str
    config: TrainingConfig
    metrics: list[dict[str, float]]
    analysis: dict[str, Any] | None
    reuse: list[ReuseResult]
    source: dict[str, Any]
    sweeps: dict[str, list[SweepPoint]]

    @classmethod
    def read(cls, folder: Path, label: str) -> RunResults:
        """Read the results in a run's folder.

        Raises:
            FormatError (a ValueError): a file is malformed, or files are of different weights or modules.
        """
        run = RunFolder.open(folder)
        analysis = read_analysis(folder / "analysis.json") if (folder / "analysis.json").exists() else None
        sources = [analysis["source"]] if analysis else []
        reuse: list[ReuseResult] = []
        if (folder / "reuse.csv").exists():
            reuse = read_results(folder / "reuse.csv")
            sources.append(read_note(folder / "reuse.csv", REUSE_KIND)["source"])
        if len({source.get("masks_sha256") for source in sources}) > 1:
            raise FormatError(
                f"{folder}: reuse.csv and analysis.json are of different modules; "
                f"make both again: {command_line('analyze', folder, '--force')}, and "
                f"{command_line('reuse', folder, '--force')}"
            )
        tables = {name: folder / f"sweep_{name}.csv" for name in SWEPT}
        return cls(
            folder=folder,
            label=label,
            config=run.config,
            metrics=read_metrics(run.metrics) if run.metrics.exists() else [],
            analysis=analysis,
            reuse=reuse,
            source=sources[-1] if sources else {},
            sweeps={name: read_sweep(path) for name, path in tables.items() if path.exists()},
        )

    @property
    def threshold(self) -> float | None:
        """The firing rate from which the run's neurons were kept; None if the files do not tell."""
        return self.source.get("threshold")


@dataclass(frozen=True, eq=False)
class Replacement:
    """The results of a replacement study.

    Attributes:
        label: the name to show for its folder.
        config: the settings of one of its weak trainings.
        results: a result per weak model, checkpoint and strategy.
    """

    label: str
    config: TrainingConfig
    results: list[ReplacementResult]

    @classmethod
    def read(cls, folder: Path, label: str) -> Replacement:
        """Read the study in a folder.

        Raises:
            FormatError (a ValueError): a file is missing or malformed, or there is no result.
        """
        path = results_file(folder)
        results = read_replacements(path)
        if not results:
            raise FormatError(f"{path}: holds no result; make it with: {command_line('replace', folder)}")
        return cls(label, RunFolder.open(folder / f"weak-{results[0].mixed_class}").config, results)


@dataclass(frozen=True, eq=False)
class Setting:
    """Runs that differ only in the seed, and the standard runs to compare them with.

    Attributes:
        name: the setting's name, unique in the page.
        key: the name as it stands in ids.
        modular: the runs with the modular terms.
        standard: the runs without them that are otherwise the same.
    """

    name: str
    key: str
    modular: tuple[RunResults, ...]
    standard: tuple[RunResults, ...]

    @property
    def config(self) -> TrainingConfig:
        """The settings of one of the runs."""
        return (self.modular or self.standard)[0].config

    @property
    def threshold(self) -> float | None:
        """The firing rate from which neurons were kept; None if no run tells."""
        return next((run.threshold for run in self.modular if run.threshold is not None), None)

    @cached_property
    def analysed(self) -> list[RunResults]:
        """The modular runs that have an analysis."""
        return [run for run in self.modular if run.analysis]

    @cached_property
    def reused(self) -> list[RunResults]:
        """The modular runs that have results of sub-tasks."""
        return [run for run in self.modular if run.reuse]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything that a page is made from.

    Attributes:
        settings: the runs, grouped by setting.
        replacements: the replacement studies.
        commands: the command lines that made the studies among the folders.
    """

    settings: tuple[Setting, ...]
    replacements: tuple[Replacement, ...]
    commands: tuple[str, ...] = ()

    @property
    def runs(self) -> list[RunResults]:
        """All runs in the order of their settings; a standard run that serves two settings comes once."""
        listed = [run for setting in self.settings for run in (*setting.modular, *setting.standard)]
        return list({id(run): run for run in listed}.values())


def read_inputs(folders: Iterable[str | Path]) -> Inputs:
    """Read the results in folders of runs (`moda train`), studies (`moda study`) and replacement studies (`moda
    replace`).

    Raises:
        FormatError (a ValueError): a folder is none of these, or holds a malformed file.
    """
    runs: dict[Path, RunResults] = {}
    replacements: dict[Path, Replacement] = {}
    commands = []
    for given in map(Path, folders):
        start = given.absolute().parent if given.is_absolute() else Path()
        if (given / DESCRIPTION).exists():
            commands.append(_command(given, given.relative_to(start).as_posix()))
        for folder in _expanded(given):
            label = folder.relative_to(start).as_posix()
            if results_file(folder).exists():
                replacements.setdefault(folder.resolve(), Replacement.read(folder, label))
            else:
                runs.setdefault(folder.resolve(), RunResults.read(folder, label))
    return Inputs(tuple(_settings(list(runs.values()))), tuple(replacements.values()), tuple(commands))


def _expanded(folder: Path) -> list[Path]:
    """Return the existing folders of a study; any other folder is returned as it is."""
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder")
    if not (folder / DESCRIPTION).exists():
        if not _holds_results(folder):
            raise FormatError(
                f"{folder}: holds no run (config.json), study ({DESCRIPTION}) or replacement study ({RESULTS})"
            )
        return [folder]
    description = STUDY.read(folder / DESCRIPTION)
    named = [run[kind] for run in description["runs"] for kind in ("modular", "standard")] + description["replacements"]
    return [path for path in (folder / name for name in named) if _holds_results(path)]


def _holds_results(folder: Path) -> bool:
    return (folder / "config.json").exists() or results_file(folder).exists()


def _command(folder: Path, label: str) -> str:
    """Return the command line that makes a study's folder."""
    description = STUDY.read(folder / DESCRIPTION)
    models, seeds = (dict.fromkeys(str(run[name]) for run in description["runs"]) for name in ("model", "seed"))
    options = ["--models", ",".join(models), "--seeds", ",".join(seeds), "--epochs", str(description["epochs"])]
    options += ["--batch-size", str(description["batch_size"])]
    if description["per_size"]:
        options += ["--per-size", str(description["per_size"])]
    return command_line("study", Path(label), *options)


# These settings neither tell settings apart nor change how results compare.
_APART = RUNTIME_SETTINGS | {"seed", "backend", "route"}


def _identity(config: TrainingConfig, *, weights: bool) -> tuple[tuple[str, str], ...]:
    left_out = _APART if weights else _APART | set(TERMS)
    values = {name: value for name, value in config.to_dict().items() if name not in left_out}
    values["data_options"] = sorted(
        (name, value) for name, value in config.data_options.items() if name not in ("seed", "download")
    )
    return tuple((name, repr(value)) for name, value in sorted(values.items()))


def _settings(runs: Sequence[RunResults]) -> list[Setting]:
    modular: dict[Any, list[RunResults]] = {}
    standard: dict[Any, list[RunResults]] = {}
    for run in runs:
        kind = modular if run.config.modular else standard
        kind.setdefault(_identity(run.config, weights=run.config.modular), []).append(run)
    standard = {_identity(group[0].config, weights=False): group for group in standard.values()}
    pairs = [(group, standard.get(_identity(group[0].config, weights=False), [])) for group in modular.values()]
    used = {id(partner) for _, partner in pairs}
    pairs += [([], group) for group in standard.values() if id(group) not in used]
    names = _names([(own or other)[0].config for own, other in pairs])
    return [
        Setting(name, f"s{index}", tuple(_by_seed(own)), tuple(_by_seed(other)))
        for index, (name, (own, other)) in enumerate(zip(names, pairs, strict=True))
    ]


def _by_seed(runs: Iterable[RunResults]) -> list[RunResults]:
    return sorted(runs, key=lambda run: run.config.seed)


def _names(configs: Sequence[TrainingConfig]) -> list[str]:
    """Name settings by model, by data where there are several, by width where it is not 1, and by what else tells them
    apart.
    """
    several = len({config.data for config in configs}) > 1
    names = []
    for config in configs:
        name = MODEL_NAMES.get(config.model, config.model)
        name += f" on {DATA_NAMES.get(config.data, config.data)}" if several else ""
        names.append(name + (f" \u00d7 {config.width:g}" if config.width != 1 else ""))
    for field in TrainingConfig().to_dict():
        shared = [name for name in names if names.count(name) > 1]
        if not shared:
            break
        values = {
            name: {repr(getattr(c, field)) for c, n in zip(configs, names, strict=True) if n == name} for name in shared
        }
        told = [len(values.get(name, ())) > 1 and field not in _APART for name in names]
        names = [
            f"{name}, {field.replace('_', ' ')} {_said(getattr(config, field))}" if tell else name
            for name, config, tell in zip(names, configs, told, strict=True)
        ]
    return names


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
