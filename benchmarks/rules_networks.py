"""Networks and data of the study of rules (rules_study.py): small ones on the digits, and how each is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from moda import data, models

CLASSES = 10
HELD_OUT = 5
"""One in so many training samples is kept apart: no training and no scores see it, epsilon is chosen on it."""


def cnn(activation: Callable[[], nn.Module], image_size: int) -> nn.Module:
    """Four convolutions with norms and pooling between them, one hidden linear layer."""
    layers: list[nn.Module] = []
    widths = (3, 32, 64, 128, 128)
    for inputs, outputs in pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), activation(), nn.MaxPool2d(2)]
    side = image_size // 16
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(128 * side * side, 128), activation(), nn.Linear(128, CLASSES)
    )


def vgg(activation: Callable[[], nn.Module], image_size: int) -> nn.Module:
    """`moda.models.small_vgg`, with this activation."""
    model = models.create("small_vgg", num_classes=CLASSES, image_size=image_size)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            model.set_submodule(name, activation())
    return model


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        x = x + self.attention(z, z, z, need_weights=False)[0]
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class ViT(nn.Module):
    """A small vision transformer: four blocks of width 48, the mean of the tokens classified."""

    def __init__(self, image_size: int, patch: int, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image_size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


@dataclass(frozen=True)
class Network:
    """A network of the study.

    Attributes:
        make: builds it, from the size of the images.
        image_size: height and width of the images.
        epochs: passes over the training samples.
        adam: whether AdamW takes the place of SGD.
        batch: samples of a batch in training.
    """

    make: Callable[[int], nn.Module]
    image_size: int
    epochs: int
    adam: bool = False
    batch: int = 64

    def build(self) -> nn.Module:
        """The network, untrained, with its weights laid out for the speed of convolutions on CPUs."""
        return self.make(self.image_size).to(memory_format=torch.channels_last)


def _named(name: str, image_size: int) -> nn.Module:
    return models.create(name, num_classes=CLASSES, width=0.25, image_size=image_size)


NETWORKS: dict[str, Network] = {
    "CNN, ReLU, 48x48": Network(partial(cnn, nn.ReLU), 48, 8),
    "CNN, GELU, 48x48": Network(partial(cnn, nn.GELU), 48, 8),
    "MobileNet x 0.25, 48x48": Network(partial(_named, "mobilenet"), 48, 16),
    "ResNet18 x 0.25, 48x48": Network(partial(_named, "resnet18"), 48, 8),
    "ViT, 48x48": Network(partial(ViT, patch=12), 48, 40, adam=True, batch=32),
    "small VGG, ReLU, 8x8": Network(partial(vgg, nn.ReLU), 8, 30),
    "small VGG, GELU, 8x8": Network(partial(vgg, nn.GELU), 8, 30),
    "ResNet18 x 0.25, 8x8": Network(partial(_named, "resnet18"), 8, 30),
    "MobileNet x 0.25, 16x16": Network(partial(_named, "mobilenet"), 16, 30),
    "ViT, 8x8": Network(partial(ViT, patch=2), 8, 40, adam=True, batch=32),
}
"""Both vision transformers have 16 patches."""


@dataclass(frozen=True)
class Parts:
    """The samples: what models are trained and scored on, what epsilon is chosen on, and the test split."""

    training: TensorDataset
    held_out: TensorDataset
    test: TensorDataset


def parts(image_size: int, seed: int) -> Parts:
    """The digits of this size, split by the seed."""
    splits = data.load("digits", image_size=image_size, seed=seed)
    images, labels = _tensors(splits.train)
    apart = torch.arange(len(labels)) % HELD_OUT == 0
    return Parts(
        TensorDataset(images[~apart], labels[~apart]),
        TensorDataset(images[apart], labels[apart]),
        TensorDataset(*_tensors(splits.test)),
    )


def _tensors(dataset: object) -> tuple[Tensor, Tensor]:
    assert isinstance(dataset, TensorDataset)
    images, labels = dataset.tensors
    return images.contiguous(memory_format=torch.channels_last), labels
