"""Runs the paper's study on handwritten digits from end to end; `moda report` makes a page of it.

<out>/<model>/seed-<s>/modular/     a run with modules, analysis.json, reuse.csv (all sub-tasks)
<out>/<model>/seed-<s>/standard/    its standard counterpart
<out>/<first model>/seed-<first>/modular/sweep_*.csv    threshold and weights
<out>/replacement/<strong model>/   the replacement study
<out>/study.json                    what there is, relative to <out>, and whether it is finished
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moda.checks import flag, integer, items, optional, record, relative_path, text
from moda.files import Format, check_study_folder
from moda.requirements import check_lightning
from moda.runs.config import TERMS, TrainingConfig
from moda.runs.finished import FinishedRun, decompose_run
from moda.runs.folder import load_data
from moda.settings import Settings, setting
from moda.study import sweep
from moda.study.analysis_files import analyze_run, write_analysis
from moda.study.replacement_study import ReplacementStudy, run_replacement_study
from moda.study.reuse_run import run_reuse
from moda.study.subtasks import choose
from moda.study.trainings import trained

__all__ = ["ARCHITECTURES", "Architecture", "StudySettings", "run_study"]

STUDY = Format(
    "moda-study",
    {
        "epochs": integer(1),
        "batch_size": integer(1),
        "per_size": optional(integer(1)),
        "runs": items(
            record({"model": text(), "seed": integer(0), "modular": relative_path, "standard": relative_path})
        ),
        "replacements": items(relative_path),
    },
    {"sweeps": optional(relative_path), "finished": flag},
    renamed={"repairs": "replacements"},
)
DESCRIPTION = "study.json"
SWEEP_PER_SIZE = 20


@dataclass(frozen=True)
class Architecture:
    """How an architecture is trained on the digits.

    Attributes:
        width: the multiplier of its hidden widths.
        image_size: the height and width that images are resized to.
    """

    width: float
    image_size: int


ARCHITECTURES = {
    "small_vgg": Architecture(1.0, 8),
    "lenet5": Architecture(1.0, 32),
    "resnet18": Architecture(0.25, 8),
    "mobilenet": Architecture(0.25, 16),
}
"""Small enough for two CPU cores; small_vgg at full width."""

REPLACEMENT_STRONG = {"small_vgg": 1.0, "resnet18": 0.25}
"""Strong models of the replacement study, and their widths; both see images of 16 x 16, the least that LeNet5 takes."""


@dataclass(frozen=True)
class StudySettings(Settings, command="study"):
    """What the study does."""

    models: tuple[str, ...] = setting(
        tuple(ARCHITECTURES),
        help="The architectures, separated by commas; sweeps are made of the first.",
        choices=tuple(ARCHITECTURES),
    )
    seeds: tuple[int, ...] = setting((0, 1, 2), help="The seeds, separated by commas.", at_least=0)
    epochs: int = setting(40, help="The epochs of each training.", at_least=1)
    batch_size: int = setting(64, help="The samples of a step: half the paper's, as the digits are few.", at_least=1)
    per_size: int | None = setting(
        None, help="At most this many sub-tasks of each size, drawn at random; all if not given.", at_least=1
    )
    replacement: bool = setting(
        True, help="Whether to make the replacement study (the default).", option="--replacement/--no-replacement"
    )
    sweeps: bool = setting(True, help="Whether to make the sweeps (the default).", option="--sweeps/--no-sweeps")

    def config(self, model: str, seed: int, *, modular: bool) -> TrainingConfig:
        """Give the settings of one training."""
        architecture = ARCHITECTURES[model]
        config = TrainingConfig(
            model=model,
            width=architecture.width,
            data_options={"image_size": architecture.image_size},
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=seed,
            accelerator="cpu",
        )
        return config if modular else config.standard()


def run_study(out: Path, settings: StudySettings, *, jobs: int = 1, force: bool = False) -> None:
    """Do what is not done yet.

    Args:
        out: the folder of the study.
        settings: what to do.
        jobs: the processes side by side, each with one thread; with 1 everything runs in this process.
        force: whether to describe this study in the place of another one; what both have in common serves again.

    Raises:
        ValueError: the folder holds runs with other settings, or is of another kind.
        ImportError: a package that is needed is missing; nothing is made then.
        KeyboardInterrupt: Ctrl-C was pressed; the same call goes on from there.
    """
    check_lightning()
    load_data(settings.config(settings.models[0], settings.seeds[0], modular=True))
    check_study_folder(out, DESCRIPTION)
    if not force:
        _check_same(out, settings)
    out.mkdir(parents=True, exist_ok=True)
    _describe(out, settings, finished=False)
    pairs = [(model, seed) for model in settings.models for seed in settings.seeds]
    steps: list[_Step] = [partial(_study_pair, out, settings, model, seed) for model, seed in pairs]
    if settings.replacement:
        steps += [partial(_study_replacement, out, settings, model) for model in _strong_models(settings)]
    _run_all(steps, jobs)
    if settings.sweeps:  # they belong to a run of the first step
        names = ("threshold", *TERMS)
        _run_all([partial(_study_sweep, out, settings, name) for name in names], jobs)
    _describe(out, settings, finished=True)


_Step = Callable[[], str]


def _run_all(steps: list[_Step], jobs: int) -> None:
    console = Console(stderr=True)
    if jobs == 1:
        for number, step in enumerate(steps, 1):
            console.print(f"[{number}/{len(steps)}] {step()}", highlight=False, markup=False, soft_wrap=True)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = [pool.submit(step) for step in steps]
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                console.print(f"[{number}/{len(steps)}] {done.result()}", highlight=False, markup=False, soft_wrap=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _modular_folder(out: Path, model: str, seed: int) -> Path:
    return out / model / f"seed-{seed}" / "modular"


def _study_pair(out: Path, settings: StudySettings, model: str, seed: int) -> str:
    """Study one architecture with one seed: both trainings, modules, analysis, all sub-tasks."""
    folder = _modular_folder(out, model, seed)
    modular = trained(folder, settings.config(model, seed, modular=True), "cpu", progress=False)
    standard = trained(folder.with_name("standard"), settings.config(model, seed, modular=False), "cpu", progress=False)
    if not modular.run.decomposition.exists():
        decompose_run(modular, progress=False)
    analysis = analyze_run(modular)
    write_analysis(folder / "analysis.json", analysis)
    tasks = choose(modular.data.num_classes, per_size=settings.per_size)
    results = run_reuse(modular, tasks, folder / "reuse.csv", standard=standard, progress=False)
    gains = [result.composed - (result.standard or 0.0) for result in results]
    return (
        f"{model} seed {seed}: module size {analysis['mean_size']:.3f}, overlap {analysis['mean_overlap']:.3f}, "
        f"composed {100 * sum(gains) / len(gains):+.2f} points against standard over {len(results)} sub-tasks"
    )


def _study_sweep(out: Path, settings: StudySettings, name: str) -> str:
    finished = FinishedRun.open(_modular_folder(out, settings.models[0], settings.seeds[0]), "cpu")
    tasks = choose(finished.data.num_classes, per_size=min(SWEEP_PER_SIZE, settings.per_size or SWEEP_PER_SIZE))
    if name == "threshold":
        points = sweep.sweep_threshold(finished, sweep.GRIDS[name], tasks, progress=False)
    else:
        points = sweep.sweep_weight(finished, name, sweep.GRIDS[name], tasks, device="cpu", progress=False)
    return f"sweep of {name}: {len(points)} values"


def _strong_models(settings: StudySettings) -> list[str]:
    return [name for name in settings.models if name in REPLACEMENT_STRONG]


def _study_replacement(out: Path, settings: StudySettings, strong_model: str) -> str:
    """Study weak LeNet5s with modules of one strong model.

    A tenth of the digits is some 80 images. Small batches and 20 passes give the weak trainings and the calibration
    about as many steps as an epoch's worth of published data would.
    """
    study = ReplacementStudy(
        data="digits",
        data_options={"image_size": 16},
        strong_model=strong_model,
        strong_width=REPLACEMENT_STRONG[strong_model],
        epochs=5 * settings.epochs,
        under_epoch=max(1, settings.epochs // 4),
        over_epoch=5 * settings.epochs - max(1, settings.epochs // 8),
        batch_size=32,
        seed=settings.seeds[0],
        calibration_epochs=20,
        device="cpu",
    )
    folder = out / "replacement" / strong_model
    config = study.strong_config().changed(epochs=settings.epochs, batch_size=settings.batch_size)
    strong = trained(folder / "strong", config, "cpu", progress=False)
    results = run_replacement_study(folder, study, strong, progress=False)
    gains = [
        after - before for before, after in (result.target for result in results if result.strategy == "calibrate")
    ]
    return f"replacement by {strong_model}: replaced class {100 * sum(gains) / len(gains):+.1f} points on average"


def _check_same(out: Path, settings: StudySettings) -> None:
    if not (out / DESCRIPTION).exists():
        return
    there, wanted = STUDY.read(out / DESCRIPTION), _description(settings)
    for name, value in wanted.items():
        if there.get(name) != value:
            raise ValueError(
                f"{out / DESCRIPTION}: describes a study with other {name}; replace it with --force, or choose another "
                "folder"
            )


def _describe(out: Path, settings: StudySettings, *, finished: bool) -> None:
    STUDY.write(out / DESCRIPTION, {**_description(settings), "finished": finished})


def _description(settings: StudySettings) -> dict[str, Any]:
    runs: list[dict[str, Any]] = [
        {
            "model": model,
            "seed": seed,
            "modular": f"{model}/seed-{seed}/modular",
            "standard": f"{model}/seed-{seed}/standard",
        }
        for model in settings.models
        for seed in settings.seeds
    ]
    return {
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "per_size": settings.per_size,
        "runs": runs,
        "replacements": [f"replacement/{model}" for model in _strong_models(settings)] if settings.replacement else [],
        "sweeps": runs[0]["modular"] if settings.sweeps else None,
    }
