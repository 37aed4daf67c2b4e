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

x = torch.ones(2, 3, 4, 4)
with stubbed_driver() as launches:
    assert select("pool", "auto", [torch.ones(2, 3)]) is triton_kernels
    for expected in (1, 2):
        triton_kernels.relu_pool(x, False)
        assert launches.value == expected, launches.value
assert select("pool", "auto", [torch.ones(2, 3)]) is not triton_kernels
"""


KINDS = """
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.compiler import CompiledKernel
from moda.bench.stubbed import stubbed_driver
from moda_kernels.triton_kernels.launching import launch
from moda_kernels.triton_kernels.relu_pool_forward import relu_pool_rows_kernel as kernel

whole, used = CompiledKernel.__getitem__, []
CompiledKernel.__getitem__ = lambda self, grid: used.append(self) or whole(self, grid)
memory = torch.zeros(4096)

def arguments(dtype=torch.float32, offset=0, rows=6, vec=4):
    x = memory.view(dtype)[offset : offset + 96]
    return x, x, memory[2048:2054], rows, 16, 64, 16, vec

def check(grid, given, **options):
    launch(kernel, grid, *given, **options)
    theirs = kernel[grid](*given, **options)
    del used[:]
    launch(kernel, grid, *given, **options)
    assert not used  # nobody is told
    told, hook = [], lambda metadata: told.append(metadata)
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        del used[:], told[:]
        chain.add(hook)
        launch(kernel, grid, *given, **options)
        chain.remove(hook)
        assert used == [theirs], (used, theirs)
        assert len(told) == 1
    return theirs

with stubbed_driver() as launches:
    first = check((1,), arguments(), num_warps=4)
    assert check((3, 1), arguments(rows=7), num_warps=4) is first  # integers are not specialised on
    others = [
        check((1,), arguments(offset=1, vec=1), num_warps=4),
        check((1,), arguments(vec=1), num_warps=4),
        check((1,), arguments(dtype=torch.float16), num_warps=4),
        check((1,), arguments(), num_warps=8),
    ]
    assert len({id(compiled) for compiled in [first, *others]}) == 5
    assert launches.value == 30

@triton.jit
def specialised(x, count: tl.int32):
    tl.store(x, count)

with stubbed_driver():
    try:
        launch(specialised, (1,), memory, 3)
    except TypeError as error:
        assert "specialised: count is specialised on" in str(error)
    else:
        raise AssertionError
"""


@pytest.mark.skipif(bool(stubbed.problem()), reason=stubbed.problem())
@pytest.mark.parametrize("program", [PROGRAM, KINDS], ids=["the driver", "what is compiled for"])
def test_launches_reach_the_stub_and_no_further(program: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
    file = tmp_path / "program.py"  # Triton reads the source of kernels
    file.write_text(program)
    run = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, timeout=300)
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
