"""The study's page: which runs belong together, whose numbers stand beside ours, what the page says and leaves out."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from moda.cli.app import app
from moda.files import FormatError
from moda.report.curves import Line, Scale, heat_map, lines, spread_out
from moda.report.page import Panel, Panels, Section, draw_all, inline
from moda.report.spread import Spread
from moda.report.study import read_inputs, study_page
from moda.report.study.references import find, find_replacement, find_sweep, from_paper, references
from moda.report.style import PAPER, drawing
from tests.moda._helpers.study_folders import (
    CIFAR10,
    STANDARD,
    config,
    write_analyses,
    write_replacement,
    write_reuse,
    write_run,
    write_study,
    write_sweep,
)

# ---- the paper's numbers --------------------------------------------------------------------------------------------


def test_references_give_the_papers_own_summaries() -> None:
    """Means that the paper states, or that follow from its tables, come out of the numbers as transcribed."""
    paper = references()[0]
    assert len(paper["models"]) == 15
    modular = fmean(entry["accuracy"]["modular"]["mean"] for entry in paper["models"])
    standard = fmean(entry["accuracy"]["standard"]["mean"] for entry in paper["models"])
    assert (round(standard, 4), round(modular, 4)) == (0.8392, 0.8366)
    slower = fmean(entry["hours"]["modular"] / entry["hours"]["standard"] for entry in paper["models"])
    assert round(slower, 3) == 1.333
    gains = [
        gain["target"]
        for entry in paper["replacement"]
        if (entry["data"], entry["strategy"]) == ("cifar10", "moda")
        for gain in entry["gains"]
    ]
    assert round(fmean(gains), 4) == 0.1204
    for entry in paper["models"]:  # reuse accuracy is the mean over sizes, which the figures show too; read from pixels
        if entry["data"] in ("cifar10", "svhn"):
            assert entry["reuse_accuracy"] == pytest.approx(fmean(entry["reuse"]["composed"]), abs=0.003)
        for name in ("standard", "composed", "size", "flops"):
            assert len(entry.get("reuse", {}).get(name, range(10))) == len(
                entry.get("reuse", {}).get("classes", range(10))
            )


def test_reference_of_the_same_setting() -> None:
    [match] = find(config(model="vgg16", data="cifar10", epochs=200), 0.9)
    assert match.name == "the paper"
    assert match.differences == ()
    assert match.numbers["module_size"] == 0.027
    assert match.statement == "the paper: the same setting."


def test_reference_says_what_differs() -> None:
    [match] = find(config(model="resnet18", data="svhn", epochs=100, width=0.5), 0.8)
    assert match.differences == ("width 0.5 instead of 1", "epochs 100 instead of 200", "threshold 0.8 instead of 0.9")
    assert find(config(model="resnet18", data="digits"), 0.9) == []


def test_published_code_stands_beside_the_yardsticks_network() -> None:
    [match] = find(config(epochs=40), 0.9)
    assert (match.name, match.differences) == ("the published code", ())
    assert match.numbers["module_size"] == 0.4393
    [resized] = find(config(epochs=40, data_options={"image_size": 16}), 0.9)
    assert resized.differences == ("image size 16 instead of 8",)


def test_reference_of_sweeps_and_replacement() -> None:
    [match] = find_sweep(config(model="vgg16", data="cifar10", epochs=200, affinity=0.5), "affinity")
    assert match.differences == ()  # what is varied does not count
    assert match.numbers["test_accuracy"][3] == 0.92
    [match] = find_replacement(config(data="svhn", epochs=200), "resnet18", "lenet5", "over-fitted", "moda")
    assert match.numbers["gains"][4] == {"target": 0.057, "others": 0.0027}
    assert find_replacement(config(data="digits"), "resnet18", "lenet5", "over-fitted", "moda") == []


def test_differences_from_the_paper() -> None:
    assert from_paper(config(model="mobilenet", data="cifar100", epochs=200), 0.9) == ()
    told = from_paper(config(model="small_vgg", epochs=40), 0.9)
    assert told == (
        "small VGG, which the paper does not decompose",
        "digits of 8 \u00d7 8 instead of CIFAR10, CIFAR100, SVHN and ImageNet",
        "epochs 40 instead of 200",
    )


# ---- which runs belong together -------------------------------------------------------------------------------------


def test_seeds_are_grouped_and_meet_their_standard_runs(tmp_path: Path) -> None:
    for seed in (1, 0):
        write_run(tmp_path / f"modular-{seed}", config(seed=seed))
        write_run(tmp_path / f"standard-{seed}", config(seed=seed, num_workers=2).changed(**STANDARD))
    write_run(tmp_path / "longer", config(epochs=9))
    inputs = read_inputs(sorted(tmp_path.iterdir()))
    found = {s.name: ([r.config.seed for r in s.modular], [r.config.seed for r in s.standard]) for s in inputs.settings}
    assert found == {"small VGG, epochs 8": ([0, 1], [0, 1]), "small VGG, epochs 9": ([0], [])}


def test_one_standard_run_serves_other_weights(tmp_path: Path) -> None:
    write_run(tmp_path / "a", config())
    write_run(tmp_path / "b", config(compactness=0.0))
    write_run(tmp_path / "standard", config().changed(**STANDARD))
    inputs = read_inputs([tmp_path / name for name in ("a", "b", "standard", "a")])
    assert [s.name for s in inputs.settings] == ["small VGG, compactness 0.3", "small VGG, compactness 0"]
    assert [len(s.standard) for s in inputs.settings] == [1, 1]
    assert len(inputs.runs) == 3


def test_a_study_is_its_runs_and_replacements(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", [("small_vgg", 1.0, 3), ("resnet18", 0.25, 4)])
    inputs = read_inputs([study])
    assert [(s.name, len(s.modular), len(s.standard)) for s in inputs.settings] == [
        ("small VGG", 2, 2),
        ("ResNet18 \u00d7 0.25", 2, 2),
    ]
    assert [r.label for r in inputs.runs][:2] == ["study/small_vgg/seed-0/modular", "study/small_vgg/seed-1/modular"]
    assert len(inputs.replacements[0].results) == 20
    assert inputs.commands == ("moda study study --models small_vgg,resnet18 --seeds 0,1 --epochs 8 --batch-size 128",)


@pytest.mark.parametrize("kind", ["none", "empty", "modules", "study"])
def test_refuses_what_it_cannot_show(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "it"
    if kind == "modules":
        write_run(folder, config())
        write_reuse(folder)
        write_analyses(folder, masks="e" * 64)
    elif kind != "none":
        folder.mkdir()
    if kind == "study":
        (folder / "study.json").write_text('{"format": "moda-study", "format_version": 1, "runs": [{}]}')
    message = {
        "none": "no such folder",
        "empty": "holds no run",
        "modules": "different modules",
        "study": "'epochs' is missing",
    }[kind]
    with pytest.raises(FormatError, match=message):
        read_inputs([folder])


# ---- numbers and figures --------------------------------------------------------------------------------------------


def test_spread() -> None:
    spread = Spread.of([0.5, 0.25, 0.75])
    assert (spread.mean, spread.deviation, spread.low, spread.high) == (0.5, 0.25, 0.25, 0.75)
    assert spread.percent(1) == "50.0\u00a0\u00b1\u00a025.0"
    assert Spread.of([-0.0123]).points() == "\u22121.23"
    assert Spread.of([-0.00001]).points() == "+0.00"
    assert Spread.of([1.204]).number(2) == "1.20"


@pytest.mark.parametrize("places", [[0.5, 0.5, 0.5], [0.0, 0.01, 1.0], [1.0, 0.98, 0.99, 0.2], [0.3, 0.9]])
def test_labels_are_moved_apart_in_order(places: list[float]) -> None:
    moved = spread_out(places, 0.1)
    order = np.argsort(places, kind="stable")
    assert np.all(np.diff(np.array(moved)[order]) >= 0.1 - 1e-9)
    assert min(moved) >= 0
    assert max(moved) <= 1
    if places == [0.3, 0.9]:
        assert moved == places


def drawn(panel: Panel) -> Figure:
    figure = Figure(figsize=panel.size)
    with drawing(PAPER):
        panel.draw(figure, PAPER)
    return figure


def test_lines_are_drawn_to_scale() -> None:
    values = [Spread.of([0.2, 0.4]), Spread.of([0.5, 0.5])]
    panel = lines(
        "p",
        "Title",
        [Line("composed", (2, 10), values, "composed")],
        Scale("size, %", 100, logarithmic=True),
        "classes",
    )
    axes = drawn(panel).axes[0]
    assert axes.get_yscale() == "log"
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([30, 50])
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx((20, 50))
    assert [text.get_text() for text in axes.texts] == ["composed"]
    assert panel.description == "Title. Line chart, size, %, along classes. composed: 30 at 2, 50 at 10."


def test_heat_map_of_few_classes_has_numbers_and_of_many_has_none() -> None:
    values = np.array([[0.5, 0.2], [0.2, 0.4]])
    axes = drawn(heat_map("p", "Overlap", ["a", "b"], values, "%", half=True)).axes[0]
    assert [text.get_text() for text in axes.texts] == ["50", "20", "40"]
    assert np.isnan(axes.images[0].get_array().filled(np.nan)[0, 1])
    many = heat_map("p", "Overlap", [str(k) for k in range(100)], np.full((100, 100), 0.25), "%")
    assert len(drawn(many).axes[0].texts) == 0
    assert "from 25 to 25, mean 25" in many.description


def test_two_figures_of_one_name_are_refused() -> None:
    panel = lines("p", "Title", [Line("x", (1,), [Spread.of([1])], "modular")], Scale(""), "epoch")
    with pytest.raises(ValueError, match="two of 'p'"):
        draw_all([Section("s", "S", (Panels((panel, panel)),))])


def test_words_become_html_without_becoming_markup() -> None:
    assert inline("5 % of <b> in `a_b`, [see](#paper)") == (
        '5\u00a0% of &lt;b&gt; in <code>a_b</code>, <a href="#paper">see</a>'
    )


# ---- the page -------------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Ids, links, addresses and tables of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.addresses: list[str] = []
        self.labels: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        told = dict(attributes)
        self.tags.add(tag)
        self.ids += [told["id"]] if told.get("id") else []
        address = told.get("href") or told.get("xlink:href") or told.get("src") or ""
        if tag == "a":
            self.links.append(address)
        elif address and not address.startswith(("#", "data:")):
            self.addresses.append(address)
        if tag == "svg":
            self.labels.append(told.get("aria-label") or "")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.rows[-1][-1] += data

    def row(self, *starts: str) -> list[str]:
        """The only row that begins so."""
        [row] = [row for row in self.rows if row[: len(starts)] == list(starts)]
        return row


@pytest.fixture(scope="module")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("a") / "study", [("small_vgg", 1.0, 3)])


@pytest.fixture(scope="module")
def page(study_folder: Path) -> str:
    return study_page(read_inputs([study_folder]))


def test_page_needs_nothing_and_hangs_together(page: str) -> None:
    outline = Outline(page)
    assert outline.addresses == []
    assert not outline.tags & {"script", "link", "iframe", "object", "img"}
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    assert len(outline.ids) == len(set(outline.ids))
    assert {link[1:] for link in outline.links} <= set(outline.ids)
    assert len(outline.labels) == 1 + 2 + 4 + 4 + 4 + 2 + 3 * 3 + 2  # accuracy, reuse, modules, ..., replacement
    assert len(set(outline.labels)) > 20
    assert all(len(label) > 30 for label in outline.labels)


def test_page_is_the_same_every_time(page: str, study_folder: Path) -> None:
    assert study_page(read_inputs([study_folder])) == page


def test_page_shows_the_numbers(page: str) -> None:
    """Numbers of the made-up runs, computed here by hand."""
    outline = Outline(page)
    jitter = [0.002 * math.sin(8), 0.002 * math.sin(7 + 8)]
    modular = [100 * (0.1 + 0.89 * (1 - math.exp(-4)) + each) for each in jitter]
    row = next(row for row in outline.rows if row[0] == "small VGG" and row[4] == "1.6 s")
    mean, half = sum(modular) / 2, abs(modular[0] - modular[1]) / math.sqrt(2)
    assert row[2] == f"{mean:.2f}\u00a0\u00b1\u00a0{half:.2f}"
    assert row[3] == f"+{100 * 0.01 * (1 - math.exp(-4)):.2f}\u00a0\u00b1\u00a00.00"
    assert row[4:] == ["1.6 s", "1.9 s", "1.20\u00a0\u00b1\u00a00.00"]
    assert outline.row("composed \u2212 standard, points")[1:] == ["\u22121.00"] * 9
    assert outline.row("sub-tasks", "8")[1:] == ["8"] * 8 + ["1"]
    assert outline.row("size", "44.7")[-1] == "100.0"
    assert outline.row("composed, the published code")[1:5] == ["99.98", "99.94", "\u2013", "99.78"]
    analysed = outline.row("small VGG", "44.5\u00a0\u00b1\u00a00.7")
    assert analysed[2:4] == ["31.5\u00a0\u00b1\u00a00.7", "30.5\u00a0\u00b1\u00a00.7"]
    worst = outline.row("small VGG", "130")
    assert worst[2:5] == ["\u22121.00", "100.0 %", "\u22121.00"]
    assert outline.row("threshold", "0.1")[1:] == ["0.1", "0.5", "0.8", "0.9", "0.95"]
    gains = [f"+{8 + target}.0 | +0.2" for target in range(5)]
    assert outline.row("under-fitted LeNet5 with small VGG, MODA")[1:] == [*gains, "+10.0 | +0.2"]


def test_page_compares_and_says_what_differs(page: str) -> None:
    text = re.sub(r"<[^>]+>", "", page)
    assert (
        "small VGG stands beside the published code: the same model and data, but here epochs 8 instead of 40." in text
    )
    assert "The paper has no numbers for these models on digits" in text
    assert "Not shown: the same after standard training of small VGG." in text


def test_page_of_the_papers_setting(tmp_path: Path) -> None:
    setting = config(model="vgg16", data="cifar10", epochs=200)
    write_run(tmp_path / "modular", setting, epochs=3)
    write_reuse(tmp_path / "modular", per_size=1)
    write_sweep(tmp_path / "modular", "threshold")
    write_replacement(tmp_path / "repair", CIFAR10, "vgg16", data="cifar10", epochs=200)
    inputs = read_inputs([tmp_path / "modular", tmp_path / "repair"])
    page = study_page(inputs, "Its <title>")
    outline, text = Outline(page), re.sub(r"<[^>]+>", "", page)
    assert "<h1>Its &lt;title&gt;</h1>" in page
    assert "VGG16 stands beside the paper: the same setting." in text
    assert "nothing: it is the paper\u2019s setting" in text
    assert outline.row("composed, the paper")[1:] == [
        "98.00",
        "96.70",
        "95.70",
        "94.90",
        "94.10",
        "93.50",
        "93.00",
        "92.40",
        "91.90",
    ]
    assert outline.row("FLOPs, the paper")[1] == "44.0"
    assert outline.row("reuse accuracy, the paper")[1:] == ["94.20", "94.50", "94.70", "94.50", "93.30"]
    assert ["the paper", "+8.5 | \u22120.2", "+17.0 | +0.4"] in [row[:3] for row in outline.rows]
    assert "Not finished: modular (3 of 200 epochs). To go on: moda train RUN --resume." in text
    panel = next(label for label in outline.labels if label.startswith("VGG16. Line chart, accuracy"))
    assert "paper: 98 at 2, 91.9 at 10" in panel


def test_rules_are_in_one_figure(tmp_path: Path) -> None:
    """Accuracy by the size of a module, a line for each rule that was swept; one rule alone has no such figure."""
    write_run(tmp_path / "run", config())
    write_sweep(tmp_path / "run", "threshold")
    assert not [
        label for label in Outline(study_page(read_inputs([tmp_path / "run"]))).labels if "module size, %" in label
    ]
    write_sweep(tmp_path / "run", "attribution")
    write_sweep(tmp_path / "run", "share")
    page = study_page(read_inputs([tmp_path / "run"]))
    [label] = [label for label in Outline(page).labels if "module size, %" in label]
    for rule in ("firing rates", "attributions", "shares of activation"):
        assert f"{rule}: " in label
    assert "epsilon of attributions" in page
    assert [row[0] for row in Outline(page).rows].count("reuse accuracy") == 3


def test_page_leaves_out_what_is_not_there_and_says_how_to_make_it(tmp_path: Path) -> None:
    write_run(tmp_path / "run", config())
    page = study_page(read_inputs([tmp_path / "run"]))
    text = re.sub(r"<[^>]+>", "", page).replace("&amp;", "&")
    for command in (
        "moda train STANDARD_RUN --standard",
        "moda reuse RUN --standard STANDARD_RUN",
        "moda analyze RUN",
        "moda sweep RUN.",
        "moda sweep RUN --affinity paper",
        "moda replace FOLDER",
    ):
        assert f"To make it: {command}" in text or f"To make one: {command}" in text, command
    assert len(Outline(page).labels) == 5  # accuracy and the four terms


def test_page_of_a_standard_run_and_of_a_replacement_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "standard", config().changed(**STANDARD))
    assert "a modular run of small VGG" in study_page(read_inputs([tmp_path / "standard"]))
    write_replacement(tmp_path / "repair")
    page = study_page(read_inputs([tmp_path / "repair"]))
    assert [label.split(".")[0] for label in Outline(page).labels] == [
        "Under-fitted LeNet5 with small VGG",
        "Over-fitted LeNet5 with small VGG",
    ]


def test_replacements_of_the_same_weak_models_are_one_table(tmp_path: Path) -> None:
    write_replacement(tmp_path / "a")
    write_replacement(tmp_path / "b", strong="resnet18")
    write_replacement(tmp_path / "c", strong="resnet18", epochs=9)
    page = study_page(read_inputs([tmp_path / name for name in "abc"]))
    assert page.count("<h3>Replacement on digits</h3>") == 2
    firsts = [row[0] for row in Outline(page).rows]
    first = firsts.index("under-fitted LeNet5 with small VGG, MODA")
    assert "under-fitted LeNet5 with ResNet18, MODA" in firsts[first : first + 8]


def test_standard_runs_that_are_cut_alike_are_shown_beside(tmp_path: Path) -> None:
    write_run(tmp_path / "modular", config())
    write_run(tmp_path / "standard", config().changed(**STANDARD))
    for name in ("modular", "standard"):
        write_analyses(tmp_path / name, layers=4)
    page = study_page(read_inputs([tmp_path / "modular", tmp_path / "standard"]))
    assert Outline(page).row("small VGG, standard training cut alike")[1:3] == ["44.0", "31.0"]
    assert "between, std.: 90 at 1, 20 at 4" in page


# ---- the command ----------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path) -> None:
    write_run(tmp_path / "run", config())
    out = tmp_path / "pages" / "report.html"
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "-o", str(out), "--title", "Mine"])
    assert result.exit_code == 0, result.output
    assert "<title>Mine</title>" in out.read_text(encoding="utf-8")
    assert "report.html" in result.output


def test_command_refuses_a_folder_without_results(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tmp_path), "-o", str(tmp_path / "report.html")])
    assert isinstance(result.exception, FormatError)
    assert not (tmp_path / "report.html").exists()


def test_every_number_of_the_references_is_a_share_or_a_time() -> None:
    def numbers(value: Any) -> list[float]:
        if isinstance(value, dict):
            return [
                each
                for key, part in value.items()
                if key not in ("hours", "classes", "value", "name")
                for each in numbers(part)
            ]
        if isinstance(value, list):
            return [each for part in value for each in numbers(part)]
        return [value] if isinstance(value, int | float) else []

    for reference in references():
        kept = {key: reference[key] for key in ("models", "sweeps", "replacement")}
        assert all(-1 <= number <= 1 for number in numbers(kept))
