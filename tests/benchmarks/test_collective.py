"""The model of the distributed loss's collective, and the tables made from it."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision

from benchmarks import collective
from benchmarks.collective import CLUSTERS, NETWORKS, Link, Step


@pytest.mark.parametrize(("name", "network"), [("vgg16", NETWORKS[0]), ("resnet50", NETWORKS[1])])
def test_networks_are_the_real_ones(name, network):
    shapes = []
    with torch.device("meta"):
        model = getattr(torchvision.models, name)().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
            module.register_forward_hook(lambda _, __, output: shapes.append(output.shape[1:]))
    model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert [(shape[0], shape[1:].numel()) for shape in shapes] == list(network.taps)
    assert sum(weight.numel() for weight in model.parameters()) == network.parameters


def played_ring(links, chunk, steps):
    """When the last rank is done, message by message."""
    ready = [0.0] * len(links)
    for _ in range(steps):
        sent = [at + link.seconds(chunk) for at, link in zip(ready, links, strict=True)]
        ready = [max(own, sent[rank - 1]) for rank, own in enumerate(sent)]
    return max(ready)


@pytest.mark.parametrize(
    "links", [["fast"] * 2, ["fast"] * 9, ["fast"] * 7 + ["slow"], ["slow", "slow", "fast"]], ids=str
)
def test_the_ring_played_message_by_message(links):
    speeds = {"fast": Link(1e-6, 1e11), "slow": Link(1e-5, 1e9)}
    ring, steps = [speeds[name] for name in links], 2 * (len(links) - 1)
    for chunk in (0, 1e3, 1e7):
        assert played_ring(ring, chunk, steps) == pytest.approx(collective.ring_seconds(ring, chunk, steps), rel=1e-9)


def test_present_classes():
    assert collective.present_classes(2, 3) == pytest.approx(2 * (1 - 1 / 8))
    assert collective.present_classes(1000, 1) == pytest.approx(1)
    assert collective.present_classes(10, 10_000) == pytest.approx(10)
    assert collective.present_classes(1, 5) == 1


def test_the_choice_between_ways_is_a_good_one():
    """Without num_classes the way taken is nowhere much slower than the other one by the model that it stands for."""
    for step in collective.steps():
        for cluster in CLUSTERS:
            seconds = step.seconds(cluster)
            assert seconds[step.chosen] <= 1.75 * min(seconds["present"], seconds["owners"])


def test_by_owner_does_not_grow_with_ranks():
    few, many = (Step(NETWORKS[1], 21841, ranks).sent()["owners"] for ranks in (64, 1024))
    assert many < 1.07 * few


def test_the_fit_goes_through_its_two_ends():
    link = Link(2e-4, 1e9)
    times = {str(size): collective.ring_seconds([link] * 4, size / 4, 6) for size in (0, 1 << 12, 1 << 24)}
    fitted = collective.fit(times, 4)
    assert (fitted.latency, fitted.bandwidth) == (pytest.approx(2e-4), pytest.approx(1e9))


@pytest.mark.parametrize("path", sorted(collective.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_model_is_within_a_factor_of_2_of_the_measurement(path):
    for ranks, run in json.loads(path.read_text())["runs"].items():
        link = collective.fit(run["all_reduce"], int(ranks))
        for size, seconds in run["all_reduce"].items():
            model = collective.ring_seconds([link], int(size) / int(ranks), 2 * (int(ranks) - 1))
            assert seconds / 2 < model < 2 * seconds


@pytest.mark.parametrize("path", collective.PAGES, ids=lambda path: path.name)
def test_the_pages_show_what_the_script_gives(path):
    page = path.read_text()
    assert collective.filled(page) == page
    assert "<!-- table " in page


def test_every_table_has_its_place():
    pages = "".join(path.read_text() for path in collective.PAGES)
    for name in collective.tables():
        assert pages.count(f"<!-- table {name} -->") == 1, name


def test_human_units():
    assert [collective.human_bytes(size) for size in (64, 5e5, 2.5e9)] == ["0.064 kB", "500 kB", "2.5 GB"]
    assert [collective.human_seconds(seconds) for seconds in (2, 0.0035, 4.2e-5)] == ["2 s", "3.5 ms", "42 µs"]
