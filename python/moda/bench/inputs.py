"""Makes the cases' inputs: shapes read from the real models, activations like those behind a ReLU, and labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moda import models
from moda.observation.taps import observe

Shapes = tuple[tuple[int, ...], ...]

CIFAR, IMAGENET = 32, 224
MODELS = ("vgg16", "resnet18", "mobilenet")


@functools.cache
def tap_shapes(model: str, image_size: int, batch: int) -> Shapes:
    """Return the shapes of a model's activations in execution order, without memory or arithmetic."""
    with torch.device("meta"):
        network = models.create(model, image_size=image_size)
        batch_of_images = torch.empty(batch, 3, image_size, image_size)
    with observe(network, route="grouped") as taps, torch.no_grad(), taps.recording():
        network(batch_of_images)
        return tuple(tuple(activation.shape) for activation in taps.activations())


def activations(shapes: Shapes, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return one tensor per shape, half of it zero as behind a ReLU, with the same numbers in every run."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device, dtype=dtype).relu_() for shape in shapes]


def labels(samples: int, classes: int, device: torch.device) -> Tensor:
    """Return (samples,) int64 labels in [0, classes) in random order, with every class equally frequent."""
    generator = torch.Generator().manual_seed(1)
    return (torch.arange(samples) % classes)[torch.randperm(samples, generator=generator)].to(device)


def images(samples: int, size: int, device: torch.device) -> Tensor:
    """Return (samples, 3, size, size) float32 images."""
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(2)).to(device)


def total_bytes(shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of one tensor of each shape together."""
    return sum(math.prod(shape) for shape in shapes) * dtype.itemsize
