"""A strong model's module of one class replaces a weak model's output, and one small layer is trained."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import moda
from moda_kernels import ModularLoss


def trained(
    network: nn.Sequential, loader: DataLoader[tuple[torch.Tensor, ...]], epochs: int, modular: bool
) -> nn.Module:
    """Train a network on (inputs, labels), with the modular loss or without."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    modular_loss = ModularLoss()
    with moda.observe(network) as taps:
        for _ in range(epochs):
            for x, y in loader:
                loss = F.cross_entropy(network(x), y)
                if modular:
                    loss = loss + modular_loss(taps.activations(), y)
                taps.clear()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return network.eval()


def network(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def main(epochs: int, target: int) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train, test = order[:1437], order[1437:]
    few = train[(labels[train] != target) | (torch.rand(len(train)) < 0.1)]  # the weak model saw little of this digit

    def loader(indices: torch.Tensor) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(TensorDataset(images[indices], labels[indices]), batch_size=64, shuffle=True)

    strong = trained(network(128), loader(train), epochs, modular=True)
    weak = trained(network(32), loader(few), epochs, modular=False)

    modules = moda.decompose(moda.count_firings(strong, loader(train), num_classes=10), threshold=0.9)
    module = moda.compose(strong, modules, [target], example=images[:2])
    replaced = moda.replace(weak, module, target, loader(few))

    of_target = test[labels[test] == target]
    for name, model in (("weak", weak), ("replaced", replaced)):
        accuracy = moda.measure.accuracy(model, loader(test))
        print(
            f"{name}: accuracy {accuracy:.2%}, on digit {target} {moda.measure.accuracy(model, loader(of_target)):.2%}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--digit", type=int, default=8)
    arguments = parser.parse_args()
    main(arguments.epochs, arguments.digit)
