"""A timm model, timm's optimiser and schedule, and the modular loss: nothing of the model changes."""

from __future__ import annotations

import argparse

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader, TensorDataset

import moda
from moda_kernels import ModularLoss


def main(name: str, epochs: int, samples: int) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, 32)[:samples]
    labels = torch.tensor(digits.target)[:samples]
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)

    model = timm.create_model(name, num_classes=10, in_chans=1)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.01)
    schedule = CosineLRScheduler(optimizer, t_initial=epochs)
    modular_loss = ModularLoss()
    with moda.observe(model) as taps:
        for epoch in range(epochs):
            for x, y in loader:
                loss = F.cross_entropy(model(x), y) + modular_loss(taps.activations(), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step(epoch + 1)
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {modular_loss.last}")
        print(f"{len(taps.names)} taps; left out: {taps.skipped or 'none'}")
    model.eval()

    # Smooth activations fire everywhere: attribution finds the neurons that a class needs.
    scores = moda.attribute(model, loader, num_classes=10)
    modules = moda.decompose(scores, epsilon=0.05)
    small = moda.compose(model, modules, [0, 1], example=images[:2])
    print(small.report())
    print(f"accuracy on two classes: {moda.measure.accuracy(small, loader, [0, 1]):.2%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=1797)
    arguments = parser.parse_args()
    main(arguments.model, arguments.epochs, arguments.samples)
