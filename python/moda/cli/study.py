"""Commands of the paper's study: reuse, repair, analyze, sweep, export, import, study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moda.cli.examples import example

if TYPE_CHECKING:
    from moda.runs.finished import FinishedRun
    from moda.study.replacement import RepairResult
    from moda.study.sweep import SweepPoint

_Run = Annotated[Path, typer.Argument(help="A run folder, decomposed.", show_default=False)]
_Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
_Tasks = Annotated[
    str, typer.Option("--tasks", help="auto (all subsets of up to 12 classes, else sampled), all, or sampled.")
]
_Sizes = Annotated[
    str | None, typer.Option("--size", help="Only sub-tasks of these numbers of classes, e.g. 2,3.", show_default=False)
]
_PerSize = Annotated[
    int | None, typer.Option("--per-size", help="At most so many sub-tasks of each size, at random.", min=1)
]


def register(app: typer.Typer) -> None:
    """Add the commands to the `moda` command."""
    for command, name, lines in _COMMANDS:
        app.command(name, epilog=example(*lines), rich_help_panel="The paper's study")(command)


def reuse(
    folder: _Run,
    standard: Annotated[
        Path | None, typer.Option(help="A run trained with --standard, to compare with.", show_default=False)
    ] = None,
    tasks: _Tasks = "auto",
    size: _Sizes = None,
    per_size: _PerSize = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Table, .csv or .parquet.  \\[default: reuse.csv in the run]")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.", min=1)] = 512,
    device: _Device = "auto",
) -> None:
    """Score the composed model of every sub-task against the whole models.

    Accuracy on the test samples of the sub-task's classes, parameters and FLOPs relative to the whole model. Rows are
    kept as they are made: after Ctrl-C or a crash the same command goes on.
    """
    from moda.study.reuse_run import run_reuse
    from moda.study.subtasks import choose

    finished = _open(folder, device)
    chosen = choose(finished.data.num_classes, tasks, sizes=_integers("size", size), per_size=per_size)
    other = None if standard is None else _open(standard, device)
    path = out or finished.run.path / "reuse.csv"
    results = run_reuse(finished, chosen, path, standard=other, batch_size=batch_size)
    _print_reuse(results, finished)
    _say(f"Table: {path}")


def _print_reuse(results: list[Any], finished: FinishedRun) -> None:
    from moda.study.reuse import by_size, reuse_accuracy

    table = _table(f"Sub-tasks of {finished.run.config.model} on {finished.run.config.data}")
    _columns(table, "classes", "sub-tasks", "standard", "modular", "composed", "size", "FLOPs")
    for count, mean in by_size(results).items():
        number = sum(len(result.classes) == count for result in results)
        figures = (mean.standard, mean.modular, mean.composed, mean.size, mean.flops)
        table.add_row(str(count), str(number), *map(_percent, figures))
    Console().print(table)
    _say(f"Reuse accuracy (mean over sizes): {_percent(reuse_accuracy(results))}")


def analyze(folder: _Run, device: _Device = "auto") -> None:
    """Describe the modules: sizes, overlaps, dead and shared neurons, layer by layer.

    Writes analysis.json to the run, with the similarity between classes on the test set besides.
    """
    from moda.study.analysis_files import analyze_run, write_analysis

    finished = _open(folder, device)
    analysis = analyze_run(finished)
    path = finished.run.path / "analysis.json"
    write_analysis(path, analysis)
    _print_modules(analysis)
    _print_layers(analysis)
    _say(f"Mean module: {_percent(analysis['mean_size'])} of the parameters")
    _say(
        f"Mean overlap of two modules: {_percent(analysis['mean_overlap'])} as published, "
        f"{_percent(analysis['mean_overlap_parameters'])} counting parameters alone"
    )
    _say(f"All figures: {path}")


def _print_modules(analysis: dict[str, Any]) -> None:
    table = _table("Modules")
    _columns(table, "class", "size", "mean overlap", "most with")
    names = analysis["class_names"]
    for k, row in enumerate(analysis["overlaps"]):
        others = {other: value for other, value in enumerate(row) if other != k}
        most = max(others, key=lambda other: others[other], default=k)
        mean = sum(others.values()) / max(1, len(others))
        table.add_row(names[k], _percent(analysis["sizes"][k]), _percent(mean), f"{names[most]} {_percent(row[most])}")
    Console().print(table)


def _print_layers(analysis: dict[str, Any]) -> None:
    table = _table("Layers, from the input")
    _columns(table, "tap", "neurons", "dead", "in all modules", "in a module", "in both of two", "both / either")
    for layer in analysis["layers"]:
        shares = (layer["module_share"], layer["overlap"], layer["jaccard"])
        counts = (layer["neurons"], layer["dead"], layer["shared_by_all"])
        table.add_row(layer["tap"], *map(str, counts), *map(_percent, shares))
    Console().print(table)


def sweep(
    folder: _Run,
    threshold: Annotated[str | None, typer.Option(help="Thresholds, separated by commas, or `paper`.")] = None,
    affinity: Annotated[str | None, typer.Option(help="Weights of the affinity term, or `paper`.")] = None,
    dispersion: Annotated[str | None, typer.Option(help="Weights of the dispersion term, or `paper`.")] = None,
    compactness: Annotated[str | None, typer.Option(help="Weights of the compactness term, or `paper`.")] = None,
    tasks: _Tasks = "auto",
    per_size: Annotated[int, typer.Option(help="At most so many sub-tasks of each size, at random.", min=1)] = 20,
    device: _Device = "auto",
) -> None:
    """Vary the threshold or a weight, and measure module size, overlap and reuse accuracy.

    Without options: the paper's thresholds. A threshold costs no training and no counting: the run's firing rates are
    cut anew. A weight costs a training, kept in the run's folder sweeps/. After Ctrl-C the same command goes on.
    """
    from moda.study.subtasks import choose
    from moda.study.sweep import GRIDS, sweep_threshold, sweep_weight

    asked = {"threshold": threshold, "affinity": affinity, "dispersion": dispersion, "compactness": compactness}
    if not any(asked.values()):
        asked["threshold"] = "paper"
    grids = {name: GRIDS[name] if text == "paper" else _numbers(name, text) for name, text in asked.items() if text}
    finished = _open(folder, device)
    chosen = choose(finished.data.num_classes, tasks, per_size=per_size)
    for name, values in grids.items():
        if name == "threshold":
            points = sweep_threshold(finished, values, chosen)
        else:
            points = sweep_weight(finished, name, values, chosen, device=device)
        _print_sweep(name, points)
        _say(f"Table: {finished.run.path / f'sweep_{name}.csv'}")


def _print_sweep(name: str, points: list[SweepPoint]) -> None:
    table = _table(f"By {name}")
    _columns(table, name, "module size", "overlap", "reuse accuracy", "whole model", "test accuracy")
    for point in points:
        figures = (point.module_size, point.overlap, point.reuse_accuracy, point.modular_accuracy, point.test_accuracy)
        table.add_row(f"{point.value:g}", *map(_percent, figures))
    Console().print(table)


def repair(
    out: Annotated[Path, typer.Argument(help="Folder of the study: its runs and repair.json.", show_default=False)],
    strong: Annotated[
        Path | None, typer.Option(help="Take this strong run instead of training one.", show_default=False)
    ] = None,
    data: Annotated[str, typer.Option(help="Its first half of classes are the strong ones.")] = "cifar10",
    data_root: Annotated[str | None, typer.Option(help="Folder that holds the data set.  \\[default: ./data]")] = None,
    image_size: Annotated[int | None, typer.Option(help="Resize images (digits, imagefolder).")] = None,
    strong_model: Annotated[str, typer.Option(help="Architecture that gives the modules.")] = "vgg16",
    strong_width: Annotated[float, typer.Option(help="Multiplier of its hidden widths.")] = 1.0,
    weak_model: Annotated[str, typer.Option(help="Architecture that is repaired.")] = "lenet5",
    weak_width: Annotated[float, typer.Option(help="Multiplier of its hidden widths.")] = 1.0,
    classes: Annotated[
        str | None, typer.Option("--classes", "-c", help="Indices of strong classes to replace.  \\[default: all]")
    ] = None,
    strategy: Annotated[str, typer.Option(help="moda, cnnsplitter, or both, separated by a comma.")] = (
        "moda,cnnsplitter"
    ),
    epochs: Annotated[int, typer.Option(help="Of each training.", min=1)] = 200,
    under: Annotated[int, typer.Option(help="Epoch of the under-fitted weak model; 0: none.", min=0)] = 10,
    over: Annotated[int, typer.Option(help="Epoch of the over-fitted weak model; 0: none.", min=0)] = 195,
    fraction: Annotated[float, typer.Option(help="Share of training samples that a weak model sees.")] = 0.1,
    batch_size: Annotated[int, typer.Option(help="Samples per step.", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="Of everything.", min=0)] = 42,
    threshold: Annotated[float, typer.Option(help="Firing rate from which a neuron is kept.")] = 0.9,
    calibration_epochs: Annotated[
        int, typer.Option(help="Passes over the weak training samples that calibrate.", min=1)
    ] = 5,
    weak_standard: Annotated[
        bool, typer.Option("--weak-standard", help="Train weak models without the modular terms.")
    ] = False,
    device: _Device = "auto",
) -> None:
    """Replace a class of weak models by a strong model's module, and test what that does.

    Trains a strong model on the first half of the classes and, for each of these, a weak model on a tenth of the data
    of the other half and of that class; replaces that class in the under-fitted and the over-fitted weak model. The
    defaults are the paper's. After Ctrl-C the same command goes on.
    """
    from moda.study.replacement_study import RESULTS, RepairStudy, run_repair_study

    study = RepairStudy(
        data=data,
        data_root=data_root,
        data_options={} if image_size is None else {"image_size": image_size},
        strong_model=strong_model,
        strong_width=strong_width,
        weak_model=weak_model,
        weak_width=weak_width,
        mixed_classes=None if classes is None else tuple(_integers("classes", classes) or ()),
        strategies=tuple(word.strip() for word in strategy.split(",")),
        epochs=epochs,
        under_epoch=under or None,
        over_epoch=over or None,
        fraction=fraction,
        batch_size=batch_size,
        seed=seed,
        threshold=threshold,
        calibration_epochs=calibration_epochs,
        weak_modular=not weak_standard,
        device=device,
    )
    results = run_repair_study(out, study, None if strong is None else _open(strong, device))
    _print_repairs(results)
    _say(f"All figures: {out / RESULTS}")


def _print_repairs(results: list[RepairResult]) -> None:
    first = results[0]
    table = _table(f"{first.weak_model} with modules of {first.strong_model}: accuracy in %, before -> after")
    _columns(table, "class", "weak model", "strategy", "replaced class", "other classes")
    for result in results:
        (target, target_after), (others, others_after) = result.target, result.others
        table.add_row(
            result.class_name,
            f"{result.checkpoint}, epoch {result.epoch}",
            result.strategy,
            _change(target, target_after),
            _change(others, others_after),
        )
    Console().print(table)


def _change(before: float, after: float) -> str:
    return f"{100 * before:.1f} -> {100 * after:.1f} ({100 * (after - before):+.1f})"


def export(
    folder: _Run,
    classes: Annotated[
        str, typer.Option("--classes", "-c", help="Names or indices, separated by commas.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A file that ends in .pt2 or .onnx.", show_default=False)
    ],
) -> None:
    """Write a composed model to a file that runs without moda: torch.export or ONNX.

    The file takes batches of any size. It is read back and must give the same logits on test images; its classes and
    the hashes of what it was made from are inside.
    """
    from moda.cli.app import parse_classes
    from moda.composition.compose import compose
    from moda.composition.export import export as write
    from moda.composition.export import provenance_of
    from moda.study.reuse import TestSet

    finished = _open(folder, "cpu")
    chosen = parse_classes(classes, finished.data.class_names)
    model = compose(finished.model, finished.decomposition(), chosen)
    names = [finished.data.class_names[k] for k in chosen]
    origin = provenance_of(model, names, finished.data.input_shape, str(folder), finished.provenance())
    few = [finished.data.test[index] for index in range(min(16, len(finished.data.test)))]  # type: ignore[arg-type]
    difference = write(model, TestSet.of(few).images, output, origin)
    _say(f"{output}: {', '.join(names)}; its logits differ from the model's by at most {difference:.1e}")


def import_published(
    weights: Annotated[Path, typer.Argument(help="A published model.pt.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="The run folder to make.", show_default=False)],
    model: Annotated[str | None, typer.Option(help="Architecture.  \\[default: from the folder names]")] = None,
    data: Annotated[str | None, typer.Option(help="Data set.  \\[default: from the folder names]")] = None,
    data_root: Annotated[str | None, typer.Option(help="Folder that holds the data set.  \\[default: ./data]")] = None,
    class_list: Annotated[str | None, typer.Option(help="File with the classes (imagefolder).")] = None,
    width: Annotated[float, typer.Option(help="Multiplier of all hidden widths.")] = 1.0,
    masks: Annotated[
        Path | None, typer.Option(help="A published mask file: cut the model, and compare.", show_default=False)
    ] = None,
    augmented: Annotated[
        bool, typer.Option("--augmented", help="Count firings on augmented images, as the published code does.")
    ] = False,
    device: _Device = "auto",
) -> None:
    """Make a run of a published checkpoint, so that every command works on it; compare its modules with ours.

    The published files are pickles; they are read without running anything in them. Without --masks, go on with
    moda decompose.
    """
    from moda.runs.finished import cut
    from moda.runs.published import agreement, described, import_run, load_published_masks

    options = {} if class_list is None else {"class_list": class_list}
    given = {"model": model, "data": data, "data_root": data_root, "width": width, "data_options": options}
    config = described(weights, **{name: value for name, value in given.items() if value is not None})
    run = import_run(weights, folder, config)
    _say(f"{run.path}: {config.model} on {config.data}")
    if masks is None:
        _say(f"Next: moda decompose {run.path}")
        return
    finished = _open(folder, device)
    theirs = load_published_masks(masks, finished.model.taps)
    ours = cut(finished, theirs.threshold, augmented=augmented)
    table = _table(f"Our modules and {masks.name}")
    _columns(table, "tap", "same", "in both", "ours alone", "theirs alone")
    for layer in agreement(ours, theirs):
        counts = (layer.both, layer.only_first, layer.only_second)
        table.add_row(layer.tap, _percent(layer.agreement), *map(str, counts))
    Console().print(table)


def study(
    out: Annotated[Path, typer.Argument(help="Folder of the study.", show_default=False)],
    models: Annotated[str, typer.Option(help="Architectures, separated by commas.")] = (
        "small_vgg,lenet5,resnet18,mobilenet"
    ),
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0,1,2",
    epochs: Annotated[int, typer.Option(help="Of each training.", min=1)] = 40,
    batch_size: Annotated[int, typer.Option(help="Samples per step.", min=2)] = 64,
    jobs: Annotated[int, typer.Option(help="Processes side by side, each with one thread.", min=1)] = 2,
    per_size: _PerSize = None,
) -> None:
    """The whole study on handwritten digits: trainings, modules, reuse, sweeps, replacement.

    Without network or GPU. Every architecture at reduced width, standard and modular, with every seed. After Ctrl-C
    the same command goes on. Then: moda report.
    """
    from moda.study.digits import StudySettings, run_study

    names = tuple(word.strip() for word in models.split(",") if word.strip())
    settings = StudySettings(names, tuple(_integers("seeds", seeds) or ()), epochs, batch_size, per_size)
    run_study(out, settings, jobs=jobs)
    _say(f"The study: {out / 'study.json'}")


_COMMANDS: tuple[tuple[Any, str, tuple[str, ...]], ...] = (
    (
        reuse,
        "reuse",
        (
            "moda reuse runs/digits --standard runs/standard",
            "moda reuse runs/digits --size 2,3 --per-size 20",
            "moda reuse runs/cifar100 --tasks sampled --out cifar100.parquet --device cuda",
        ),
    ),
    (analyze, "analyze", ("moda analyze runs/digits",)),
    (
        sweep,
        "sweep",
        (
            "moda sweep runs/digits",
            "moda sweep runs/digits --threshold 0.5,0.7,0.9,0.95 --per-size 50",
            "moda sweep runs/digits --affinity paper --dispersion paper --compactness 0,0.3,1",
        ),
    ),
    (
        repair,
        "repair",
        (
            "moda repair repairs/vgg16 --data cifar10 --data-root ~/data",
            "moda repair repairs/resnet18 --data svhn --strong-model resnet18 --classes 0,3",
            "moda repair repairs/digits --data digits --image-size 16 --strong-model small_vgg",
        ),
    ),
    (
        export,
        "export",
        (
            "moda export runs/digits --classes 1,7 -o one-seven.pt2",
            "moda export runs/digits --classes 3,5,8 -o three-five-eight.onnx",
        ),
    ),
    (
        import_published,
        "import",
        (
            "moda import vgg16_cifar10/model__bs128__ep200__lr0.05__aff1.0_dis1.0_comp0.3/v1/model.pt runs/published",
            "moda import model.pt runs/published --model vgg16 --data cifar10 --masks model.pt.mod_mask.thres0.9.pt",
        ),
    ),
    (study, "study", ("moda study study", "moda study quick --models small_vgg --seeds 0 --per-size 20")),
)


def _open(folder: Path, device: str) -> FinishedRun:
    from moda.runs.finished import FinishedRun

    return FinishedRun.open(folder, device)


def _integers(name: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    return [int(value) for value in _parsed(name, text, int)]


def _numbers(name: str, text: str) -> list[float]:
    return _parsed(name, text, float)


def _parsed(name: str, text: str, kind: type[int] | type[float]) -> list[float]:
    words = [word.strip() for word in text.split(",")]
    try:
        return [kind(word) for word in words]
    except ValueError:
        what = "integers" if kind is int else "numbers"
        option = f"--{name.replace('_', '-')}"
        raise typer.BadParameter(f"{option}: expected {what} separated by commas, got {text!r}") from None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left")


def _columns(table: Table, first: str, *others: str) -> None:
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")


def _say(line: str) -> None:
    Console().print(line, highlight=False, soft_wrap=True)
