"""The `moda` command. Heavy packages are imported inside the commands, so that `moda --help` is quick."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moda.cli.examples import example as _example
from moda.cli.report import register as register_report
from moda.cli.study import register
from moda.runs.config import ACCELERATORS, PRECISIONS, ROUTES, TrainingConfig

if TYPE_CHECKING:
    from moda.data import DataSplits
    from moda.runs.finished import FinishedRun
    from moda.runs.folder import RunFolder

DEFAULTS = TrainingConfig()
INTERRUPTED = 130  # what a shell reports for a command stopped by Ctrl-C

app = typer.Typer(
    name="moda",
    help="Train modular, cut, recombine: modular training of neural networks (MODA, arXiv 2411.01074).",
    epilog="Start with: moda demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point: runs a command; an error is one line on stderr and a non-zero exit status.

    Exit status: 0; 1 for an error; 2 for a command line that makes no sense; 130 after Ctrl-C.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        status = app(args=arguments, prog_name="moda", standalone_mode=False)
    except _Interrupted as interrupt:
        _fail(str(interrupt), INTERRUPTED, debug=debug)
    except typer.Abort:
        status = INTERRUPTED
    except Exception as error:
        # The parser's own errors (no such option, missing argument, ...) have a message without its decoration.
        usage = getattr(error, "format_message", None)
        message = usage() if usage else str(error) or type(error).__name__
        _fail(message, 2 if usage else 1, debug=debug)
    if status == INTERRUPTED:  # Ctrl-C where it left nothing to say
        _fail("interrupted", INTERRUPTED, debug=debug)
    sys.exit(status if isinstance(status, int) else 0)


class _Interrupted(Exception):  # noqa: N818
    """Ctrl-C with something to say; typer swallows a KeyboardInterrupt and its message."""


def _fail(message: str, status: int, *, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(f"moda: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="On an error show the traceback too.")] = False,
) -> None:
    """Only declares --debug for the help: `main` takes it from anywhere on the command line."""


# ---- train --------------------------------------------------------------------------------------------------------

_Folder = Annotated[Path, typer.Argument(help="The run folder.", show_default=False)]


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


@app.command(
    epilog=_example(
        "moda train runs/digits --epochs 40",
        "moda train runs/standard --epochs 40 --standard",
        "moda train runs/resnet --model resnet18 --data cifar10 --data-root ~/data --precision bf16-mixed",
        "moda train runs/resnet --resume",
    )
)
def train(
    folder: _Folder,
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
        weights = [f"--{name}" for name in ("affinity", "dispersion", "compactness") if given.get(name)]
        if weights:
            raise typer.BadParameter(f"--standard trains without the modular terms; drop {', '.join(weights)}")
        given |= {"affinity": 0.0, "dispersion": 0.0, "compactness": 0.0}
    if options:
        given["data_options"] = options
    config = _resumed_config(folder, given) if resume else TrainingConfig(**given)

    from moda.training.loop import TrainingInterrupted
    from moda.training.loop import train as run_training
    from moda.training.processes import process_rank

    try:
        result = run_training(config, folder, resume=resume)
    except TrainingInterrupted as interrupt:
        raise _Interrupted(str(interrupt)) from None
    if process_rank() > 0:
        return
    if result.seconds == 0 and resume:
        _console().print(f"{folder}: already finished after {config.epochs} epochs.")
    _print_training(result.run, result.metrics)


def _resumed_config(folder: Path, given: dict[str, Any]) -> TrainingConfig:
    """The run's settings, with those replaced that a resumed run may change."""
    from moda.runs.config import RUNTIME_SETTINGS
    from moda.runs.folder import RunFolder

    fixed = [name for name in given if name not in RUNTIME_SETTINGS]
    if fixed:
        option = fixed[0].replace("_", "-")
        raise typer.BadParameter(f"--resume takes the settings of {folder / 'config.json'}; drop --{option}")
    return RunFolder.open(folder).config.changed(**given)


