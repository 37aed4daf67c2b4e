"""Time and memory of composing a large model: `python -m benchmarks.composition_cost resnet50 vit_b_16`.

Each model of torchvision, with random weights, is composed for two of its 1,000 classes, 30 % of the neurons; images
have 224 pixels. Printed are wall time, CPU time (user and system, of all threads), and by how much the process's peak
memory grew over what it held when the model had run once.
"""

from __future__ import annotations

import argparse
import os
import resource
import time

import torch

import moda
from moda.decomposition.container import Decomposition


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of composing.")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import tests.conftest  # noqa: F401  # makes torchvision importable

    torch.set_num_threads(options.threads)
    for name in options.models:
        _measure(name)


def _measure(name: str) -> None:
    from torchvision import models

    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    taps = moda.observe(model)
    with torch.no_grad():
        model(torch.randn(2, 3, 224, 224))
    masks = {tap: torch.rand(1000, width) < 0.163 for tap, width in zip(taps.names, taps.widths, strict=True)}
    decomposition = Decomposition(masks)
    held, started, worked = _peak(), time.perf_counter(), _cpu()
    composed = moda.compose(taps, decomposition, [3, 5])
    wall, work, peak = time.perf_counter() - started, _cpu() - worked, _peak() - held
    started, worked = time.perf_counter(), _cpu()
    moda.compose(taps, decomposition, [7, 1])
    again, again_work = time.perf_counter() - started, _cpu() - worked
    whole, left = (sum(p.numel() for p in m.parameters()) for m in (model, composed))
    print(
        f"{name}: {wall:.1f} s, {work:.1f} s of CPU; another module of it {again:.1f} s, {again_work:.1f} s of CPU; "
        f"{peak / 1e6:.0f} MB over {held / 1e6:.0f} MB ({whole * 4 / 1e6:.0f} MB of parameters); "
        f"{left / whole:.3f} of the parameters left; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def _cpu() -> float:
    times = os.times()
    return times.user + times.system


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
