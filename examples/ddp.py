"""Several processes, one loss: torchrun --nproc-per-node 2 examples/ddp.py

The modular loss is that of the whole batch, with one all-reduce a step; every rank has the gradients that one process
with all samples would have.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import moda
from moda_kernels import ModularLoss


def main(epochs: int) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", dist.get_rank()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target))
    sampler = DistributedSampler(data, seed=0)
    loader = DataLoader(data, batch_size=32, sampler=sampler)

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    taps = moda.observe(model)
    parallel = DistributedDataParallel(model)
    modular_loss = ModularLoss(group="world", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            loss = F.cross_entropy(parallel(x), y) + modular_loss(taps.activations(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    rates = moda.count_firings(model, loader, num_classes=10, group="world")
    if dist.get_rank() == 0:
        print(f"{modular_loss.last}; {int(rates.class_sizes.sum())} samples counted on {dist.get_world_size()} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    main(parser.parse_args().epochs)
