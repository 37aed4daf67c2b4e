"""A plain PyTorch loop: train modular, decompose into one module per class, compose a smaller model of three."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import moda
from moda_kernels import ModularLoss


def main(epochs: int) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    train = DataLoader(TensorDataset(images[:1437], labels[:1437]), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(images[1437:], labels[1437:]), batch_size=360)

    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    taps = moda.observe(model)
    modular_loss = ModularLoss()
    for epoch in range(epochs):
        for x, y in train:
            loss = F.cross_entropy(model(x), y) + modular_loss(taps.activations(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: {modular_loss.last}")
    model.eval()

    rates = moda.count_firings(model, train, num_classes=10)
    modules = moda.decompose(rates, threshold=0.9)
    classes = [3, 5, 8]
    small = moda.compose(model, modules, classes, example=images[:2])
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    print(f"whole model: accuracy {moda.measure.accuracy(model, test):.2%}")
    print(
        f"classes {classes}: accuracy {moda.measure.accuracy(small, test, classes):.2%}, {share:.0%} of the parameters"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
