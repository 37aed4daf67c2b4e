from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

import moda
from moda.composition.replace import CalibratedModel, Calibration, NormalizedModel
from moda.files import FormatError, sha256_of
from moda.runs.folder import RunFolder
from moda.study.replacement import class_accuracies, read_replacements, replace_class, results_file, write_replacements
from moda.study.replacement_study import ReplacementStudy, run_replacement_study
from tests.moda._helpers.studying import make_run

STUDY = ReplacementStudy(
    data="digits",
    data_options={"image_size": 16},
    strong_model="small_vgg",
    strong_width=0.25,
    mixed_classes=(3, 1),
    epochs=2,
    under_epoch=1,
    over_epoch=2,
    batch_size=64,
    device="cpu",
)


def side(folder, part, mixed_class=3, **settings):
    replacement = {"part": part, "mixed_class": mixed_class}
    return make_run(folder, decomposed=part == "strong", data_options={"replacement": replacement}, **settings)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sides")
    return side(folder / "strong", "strong", 0), side(folder / "weak", "weak", weights_seed=1)


def test_accuracy_by_class():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x

    scores = torch.eye(3)[[0, 1, 1, 2]]
    assert class_accuracies(Fixed(), [(scores[:3], torch.tensor([0, 1, 2])), (scores[3:], torch.tensor([2]))], 3) == (
        1,
        1,
        0.5,
    )
    with pytest.raises(ValueError, match=re.escape("loader: expected samples of every class, got none of [1, 2]")):
        class_accuracies(Fixed(), [(scores[:1], torch.tensor([0]))], 3)


@pytest.mark.parametrize("strategy", ["calibrate", "normalize"])
def test_figures_are_those_of_the_two_models(sides, strategy):
    strong, weak = sides
    replaced, result = replace_class(strong, weak, strategy, calibration=Calibration(epochs=2))
    assert isinstance(replaced, CalibratedModel if strategy == "calibrate" else NormalizedModel)
    assert replaced.position == (5,)  # the class that both know, the weak model's last
    loader = weak.loader(weak.data.test)
    before, after = (class_accuracies(model, loader, 6) for model in (weak.run.load_model(weak.data), replaced))
    assert (result.before, result.after) == (before, after)
    assert result.target == (before[5], after[5])
    assert result.others == (pytest.approx(sum(before[:5]) / 5), pytest.approx(sum(after[:5]) / 5))
    assert (result.mixed_class, result.class_name, result.epoch, result.checkpoint) == (3, "3", 1, "final")
    # The module serves class 3: its only logit is the whole strong model's, with the other neurons at 0.
    images = weak.data.test.tensors[0][:8]
    masked = moda.mask(strong.model, strong.decomposition(), [3]).eval()
    with torch.no_grad():
        torch.testing.assert_close(replaced.module(images), masked(images), rtol=1e-4, atol=1e-5)
    again = replace_class(strong, weak, strategy, calibration=Calibration(epochs=2))[1]
    assert again == result  # to the bit: the seed decides the calibration layer


def test_bounds_come_from_the_strong_training_data(sides):
    strong, weak = sides
    replaced, _ = replace_class(strong, weak, "normalize")
    module = moda.compose(strong.model, strong.decomposition(), [3]).eval()
    with torch.no_grad():
        logits = module(strong.data.train.tensors[0])
    torch.testing.assert_close(replaced.bounds, torch.stack([logits.min(), logits.max()]), rtol=1e-4, atol=1e-5)


def test_results_come_back_as_they_were(sides, tmp_path):
    result = replace_class(*sides, "normalize")[1]
    write_replacements(tmp_path / "replacement.json", [result, replace(result, epoch=3)])
    assert read_replacements(tmp_path / "replacement.json") == [result, replace(result, epoch=3)]
    text = (tmp_path / "replacement.json").read_text()
    assert json.loads(text)["results"][0]["target_after"] == result.after[-1]
    (tmp_path / "replacement.json").write_text(text.replace('"weak_model"', '"weaker"'))
    with pytest.raises(FormatError, match="entry 'weak_model' is missing"):
        read_replacements(tmp_path / "replacement.json")


