"""The study's commands end to end: what they print, what they write, and one readable line for every mistake."""

from __future__ import annotations

import json

import pytest
import torch

from moda.composition.export import read_provenance
from moda.files import FormatError
from moda.methods.cnnsplitter import Search
from moda.runs.folder import RunFolder
from moda.study.analysis_files import read_analysis
from moda.study.digits import StudySettings
from moda.study.replacement import read_replacements
from moda.study.reuse import read_results
from moda.study.sweep import read_sweep
from tests.moda._helpers.studying import make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "modular")
    make_run(folder / "standard", decomposed=False, weights_seed=1, affinity=0.0, dispersion=0.0, compactness=0.0)
    return folder


def test_reuse(moda, runs, tmp_path):
    table = tmp_path / "out" / "reuse.csv"
    arguments = ("reuse", runs / "modular", "--standard", runs / "standard", "--size", "2,10", "--per-size", 3)
    code, out, err = moda(*arguments, "--out", table, "--device", "cpu")
    assert (code, err) == (0, "")
    assert [len(result.classes) for result in read_results(table)] == [2, 2, 2, 10]
    assert all(result.standard is not None for result in read_results(table))
    assert "Sub-tasks of small_vgg on digits" in out
    assert "Reuse accuracy (mean over sizes): " in out
    before = table.read_bytes()
    assert moda(*arguments, "--out", table)[:2] == (0, out)
    assert table.read_bytes() == before
    code, _, err = moda("reuse", runs / "modular", "--size", "2", "--out", table)
    assert code == 1
    assert err.startswith(f"moda: {table}: its results are of another study: standard_sha256 is")


def test_analyze(moda, runs):
    code, out, err = moda("analyze", runs / "modular")
    assert (code, err) == (0, "")
    analysis = read_analysis(runs / "modular" / "analysis.json")
    assert f"Mean module: {100 * analysis['mean_size']:.2f} % of the parameters" in out
    assert len(analysis["layers"]) == 5
    assert [len(matrix) for matrix in analysis["similarity"].values()] == [10] * 5
    assert 0 < analysis["mean_overlap_parameters"] <= analysis["mean_size"] < 1
    for layer in analysis["layers"]:
        assert layer["tap"] in out


def test_sweep(moda, runs):
    code, out, err = moda("sweep", runs / "modular", "--threshold", "0.5,0.9", "--per-size", 1)
    assert (code, err) == (0, "")
    points = read_sweep(runs / "modular" / "sweep_threshold.csv")
    assert [point.value for point in points] == [0.5, 0.9]
    assert f"{100 * points[0].module_size:.2f} %" in out
    code, out, err = moda("sweep", runs / "modular", "--compactness", "0.3", "--per-size", 1)
    assert (code, len(read_sweep(runs / "modular" / "sweep_compactness.csv"))) == (0, 1)


def test_export(moda, runs, tmp_path):
    code, out, err = moda("export", runs / "modular", "--classes", "7,1", "-o", tmp_path / "m.pt2")
    assert (code, err) == (0, "")
    assert "m.pt2: 7, 1; its logits differ from the model's by at most" in out
    assert read_provenance(tmp_path / "m.pt2")["class_names"] == ["7", "1"]


def test_replace(moda, tmp_path):
    arguments = ("replace", tmp_path / "r", "--data", "digits", "--image-size", 16, "--strong-model", "small_vgg")
    arguments += ("--strong-width", 0.25, "--classes", "2", "--epochs", 1, "--under", 0, "--over", 0)
    code, out, _ = moda(*arguments)
    assert code == 0
    results = read_replacements(tmp_path / "r" / "replacement.json")
    assert [(result.mixed_class, result.strategy, result.checkpoint) for result in results] == [
        (2, "calibrate", "final"),
        (2, "normalize", "final"),
    ]
    assert "lenet5 with modules of small_vgg" in out
    code, out, _ = moda(  # by its former name
        "repair", tmp_path / "s", *arguments[2:], "--strong", tmp_path / "r" / "strong", "--strategy", "calibrate"
    )
    assert code == 0
    (again,) = read_replacements(tmp_path / "s" / "replacement.json")
    assert again == results[0]
    assert not (tmp_path / "s" / "strong").exists()


