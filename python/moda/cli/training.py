"""Holds the command `moda train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from moda.cli.arguments import RunArgument
from moda.cli.commands import Interrupted, example, group
from moda.cli.options import option_of, takes
from moda.cli.printing import percent, say, show, table
from moda.hints import command_line
from moda.runs.config import GATE_TERMS, RUNTIME_SETTINGS, TERMS, TrainingConfig
from moda.runs.folder import RunFolder

commands = group()


class _Train(TyperCommand):
    """`--resume auto` beside `--resume`: an option whose value may be left out, which typer does not know."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read `--resume auto` as one word."""
        words = iter(args)
        read = []
        for word in words:
            following = next(words, None) if word == "--resume" else None
            if word == "--resume=auto" or following == "auto":
                read.append("--resume-auto")
            else:
                read += [word] if following is None else [word, following]
        return super().parse_args(ctx, read)


@commands.command(
    cls=_Train,
    epilog=example(
        "moda train runs/digits --epochs 40",
        "moda train runs/standard --epochs 40 --standard",
        "moda train runs/mwt --epochs 40 --method mwt",
        "moda train runs/resnet --model resnet18 --data cifar10 --data-root ~/data --precision bf16-mixed",
        "moda train runs/resnet --resume",
        "torchrun --nproc-per-node 4 --max-restarts 3 -m moda train runs/big --epochs 90 --resume auto",
    ),
)
@takes(TrainingConfig, "train")
def train(
    folder: RunArgument,
    given: Mapping[str, Any],
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the run's last checkpoint. `--resume auto` begins where there is no run yet: one "
            "command line for clusters that restart a job.",
        ),
    ] = False,
    begin_or_resume: Annotated[bool, typer.Option("--resume-auto", hidden=True)] = False,
    standard: Annotated[bool, typer.Option("--standard", help="Train without the modular terms.")] = False,
) -> None:
    """Train a model modular (or standard) into a run folder.

    The recipe is the paper's: SGD, Nesterov momentum, cosine annealing, cross-entropy plus affinity, dispersion and
    compactness, or the terms of another method. Ctrl-C or a crash keeps the last checkpoint; --resume goes on
    from it, on one device bit for bit.
    """
    _check_terms(given)
    if standard:
        weights = [option_of(TrainingConfig, term) for term in _WEIGHTS if given.get(term)]
        if weights:
            raise typer.BadParameter(f"--standard trains without the modular terms; drop {', '.join(weights)}")
    if resume and begin_or_resume:
        raise typer.BadParameter("--resume: given twice, with auto and without")
    if resume:
        config = _resumed_config(folder, given, standard=standard)
    else:
        config = TrainingConfig(**given)
        config = config.standard() if standard else config

    from moda.training.loop import TrainingInterrupted
    from moda.training.loop import train as run_training
    from moda.training.processes import process_rank

    try:
        result = run_training(config, folder, resume="auto" if begin_or_resume else resume)
    except TrainingInterrupted as interrupt:
        raise Interrupted(str(interrupt)) from None
    if process_rank() > 0:
        return
    if result.seconds == 0 and (resume or begin_or_resume):
        say(f"{folder}: already finished after {config.epochs} epochs.")
    _print_training(result.run, result.metrics)


_WEIGHTS = ("method", *TERMS, *(term for terms in GATE_TERMS.values() for term in terms), "temperature")


def _check_terms(given: Mapping[str, Any]) -> None:
    """Refuse weights of another method than the one that is trained."""
    method = given.get("method", TrainingConfig.method)
    own = {"method", *TERMS} if method not in GATE_TERMS else {"method", *GATE_TERMS[method]}
    own |= {"temperature"} if method == "nemo" else set()
    foreign = [name for name in _WEIGHTS if name in given and name not in own]
    if foreign:
        option = option_of(TrainingConfig, foreign[0])
        raise typer.BadParameter(f"{option} is no setting of the method {method}; drop it, or give another --method")


def _resumed_config(folder: Path, given: Mapping[str, Any], *, standard: bool) -> TrainingConfig:
    """Give the run's settings, with those replaced that a resumed run may change."""
    fixed = [option_of(TrainingConfig, name, value) for name, value in given.items() if name not in RUNTIME_SETTINGS]
    fixed += ["--standard"] if standard else []
    if fixed:
        raise typer.BadParameter(f"--resume takes the settings of {folder / 'config.json'}; drop {fixed[0]}")
    return RunFolder.open(folder).config.changed(**given)


def _print_training(run: RunFolder, metrics: dict[str, float]) -> None:
    rows = table(f"{run.config.model} on {run.config.data}", "last epoch", "")
    for name in ("train_accuracy", "test_accuracy"):
        rows.add_row(name.replace("_", " "), percent(metrics[name]))
    for name in ("cross_entropy", *run.config.terms):
        if name in metrics:
            rows.add_row(name.replace("_", " "), f"{metrics[name]:.4f}")
    show(rows)
    say(f"Weights, settings and metrics: {run.path}/")
    if run.config.modular:
        say(f"Next: {command_line('decompose', run.path)}")
