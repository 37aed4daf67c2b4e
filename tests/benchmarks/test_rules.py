"""The study of rules: it goes on where it was, and its page says what was measured, reached and missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moda
from benchmarks import rules_page, rules_results, rules_study
from benchmarks.rules_chart import chart
from benchmarks.rules_networks import Network, parts
from benchmarks.rules_results import missing, summaries
from benchmarks.rules_study import Trained
from moda.bench.results import read as read_passes


def _tiny(image_size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(6 * (image_size // 4) ** 2, 12), nn.ReLU(),
        nn.Linear(12, 10),
    )  # fmt: skip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A study of one small network, and two epsilons."""
    networks = {"tiny, 8x8": Network(_tiny, 8, 2)}
    for module in (rules_study, rules_results, rules_page):
        monkeypatch.setattr(module, "NETWORKS", networks)
    monkeypatch.setattr(rules_study, "EPSILONS", (0.05, 0.3))


def test_a_study_goes_on_where_it_was(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_study, "subsets", lambda size: [tuple(range(size))])
    monkeypatch.setattr("sys.argv", ["rules_study", str(tmp_path), "--seeds", "1"])
    measured = rules_study.measured
    monkeypatch.setattr(rules_study, "measured", lambda run, out: measured(run, out) if run.modular else 1 / 0)
    with pytest.raises(ZeroDivisionError):  # killed at the second training
        rules_study.main()
    folders = [Trained("tiny, 8x8", modular, 1).folder(tmp_path) for modular in (True, False)]
    assert [(folder / "accuracies.json").exists() for folder in folders] == [True, False]
    before = (folders[0] / "accuracies.json").stat().st_mtime_ns
    monkeypatch.setattr(rules_study, "measured", measured)
    rules_study.main()
    assert (folders[0] / "accuracies.json").stat().st_mtime_ns == before

    entries = rules_results.collect(tmp_path)
    assert [(entry["modular"], entry["seed"]) for entry in entries] == [(True, 1), (False, 1)]
    for entry in entries:
        assert entry["parameters"] == 6 * 49 + 12 * 25 + 10 * 13
        for rule in ("share", "attribution"):
            values = entry["rules"][rule]
            sizes = {point["epsilon"]: point["size"] for point in values["held_out"]}
            assert 1 >= sizes[0.05] >= sizes[0.3] >= entry["least"] > 0
            assert values["epsilon"] not in sizes or values["size"] == sizes[values["epsilon"]]
    assert [(run.training, run.seed) for run in missing(entries)] == [
        (training, seed) for seed in (0, 2) for training in ("modular", "standard")
    ]
    text = rules_page.page(entries, "")
    assert "2 of 6 trainings were measured" in text
    assert "- tiny, 8x8: modular, seeds 0, 2; standard, seeds 0, 2" in text
    chart(summaries(entries))


def test_accuracies_are_those_of_masked_models() -> None:
    torch.manual_seed(0)
    model, test = _tiny(8).eval(), parts(8, 0).test
    images, labels = test.tensors
    attributions = moda.attribute(model, [(images, labels)], 10, progress=False)
    modules = moda.decompose(attributions, epsilon=0.4)
    found = rules_study._Test(model, test).accuracies(modules)
    expected: dict[str, list[float]] = {"model": [], "modules": []}
    for pair in rules_study.subsets(2):
        members = torch.isin(labels, torch.tensor(pair))
        right = (labels[members] == pair[1]).long()
        for name, logits in (
            ("model", model(images[members])[:, list(pair)]),
            ("modules", moda.mask(model, modules, pair)(images[members])),
        ):
            expected[name].append(100 * (logits.argmax(1) == right).double().mean().item())
    for name, values in expected.items():
        assert found["2"][name] == pytest.approx(sum(values) / 45)
    assert found["10"]["model"] == pytest.approx(100 * (model(images).argmax(1) == labels).double().mean().item())


def test_subsets_are_the_same_for_all_networks() -> None:
    assert len(rules_study.subsets(2)) == 45
    fives = rules_study.subsets(5)
    assert len(set(fives)) == len(fives) == 50
    assert fives == rules_study.subsets(5)
    assert all(list(subset) == sorted(set(subset)) and len(subset) == 5 for subset in fives)
    assert rules_study.subsets(10) == [tuple(range(10))]


def _entry(name: str, sizes: dict[str, float], lost: float, seed: int = 0) -> dict[str, Any]:
    def values(rule: str) -> dict[str, Any]:
        points = lost if rule == "attribution" else 0.0
        accuracies = {str(k): {"model": 99.0, "modules": 99.0 - points} for k in (2, 5, 10)}
        curve = [{"epsilon": 0.1, "loss": points, "size": sizes[rule]}]
        budget = {"epsilon": 0.1, "held_out": curve} if rule != "firing" else {}
        return {"accuracies": accuracies, "size": sizes[rule], **budget}

    return {
        "network": name, "modular": False, "seed": seed, "epochs": 1, "test_accuracy": 99.0, "parameters": 10,
        "least": 0.01, "rules": {rule: values(rule) for rule in sizes},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size", "lost", "small", "good"),
    [
        ("CNN, ReLU, 48x48", 0.30, 0.5, True, True),
        ("CNN, ReLU, 48x48", 0.31, 0.2, False, True),  # more than a third of 0.9
        ("small VGG, ReLU, 8x8", 0.45, 0.51, True, False),
        ("small VGG, ReLU, 8x8", 0.46, -1.0, False, True),
    ],
)
def test_goals(name: str, size: float, lost: float, small: bool, good: bool) -> None:
    entry = _entry(name, {"firing": 0.9, "share": 0.5, "attribution": size}, lost)
    (summary,) = summaries([entry])
    assert (summary.small_enough, summary.good_enough) == (small, good)
    row = next(line for line in rules_page.page([entry], "").splitlines() if "goal" in line and name in line)
    assert ("reached" in row) == (small and good)


def test_means_over_seeds() -> None:
    sizes = {"firing": 0.9, "share": 0.5, "attribution": 0.2}
    entries = [_entry("ViT, 8x8", sizes, 0.1, seed=2), _entry("ViT, 8x8", {**sizes, "attribution": 0.4}, 0.3, seed=0)]
    (summary,) = summaries(entries)
    assert summary.seeds == [0, 2]
    assert summary.size("attribution") == pytest.approx(0.3)
    assert summary.lost("attribution", 5) == pytest.approx(0.2)
    assert summary.curve("attribution") == [(0.1, pytest.approx(0.3), pytest.approx(0.2))]


def test_new_entries_take_the_place_of_old_ones() -> None:
    sizes = {"firing": 0.9, "share": 0.5, "attribution": 0.2}
    old = [_entry("ViT, 8x8", sizes, 0.1), _entry("CNN, ReLU, 48x48", sizes, 0.1, seed=1)]
    new = [_entry("ViT, 8x8", {**sizes, "attribution": 0.3}, 0.2)]
    assert rules_results.merged(old, new) == [new[0], old[1]]  # seed by seed


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    stored = rules_results.read(rules_page.RESULTS)
    findings = rules_page.FINDINGS.read_text(encoding="utf-8")
    passes = read_passes(rules_page.PASSES) if rules_page.PASSES.exists() else None
    assert rules_page.PAGE.read_text(encoding="utf-8") == rules_page.page(stored, findings, passes)
    readme = (rules_page.ROOT / "README.md").read_text(encoding="utf-8")
    assert all(line in readme.splitlines() for line in rules_page.in_short(stored))