def test_import(moda, runs, tmp_path):
    run = RunFolder.open(runs / "modular")
    torch.save(run.load_weights(), tmp_path / "model.pt")
    from moda.decomposition.container import Decomposition

    masks = Decomposition.load(run.decomposition).masks
    masks_file = tmp_path / "model.pt.mod_mask.thres0.9.pt"
    torch.save({k: [mask[k] for mask in masks.values()] for k in range(10)}, masks_file)
    arguments = ("import", tmp_path / "model.pt", tmp_path / "run", "--model", "small_vgg", "--data", "digits")
    code, out, err = moda(*arguments, "--width", 0.25)
    assert (code, err) == (0, "")
    assert f"Next: moda decompose {tmp_path / 'run'}" in out
    arguments = (*arguments[:2], tmp_path / "other", *arguments[3:])
    code, out, err = moda(*arguments, "--width", 0.25, "--masks", masks_file, "--device", "cpu")
    assert code == 0
    assert "Our modules and model.pt.mod_mask.thres0.9.pt" in out
    assert moda("analyze", tmp_path / "other")[0] == 0
    assert moda("sweep", tmp_path / "other", "--threshold", "0.9", "--per-size", 1)[0] == 0  # it has no metrics
    code, _, err = moda("import", tmp_path / "model.pt", tmp_path / "third")
    assert (code, err) == (
        1,
        f"moda: {tmp_path / 'model.pt'}: its folders are not named as the artifact's; say the model: --model\n",
    )