def test_a_study_trains_once_and_replaces_at_every_checkpoint(tmp_path):
    results = run_replacement_study(tmp_path, STUDY, progress=False)
    assert [(r.mixed_class, r.checkpoint, r.epoch, r.strategy) for r in results] == [
        (mixed, checkpoint, epoch, strategy)
        for mixed in (3, 1)
        for checkpoint, epoch in (("under-fitted", 1), ("over-fitted", 2))
        for strategy in ("calibrate", "normalize")
    ]
    weak = RunFolder.open(tmp_path / "weak-3")
    kept = weak.checkpoints / "epoch-0001.safetensors"
    assert results[0].weak_weights_sha256 == sha256_of(kept)
    assert results[2].weak_weights_sha256 == sha256_of(weak.weights)
    assert weak.config.data_options["replacement"] == {"part": "weak", "mixed_class": 3, "seed": 42, "fraction": 0.1}
    assert RunFolder.open(tmp_path / "strong").config.data_options["replacement"]["part"] == "strong"
    assert read_replacements(tmp_path / "replacement.json") == results
    before = kept.stat().st_mtime_ns
    assert run_replacement_study(tmp_path, STUDY, progress=False) == results
    assert kept.stat().st_mtime_ns == before
    with pytest.raises(
        ValueError, match=r"strong: holds a run with width=0\.25, this study needs 0\.5; use another folder"
    ):
        run_replacement_study(tmp_path, replace(STUDY, strong_width=0.5), progress=False)


def test_checkpoints_of_a_study():
    assert STUDY.weak_config(1).keep_every_epochs == 1
    paper = ReplacementStudy()
    assert (paper.weak_config(0).keep_every_epochs, paper.checkpoints) == (
        5,
        [("under-fitted", 10), ("over-fitted", 195)],
    )
    assert paper.weak_config(0).modular
    assert not replace(paper, weak_modular=False).weak_config(0).modular
    final = replace(paper, under_epoch=None, over_epoch=None)
    assert (final.weak_config(0).keep_every_epochs, final.checkpoints) == (0, [("final", 200)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, w: replace_class(s, w, "glue"), "strategy: expected one of calibrate, normalize, got 'glue'"),
        (lambda s, w: replace_class(w, w), "was not trained on the strong part of a data set; moda replace trains such runs"),
        (lambda s, w: replace_class(s, s), "was not trained on the weak part of a data set"),
        (lambda s, w: replace_class(s, w, epoch=7), "epoch-0007.safetensors: no such file; "),
        (lambda s, w: replace(STUDY, strategies=("glue",)), "strategies: expected some of calibrate, normalize, got ['glue']"),
        (lambda s, w: replace(STUDY, strategies=()), "strategies: expected some of calibrate, normalize, got none"),
        (lambda s, w: replace(STUDY, over_epoch=3), "over_epoch: expected an epoch in [1, 2], got 3"),
    ],
)  # fmt: skip
def test_bad_input_is_named(sides, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*sides)


def test_sides_of_different_images_do_not_fit(sides, tmp_path):
    options = {"image_size": 12, "replacement": {"part": "weak", "mixed_class": 3}}
    weak = make_run(tmp_path / "weak", decomposed=False, data_options=options)
    with pytest.raises(ValueError, match=re.escape("digits of shape (3, 8, 8), got digits of shape (3, 12, 12)")):
        replace_class(sides[0], weak)


def test_files_of_earlier_releases_are_read(sides, tmp_path):
    """They are called repair.json, their format "moda-repair", their strategies "moda" and "cnnsplitter"."""
    results = [replace_class(*sides, strategy)[1] for strategy in ("normalize", "calibrate")]
    write_replacements(tmp_path / "replacement.json", results)
    text = (tmp_path / "replacement.json").read_text()
    for old, new in (("moda-repair", "moda-replacement"), ("cnnsplitter", "normalize"), ("moda", "calibrate")):
        text = text.replace(f'"{new}"', f'"{old}"')
    (tmp_path / "former").mkdir()
    former = tmp_path / "former" / "repair.json"
    former.write_text(text)
    assert results_file(tmp_path / "former") == former
    assert results_file(tmp_path) == tmp_path / "replacement.json"
    assert read_replacements(former) == results
    assert replace(STUDY, strategies=("moda", "cnnsplitter")) == replace(STUDY, strategies=("calibrate", "normalize"))
    assert replace_class(*sides, "cnnsplitter")[1] == results[0]
