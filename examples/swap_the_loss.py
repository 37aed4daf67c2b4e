"""The kernels alone: one line of a script with an eager modular loss changes, and the values stay the same."""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

import moda_kernels


def eager_losses(activations: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of MODA (arXiv 2411.01074, section 3) as one writes them first: all pairs of all layers."""
    same = (labels[:, None] == labels).triu(1)
    different = (labels[:, None] != labels).triu(1)
    affinity, dispersion, compactness = [], [], []
    for activation in activations:
        rows = activation.abs().flatten(2).mean(2) if activation.dim() > 2 else activation
        similarity = F.normalize(rows) @ F.normalize(rows).T
        affinity.append(1 - similarity[same].mean())
        dispersion.append(similarity[different].mean())
        compactness.append(rows.abs().mean())
    return torch.stack(affinity).mean(), torch.stack(dispersion).mean(), torch.stack(compactness).mean()


def main(batch_size: int) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 10, (batch_size,))
    shapes = ((32, 16, 16), (64, 8, 8), (128, 4, 4), (256,))
    activations = [torch.randn(batch_size, *shape).relu_().requires_grad_() for shape in shapes]
    results = {}
    for name, losses in (("eager", eager_losses), ("moda_kernels", moda_kernels.modular_losses)):
        for _ in range(3):  # the first run is slower: memory is taken
            start = time.perf_counter()
            affinity, dispersion, compactness = losses(activations, labels)
            total = affinity + dispersion + 0.3 * compactness
            gradients = torch.autograd.grad(total, activations)
            seconds = time.perf_counter() - start
        results[name] = (total.detach(), *gradients)
        print(f"{name}: loss {total.item():.6f}, {seconds * 1e3:.2f} ms forward and backward")
    for ours, theirs in zip(results["moda_kernels"], results["eager"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    print("The losses and all gradients agree.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=128)
    main(parser.parse_args().batch_size)