def test_study(moda, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "moda.study.sweep.GRIDS", {"threshold": (0.9,), "affinity": (1.0,), "dispersion": (1.0,), "compactness": (0.3,)}
    )
    monkeypatch.setattr("moda.study.digits.REPLACEMENT_STRONG", {})
    arguments = (
        "study",
        tmp_path,
        "--models",
        "small_vgg",
        "--seeds",
        "3",
        "--epochs",
        1,
        "--per-size",
        1,
        "--jobs",
        1,
    )
    code, _, err = moda(*arguments)
    assert code == 0
    described = json.loads((tmp_path / "study.json").read_text())
    assert described["finished"] is True
    (pair,) = described["runs"]
    assert (pair["model"], pair["seed"]) == ("small_vgg", 3)
    modular, standard = (RunFolder.open(tmp_path / pair[side]) for side in ("modular", "standard"))
    assert (modular.config.modular, standard.config.modular) == (True, False)
    assert len(read_results(modular.path / "reuse.csv")) == 9
    assert read_analysis(modular.path / "analysis.json")["source"]["masks_sha256"]
    assert len(read_sweep(tmp_path / described["sweeps"] / "sweep_threshold.csv")) == 1
    assert "[1/1] small_vgg seed 3: module size " in err
    weights = modular.weights.stat().st_mtime_ns
    assert moda(*arguments)[0] == 0
    assert modular.weights.stat().st_mtime_ns == weights


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["reuse", "RUN", "--size", "2,x"], 2, "Invalid value: --size: expected integers separated by commas, got '2,x'"),
        (["reuse", "RUN", "--size", "1"], 1, "size: expected numbers of classes in [2, 10], got 1"),
        (["reuse", "RUN", "--tasks", "some"], 1, "tasks: expected one of auto, all, sampled, got 'some'"),
        (["reuse", "RUN", "--out", "x.txt"], 1, "out: expected a name that ends in .csv or .parquet, got 'x.txt'"),
        (["reuse", "RUN", "--device", "abacus"], 1, "device: 'abacus' cannot be used here: "),
        (["reuse", "STANDARD"], 1, "is not decomposed yet; do it with: moda decompose "),
        (["reuse", "nowhere"], 1, "nowhere: no such folder"),
        (["analyze", "STANDARD"], 1, "is not decomposed yet; do it with: moda decompose "),
        (["sweep", "RUN", "--threshold", "0.5,high"], 2, "Invalid value: --threshold: expected numbers separated by commas, got '0.5,high'"),
        (["sweep", "RUN", "--threshold", "2"], 1, "threshold: expected numbers in [0, 1], got 2.0"),
        (["export", "RUN", "-o", "x.pt2"], 2, "Missing option '--classes'"),
        (["replace", "x", "--data", "digits", "-c", "7"], 1, "--classes: expected names or indices of 5 classes (0, 1, 2, 3, 4), got '7'"),
        (["export", "RUN", "-c", "1,1", "-o", "x.pt2"], 1, "classes: expected every class once, got 1 more than once"),
        (["export", "RUN", "-c", "1", "-o", "x.pth"], 1, "output: expected a name that ends in .pt2 or .onnx, got 'x.pth'"),
        (["replace", "x", "--strategy", "glue"], 1, "--strategy: expected some of calibrate, normalize, got ['glue']"),
        (["import", "none.pt", "x", "--model", "vgg16", "--data", "digits"], 1, "none.pt: no such file"),
        (["study", "x", "--models", "vgg99"], 1, "models: expected some of small_vgg, lenet5, resnet18, mobilenet, got ['vgg99']"),
        (["study", "x", "--seeds", "one"], 2, "Invalid value: --seeds: expected integers separated by commas, got 'one'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(moda, runs, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    names = {"RUN": runs / "modular", "STANDARD": runs / "standard"}
    status, out, err = moda(*(names.get(argument, argument) for argument in arguments))
    assert (status, out) == (code, "")
    assert message in err
    assert err.startswith("moda: ")
    assert err.count("\n") == 1


def test_settings_of_a_study():
    with pytest.raises(ValueError, match="models: expected some of .*, got none"):
        StudySettings(models=())
    with pytest.raises(ValueError, match="seeds: expected at least one, got none"):
        StudySettings(seeds=())
    for name in ("epochs", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            StudySettings(**{name: 0})
    config = StudySettings().config("resnet18", 2, modular=False)
    assert (config.width, config.seed, config.modular) == (0.25, 2, False)


def test_analysis_files_are_checked(tmp_path):
    (tmp_path / "analysis.json").write_text("{}")
    with pytest.raises(FormatError, match='expected "format": "moda-analysis"'):
        read_analysis(tmp_path / "analysis.json")


@pytest.mark.parametrize("command", ["reuse", "analyze", "sweep", "replace", "export", "import", "study"])
def test_every_command_has_examples(moda, command):
    code, out, _ = moda(command, "--help")
    assert code == 0
    assert f"$ moda {command} " in out


def test_modules_that_took_a_search_are_replaced_with_force_alone(moda, tmp_path, monkeypatch):
    run = tmp_path / "run"
    make_run(run, decomposed=False, width=0.1, affinity=0.0, dispersion=0.0, compactness=0.0)
    search = (
        "modularize",
        run,
        "--method",
        "cnnsplitter",
        "--generations",
        "2",
        "--population",
        "5",
        "--device",
        "cpu",
    )
    breed = Search.breed
    monkeypatch.setattr(Search, "breed", lambda own: breed(own) if own.generation < 1 else own.nothing())
    code, _, err = moda(*search)
    assert (code, "nothing" in err) == (1, True)
    monkeypatch.setattr(Search, "breed", breed)
    assert (run / "search.json").exists()
    code, _, err = moda(*search)
    assert (code, f"{run}/search.json: is a search that was stopped; go on with --resume" in err) == (1, True)
    code, _, err = moda("modularize", run, "--resume")
    assert (code, "--resume: a search by gradsplitter begins anew" in err) == (1, True)
    assert moda(*search, "--resume")[0] == 0
    assert not (run / "search.json").exists()
    made = json.loads((run / "decomposition" / "decomposition.json").read_text())
    assert (made["method"], made["metadata"]["generation"]) == ("cnnsplitter", 2)
    for command in (("decompose", run), search):
        code, _, err = moda(*command)
        assert (code, "holds a result already; replace it with --force" in err) == (1, True)
    code, _, err = moda(*search, "--resume", "--force")
    assert (code, "has no search that was stopped" in err) == (1, True)
    assert moda("decompose", run, "--force")[0] == 0
    assert moda("decompose", run, "--threshold", "0.8")[0] == 0
    assert json.loads((run / "decomposition" / "decomposition.json").read_text())["method"] == "moda"
