"""Draws the demo's figures as one picture and as one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeAlias

from matplotlib.figure import Figure, SubFigure

from moda.composition.measure import mean_over_pairs
from moda.demo import panels
from moda.demo.results import DemoResult, Trained
from moda.demo.tables import SUBTASK_COLUMNS, subtask_rows
from moda.report.page import render
from moda.report.style import PAPER, SCREEN, Theme, drawing, to_png, to_svg

Canvas: TypeAlias = "Figure | SubFigure"
Row: TypeAlias = "tuple[str, str, str]"  # quantity, standard, modular

WIDTH = 13.0  # inches, of the picture
DOTS_PER_INCH = 110
MARGIN = 0.35  # inches, left of everything


def demo_page(result: DemoResult, comparison: Sequence[Row], try_this: str) -> tuple[bytes, str]:
    """Draw the figures of a demo as PNG, and as an HTML page that needs nothing beside itself.

    Args:
        result: the result to show; maps are those of the first seed, numbers are means over all seeds.
        comparison: the rows of the table of both trainings.
        try_this: a command line to go on with.
    """
    figures = _figures(result)
    with drawing(PAPER):
        picture = to_png(_picture(result, figures), DOTS_PER_INCH)
    with drawing(SCREEN):
        drawings = {each.name: _alone(each) for each in figures}
    page = render(
        "demo.html",
        package="moda.demo",
        result=result,
        title=_title(result),
        subtitle=_subtitle(result),
        headlines=_headlines(result),
        comparison=comparison,
        figures=figures,
        drawings=drawings,
        table_title=TABLE_TITLE,
        table_caption=TABLE_CAPTION,
        table_columns=SUBTASK_COLUMNS,
        table_rows=subtask_rows(result),
        try_this=try_this,
    )
    return picture, page


TABLE_TITLE = "Smaller models, put together from modules"
TABLE_CAPTION = (
    "Means over sub-tasks. Accuracy on the test samples of the sub-task's classes, with only their outputs competing; "
    "parameters and FLOPs as shares of the whole model's. Nothing was fine-tuned."
)


@dataclass(frozen=True)
class _Panel:
    """A figure of the page.

    Attributes:
        name: the name that ids are made of.
        title: what the figure says.
        caption: what the figure shows.
        description: the same for those who do not see it.
        size: the width and height in inches.
        draw: a function that draws the figure.
    """

    name: str
    title: str
    caption: str
    description: str
    size: tuple[float, float]
    draw: Callable[[Canvas, Theme], None]


def _title(result: DemoResult) -> str:
    return "Handwritten digits, learnt the standard way and the modular way"


def _subtitle(result: DemoResult) -> str:
    seeds = len(result.seeds)
    repeated = f"; numbers are means of {seeds} seeds, maps show seed {result.seeds[0].seed}" if seeds > 1 else ""
    return (
        f"A VGG of {result.parameters:,} parameters on 1797 handwritten digits (8x8), "
        f"{result.settings.epochs} epochs in batches of {result.settings.batch_size}, trained twice from the same "
        f"weights: the standard way, and modular "
        f"(affinity, dispersion, compactness). A class keeps the neurons that fire for at least "
        f"{100 * result.settings.threshold:.0f} % of its samples{repeated}."
    )


def _headlines(result: DemoResult) -> list[Row]:
    """Give (number, what it is, against what) of the four numbers that matter most."""
    smallest = result.subtasks()[0]

    def row(quantity: str, what: str, digits: int) -> Row:
        modular, standard = (100 * result.mean(each, quantity) for each in ("modular", "standard"))
        return f"{modular:.{digits}f} %", what, f"standard training: {standard:.{digits}f} %"

    return [
        row("accuracy", "test accuracy", 1),
        row("module_size", "of all parameters make a module", 0),
        row("overlap", "are shared by two modules", 0),
        (
            f"{100 * smallest.composed:.1f} %",
            f"accuracy of composed {smallest.classes}-class models",
            f"with {100 * smallest.size:.0f} % of the parameters",
        ),
    ]


def _figures(result: DemoResult) -> list[_Panel]:
    return [_sizes(result), _overlap(result), _similarity(result), _firing(result)]


def _sizes(result: DemoResult) -> _Panel:
    names = result.class_names
    sizes = {name: _mean_sizes([getattr(seed, name) for seed in result.seeds]) for name in ("standard", "modular")}
    listed = ", ".join(f"{name}: {100 * size:.0f}" for name, size in zip(names, sizes["modular"], strict=True))

    def draw(canvas: Canvas, theme: Theme) -> None:
        axes = canvas.add_axes((0.085, 0.02, 0.87, 0.94))
        panels.module_sizes(axes, theme, names, sizes["standard"], sizes["modular"])

    return _Panel(
        "sizes",
        f"A module takes {100 * fmean(sizes['modular']):.0f} % of the parameters",
        f"By digit. Modules of the standard model, decomposed alike, take {100 * fmean(sizes['standard']):.0f} %.",
        f"Bar chart of module sizes in per cent of the parameters, by digit. Modular: {listed}. "
        f"Standard: {100 * min(sizes['standard']):.0f} to {100 * max(sizes['standard']):.0f}.",
        (6.6, 4.1),
        draw,
    )


def _mean_sizes(trained: Sequence[Trained]) -> list[float]:
    return [fmean(sizes) for sizes in zip(*(each.module_sizes for each in trained), strict=True)]


def _overlap(result: DemoResult) -> _Panel:
    values = result.seeds[0].modular.overlaps
    mean = 100 * result.mean("modular", "overlap")

    def draw(canvas: Canvas, theme: Theme) -> None:
        axes = canvas.add_axes((0.09, 0.07, 0.87, 0.9), anchor="W")
        panels.overlaps(axes, result.class_names, values)

    return _Panel(
        "overlap",
        f"Two modules share {mean:.0f} % of the parameters",
        "Every pair of digits, in % of all parameters; on the diagonal, the module itself.",
        f"Heat map of the overlap of every two modules of the modular model; the mean is {mean:.0f} per cent.",
        (6.4, 4.1),
        draw,
    )


def _similarity(result: DemoResult) -> _Panel:
    seed = result.seeds[0]
    rows = (("standard", seed.standard), ("modular", seed.modular))
    widths = [rate.shape[1] for rate in seed.modular.rates.rates.values()]
    last = [mean_over_pairs(trained.similarity[-1]) for _, trained in rows]

    def draw(canvas: Canvas, theme: Theme) -> None:
        grid = canvas.add_gridspec(
            2, len(widths), left=0.095, right=0.905, bottom=0.05, top=0.93, wspace=0.08, hspace=0.2
        )
        image: Any = None
        for row, (name, trained) in enumerate(rows):
            for column, values in enumerate(trained.similarity):
                axes = canvas.add_subplot(grid[row, column])
                image = panels.similarity(axes, values, result.class_names, rows=column == 0, columns=row == 1)
                mean = mean_over_pairs(values)
                title = f"layer {column + 1} ({widths[column]} neurons)\n" if row == 0 else ""
                axes.set_title(f"{title}mean {mean:.2f}", fontsize=9, color=theme.muted, pad=4)
            colour = theme.modular if name == "modular" else theme.muted
            canvas.text(MARGIN / WIDTH, 0.72 - 0.47 * row, name, color=colour, weight="bold", va="center")
        _colour_bar(canvas, image, (0.918, 0.12, 0.011, 0.74), ("different", "alike"))

    return _Panel(
        "similarity",
        "How alike two digits look to each layer",
        "Mean cosine similarity between the activations of test samples of two digits, from the first hidden layer to "
        "the last.",
        "Heat maps of class similarity in each hidden layer, after standard and after modular training. Between "
        f"different digits the mean in the last layer is {last[0]:.2f} after standard training and {last[1]:.2f} "
        "after modular training.",
        (WIDTH, 5.0),
        draw,
    )


def _firing(result: DemoResult) -> _Panel:
    seed = result.seeds[0]
    layer = seed.modular.rates.taps[-1]
    rates = {"standard": seed.standard.rates.rates[layer], "modular": seed.modular.rates.rates[layer]}
    neurons = rates["modular"].shape[1]
    kept = {name: float((rate >= result.settings.threshold).float().mean()) for name, rate in rates.items()}
    silent = {name: int((rate.amax(0) == 0).sum()) for name, rate in rates.items()}

    def draw(canvas: Canvas, theme: Theme) -> None:
        grid = canvas.add_gridspec(2, 1, left=0.095, right=0.905, bottom=0.02, top=0.93, hspace=0.24)
        image: Any = None
        for row, (name, values) in enumerate(rates.items()):
            axes = canvas.add_subplot(grid[row, 0])
            image = panels.firing_rates(axes, values, result.class_names)
            text = f"a digit keeps {100 * kept[name]:.0f} % of the neurons; {silent[name]} never fire"
            axes.set_title(text, fontsize=9, color=theme.muted, loc="left", pad=4)
            colour = theme.modular if name == "modular" else theme.muted
            canvas.text(MARGIN / WIDTH, 0.71 - 0.51 * row, name, color=colour, weight="bold", va="center")
        _colour_bar(canvas, image, (0.918, 0.12, 0.011, 0.74), ("never", "always"))

    return _Panel(
        "firing",
        "Which neurons fire for which digit",
        f"For which share of a digit's training samples each of the {neurons} neurons of the last hidden layer fires. "
        "Rows are digits; neurons are sorted by the digit they fire most for.",
        f"Firing rates of {neurons} neurons for each digit. A digit keeps {100 * kept['standard']:.0f} per cent of "
        f"them after standard training and {100 * kept['modular']:.0f} per cent after modular training.",
        (WIDTH, 4.4),
        draw,
    )


def _colour_bar(canvas: Canvas, image: Any, place: tuple[float, float, float, float], ends: tuple[str, str]) -> None:
    bar = canvas.colorbar(image, cax=canvas.add_axes(place), ticks=[0, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.set_yticklabels([f"0  {ends[0]}", "0.5", f"1  {ends[1]}"], fontsize=8)


def _alone(panel: _Panel) -> str:
    """Draw one figure as SVG."""
    figure = Figure(figsize=panel.size)
    panel.draw(figure, SCREEN)
    return to_svg(figure, panel.name, panel.description)


# ---- the picture --------------------------------------------------------------------------------------------------

_HEADER, _HEADING, _TABLE = 2.2, 0.8, 2.75  # inches


def _picture(result: DemoResult, figures: Sequence[_Panel]) -> Figure:
    """Draw all figures and the table of sub-tasks under each other, the first two side by side."""
    sizes, overlap, *wide = figures
    rows: list[tuple[float, Callable[[SubFigure], None]]] = [
        (_HEADER, lambda part: _draw_header(part, result)),
        (_HEADING + sizes.size[1], lambda part: _draw_pair(part, sizes, overlap)),
        *((_HEADING + each.size[1], _drawer(each)) for each in wide),
        (_TABLE, lambda part: _draw_table(part, result)),
    ]
    heights = [height for height, _ in rows]
    figure = Figure(figsize=(WIDTH, sum(heights)), facecolor="white")
    for part, (_, draw) in zip(_stacked(figure, heights), rows, strict=True):
        draw(part)
    return figure


def _stacked(canvas: Canvas, heights: Sequence[float]) -> list[SubFigure]:
    """Divide a figure into parts under each other."""
    parts: Any = canvas.subfigures(len(heights), 1, height_ratios=heights)
    return list(parts)


def _drawer(panel: _Panel) -> Callable[[SubFigure], None]:
    return lambda part: _draw_titled(part, panel, MARGIN / WIDTH)


def _draw_header(part: SubFigure, result: DemoResult) -> None:
    left = MARGIN / WIDTH
    part.text(left, 0.89, _title(result), fontsize=21, weight="bold", va="top")
    first, second = _wrapped(_subtitle(result), 170)
    part.text(left, 0.685, f"{first}\n{second}", fontsize=9.5, color=PAPER.muted, va="top", linespacing=1.4)
    for index, (number, what, against) in enumerate(_headlines(result)):
        place = left + index * 0.245
        part.text(place, 0.36, number, fontsize=19, weight="bold", color=PAPER.modular, va="center")
        part.text(place, 0.18, what, fontsize=9.5, va="center")
        part.text(place, 0.075, against, fontsize=9, color=PAPER.muted, va="center")


def _wrapped(text: str, width: int) -> tuple[str, str]:
    """Break a text into two lines between words."""
    cut = text.rfind(" ", 0, width)
    return (text, "") if len(text) <= width else (text[:cut], text[cut + 1 :])


def _draw_pair(part: SubFigure, left: _Panel, right: _Panel) -> None:
    beside: Any = part.subfigures(1, 2, width_ratios=[left.size[0], right.size[0]])
    first, second = beside
    _draw_titled(first, left, MARGIN / left.size[0])
    _draw_titled(second, right, MARGIN / right.size[0])


def _draw_titled(part: SubFigure, panel: _Panel, left: float) -> None:
    heading, body = _stacked(part, [_HEADING, panel.size[1]])
    _draw_heading(heading, panel.title, panel.caption, left)
    panel.draw(body, PAPER)


def _draw_heading(part: SubFigure, title: str, caption: str, left: float) -> None:
    part.text(left, 0.5, title, fontsize=13, weight="bold", va="center")
    part.text(left, 0.14, caption, fontsize=9, color=PAPER.muted, va="center")


def _draw_table(part: SubFigure, result: DemoResult) -> None:
    heading, body = _stacked(part, [_HEADING, _TABLE - _HEADING])
    _draw_heading(heading, TABLE_TITLE, TABLE_CAPTION, MARGIN / WIDTH)
    columns = [0.075, 0.17, 0.3, 0.45, 0.6, 0.75, 0.9]
    lines = [SUBTASK_COLUMNS, *subtask_rows(result)]
    for line, cells in enumerate(lines):
        height = 0.86 - 0.17 * line
        for place, (column, cell) in enumerate(zip(columns, cells, strict=True)):
            colour = PAPER.muted if line == 0 else PAPER.modular if place == 2 else PAPER.ink
            weight = "bold" if line and place in (0, 2) else "normal"
            body.text(column, height, cell, ha="right", va="center", color=colour, weight=weight, fontsize=10)
