"""Holds the commands that write or read files of others: export, import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moda.cli.arguments import ClassesOption, DecomposedRun, DeviceOption, ForceOption, parse_classes
from moda.cli.commands import example, group
from moda.cli.options import takes
from moda.cli.printing import percent, say, show, table
from moda.composition.compose import compose
from moda.composition.export import FORMATS, provenance_of, read_provenance
from moda.composition.export import export as write
from moda.files import FormatError, check_result_file
from moda.hints import command_line
from moda.runs.config import TrainingConfig
from moda.runs.finished import FinishedRun, decompose_run
from moda.runs.published import agreement, described, import_run, load_published_masks
from moda.study.reuse import TestSet

commands = group()


@commands.command(
    epilog=example(
        "moda export runs/digits --classes 1,7 -o one-seven.pt2",
        "moda export runs/digits --classes 3,5,8 -o three-five-eight.onnx",
    )
)
def export(
    folder: DecomposedRun,
    classes: ClassesOption,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The file to write; its name ends in .pt2 or .onnx.", show_default=False),
    ],
    force: ForceOption = False,
) -> None:
    """Write a composed model to a file that runs without moda: torch.export or ONNX.

    The file takes batches of any size. It is read back and must give the same logits on test images; its classes and
    the hashes of what it was made from are inside.
    """
    check_result_file(output, force=force)
    if output.suffix not in FORMATS:
        raise ValueError(f"output: expected a name that ends in {' or '.join(FORMATS)}, got {output.name!r}")
    if output.exists():
        _check_exported(output)
    finished = FinishedRun.open(folder, "cpu")
    chosen = parse_classes(classes, finished.data.class_names)
    model = compose(finished.model, finished.decomposition(), chosen, class_names=finished.data.class_names)
    names = [finished.data.class_names[k] for k in chosen]
    origin = provenance_of(model, names, finished.data.input_shape, str(folder), finished.provenance())
    few = [finished.data.test[index] for index in range(min(16, len(finished.data.test)))]  # type: ignore[arg-type]
    difference = write(model, TestSet.of(few).images, output, origin)
    say(f"{output}: {', '.join(names)}; its logits differ from the model's by at most {difference:.1e}")


def _check_exported(path: Path) -> None:
    """Raise ValueError unless a file is one that `moda export` wrote."""
    try:
        read_provenance(path)
    except FormatError:
        raise ValueError(f"{path}: holds something else than such a result; choose another name") from None


@commands.command(
    "import",
    epilog=example(
        "moda import vgg16_cifar10/model__bs128__ep200__lr0.05__aff1.0_dis1.0_comp0.3/v1/model.pt runs/published",
        "moda import model.pt runs/published --model vgg16 --data cifar10 --masks model.pt.mod_mask.thres0.9.pt",
    ),
)
@takes(TrainingConfig, "import", defaults=False)
def import_published(
    weights: Annotated[Path, typer.Argument(help="The published model.pt.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="The run folder to make.", show_default=False)],
    given: Mapping[str, Any],
    masks: Annotated[
        Path | None,
        typer.Option(
            help="A published mask file; the model is decomposed too, and the modules are compared.", show_default=False
        ),
    ] = None,
    augmented: Annotated[
        bool, typer.Option("--augmented", help="Count firings on augmented images, as the published code does.")
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Make a run of a published checkpoint, so that every command works on it, and compare its modules with ours.

    The published files are pickles; they are read without running anything in them. What the names of their folders do
    not say of the training has to be given. Without --masks, go on with moda decompose.
    """
    config = described(weights, **given)
    run = import_run(weights, folder, config)
    say(f"{run.path}: {config.model} on {config.data}")
    if masks is None:
        say(f"Next: {command_line('decompose', run.path)}")
        return
    finished = FinishedRun.open(folder, device)
    theirs = load_published_masks(masks, finished.taps.names)
    ours = decompose_run(finished, theirs.settings["threshold"], augmented=augmented)
    rows = table(f"Our modules and {masks.name}", "tap", "same", "in both", "ours alone", "theirs alone")
    for layer in agreement(ours, theirs):
        counts = (layer.both, layer.only_first, layer.only_second)
        rows.add_row(layer.tap, percent(layer.agreement), *map(str, counts))
    show(rows)
