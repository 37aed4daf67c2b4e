"""The demo with little training: its numbers are measured right, and its page is whole."""

from __future__ import annotations

import io
import json
import random
import re
import shlex
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader, Subset

import moda
from moda.composition import measure
from moda.composition.compose import compose
from moda.decomposition.container import Decomposition
from moda.demo.results import DemoResult
from moda.demo.run import choose_subtasks, run_demo
from moda.demo.settings import DemoSettings
from moda.demo.tables import reading
from moda.observation.taps import observe
from moda.runs.folder import RunFolder, load_data
from tests.moda._helpers.browser import HIDDEN_WITHOUT_HINT, OFF_SCREEN, SHADOWS, Browser

SETTINGS = DemoSettings(seeds=(0, 1), epochs=3, subtask_sizes=(2, 10), samples=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult, str]:
    """The folder, the result, and what was printed."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    printed = io.StringIO()
    result = run_demo(folder, SETTINGS, Console(file=printed, width=120))
    return folder, result, printed.getvalue()


def test_folder(made: tuple[Path, DemoResult, str]) -> None:
    folder, result, _ = made
    assert {path.name for path in folder.iterdir()} == {"demo.html", "demo.png", "results.json", "runs"}
    for seed in (0, 1):
        for name in ("standard", "modular"):
            run = RunFolder.open(folder / "runs" / f"seed-{seed}" / name)
            assert run.finished
            assert run.config.modular == (name == "modular")
    loaded = Decomposition.load(folder / "runs" / "seed-0" / "modular" / "decomposition")
    assert all(torch.equal(loaded.masks[tap], mask) for tap, mask in result.seeds[0].decomposition.masks.items())


def test_both_trainings_begin_alike(made: tuple[Path, DemoResult, str]) -> None:
    folder, result, _ = made
    runs = [folder / "runs" / "seed-0" / name for name in ("standard", "modular")]
    first = [float(path.joinpath("metrics.csv").read_text().splitlines()[1].split(",")[4]) for path in runs]
    assert first[0] == pytest.approx(first[1], rel=0.05)  # cross-entropy of the first epoch: same weights, same order
    assert result.parameters == 100_138


def test_numbers_are_those_of_the_models(made: tuple[Path, DemoResult, str]) -> None:
    folder, result, _ = made
    seed = result.seeds[1]
    run = RunFolder.open(folder / "runs" / "seed-1" / "modular")
    data = load_data(run.config)
    model = run.load_model(data)
    observe(model, example=torch.zeros(2, 3, 8, 8))
    loader = DataLoader(data.test, batch_size=100)
    assert seed.modular.accuracy == pytest.approx(measure.accuracy(model, loader))
    assert seed.modular.module_sizes[3] == pytest.approx(measure.size(model, seed.decomposition, [3]))
    by_attribution = moda.decompose(moda.attribute(model, DataLoader(data.train_eval, 128), 10))
    sizes = measure.module_sizes(model, by_attribution)
    assert seed.modular.attribution_sizes == pytest.approx(sizes.tolist(), abs=0.01)  # batches of other sizes round
    assert seed.modular.attribution_size < seed.modular.module_size
    assert seed.by_attribution[0].size < seed.subtasks[0].size
    pairs = [measure.overlap(model, seed.decomposition, a, b) for a in range(10) for b in range(a)]
    assert seed.modular.overlap == pytest.approx(sum(pairs) / 45)
    expected = [measured(model, seed.decomposition, loader, classes) for classes in chosen_for(1)]
    row = seed.subtasks[0]
    assert (row.classes, row.count) == (2, 3)
    for index, value in enumerate((row.composed, row.modular, row.size, row.flops)):
        assert value == pytest.approx(sum(each[index] for each in expected) / 3, abs=1e-6)


def chosen_for(seed: int) -> list[list[int]]:
    return choose_subtasks(10, 2, 3, random.Random(seed))


def measured(
    model: torch.nn.Module, decomposition: Decomposition, loader: DataLoader[object], classes: list[int]
) -> tuple[float, float, float, float]:
    small = compose(model, decomposition, classes)  # type: ignore[arg-type]
    example = torch.zeros(1, 3, 8, 8)
    return (
        measure.accuracy(small, loader),
        measure.accuracy(model, loader, classes),
        measure.size(model, decomposition, classes),  # type: ignore[arg-type]
        measure.flops(small, example) / measure.flops(model, example),
    )


def test_similarity_is_that_of_test_samples(made: tuple[Path, DemoResult, str]) -> None:
    folder, result, _ = made
    run = RunFolder.open(folder / "runs" / "seed-0" / "standard")
    data = load_data(run.config)
    model = run.load_model(data)
    taps = observe(model)
    labels = torch.tensor([int(label) for _, label in data.test])
    twos, fives = (DataLoader(Subset(data.test, (labels == k).nonzero().flatten().tolist()), 1000) for k in (2, 5))
    rows = []
    for images, _ in (*twos, *fives):
        with torch.no_grad(), taps.recording():
            model(images)
            rows.append(torch.nn.functional.normalize(taps.activations()[-1].double()))
    expected = (rows[0] @ rows[1].T).mean()
    assert float(result.seeds[0].standard.similarity[-1][2, 5]) == pytest.approx(float(expected), rel=1e-4)


def test_results_file_and_tables(made: tuple[Path, DemoResult, str]) -> None:
    folder, result, printed = made
    numbers = json.loads((folder / "results.json").read_text())
    assert numbers["format"] == "moda-demo"
    assert numbers["settings"]["epochs"] == 3
    accuracies = [seed["modular"]["accuracy"] for seed in numbers["seeds"]]
    assert numbers["mean"]["modular"]["accuracy"] == pytest.approx(sum(accuracies) / 2)
    standard, modular = (100 * result.mean(name, "accuracy") for name in ("standard", "modular"))
    assert re.search(rf"test accuracy +│ +{standard:.2f} % │ +{modular:.2f} % │", printed)
    assert "mean of 2 seeds" in printed
    assert f"module size by attribution │ {100 * result.mean('standard', 'attribution_size'):.1f} %" in re.sub(
        " +", " ", printed
    )
    assert "Decomposed by attribution instead of firing rates, modules take" in printed
    row = numbers["mean"]["subtasks"][1]
    assert re.search(rf"10 │ +1 │ +{100 * row['composed']:.2f} %", printed)
    ten = result.subtasks()[1]
    assert ten.modular == pytest.approx(result.mean("modular", "accuracy"))


def test_picture(made: tuple[Path, DemoResult, str]) -> None:
    with Image.open(made[0] / "demo.png") as picture:
        assert picture.format == "PNG"
        assert picture.width == 1430
        assert picture.height > picture.width
        colours = picture.convert("RGB").getcolors(maxcolors=10**6)
    assert colours is not None
    assert len(colours) > 200
    common = {colour for _, colour in sorted(colours, reverse=True)[:12]}
    assert (255, 255, 255) in common  # paper
    assert (0, 114, 178) in common  # the bars


class Page(HTMLParser):
    """Checks that tags nest, and gathers ids, references and text."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        self.references += [str(values[name]) for name in ("src", "href", "xlink:href") if values.get(name)]
        if tag in ("img", "svg"):
            self.images.append(values)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def test_page_is_whole(made: tuple[Path, DemoResult, str]) -> None:
    folder, result, _ = made
    text = (folder / "demo.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert len(page.images) == 4
    for image in page.images:
        assert image["role"] == "img"
        assert len(str(image["aria-label"])) > 40
    inside = {reference for reference in page.references if reference.startswith("#")}
    assert {reference[1:] for reference in inside} <= set(page.ids)
    outside = [reference for reference in page.references if not reference.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert not re.search(r"url\((?!#)|@import|<script", text)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    for title in (f"A module takes {100 * result.mean('modular', 'module_size'):.0f} %", "Two modules share"):
        assert title in page.text
    for row in result.subtasks():
        assert f"{100 * row.composed:.2f} %" in page.text


def test_figures_are_xml_in_the_colours_of_the_page(made: tuple[Path, DemoResult, str]) -> None:
    drawings = re.findall(r"<svg.*?</svg>", (made[0] / "demo.html").read_text(), flags=re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        assert ET.fromstring(drawing).get("viewBox")
        assert "#01020" not in drawing
        assert "var(--ink)" in drawing or "var(--muted)" in drawing
        assert "<text" in drawing


def test_again_in_the_same_folder(tmp_path: Path) -> None:
    settings = DemoSettings(epochs=1, subtask_sizes=(10,))
    for _ in range(2):
        run_demo(tmp_path / "demo", settings, Console(file=io.StringIO()))
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="demo: holds 'notes.txt', which no demo made; choose another folder"):
        run_demo(tmp_path / "demo", settings, Console(file=io.StringIO()))
    assert (tmp_path / "demo" / "runs").exists()


def test_choose_subtasks() -> None:
    few = choose_subtasks(10, 2, 20, random.Random(0))
    assert len(few) == len({tuple(classes) for classes in few}) == 20
    assert all(a < b for a, b in few)
    assert few == choose_subtasks(10, 2, 20, random.Random(0))
    assert few != choose_subtasks(10, 2, 20, random.Random(1))
    assert choose_subtasks(4, 3, 20, random.Random(0)) == [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]
    with pytest.raises(ValueError, match=r"subtask_sizes: expected sizes in \[1, 4\], got 5"):
        choose_subtasks(4, 5, 1, random.Random(0))


def test_settings_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="seeds: expected at least one seed, got none"):
        DemoSettings(seeds=())
    for name in ("epochs", "batch_size", "samples"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            DemoSettings(**{name: 0})


def test_sentences_follow_the_numbers(made: tuple[Path, DemoResult, str]) -> None:
    sentences = reading(made[1])
    size = 100 * made[1].mean("modular", "module_size")
    assert f"takes {size:.0f} % of the parameters" in sentences[0]


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (400, "dark"), (800, "dark"), (1400, "light")])
def test_at_any_width_nothing_that_matters_is_off_screen(
    made: tuple[Path, DemoResult, str], browser: Browser, width: int, scheme: str
) -> None:
    """The modular column is what the page is about; figures that scroll say so."""
    page = made[0] / "demo.html"
    browser.messages(), browser.requested()
    browser.show(page, width, scheme)
    assert browser.messages() == []
    assert {address for address in browser.requested() if not address.startswith("data:")} == {page.as_uri()}
    assert browser.run("return document.documentElement.scrollWidth") == width
    for what in ("td.main", "th[scope=row]", ".headlines div", "h1", "h2", ".caption", "footer p"):
        assert browser.run(OFF_SCREEN, what) == [], what
    assert browser.run(HIDDEN_WITHOUT_HINT) == []
    assert browser.run(SHADOWS) == 0
    assert (browser.picture()[2, 2].mean() < 0.2) == (scheme == "dark")


def test_on_paper_the_page_is_whole_and_light(made: tuple[Path, DemoResult, str], browser: Browser) -> None:
    browser.show(made[0] / "demo.html", 690, "dark", "print")  # A4 between margins of 14 mm
    assert browser.run("return document.documentElement.scrollWidth") == 690
    assert browser.run(OFF_SCREEN, "svg, table") == []
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("return getComputedStyle(document.querySelector('.hint')).display") == "none"


def test_the_command_in_the_footer_works(made: tuple[Path, DemoResult, str]) -> None:
    text = Page((made[0] / "demo.html").read_text()).text
    words = shlex.split(re.search(r"try (moda compose .* 1,7)", " ".join(text.split()))[1])
    assert RunFolder.open(words[2]).decomposition.exists()
