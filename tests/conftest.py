"""Shared fixtures: golden data, one thread per test process, poisoned memory, torchvision and timm beside a CPU build."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, which is chosen when Triton is first imported in a process.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _make_torchvision_importable() -> torch.library.Library:
    """torchvision and timm lie beside the environment, where only the tests look (Makefile). With a CPU build of PyTorch the
    wheel of torchvision lacks its compiled operators; the schemas of two of them are enough to import it.
    """
    sys.path.append(str(Path(sys.prefix) / "vision"))
    library = torch.library.Library("torchvision", "FRAGMENT")
    if torch.version.cuda is None:
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_TORCHVISION = _make_torchvision_importable()


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """`golden("losses_basic")` gives the arrays of tests/golden/losses_basic.npz."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            return {key: file[key] for key in file.files}

    return load


@pytest.fixture(autouse=True)
def _restore_global_state() -> object:
    """No test leaks a seed, a default dtype or MODA_BACKEND into the next one."""
    dtype, threads, environment = torch.get_default_dtype(), torch.get_num_threads(), dict(os.environ)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)


COMPILING = 7200  # seconds, ten times what the slowest takes on two busy cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What runs a compiler comes first: at the end it would keep one process busy for minutes, and the others idle.
    items.sort(key=lambda item: item.get_closest_marker("compiles") is None)
    for item in items:
        if item.get_closest_marker("compiles") is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(COMPILING))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; `make gpu` runs it on a machine that has one")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
