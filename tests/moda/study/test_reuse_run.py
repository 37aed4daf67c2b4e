from __future__ import annotations

import re
from itertools import combinations

import pytest
import torch

from moda.files import FormatError
from moda.runs.finished import decompose_run
from moda.study import reuse_run
from moda.study.results_file import read_note
from moda.study.reuse import TestSet, by_size, evaluate_subtasks, read_results, reuse_accuracy
from moda.study.reuse_run import KIND, run_reuse
from tests.moda._helpers.studying import make_run

TASKS = [*combinations(range(4), 2), (0, 1, 2), (9, 3, 4)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder / "modular"), make_run(folder / "standard", decomposed=False, weights_seed=1)


def test_the_table_holds_what_the_engine_measures(runs, tmp_path):
    finished, standard = runs
    path = tmp_path / "reuse.csv"
    results = run_reuse(finished, TASKS, path, standard=standard, progress=False)
    test = TestSet.of(finished.data.test)
    arguments = finished.model, finished.decomposition(), TASKS, test
    expected = {r.classes: r for r in evaluate_subtasks(*arguments, standard=standard.model, progress=False)}
    assert results == [expected[tuple(sorted(task))] for task in TASKS]
    assert read_results(path) == sorted(results, key=lambda result: (len(result.classes), result.classes))
    note = read_note(path, KIND)
    assert note["finished"] is True
    summary = note["summary"]
    assert summary["reuse_accuracy"] == pytest.approx(reuse_accuracy(results), rel=1e-12)
    means = by_size(results)
    assert [entry["classes"] for entry in summary["by_size"]] == [2, 3]
    assert [entry["tasks"] for entry in summary["by_size"]] == [6, 2]
    assert summary["by_size"][0]["standard"] == pytest.approx(means[2].standard, rel=1e-12)
    assert summary["size"] == pytest.approx((means[2].size + means[3].size) / 2, rel=1e-12)
    assert note["source"] == finished.provenance() | {"standard_sha256": standard.weights_sha256}


def test_a_study_goes_on_after_ctrl_c(runs, tmp_path, monkeypatch):
    finished, _ = runs
    whole = run_reuse(finished, TASKS, tmp_path / "whole.csv", progress=False)
    scored = []

    def stopping(model, decomposition, tasks, test, **options):
        for result in evaluate_subtasks(model, decomposition, tasks, test, **options):
            if len(scored) == 3:
                raise KeyboardInterrupt
            scored.append(result.classes)
            yield result

    monkeypatch.setattr(reuse_run, "evaluate_subtasks", stopping)
    path = tmp_path / "stopped.csv"
    with pytest.raises(KeyboardInterrupt, match="interrupted after 3 of 8 sub-tasks; the same command goes on"):
        run_reuse(finished, TASKS, path, progress=False)
    assert {result.classes for result in read_results(path)} == set(scored)
    assert read_note(path, KIND)["finished"] is False
    asked = []

    def watching(model, decomposition, tasks, test, **options):
        asked.extend(tasks)
        return evaluate_subtasks(model, decomposition, tasks, test, **options)

    monkeypatch.setattr(reuse_run, "evaluate_subtasks", watching)
    assert run_reuse(finished, TASKS, path, progress=False) == whole
    assert not set(scored) & set(asked)
    assert (tmp_path / "stopped.csv").read_text() == (tmp_path / "whole.csv").read_text()
    assert (tmp_path / "stopped.json").read_text() == (tmp_path / "whole.json").read_text()


def test_more_sub_tasks_add_to_the_table(runs, tmp_path):
    finished, _ = runs
    run_reuse(finished, TASKS[:2], tmp_path / "reuse.csv", progress=False)
    (one,) = run_reuse(finished, TASKS[6:7], tmp_path / "reuse.csv", progress=False)
    assert one.classes == (0, 1, 2)
    assert [result.classes for result in read_results(tmp_path / "reuse.csv")] == [*TASKS[:2], (0, 1, 2)]


def test_parquet(runs, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    finished, _ = runs
    results = run_reuse(finished, TASKS[:3], tmp_path / "reuse.parquet", progress=False)
    columns = parquet.read_table(tmp_path / "reuse.parquet").to_pydict()
    assert columns["classes"] == ["0 1", "0 2", "0 3"]
    assert columns["composed"] == [result.composed for result in results]
    assert columns["standard"] == [None] * 3
    assert read_results(tmp_path / "reuse.csv") == results


def test_another_decomposition_is_refused(tmp_path):
    finished = make_run(tmp_path / "run")
    run_reuse(finished, TASKS[:1], tmp_path / "reuse.csv", progress=False)
    decompose_run(finished, 0.5, progress=False)
    with pytest.raises(FormatError, match=r"reuse\.csv: its results are of another study: masks_sha256 is"):
        run_reuse(finished, TASKS[:1], tmp_path / "reuse.csv", progress=False)


def test_bad_input_is_named(runs, tmp_path):
    finished, _ = runs
    with pytest.raises(ValueError, match=re.escape("out: expected a name that ends in .csv or .parquet, got 'x.txt'")):
        run_reuse(finished, TASKS, tmp_path / "x.txt")
    with pytest.raises(ValueError, match="tasks: expected at least one sub-task, got none"):
        run_reuse(finished, [], tmp_path / "x.csv")
    other = make_run(tmp_path / "other", decomposed=False, seed=7)
    with pytest.raises(ValueError, match="standard: expected a run with seed=0 as .*, got 7"):
        run_reuse(finished, TASKS, tmp_path / "x.csv", standard=other)
    torch.manual_seed(0)
    with pytest.raises(FormatError, match="is not decomposed yet"):
        run_reuse(other, TASKS, tmp_path / "x.csv")
