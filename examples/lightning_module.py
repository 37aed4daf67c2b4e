"""Somebody's own LightningModule becomes modular by a callback; nothing else changes."""

from __future__ import annotations

import argparse

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import moda


class Classifier(lightning.LightningModule):
    """Knows nothing of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(epochs: int) -> None:
    lightning.seed_everything(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target))
    loader = DataLoader(data, batch_size=64, shuffle=True)
    classifier = Classifier()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[moda.ModularCallback(attribute="net")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, loader)
    print({name: round(float(value), 3) for name, value in trainer.callback_metrics.items()})

    modules = moda.decompose(moda.count_firings(classifier.net, loader, num_classes=10), threshold=0.9)
    sizes = moda.measure.module_sizes(classifier.net, modules, example=data[:2][0])
    print("parameters of each class's module:", ", ".join(f"{size:.0%}" for size in sizes.tolist()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
