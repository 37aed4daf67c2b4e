"""The command `moda train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moda.cli.arguments import RunArgument
from moda.cli.commands import Interrupted, example, group
from moda.cli.printing import percent, say, show, table
from moda.runs.config import ACCELERATORS, PRECISIONS, ROUTES, RUNTIME_SETTINGS, TERMS, TrainingConfig
from moda.runs.folder import RunFolder

commands = group()
DEFAULTS = TrainingConfig()

_PANELS = {
    "Model and data": ("model", "data", "data_root", "width"),
    "Objective": ("affinity", "dispersion", "compactness", "backend", "route"),
    "Optimisation": ("epochs", "batch_size", "learning_rate", "momentum", "seed"),
    "Machine": ("precision", "accelerator", "devices", "strategy", "timeout", "num_workers"),
    "Files": ("log_every_steps", "checkpoint_every_steps", "keep_every_epochs", "tensorboard"),
}


def _setting(names: str, text: str, field: str) -> Any:
    """An option that stands for a field of TrainingConfig; not given, it is None."""
    default = getattr(DEFAULTS, field)
    shown = f"  \\[default: {default}]" if default is not None else ""
    panel = next(title for title, fields in _PANELS.items() if field in fields)
    return typer.Option(*names.split(), help=text + shown, show_default=False, rich_help_panel=panel)


def _data_option(name: str, text: str) -> Any:
    return typer.Option(name, help=text, show_default=False, rich_help_panel="Model and data")


@commands.command(
    epilog=example(
        "moda train runs/digits --epochs 40",
        "moda train runs/standard --epochs 40 --standard",
        "moda train runs/resnet --model resnet18 --data cifar10 --data-root ~/data --precision bf16-mixed",
        "moda train runs/resnet --resume",
    )
)
def train(
    folder: RunArgument,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    standard: Annotated[bool, typer.Option("--standard", help="Train without the modular terms.")] = False,
    model: Annotated[str | None, _setting("--model", "lenet5, vgg16, small_vgg, resnet18, mobilenet.", "model")] = None,
    data: Annotated[str | None, _setting("--data", "digits, cifar10, cifar100, svhn, imagefolder.", "data")] = None,
    data_root: Annotated[
        str | None, _setting("--data-root", "Folder that holds the data set.  \\[default: ./data]", "data_root")
    ] = None,
    image_size: Annotated[int | None, _data_option("--image-size", "Resize images (digits, imagefolder).")] = None,
    class_list: Annotated[str | None, _data_option("--class-list", "File with the classes (imagefolder).")] = None,
    download: Annotated[bool, _data_option("--download", "Fetch the data set (cifar, svhn).")] = False,
    width: Annotated[float | None, _setting("--width", "Multiplier of all hidden widths.", "width")] = None,
    affinity: Annotated[float | None, _setting("--affinity", "Weight of the affinity term.", "affinity")] = None,
    dispersion: Annotated[
        float | None, _setting("--dispersion", "Weight of the dispersion term.", "dispersion")
    ] = None,
    compactness: Annotated[
        float | None, _setting("--compactness", "Weight of the compactness term.", "compactness")
    ] = None,
    epochs: Annotated[int | None, _setting("--epochs", "Passes over the training data.", "epochs")] = None,
    batch_size: Annotated[int | None, _setting("--batch-size", "Samples per step.", "batch_size")] = None,
    learning_rate: Annotated[
        float | None, _setting("--learning-rate --lr", "Before cosine annealing.", "learning_rate")
    ] = None,
    momentum: Annotated[float | None, _setting("--momentum", "Of SGD (Nesterov).", "momentum")] = None,
    seed: Annotated[int | None, _setting("--seed", "Of weights, order, augmentation, split.", "seed")] = None,
    precision: Annotated[str | None, _setting("--precision", f"{', '.join(PRECISIONS)}.", "precision")] = None,
    backend: Annotated[str | None, _setting("--backend", "Of the modular loss (see moda doctor).", "backend")] = None,
    route: Annotated[str | None, _setting("--route", f"Of the taps: {', '.join(ROUTES)}.", "route")] = None,
    accelerator: Annotated[str | None, _setting("--accelerator", f"{', '.join(ACCELERATORS)}.", "accelerator")] = None,
    devices: Annotated[int | None, _setting("--devices", "GPUs, or processes on the CPU.", "devices")] = None,
    strategy: Annotated[str | None, _setting("--strategy", "auto, ddp, fsdp (FSDP2), ...", "strategy")] = None,
    timeout: Annotated[
        float | None, _setting("--timeout", "Seconds processes wait for one another.", "timeout")
    ] = None,
    num_workers: Annotated[int | None, _setting("--workers", "Processes that load data.", "num_workers")] = None,
    log_every_steps: Annotated[
        int | None, _setting("--log-every", "Steps between rows of steps.csv; 0: none.", "log_every_steps")
    ] = None,
    checkpoint_every_steps: Annotated[
        int | None,
        _setting("--checkpoint-every", "Steps between extra checkpoints; 0: one per epoch.", "checkpoint_every_steps"),
    ] = None,
    keep_every_epochs: Annotated[
        int | None, _setting("--keep-every", "Epochs between weights to keep; 0: none.", "keep_every_epochs")
    ] = None,
    tensorboard: Annotated[
        bool | None, _setting("--tensorboard/--no-tensorboard", "Also write TensorBoard files.", "tensorboard")
    ] = None,
) -> None:
    """Train a model modular (or standard) into a run folder.

    The recipe is the paper's: SGD, Nesterov momentum, cosine annealing, cross-entropy plus affinity, dispersion and
    compactness. Ctrl-C or a crash keeps the last checkpoint; --resume goes on from it, on one device bit for bit.
    """
    given = {name: value for name, value in locals().items() if name in DEFAULTS.to_dict() and value is not None}
    options = {"image_size": image_size, "class_list": class_list, "download": download or None}
    options = {name: value for name, value in options.items() if value is not None}
    if standard:
        weights = [f"--{name}" for name in TERMS if given.get(name)]
        if weights:
            raise typer.BadParameter(f"--standard trains without the modular terms; drop {', '.join(weights)}")
        given |= dict.fromkeys(TERMS, 0.0)
    if options:
        given["data_options"] = options
    config = _resumed_config(folder, given) if resume else TrainingConfig(**given)

    from moda.training.loop import TrainingInterrupted
    from moda.training.loop import train as run_training
    from moda.training.processes import process_rank

    try:
        result = run_training(config, folder, resume=resume)
    except TrainingInterrupted as interrupt:
        raise Interrupted(str(interrupt)) from None
    if process_rank() > 0:
        return
    if result.seconds == 0 and resume:
        say(f"{folder}: already finished after {config.epochs} epochs.")
    _print_training(result.run, result.metrics)


def _resumed_config(folder: Path, given: dict[str, Any]) -> TrainingConfig:
    """The run's settings, with those replaced that a resumed run may change."""
    fixed = [name for name in given if name not in RUNTIME_SETTINGS]
    if fixed:
        option = fixed[0].replace("_", "-")
        raise typer.BadParameter(f"--resume takes the settings of {folder / 'config.json'}; drop --{option}")
    return RunFolder.open(folder).config.changed(**given)


def _print_training(run: RunFolder, metrics: dict[str, float]) -> None:
    rows = table(f"{run.config.model} on {run.config.data}", "last epoch", "")
    for name in ("train_accuracy", "test_accuracy"):
        rows.add_row(name.replace("_", " "), percent(metrics[name]))
    for name in ("cross_entropy", *TERMS):
        if name in metrics:
            rows.add_row(name.replace("_", " "), f"{metrics[name]:.4f}")
    show(rows)
    say(f"Weights, settings and metrics: {run.path}/")
    if run.config.modular:
        say(f"Next: moda decompose {run.path}")
