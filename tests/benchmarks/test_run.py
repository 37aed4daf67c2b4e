"""Tiny cases of every suite, from the models to the result file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from moda.bench import command, inputs, machine, memory, results, runner
from moda.bench.attribution import attribution_case
from moda.bench.case import Case, Contender
from moda.bench.clock import Budget, HostClock, Timed
from moda.bench.decomposition import PassInputs, composition_case, decomposition_case
from moda.bench.plan import SUITES, Plan
from moda.bench.results import MEASURED, Results, Row
from moda.bench.scaling import scaling_cases
from moda.bench.table import duration
from moda.bench.training_step import StepInputs, step_case
from moda.cli.app import app
from moda.files import FormatError
from moda.observation import taps
from moda_kernels import _norm_ops
from moda_kernels.batch_norm import BatchNorm
from tests.moda_kernels._helpers.native_needed import needs_native

CPU = torch.device("cpu")
TINY = Budget(least=2, most=2, seconds=0, warmups=0)


def _run(case: Case) -> dict[str, Row]:
    rows = runner.run_case(case, HostClock(cache_bytes=1 << 12))
    return {row.contender: row for row in rows if row.status == MEASURED}


def test_shapes_are_those_of_the_real_model() -> None:
    """VGG16 by hand: two blocks of two and three of three convolutions, halved after each, two hidden linear layers."""
    stages = [(64, 32, 2), (128, 16, 2), (256, 8, 3), (512, 4, 3), (512, 2, 3)]
    expected = [(128, neurons, side, side) for neurons, side, count in stages for _ in range(count)]
    assert list(inputs.tap_shapes("vgg16", 32, 128)) == [*expected, (128, 4096), (128, 4096)]
    assert inputs.total_bytes([(128, 4096), (2, 3)], torch.float16) == (128 * 4096 + 6) * 2


def test_labels_are_balanced_and_repeat() -> None:
    labels = inputs.labels(103, 10, CPU)
    assert sorted(torch.bincount(labels).tolist()) == [10] * 7 + [11] * 3
    assert torch.equal(labels, inputs.labels(103, 10, CPU))


def test_a_training_step_of_every_route() -> None:
    rows = _run(step_case(StepInputs("small_vgg", 16, 8, CPU), TINY))
    assert set(rows) == {"standard", "accelerated", "reference", "grouped", "fused", "ours"}
    for row in rows.values():
        assert row.seconds is not None
        assert row.ratio is not None
        assert row.seconds.samples == 2
    assert rows["standard"].ratio is not None
    assert rows["standard"].ratio.median == 1
    assert rows["standard"].memory is not None
    assert rows["reference"].memory is not None
    assert rows["reference"].memory > rows["standard"].memory  # the published formulas hold gradients of every layer


@needs_native
@pytest.mark.parametrize("factor", [1.0, 1.05], ids=["right", "wrong"])
def test_a_step_with_wrong_norms_is_not_timed(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Of several batches one decides; wrong arithmetic shows on all of them."""
    kernel = _norm_ops.norm_relu_pool

    def changed(kernels: _norm_ops.Kernels, x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
        y, pooled = kernel(kernels, x, norm)
        return y * factor, pooled

    monkeypatch.setattr(_norm_ops, "norm_relu_pool", changed)
    monkeypatch.setattr(taps, "NORMS_FUSED_FROM_BYTES", 0)
    rows = _run(step_case(StepInputs("resnet18", 16, 8, CPU), TINY))
    assert {"standard", "fused"} <= set(rows)
    assert ({"accelerated", "ours"} <= set(rows)) == (factor == 1.0)
    assert bool({"accelerated", "ours"} & set(rows)) == (factor == 1.0)


def test_peak_memory_counts_what_is_freed_again() -> None:
    def two_of_three_at_once() -> None:
        kept = torch.empty(1 << 20, dtype=torch.uint8)
        for _ in range(2):
            torch.empty(1 << 20, dtype=torch.uint8)
        del kept

    assert memory.peak_bytes(two_of_three_at_once, CPU) == 2 << 20


def test_held_bytes_count_shared_storage_once() -> None:
    tensor = torch.empty(10, dtype=torch.float32)
    assert memory.held_bytes([tensor, tensor[2:], torch.empty(3, dtype=torch.int64)]) == 40 + 24


def test_a_decomposition_pass_and_composed_models() -> None:
    about = PassInputs("small_vgg", 12, 8, CPU)
    counted = _run(decomposition_case(about, TINY))
    assert {"plain inference", "reference", "torch"} <= set(counted)
    composed = _run(composition_case(about, (0.25,), TINY))
    full, small = composed["full model"].flops, composed["25% of neurons"].flops
    assert full is not None
    assert small is not None
    assert 0.05 < small / full < 0.25  # a sixteenth of most layers, a quarter of the first and last


def test_an_attribution_pass() -> None:
    rows = _run(attribution_case(PassInputs("small_vgg", 12, 8, CPU), TINY))
    assert {"forward and backward", "torch"} <= set(rows)
    assert rows["torch"].ratio is not None


def test_scaling_varies_one_axis_at_a_time() -> None:
    cases = scaling_cases(CPU, TINY, {"batch": (32, 64), "classes": (2,), "layers": (3,)})
    described = [(c.name, c.parameters["samples"], c.parameters["classes"], c.parameters["layers"]) for c in cases]
    assert described == [
        ("batch 32", 32, 10, 2),
        ("batch 64", 64, 10, 2),
        ("classes 2", 1024, 2, 2),
        ("layers 3", 128, 10, 3),
    ]
    row = _run(cases[0])["torch"]
    assert row.moved == 3 * 2 * 32 * 64 * 64 * 4  # read, read again, write: two layers of 64 neurons at 8x8
    assert row.seconds is not None
    assert row.bandwidth == pytest.approx(row.moved / row.seconds.median)


def test_pairs_that_do_not_fit_in_memory_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moda.bench.losses.memory_bytes", lambda _: 1 << 20)
    rows = runner.run_case(scaling_cases(CPU, TINY, {"batch": (512,)})[0], HostClock(1 << 12))
    (reference,) = (row for row in rows if row.contender == "reference")
    assert reference.status == results.SKIPPED
    assert "for its pairs" in reference.note


@pytest.mark.parametrize("quick", [True, False])
def test_plans_name_every_case_once(quick: bool) -> None:
    cases = Plan(CPU, quick).cases()
    names = [(case.suite, case.name) for case in cases]
    assert len(set(names)) == len(names)
    assert {case.suite for case in cases} == set(SUITES)


def _measured() -> Results:
    case = scaling_cases(CPU, TINY, {"batch": (32,)})[0]
    clock = HostClock(cache_bytes=1 << 12)
    rows = tuple(runner.run_case(case, clock))
    return Results(machine.describe(CPU), machine.limits(CPU, clock, TINY), quick=True, rows=rows)


def test_results_survive_the_file(tmp_path: Path) -> None:
    measured = _measured()
    path = results.write(measured, tmp_path / "new")
    assert results.read(path) == measured
    stored = json.loads(path.read_text())
    assert (stored["format"], stored["format_version"]) == ("moda-benchmark", 1)
    assert set(stored["machine"]) >= {
        "device",
        "processor",
        "threads",
        "versions",
        "backends",
        "date",
        "commit",
        "modified",
    }
    assert stored["machine"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert stored["limits"]["copy_bytes_per_second"]["median"] > 1e6
    assert set(stored["rows"][-1]["seconds"]) == {"median", "q1", "q3", "minimum", "samples"}


def test_a_file_of_another_version_or_shape_is_refused(tmp_path: Path) -> None:
    path = results.write(_measured(), tmp_path)
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "format_version": 2}))
    with pytest.raises(FormatError, match="format_version"):
        results.read(path)
    del stored["rows"][0]["contender"]
    path.write_text(json.dumps(stored))
    with pytest.raises(FormatError, match="contender"):
        results.read(path)


