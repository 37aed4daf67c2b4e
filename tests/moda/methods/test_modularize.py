"""All methods through one call, on three blobs of pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moda
from moda.methods import MODA, CNNSplitter, EpochSummary, GradSplitter, MwT, NeMo, modularize
from moda_kernels import modular_losses


class Net(nn.Module):
    """Two gated blocks behind a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, stride=2), nn.BatchNorm2d(12), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.third(self.second(self.first(x))).mean((2, 3)))
        return logits


def pictures(seed: int, count: int = 48) -> list[tuple[Tensor, Tensor]]:
    """A bright third of the picture says the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat(count // 3)
    images = 0.3 * torch.randn(count, 1, 9, 9, generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[0, 3 * label : 3 * label + 3] += 1
    return [(images[i : i + 24], labels[i : i + 24]) for i in range(0, count, 24)]


def trained() -> Net:
    torch.manual_seed(1)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(20):
        for images, labels in pictures(0):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model


METHODS: dict[str, Callable[[], Any]] = {
    "moda": lambda: MODA(epochs=3, learning_rate=0.02),
    "mwt": lambda: MwT(epochs=3, learning_rate=0.02),
    "nemo": lambda: NeMo(epochs=3, learning_rate=0.02),
    "gradsplitter": lambda: GradSplitter(head_epochs=2, epochs=7, head_rate=0.05, mask_rate=0.05),
    "cnnsplitter": lambda: CNNSplitter(2, 8, 4, 2, 10, sensitive=(), progress=False),
}


@pytest.mark.filterwarnings("ignore:some classes never use a layer")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_one_module_per_class(name: str):
    seen: list[EpochSummary] = []
    method = METHODS[name]()
    made = modularize(trained(), method, pictures(0), 3, validation=pictures(1), report=seen.append)
    assert made.decomposition.method == name
    assert made.decomposition.num_classes == 3
    assert len(seen) == len(made.epochs) == sum(phase.epochs for phase in method.phases())
    for site, mask in made.decomposition.masks.items():
        assert bool(mask.any(1).all()), site
    assert all(torch.isfinite(torch.tensor(list(epoch.terms.values()))).all() for epoch in made.epochs)


def test_moda_s_loss_is_the_one_of_the_kernels():
    torch.manual_seed(0)
    images, labels = pictures(0)[0]
    model = Net()
    prepared = MODA().prepare(model, 3, images)
    terms = MODA().loss(prepared, model(images), labels)
    reference = Net()
    reference.load_state_dict(model.state_dict())
    taps = moda.observe(reference, route="grouped")
    reference(images)
    for name, value in modular_losses(taps.activations(), labels, backend="reference")._asdict().items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["firing", "share", "attribution"])
def test_moda_extracts_by_every_rule(rule: str):
    torch.manual_seed(0)
    method, loader = MODA(epochs=1, learning_rate=0.02, rule=rule, epsilon=0.3, threshold=0.6), pictures(0)
    made = modularize(Net(), method, loader, 3)
    scores: Any = {"firing": moda.count_firings, "share": moda.activation_shares, "attribution": moda.attribute}[rule](
        made.prepared.taps, loader, 3, progress=False
    )
    settings = {"threshold": 0.6} if rule == "firing" else {"epsilon": 0.3}
    expected = moda.decompose(scores, **settings)
    assert made.decomposition.settings == {"rule": rule, **expected.settings, **settings}
    assert made.decomposition.masks.keys() == expected.masks.keys()
    assert all(made.decomposition.masks[site].equal(mask) for site, mask in expected.masks.items())


def narrow() -> Net:
    """Its second block has a single neuron."""
    model = Net()
    model.second = nn.Sequential(nn.Conv2d(8, 1, 3), nn.BatchNorm2d(1), nn.ReLU())
    model.third[0] = nn.Conv2d(1, 16, 3)
    return model


@pytest.mark.parametrize("name", ["mwt", "nemo", "gradsplitter", "cnnsplitter"])
def test_a_site_of_one_neuron_is_said_before_training(name: str):
    argument = "layers" if name in ("mwt", "nemo") else "sites"
    with pytest.raises(ValueError, match=rf"model: 'second.*' has a single neuron.*naming the others with {argument}="):
        modularize(narrow(), METHODS[name](), pictures(0), 3)


@pytest.mark.parametrize("name", ["moda", "mwt", "nemo"])
def test_a_frozen_network_is_not_trained(name: str):
    with pytest.raises(ValueError, match=f"model: {name} trains the network, but none of its parameters requires"):
        modularize(Net().requires_grad_(False), METHODS[name](), pictures(0), 3)


@pytest.mark.parametrize("name", METHODS)
def test_fewer_than_two_classes_are_none_to_tell_apart(name: str):
    with pytest.raises(ValueError, match="num_classes: expected at least 2, got 1"):
        modularize(Net(), METHODS[name](), pictures(0), 1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: modularize(Net(), "moda", pictures(0), 3),
            TypeError,
            "method: expected a modularization method, got str",
        ),
        (lambda: modularize(Net(), MODA(), [], 3), ValueError, "loader: expected at least one batch, got none"),
        (lambda: modularize(Net(), MODA(), pictures(0), 1), ValueError, "num_classes: expected at least 2, got 1"),
        (lambda: MODA(affinity=-1), ValueError, "affinity: expected a finite number of at least 0, got -1"),
        (lambda: MODA(rule="taylor"), ValueError, "rule: expected one of firing, share, attribution, got 'taylor'"),
        (lambda: MODA(epsilon=1.5), ValueError, r"epsilon: expected a number in \[0, 1\], got 1.5"),
        (lambda: MODA(threshold=-0.1), ValueError, r"threshold: expected a number in \[0, 1\], got -0.1"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make()
