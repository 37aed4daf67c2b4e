"""Ship less: a composed model as an ONNX file that onnxruntime serves, and as Python source that needs torch alone."""

from __future__ import annotations

import argparse
from pathlib import Path

import onnxruntime
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import moda


def main(epochs: int, folder: Path) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=64, shuffle=True)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()

    modules = moda.decompose(moda.attribute(model, loader, num_classes=10), epsilon=0.05)
    small = moda.compose(model, modules, [0, 1, 7], example=images[:2])
    path = folder / "zero_one_seven.onnx"
    provenance = moda.export.provenance_of(small, ["zero", "one", "seven"], (1, 8, 8), "examples/deploy_onnx.py", {})
    difference = moda.export.export(small, images[:16], path, provenance)
    print(f"{path.name}: {path.stat().st_size:,} bytes, logits differ by {difference:.1e}")

    session = onnxruntime.InferenceSession(str(path))
    (logits,) = session.run(["logits"], {session.get_inputs()[0].name: images[:5].numpy()})
    print("onnxruntime:", logits.argmax(1).tolist(), "of", moda.export.read_provenance(path)["class_names"])

    source = moda.export.to_source(small, folder / "zero_one_seven")
    print("Python that needs torch alone:", source.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("deployed"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    main(arguments.epochs, arguments.folder)