def test_file_names_are_plain() -> None:
    assert results.file_name("NVIDIA H200 (80%)") == "nvidia-h200-80.json"


def test_durations_have_three_digits_and_a_unit() -> None:
    assert [duration(s) for s in (1.2345, 0.123, 0.0456, 7.89e-6)] == ["1.23 s", "123 ms", "45.6 ms", "7.89 us"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"suites": ["los"]}, "suites: .*got los"), ({"device": "tpu"}, "device: expected auto, cpu or cuda")],
)
def test_the_command_refuses_what_it_does_not_know(arguments: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"quick": True, "device": "cpu", "suites": [], "folder": None, **arguments}
    with pytest.raises(ValueError, match=message):
        command.bench(**given)  # type: ignore[arg-type]


def test_the_command_writes_where_it_is_told_and_prints_the_table_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = scaling_cases(CPU, TINY, {"batch": (32,)})
    monkeypatch.setattr(Plan, "cases", lambda self, suites: cases)
    assert command.bench(quick=True, device="cpu", suites=["scaling"], folder=tmp_path)
    (path,) = tmp_path.iterdir()
    shown = capsys.readouterr()
    assert "GB/s copied" in shown.out.splitlines()[0]
    assert "batch 32" in shown.out
    assert path.name in "".join(shown.err.split())
    assert {row.contender for row in results.read(path).rows} >= {"reference", "torch"}


@pytest.mark.parametrize(("right", "status"), [(True, 0), (False, 1)])
def test_moda_bench_fails_if_a_contender_is_wrong(
    right: bool, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    contender = Contender("only", {"run": Timed(lambda _: None)}, check=lambda: "" if right else "off by one")
    case = Case("loss", "tiny", "only", lambda: [contender], TINY)
    monkeypatch.setattr(Plan, "cases", lambda self, suites: [case])
    arguments = ["bench", "--quick", "--device", "cpu", "--suite", "loss", "--output", str(tmp_path)]
    assert CliRunner().invoke(app, arguments).exit_code == status
    (row,) = results.read(next(tmp_path.iterdir())).rows
    assert (row.status, row.note) == ((MEASURED, "") if right else (results.WRONG, "off by one"))