def _print_training(run: RunFolder, metrics: dict[str, float]) -> None:
    table = Table(title=f"{run.config.model} on {run.config.data}", title_justify="left")
    table.add_column("last epoch")
    table.add_column("", justify="right")
    for name in ("train_accuracy", "test_accuracy"):
        table.add_row(name.replace("_", " "), f"{100 * metrics[name]:.2f} %")
    for name in ("cross_entropy", "affinity", "dispersion", "compactness"):
        if name in metrics:
            table.add_row(name.replace("_", " "), f"{metrics[name]:.4f}")
    _console().print(table)
    _console().print(f"Weights, settings and metrics: {run.path}/", highlight=False)
    if run.config.modular:
        _console().print(f"Next: moda decompose {run.path}", highlight=False)


# ---- decompose ----------------------------------------------------------------------------------------------------


@app.command(epilog=_example("moda decompose runs/digits", "moda decompose runs/digits --threshold 0.8"))
def decompose(
    folder: _Folder,
    threshold: Annotated[float, typer.Option(help="Firing rate from which a neuron is kept.")] = 0.9,
    min_fraction: Annotated[float, typer.Option(help="Least share of a layer's neurons that a class keeps.")] = 0.005,
    backend: Annotated[str, typer.Option(help="Of the firing counts (see moda doctor).")] = "auto",
    augmented: Annotated[
        bool, typer.Option("--augmented", help="Count on augmented images, as the published code does.")
    ] = False,
) -> None:
    """Cut a trained model into one module per class.

    Counts, on the training data, for which share of each class's samples every neuron fires, and writes the
    modules to the run's folder decomposition/.
    """
    from moda.runs.finished import FinishedRun, cut

    finished = FinishedRun.open(folder)
    decomposition = cut(finished, threshold, min_fraction, backend=backend, augmented=augmented)
    run = finished.run
    _print_modules(finished.model, decomposition, finished.data)
    _console().print(f"Modules: {run.decomposition}/", highlight=False)
    _console().print(f"Next: moda compose {folder} --classes 0,1", highlight=False)


def _print_modules(model: Any, decomposition: Any, data: DataSplits) -> None:
    from moda.composition import measure

    table = Table(title="Modules", title_justify="left")
    for name in ("class", "neurons", "parameters"):
        table.add_column(name, justify="left" if name == "class" else "right")
    neurons = sum(mask.shape[1] for mask in decomposition.masks.values())
    sizes = []
    for index, name in enumerate(data.class_names):
        kept = sum(int(mask.sum()) for mask in decomposition.select([index]).values())
        sizes.append(measure.size(model, decomposition, [index]))
        table.add_row(name, f"{kept} of {neurons}", f"{100 * sizes[-1]:.1f} %")
    _console().print(table)
    overlaps = measure.overlap_matrix(model, decomposition)
    classes = len(overlaps)
    mean = (float(overlaps.sum()) - float(overlaps.trace())) / max(1, classes * (classes - 1))
    _console().print(
        f"Mean module: {100 * sum(sizes) / classes:.1f} % of the parameters; "
        f"mean overlap of two modules: {100 * mean:.1f} %.",
        highlight=False,
    )


# ---- compose, evaluate --------------------------------------------------------------------------------------------

_Classes = Annotated[
    str | None, typer.Option("--classes", "-c", help="Names or indices, separated by commas.", show_default=False)
]


