"""Says what was run, what differs from the paper, what the paper reports on its own data, and where the numbers are."""

from __future__ import annotations

from collections.abc import Sequence

from moda.report.page import Block, Row, Section, Table, Words
from moda.report.study.inputs import DATA_NAMES, MODEL_NAMES, Inputs, RunResults, Setting
from moda.report.study.references import from_paper, references
from moda.report.study.training import duration
from moda.report.study.words import DASH, percent_of

__all__ = ["runs", "settings_and_paper"]

_PAPER_DATA = {**DATA_NAMES, "imagenet100r": "ImageNet100R", "imagenet100d": "ImageNet100D"}


def settings_and_paper(settings: Sequence[Setting]) -> Section:
    """Show the differences, and the paper's own numbers of the same architectures."""
    rows = []
    for setting in settings:
        differences = from_paper(setting.config, setting.threshold)
        seeds = sorted({run.config.seed for run in (*setting.modular, *setting.standard)})
        rows.append(
            Row(
                (
                    setting.name,
                    ", ".join(map(str, seeds)),
                    "; ".join(differences) or "nothing: it is the paper\u2019s setting",
                )
            )
        )
    paper = references()[0]
    named = dict.fromkeys(setting.config.model for setting in settings)
    theirs = [entry for entry in paper["models"] if entry["model"] in named]
    blocks: list[Block] = [
        Table("What is not as in the paper.", ("model", "seeds", "here"), tuple(rows), prose=True),
        Words(
            "Times depend on the machine and on what else it did. Numbers of different data sets, budgets or widths "
            "cannot be compared; they stand here for orientation."
        ),
    ]
    if theirs:
        blocks.append(_paper_table(theirs))
    blocks.append(Words(f"Where they are from: {paper['title']}: {_sources(paper['sources'])}."))
    others = [r for r in references()[1:] if any(e["model"] in named for e in r["models"])]
    blocks += [Words(f"{other['title']}: {'; '.join(other['sources'].values())}.") for other in others]
    return Section("paper", "The paper\u2019s setting and this one", tuple(blocks))


def _sources(sources: dict[str, str]) -> str:
    return "; ".join(f"{what.replace('_', ' ')}: {where}" for what, where in sources.items())


def _paper_table(entries: Sequence[dict]) -> Table:  # type: ignore[type-arg]
    rows = []
    for entry in entries:
        accuracy, hours = entry["accuracy"], entry["hours"]
        name = f"{MODEL_NAMES[entry['model']]} on {_PAPER_DATA[entry['data']]}"
        cells = (
            percent_of(accuracy["standard"]),
            percent_of(accuracy["modular"]),
            f"{hours['modular'] / hours['standard']:.2f}",
            f"{100 * entry['reuse_accuracy']:.2f}",
            f"{100 * entry['module_size']:.1f}",
            f"{100 * entry['overlap']:.1f}",
        )
        rows.append(Row((name, *cells), reference=True))
    columns = ("the paper", "standard", "modular", "training time, ratio", "reuse accuracy", "module size", "overlap")
    return Table("What the paper reports for the same architectures, in per cent.", columns, tuple(rows))


def runs(inputs: Inputs) -> Section:
    """List every run with the hash of what its numbers were computed from."""
    rows = [Row(_run_cells(run)) for run in inputs.runs]
    for study in inputs.replacements:
        rows.append(Row((study.label, "replacement", DASH, DASH, DASH, DASH)))
    columns = ("folder", "training", "seed", "epochs", "time", "weights (SHA-256)")
    blocks: list[Block] = [Table("Folders that this page was made from.", columns, tuple(rows), prose=True)]
    blocks += [Words(f"Made by `{command}`.") for command in inputs.commands]
    return Section("runs", "Runs", tuple(blocks))


def _run_cells(run: RunResults) -> tuple[str, ...]:
    config = run.config
    kind = "modular" if config.modular else "standard"
    done = len(run.metrics)
    epochs = str(config.epochs) if done == config.epochs else f"{done} of {config.epochs}"
    time = duration(sum(row["seconds"] for row in run.metrics)) if run.metrics else DASH
    digest = str(run.source.get("weights_sha256", DASH))[:12]
    name = MODEL_NAMES.get(config.model, config.model)
    return run.label, f"{name}, {kind}", str(config.seed), epochs, time, digest
