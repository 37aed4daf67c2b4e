"""A whole comparison of methods, small: what is trained, searched, measured, kept and shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytest.importorskip("sklearn")

from moda.cli import app as cli
from moda.decomposition.container import Decomposition
from moda.methods import CNNSplitter, GradSplitter
from moda.report.comparison import comparison_page, papers_numbers
from moda.runs.config import TrainingConfig
from moda.runs.finished import FinishedRun, decompose_run
from moda.study.comparison import (
    FIGURES,
    ComparisonSettings,
    MethodFigures,
    SizeFigures,
    compare_methods,
    compare_run,
    means,
    read_comparison,
)
from moda.study.searching import SearchSettings

SETTINGS = ComparisonSettings(
    methods=("mwt", "gradsplitter"),
    width=0.1,
    epochs=1,
    batch_size=256,
    splitter_epochs=1,
    fine_tuning=1,
    sizes=(2,),
    per_size=1,
    weak_epochs=0,
)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[MethodFigures]]:
    out = tmp_path_factory.mktemp("comparison")
    return out, compare_methods(out, SETTINGS, progress=False)


def test_every_method_is_measured(compared: tuple[Path, list[MethodFigures]]):
    _, found = compared
    assert [one.method for one in found] == ["mwt", "gradsplitter"]
    mwt, gradsplitter = found
    assert mwt.sizes[0].after is not None
    assert mwt.sizes[0].seconds is not None
    assert gradsplitter.sizes[0].after is None
    assert gradsplitter.accuracy == gradsplitter.standard == mwt.standard
    for one in found:
        (size,) = one.sizes
        assert (size.classes, size.tasks) == (2, 1)
        assert one.train_seconds is not None
        assert one.modularize_seconds is not None
        assert one.calibrated is None
        assert 0 < one.kept <= 1
    # of united modules what both have counts once, of modules side by side twice
    assert mwt.sizes[0].size <= 1 < gradsplitter.sizes[0].size
    assert mwt.sizes[0].kept <= 1 < gradsplitter.sizes[0].kept


def test_what_is_done_is_kept(compared: tuple[Path, list[MethodFigures]], monkeypatch: pytest.MonkeyPatch):
    out, found = compared
    monkeypatch.setattr("moda.study.comparison.trained", lambda *_: pytest.fail("it trains again"))
    assert compare_methods(out, SETTINGS, progress=False) == found
    folder = out / "small_vgg" / "seed-0"
    assert MethodFigures.of(FIGURES.read(folder / "mwt.json")) == found[0]
    assert Decomposition.load(folder / "gradsplitter").combine == "probability"


def test_a_run_with_gates_is_measured_by_itself(compared: tuple[Path, list[MethodFigures]]):
    """Its whole model has gates, its modules have none; its threshold alone decides."""
    out, found = compared
    folder = out / "small_vgg" / "seed-0" / "mwt"
    alone = compare_run(folder, SETTINGS.changed(fine_tuning=0))
    assert (alone.accuracy, alone.module_size, alone.overlap) == (
        found[0].accuracy, found[0].module_size, found[0].overlap,
    )  # fmt: skip
    assert (alone.standard, alone.calibrated, alone.sizes[0].after) == (None, None, None)
    finished = FinishedRun.open(folder, "cpu")
    assert finished.gates is not None
    assert any("mask_generator" in name for name, _ in finished.whole.named_modules())
    assert not any("mask_generator" in name for name, _ in finished.model.named_modules())
    with pytest.raises(TypeError, match="epsilon: has no meaning for gates of mwt; threshold alone decides there"):
        decompose_run(finished, epsilon=0.1)
    columns = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert columns[3:8] == ["loss", "cross_entropy", "cohesion", "coupling", "train_accuracy"]


def test_the_page_has_every_method_and_the_papers_numbers(compared: tuple[Path, list[MethodFigures]]):
    _, found = compared
    page = comparison_page(found)
    for text in ("MwT", "GradSplitter", "small_vgg on digits", f"{100 * found[0].accuracy:.1f}"):
        assert text in page
    assert "MODA&#39;s paper" not in page
    size = SizeFigures(2, 1, 0.9, 0.7, 0.8, 0.5, 0.5, 0.5, 1.0)
    published = MethodFigures(
        "mwt", "vgg16", "cifar10", 0, 0.9, None, 0.1, 0.2, 0.3, None, None, None, None, 1.0, 2.0, (size,)
    )  # fmt: skip
    page = comparison_page([published])
    assert "MODA&#39;s paper" in page
    assert "75.3" in page
    assert "97.2" in page


def test_the_page_of_several_seeds_has_their_spread(compared: tuple[Path, list[MethodFigures]]):
    _, (first, _) = compared
    second = replace(first, seed=1, accuracy=first.accuracy - 0.02)
    page = comparison_page([first, second])
    assert "Means over 2 seeds \u00b1 standard deviations." in page
    assert f"{100 * first.accuracy - 1:.1f}\u00a0\u00b1\u00a01.4" in page
    assert "one sub-task" in page
    assert "moda compare" in page


def test_means_are_over_seeds_and_over_those_that_have_the_figure(compared: tuple[Path, list[MethodFigures]]):
    _, (mwt, gradsplitter) = compared
    other = replace(
        mwt, seed=1, accuracy=mwt.accuracy + 0.25, standard=None,
        sizes=tuple(replace(size, before=size.before + 0.5, seconds=None) for size in mwt.sizes),
    )  # fmt: skip
    first, second = means([mwt, other, gradsplitter])
    assert (first.method, second) == ("mwt", gradsplitter)
    assert first.accuracy == pytest.approx(mwt.accuracy + 0.125)
    assert first.standard == mwt.standard
    assert first.sizes[0].before == pytest.approx(mwt.sizes[0].before + 0.25)
    assert first.sizes[0].seconds == mwt.sizes[0].seconds
    assert means([mwt, gradsplitter, mwt]) == [mwt, mwt, gradsplitter]


def test_comparisons_are_shown_together(
    compared: tuple[Path, list[MethodFigures]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out, found = compared
    assert read_comparison(out) == found
    assert read_comparison(tmp_path) == []
    page = tmp_path / "both.html"
    monkeypatch.setattr("sys.argv", ["moda", "compare", str(out), str(out), "-o", str(page)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert "small_vgg on digits, seed 0" in capsys.readouterr().out
    assert "small_vgg on digits" in page.read_text(encoding="utf-8")
    none = tmp_path / "none"
    monkeypatch.setattr("sys.argv", ["moda", "compare", str(out), str(none), "-o", str(tmp_path / "no.html")])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    told = "".join(character for character in capsys.readouterr().err if character not in "\u2502\n")
    assert "holds no run and no comparison" in " ".join(told.split())


def test_a_model_that_is_not_for_the_images_is_named_before_any_is_trained(tmp_path: Path):
    settings = ComparisonSettings(models=("small_vgg", "simcnn"), epochs=1)
    with pytest.raises(ValueError, match="image_size: expected"):
        compare_methods(tmp_path / "new", settings, progress=False)
    assert not list((tmp_path / "new").glob("small_vgg*"))


def test_the_papers_numbers_are_shares():
    for entry in papers_numbers():
        for name in ("before", "after", "whole"):
            assert len(entry.get(name, entry["classes"])) == len(entry["classes"])
            assert all(value is None or 0 <= value <= 1 for value in entry.get(name, []))


def test_settings_make_the_methods_they_describe():
    assert SearchSettings().searching() == GradSplitter()
    assert SearchSettings("cnnsplitter").searching() == CNNSplitter()
    changed = SearchSettings("cnnsplitter", generations=3, population=20, seed=4).searching()
    assert changed == CNNSplitter(3, 20, 10, 4, seed=4)
    config = ComparisonSettings(cohesion=2.0).config("simcnn", 3, "mwt")
    assert (config.method, config.cohesion, config.seed, config.gated) == ("mwt", 2.0, 3, True)
    assert not ComparisonSettings().config("simcnn", 3, "gradsplitter").modular


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("moda", "best")}, r"methods: expected some of moda, mwt, nemo, .*, got \['best'\]"),
        ({"sizes": (1,)}, "sizes: expected"),
        ({"population": 2}, "population: expected"),
        ({"seeds": ()}, "seeds: expected at least one"),
    ],
)
def test_bad_settings_are_named(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        ComparisonSettings(**options)


def test_methods_with_gates_train_on_one_device(tmp_path: Path):
    from moda.training.loop import train

    with pytest.raises(ValueError, match="devices: the method 'nemo' trains on one device"):
        train(TrainingConfig(method="nemo", devices=2), tmp_path / "run")
    assert TrainingConfig(method="nemo").terms == ("contrast",)
    assert json.loads(json.dumps(TrainingConfig(method="mwt").to_dict()))["method"] == "mwt"
