"""Attributions and activation shares on disk: what comes back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moda.decomposition.files import load_scores, save_scores
from moda.decomposition.scores import ActivationShares, Attributions
from moda.files import FormatError, write_tensors

PAGE = (Path(__file__).parents[3] / "docs" / "file_formats.md").read_text(encoding="utf-8")
SIZES = torch.tensor([4, 0, 7])


def example(rule: str = "attribution"):
    scores = {"layer.1": torch.rand(3, 5), "head": torch.rand(3, 2)}
    return ActivationShares(scores, SIZES) if rule == "share" else Attributions(scores, SIZES, "logit")


def change(folder: Path, **entries: object) -> None:
    path = folder / "scores.json"
    description = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({key: value for key, value in description.items() if value is not ...}))


@pytest.mark.parametrize("rule", ["attribution", "share"])
def test_round_trip(tmp_path, rule):
    scores = example(rule)
    save_scores(scores, tmp_path / "new", {"weights_sha256": "x"})
    loaded, metadata = load_scores(tmp_path / "new", rule)
    assert (type(loaded), loaded.taps, metadata) == (type(scores), scores.taps, {"weights_sha256": "x"})
    assert loaded.described() == scores.described() == ({} if rule == "share" else {"target": "logit"})
    assert all(torch.equal(loaded.scores[tap], scores.scores[tap]) for tap in scores.taps)
    assert torch.equal(loaded.class_sizes, SIZES)


@pytest.mark.parametrize(("rule", "kind"), [("attribution", "moda-attributions"), ("share", "moda-activation-shares")])
def test_the_page_describes_what_is_written(tmp_path, rule, kind):
    save_scores(example(rule), tmp_path)
    description = json.loads((tmp_path / "scores.json").read_text())
    assert description["format"] == kind
    assert f"`{kind}` | 1 |" in PAGE
    table = PAGE.split("\n`scores.json`:\n", 1)[1].lstrip("\n").split("\n\n", 1)[0]
    assert all(f"`{entry}`" in table for entry in description)


def replace_scores(folder: Path, scores: dict[str, torch.Tensor]) -> None:
    change(folder, scores_sha256=write_tensors(folder / "scores.safetensors", scores))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "scores.json").unlink(), r"scores\.json: no such file"),
        (lambda f: (f / "scores.safetensors").unlink(), r"scores\.safetensors: no such file"),
        (lambda f: change(f, format="moda-activation-shares"), 'expected "format": "moda-attributions"'),
        (lambda f: change(f, target=...), "entry 'target' is missing"),
        (lambda f: change(f, class_sizes=[1]), "class_sizes: expected one of each of 3 classes, got 1"),
        (lambda f: change(f, scores_sha256="0" * 64), "SHA-256"),
        (lambda f: replace_scores(f, {"layer.1": torch.rand(3, 5)}), "head"),
        (lambda f: replace_scores(f, {"layer.1": torch.rand(3, 5), "head": torch.rand(3, 2).double()}), "head"),
        (lambda f: replace_scores(f, {"layer.1": torch.rand(3, 5), "head": torch.full((3, 2), -1.0)}), "at least 0, got -1"),
        (lambda f: replace_scores(f, {"layer.1": torch.rand(3, 5), "head": torch.full((3, 2), float("nan"))}), "finite"),
    ],
)  # fmt: skip
def test_spoiled_folders_are_refused(tmp_path, spoil, message):
    save_scores(example(), tmp_path)
    spoil(tmp_path)
    with pytest.raises(FormatError, match=message):
        load_scores(tmp_path, "attribution")
