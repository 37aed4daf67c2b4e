"""Hugging Face's Trainer with the modular loss, on a small BERT or ViT made from its configuration."""

from __future__ import annotations

import argparse
import tempfile

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import moda
from moda.hf import ModularTrainerCallback

SIZES = {
    "num_labels": 10,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


class Digits(Dataset[dict[str, torch.Tensor]]):
    """Digits as images for ViT, or as 64 tokens, one a pixel of 17 grey levels, for BERT."""

    def __init__(self, tokens: bool, samples: int) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images[:samples])
        self.labels = torch.tensor(digits.target[:samples])
        self.name = "input_ids" if tokens else "pixel_values"
        self.inputs = images.flatten(1).long() if tokens else images.float()[:, None] / 16

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {self.name: self.inputs[index], "labels": self.labels[index]}


def main(architecture: str, epochs: float, samples: int) -> None:
    torch.manual_seed(0)
    data = Digits(architecture == "bert", samples)
    if architecture == "bert":
        model = BertForSequenceClassification(BertConfig(vocab_size=17, max_position_embeddings=64, **SIZES))
    else:
        model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, **SIZES))
    callback = ModularTrainerCallback()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=1e-3,
            report_to="none", save_strategy="no", logging_strategy="no", use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        result = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback]).train()
    print(f"{architecture}: loss {result.training_loss:.3f}, {callback.loss.last}")

    model.eval()
    loader = DataLoader(data, batch_size=64)
    modules = moda.decompose(moda.attribute(model, loader, num_classes=10), epsilon=0.05)
    small = moda.compose(model, modules, [0, 1], example={data.name: data.inputs[:2]})
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    print(f"a model of two digits has {share:.0%} of the parameters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", choices=["bert", "vit"], default="vit")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--samples", type=int, default=1797)
    arguments = parser.parse_args()
    main(arguments.architecture, arguments.epochs, arguments.samples)
