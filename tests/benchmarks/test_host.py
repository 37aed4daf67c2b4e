"""The suite "host": Triton's real launcher runs over a driver that launches nothing, and counts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moda.bench import stubbed
from moda.bench.clock import Budget
from moda.bench.host import STANDARD, host_case

ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch
from moda.bench.stubbed import stubbed_driver
from moda_kernels import triton_kernels
from moda_kernels.backends import select

labels = torch.tensor([3, 1, 3])
with stubbed_driver() as launches:
    assert select("pool", "auto", [torch.ones(2, 3)]) is triton_kernels
    for expected in (1, 2):
        triton_kernels.segments(labels)
        assert launches.value == expected, launches.value
assert select("pool", "auto", [torch.ones(2, 3)]) is not triton_kernels
"""


@pytest.mark.skipif(bool(stubbed.problem()), reason=stubbed.problem())
def test_launches_reach_the_stub_and_no_further() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_why_launches_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    contenders = host_case("mobilenet", Budget(1, 1, 0.0)).build()
    assert contenders[0].name == STANDARD
    assert {contender.skipped for contender in contenders} == {"there is no C compiler"}
    with (
        pytest.raises(RuntimeError, match="launches cannot be measured: there is no C compiler"),
        stubbed.stubbed_driver(),
    ):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "make gpu" in stubbed.problem()