@app.command(
    epilog=_example("moda compose runs/digits --classes 1,7", "moda compose runs/digits -c 3,5,8 -o three-five-eight")
)
def compose(
    folder: _Folder,
    classes: _Classes = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write it.  \\[default: composed-... in the run]"),
    ] = None,
) -> None:
    """Build the smaller model of some classes from their modules."""
    from moda.composition.compose import compose as build
    from moda.composition.files import save_composed
    from moda.runs.finished import FinishedRun

    if classes is None:
        raise typer.BadParameter("--classes: name the classes that the model is to tell apart, e.g. --classes 1,7")
    finished = FinishedRun.open(folder, "cpu")
    run, data = finished.run, finished.data
    chosen = parse_classes(classes, data.class_names)
    model = build(finished.model, finished.decomposition(), chosen)
    names = [data.class_names[index] for index in chosen]
    target = output or run.path / f"composed-{'-'.join(map(str, chosen))}"
    metadata = {"source_run": str(run.path), "class_names": names, "training": run.config.to_dict()}
    save_composed(model, target, metadata)
    _print_accuracies(finished, chosen, model)
    _console().print(f"The composed model: {target}/", highlight=False)
    _console().print(f"Next: moda evaluate {target}", highlight=False)


@app.command(
    epilog=_example(
        "moda evaluate runs/digits",
        "moda evaluate runs/digits --classes 1,7",
        "moda evaluate runs/digits/composed-1-7",
    )
)
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A run folder, or one that `moda compose` wrote.", show_default=False)],
    classes: _Classes = None,
) -> None:
    """Test a trained model, or a composed one, on the test data.

    With --classes only samples and outputs of these classes count, and where the run is decomposed the model composed
    of them is tested beside the whole one.
    """
    from moda.composition import measure
    from moda.runs.finished import FinishedRun

    if (folder / "composed.json").exists():
        _evaluate_composed(folder, classes)
        return
    finished = FinishedRun.open(folder, "cpu")
    if classes is not None:
        chosen = parse_classes(classes, finished.data.class_names)
        _print_accuracies(finished, chosen, _composed(finished, chosen))
        return
    share = measure.accuracy(finished.model, finished.loader(finished.data.test))
    _console().print(f"{finished.run.config.model}: {100 * share:.2f} % of the test samples", highlight=False)


def _evaluate_composed(folder: Path, classes: str | None) -> None:
    from moda.composition import measure
    from moda.composition.files import DESCRIPTION_FILE, FORMAT, FORMAT_VERSION, load_composed
    from moda.data.batches import BatchLoader, EpochOrder
    from moda.files import FormatError, read_json
    from moda.observation.taps import instrument
    from moda.runs.folder import create_model, load_data

    description = read_json(folder / DESCRIPTION_FILE, FORMAT, FORMAT_VERSION)
    settings = description.get("metadata", {}).get("training")
    if not isinstance(settings, dict):
        raise FormatError(
            f"{folder / DESCRIPTION_FILE}: does not say how the model was trained; was it made by moda compose?"
        )
    config = TrainingConfig.from_dict(settings)
    data = load_data(config)
    model = load_composed(folder, instrument(create_model(config, data)))
    chosen = list(model.classes) if classes is None else parse_classes(classes, data.class_names)
    loader = BatchLoader(data.test, EpochOrder(len(data.test), config.batch_size, None))  # type: ignore[arg-type]
    share = measure.accuracy(model, loader, chosen)
    names = ", ".join(data.class_names[index] for index in chosen)
    _console().print(
        f"composed of {names}: {100 * share:.2f} % of their test samples, "
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters",
        highlight=False,
    )


def _composed(finished: FinishedRun, classes: list[int]) -> Any:
    """The model of these classes, or None where the run is not decomposed."""
    from moda.composition.compose import compose as build

    if not finished.run.decomposition.exists():
        return None
    return build(finished.model, finished.decomposition(), classes)


