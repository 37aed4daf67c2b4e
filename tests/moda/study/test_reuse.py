from __future__ import annotations

import re
from itertools import combinations

import pytest
import torch

import moda
from moda.study.results_file import ResultsFile
from moda.study.reuse import (
    COLUMNS,
    ReuseResult,
    TestSet,
    by_size,
    evaluate_subtasks,
    read_results,
    reuse_accuracy,
    to_row,
    write_parquet,
)

CLASSES = 4


@pytest.fixture(scope="module")
def study():
    """A modular and a standard model with random weights, random modules, and test data of four classes."""
    torch.manual_seed(5)
    modular, standard = (moda.models.small_vgg(num_classes=CLASSES, width=0.25).eval() for _ in range(2))
    taps = moda.observe(modular, example=torch.randn(2, 3, 8, 8))
    masks = {tap: torch.rand(CLASSES, width) < 0.6 for tap, width in zip(taps.names, taps.widths, strict=True)}
    for mask in masks.values():
        mask[2] = mask[3]  # two classes with one module: their sub-tasks share masks
    test = TestSet(torch.randn(40, 3, 8, 8), torch.arange(40) % CLASSES, batch_size=16)
    return modular, moda.Decomposition(masks), standard, test


TASKS = [task for size in (2, 3, 4) for task in combinations(range(CLASSES), size)]


def test_every_figure_equals_the_one_measured_alone(study):
    model, decomposition, standard, test = study
    results = {
        r.classes: r for r in evaluate_subtasks(model, decomposition, TASKS, test, standard=standard, progress=False)
    }
    assert sorted(results) == sorted(TASKS)
    loader = [(test.images, test.labels)]
    whole = moda.measure.flops(model, test.images[:1])
    for task, result in results.items():
        composed = moda.compose(model, decomposition, task)
        # One masked evaluation is what a composed one computes: so it must score alike, to the sample.
        assert result.composed == moda.measure.accuracy(moda.mask(model, decomposition, task), loader, task)
        assert result.composed == moda.measure.accuracy(composed, loader, task)
        assert result.modular == moda.measure.accuracy(model, loader, task)
        assert result.standard == moda.measure.accuracy(standard, loader, task)
        assert result.size == moda.measure.size(model, decomposition, task)
        assert result.flops == moda.measure.flops(composed, test.images[:1]) / whole


def test_order_inside_a_task_and_a_missing_standard_model(study):
    model, decomposition, _, test = study
    (one,) = evaluate_subtasks(model, decomposition, [(3, 0)], test, progress=False)
    (two,) = evaluate_subtasks(model, decomposition, [(0, 3)], test, progress=False)
    assert one == two
    assert one.standard is None


def test_means_by_size_and_reuse_accuracy():
    rows = [((0, 1), 1.0), ((0, 2), 0.5), ((0, 1, 2), 0.25)]
    results = [ReuseResult(classes, composed, 1.0, None, 0.5, 0.5) for classes, composed in rows]
    assert {count: mean.composed for count, mean in by_size(results).items()} == {2: 0.75, 3: 0.25}
    assert reuse_accuracy(results) == 0.5  # over sizes, not over sub-tasks


def test_tables_hold_what_was_measured(study, tmp_path):
    model, decomposition, standard, test = study
    results = list(evaluate_subtasks(model, decomposition, TASKS[:3], test, standard=standard, progress=False))
    results.append(ReuseResult((0, 2), 0.1, 0.2, None, 1 / 3, 2 / 3))
    table = ResultsFile.open(tmp_path / "reuse.csv", "moda-reuse", COLUMNS, {})
    for result in results:
        table.append(to_row(result))
    assert read_results(tmp_path / "reuse.csv") == results
    parquet = pytest.importorskip("pyarrow.parquet")
    write_parquet(tmp_path / "reuse.parquet", results)
    columns = parquet.read_table(tmp_path / "reuse.parquet").to_pydict()
    assert columns["composed"] == [result.composed for result in results]
    assert columns["standard"][-1] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "expected the columns classes, composed, modular, standard, size, flops, got ['a', 'b']"),
        ("classes,composed,modular,standard,size,flops\n0 1,x,1,,1,1\n", "composed: expected a number, got 'x'"),
    ],
)
def test_malformed_files_are_refused(tmp_path, text, message):
    path = tmp_path / "reuse.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_results(path)
    with pytest.raises(ValueError, match="no such file; make it with: moda reuse"):
        read_results(tmp_path / "none.csv")


def test_unknown_classes_and_missing_samples_are_named(study):
    model, decomposition, _, test = study
    with pytest.raises(ValueError, match="classes: "):
        list(evaluate_subtasks(model, decomposition, [(0, 9)], test, progress=False))
    few = TestSet(test.images[:1], test.labels[:1])
    with pytest.raises(ValueError, match=re.escape("test: expected samples of the classes [1, 2], got none")):
        list(evaluate_subtasks(model, decomposition, [(1, 2)], few, progress=False))


def test_a_test_set_is_read_whole():
    data = [(torch.full((1, 2, 2), float(i)), i % 2) for i in range(5)]
    test = TestSet.of(data)
    assert test.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert test.labels.tolist() == [0, 1, 0, 1, 0]
