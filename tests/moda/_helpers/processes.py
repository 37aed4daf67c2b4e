"""What tests of trainings in processes of their own share."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Moda = Callable[..., "tuple[int, str, str]"]
"""Runs the command with these arguments: exit status, stdout, stderr."""


def assert_same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def wait_for(condition: Any, process: subprocess.Popen[Any], seconds: float = 600) -> None:
    """Until `condition()`; fails if the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


def environment() -> dict[str, str]:
    """Of a subprocess that finds the packages as the tests do."""
    root = Path(__file__).parents[3]
    paths = [str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