def _print_accuracies(finished: FinishedRun, classes: list[int], composed: Any) -> None:
    """The whole model and the composed one on the test samples of some classes."""
    import torch

    from moda.composition import measure

    names = ", ".join(finished.data.class_names[index] for index in classes)
    table = Table(title=f"On the test samples of {names}", title_justify="left")
    for name in ("model", "accuracy", "parameters", "FLOPs"):
        table.add_column(name, justify="left" if name == "model" else "right")
    example = torch.zeros(1, *finished.data.input_shape)
    whole = None
    for title, model in (("whole", finished.model), ("composed", composed)):
        if model is None:
            continue
        share = measure.accuracy(model, finished.loader(finished.data.test), classes)
        cost = sum(parameter.numel() for parameter in model.parameters()), measure.flops(model, example)
        whole = whole or cost
        cells = [f"{value:,} ({100 * value / total:.0f} %)" for value, total in zip(cost, whole, strict=True)]
        table.add_row(title, f"{100 * share:.2f} %", *cells)
    _console().print(table)


def parse_classes(text: str, names: tuple[str, ...]) -> list[int]:
    """Class indices from "cat,dog" or "3,5"; a word that is a class's name is that class, else it is an index.

    Raises:
        ValueError: a word is neither, or a class comes twice.
    """
    chosen = []
    for word in (part.strip() for part in text.split(",")):
        if word in names:
            chosen.append(names.index(word))
        elif word.isdigit() and int(word) < len(names):
            chosen.append(int(word))
        else:
            known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise ValueError(f"classes: expected names or indices of {len(names)} classes ({known}), got {word!r}")
    twice = sorted({names[index] for index in chosen if chosen.count(index) > 1})
    if twice:
        raise ValueError(f"classes: expected every class once, got {', '.join(twice)} more than once")
    return chosen


# ---- doctor, bench, demo ---------------------------------------------------------------------------------------------


@app.command(epilog=_example("moda doctor"))
def doctor() -> None:
    """Show versions, devices and backends, why one is not available, and how to fix it."""
    from moda.cli.doctor import examine

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    topic = None
    for finding in examine():
        if topic is not None and finding.topic != topic:
            table.add_row()
        heading = finding.topic if finding.topic != topic else ""
        topic = finding.topic
        mark = "[green]yes[/green]" if finding.ok else "[yellow]no[/yellow]"
        table.add_row(f"[bold]{heading}[/bold]", finding.name, mark, Text(finding.detail))
    _console().print(table)


@app.command(epilog=_example("moda bench --quick", "moda bench --suite step --suite loss"))
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Few cases and rounds.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; auto takes a GPU if there is one.")] = "auto",
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="step, loss, relu_pool, firing, decomposition, composition or scaling; repeat for several.",
            show_default="all",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for <device>.json.",
            show_default="benchmarks/results in a checkout, else here, for a full run; none for any other",
        ),
    ] = None,
) -> None:
    """Measure this machine: training steps, losses, pooling, counting and decomposition, ours beside PyTorch's.

    Results are checked first, contenders take turns, and one table comes last. A full run takes a quarter of an hour on
    two cores. Exit status 1 if a contender computed something wrong.
    """
    from moda.bench.command import bench as measure

    if not measure(quick=quick, device=device, suites=suite or (), folder=output):
        raise typer.Exit(1)


@app.command(epilog=_example("moda demo", "moda demo my-demo --seeds 3"))
def demo(
    folder: Annotated[Path, typer.Argument(help="Where to write runs and figures.")] = Path("demo"),
    seeds: Annotated[int, typer.Option(help="Repeat with so many seeds and show means.", min=1)] = 1,
    epochs: Annotated[int, typer.Option(help="Of each training.", min=1)] = 40,
    batch_size: Annotated[int, typer.Option(help="Samples per step.", min=2)] = 64,
) -> None:
    """Train a small network on handwritten digits, cut it into modules, recombine them, and show what came of it.

    About a minute on two cores, without network. Writes demo.html and demo.png.
    """
    from moda.demo.run import DemoSettings, run_demo

    run_demo(folder, DemoSettings(tuple(range(seeds)), epochs, batch_size), _console())


def _console() -> Console:
    return Console()


register(app)
register_report(app)

if __name__ == "__main__":
    main()
