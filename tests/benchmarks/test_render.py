"""The page: made of committed results and findings, nothing else."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from benchmarks import render
from benchmarks.charts import charts, svg
from benchmarks.goals import verdicts
from moda.bench import results as stored
from moda.bench.clock import Quartiles
from moda.bench.results import MEASURED, SKIPPED, Results, Row

MACHINE = {
    "device": "Test CPU, 2 threads",
    "device_type": "cpu",
    "processor": "Test CPU",
    "threads": 2,
    "cpu_capability": "AVX2",
    "cache_bytes": 32 << 20,
    "system": "Linux",
    "versions": {"torch": "2.13.0"},
    "backends": {},
    "load_average": 0.1,
    "date": "2026-11-21T08:00:00+00:00",
    "commit": "0123456789abcdef",
    "modified": False,
}
LIMITS = {
    "copy_bytes": 1 << 30,
    "copy_bytes_per_second": {"median": 10e9, "q1": 9e9, "q3": 11e9, "minimum": 8e9, "samples": 5},
    "call_seconds": {"median": 2e-6, "q1": 1e-6, "q3": 3e-6, "minimum": 1e-6, "samples": 5},
}


def _quartiles(median: float) -> Quartiles:
    return Quartiles(median, median * 0.99, median * 1.01, median * 0.98, 9)


def _row(suite: str, case: str, contender: str, phase: str, ratio: float, **more: object) -> Row:
    baseline = {"step": "standard", "relu_pool": "ReLU alone"}.get(suite, "reference")
    parameters = more.pop("parameters", {})
    return Row(
        suite, case, parameters, baseline, contender, phase, MEASURED,
        seconds=_quartiles(ratio), ratio=_quartiles(ratio), **more,  # type: ignore[arg-type]
    )  # fmt: skip


def _results(*rows: Row) -> Results:
    return Results(MACHINE, LIMITS, quick=False, rows=rows)


ROWS = (
    _row("step", "vgg16", "standard", "step", 1.0, memory=100 << 20),
    _row("step", "vgg16", "ours", "step", 1.021, memory=103 << 20),
    _row("step", "mobilenet", "standard", "step", 1.0, memory=100 << 20),
    _row("step", "mobilenet", "ours", "step", 1.087, memory=100 << 20),
    _row("loss", "vgg16 CIFAR", "reference", "both", 1.0, moved=4 * 10**9),
    _row("loss", "vgg16 CIFAR", "native", "both", 0.05, moved=4 * 10**8),
    _row("firing", "vgg16 10 classes", "native", "update", 0.0625, moved=10**9),
    _row("scaling", "batch 64", "native", "both", 0.5, moved=10**8, parameters={"axis": "batch", "value": 64}),
    _row("scaling", "batch 128", "native", "both", 0.4, moved=10**8, parameters={"axis": "batch", "value": 128}),
    Row("loss", "vgg16 CIFAR", {}, "reference", "triton", "", SKIPPED, note="no GPU"),
)


def test_every_figure_of_a_row_is_on_the_page() -> None:
    page = render.page([_results(*ROWS)], "## Findings\n\nBy hand.")
    assert "| vgg16 | ours | 1.02 s (1.01 s .. 1.03 s) | 1.021x (1.011 .. 1.031) | 103.0 MiB (1.030x) |" in page
    # 0.4 GB in 50 ms are 8 GB/s, of the 10 that a copy reaches
    assert (
        "| vgg16 CIFAR | native | both | 50 ms (49.5 ms .. 50.5 ms) | 0.0500x (0.0495 .. 0.0505) | 8.0 | 80% |" in page
    )
    assert "- skipped: loss, vgg16 CIFAR, triton: no GPU" in page
    assert "commit 0123456789ab, load" in page
    assert page.rstrip().endswith("## Findings\n\nBy hand.")


def test_goals_are_judged_by_the_worst_case() -> None:
    judged = {
        goal.text: (row.case, round(figure, 6), goal.reached(figure)) for goal, row, figure in verdicts(_results(*ROWS))
    }
    assert judged == {
        "training step over standard": ("mobilenet", 1.087, False),
        "peak memory of a training step over standard": ("vgg16", 1.03, False),
        "firing counts over the published loop: speed-up": ("vgg16 10 classes", 16.0, True),
    }
    page = render.page([_results(*ROWS)], "")
    assert "| training step over standard | <= 1.03 | 1.087 | **missed** | mobilenet, ours |" in page


@pytest.mark.parametrize(("bytes_", "judged"), [(16 << 20, []), (17 << 20, [1.2])])
def test_relu_pool_is_judged_on_large_tensors_only(bytes_: int, judged: list[float]) -> None:
    row = _row("relu_pool", "x", "native", "both", 1.2, parameters={"bytes": bytes_})
    assert [figure for _, _, figure in verdicts(_results(row))] == judged


def test_growth_is_per_sample() -> None:
    rows = [_row("scaling", f"batch {n}", "native", "both", n / 1000) for n in (1024, 8192)]
    assert [figure for _, _, figure in verdicts(_results(*rows))] == [pytest.approx(1.0)]


def test_charts_are_svg_that_repeats_and_holds_the_figures() -> None:
    drawn = {name: svg(figure) for name, (_, figure) in charts(_results(*ROWS)).items()}
    assert set(drawn) == {"step", "loss", "roofline", "scaling"}
    for text in drawn.values():
        assert ET.fromstring(text).tag.endswith("svg")
        assert "#000000" not in text  # black ink would vanish on a dark page
    assert "1.087x" in drawn["step"]
    assert "20.0x" in drawn["loss"]
    again = {name: svg(figure) for name, (_, figure) in charts(_results(*ROWS)).items()}
    assert drawn == again


def test_no_results_make_no_figures() -> None:
    assert "No results are committed yet." in render.page([], "")
    assert charts(_results()) == {}


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    page = render.page(render.load(), render.FINDINGS.read_text(encoding="utf-8"))
    assert render.PAGE.read_text(encoding="utf-8") == page, "run: python -m benchmarks.render"
    images = {line.split("(")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")}
    assert images == {f"img/benchmarks/{path.name}" for path in render.IMAGES.glob("*.svg")}


def test_a_later_run_takes_the_place_of_its_suites(tmp_path):
    file = stored.write(_results(*ROWS), tmp_path)
    again = _row("step", "vgg16", "ours", "step", 0.9)
    machine = {**MACHINE, "date": "2026-11-26T08:00:00+00:00", "commit": "fedcba9876543210", "load_average": 0.2}
    (tmp_path / "later").mkdir()
    later = stored.write(Results(machine, LIMITS, quick=False, rows=(again,)), tmp_path / "later")
    render.join(file, later)
    render.join(file, later)  # once more says it once
    joined = stored.read(file)
    assert [row for row in joined.rows if row.suite == "step"] == [again]
    assert [row for row in joined.rows if row.suite != "step"] == [row for row in ROWS if row.suite != "step"]
    page = render.page([joined], "")
    assert page.count("Measured again 2026-11-26, commit fedcba987654, load average 0.2 at the start: step.") == 1
    assert "Measured 2026-11-21" in page
    other = stored.write(
        Results({**machine, "device": "Another CPU"}, LIMITS, quick=False, rows=()), tmp_path / "later"
    )
    with pytest.raises(ValueError, match="expected results of Test CPU, 2 threads, got those of Another CPU"):
        render.join(file, other)
