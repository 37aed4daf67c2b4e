"""The measurements for a GPU, rehearsed on the CPU: they must not fail where a GPU is lent for minutes."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_files, gpu_kernels, gpu_page, gpu_step

pytest.importorskip("triton")


class _Stream:
    def wait_stream(self, _other: object) -> None: ...


class _Graph:
    def replay(self) -> None: ...


class _Event:
    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, _end: object) -> float:
        return 1.0


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """A CPU in a GPU's place; results go to `tmp_path`."""
    fakes = {
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda _: nullcontext(),
        "CUDAGraph": _Graph,
        "graph": lambda _, **_options: nullcontext(),
        "Event": _Event,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 1000,
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=1000),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for module in (gpu_files, gpu_kernels, gpu_step):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_files, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_kernels, "BACKEND", "torch")
    return tmp_path


def test_step(cpu, monkeypatch, capsys):
    small = gpu_step.Case("mobilenet", "float32", False, batch=2)
    monkeypatch.setattr(gpu_step, "cases", lambda _quick: [small])
    for name in ("WARMUPS", "ROUNDS", "HOST_STEPS", "STEADY_STEPS"):
        monkeypatch.setattr(gpu_step, name, 1)
    monkeypatch.setattr(sys, "argv", ["gpu_step", "--quick"])
    gpu_step.main()
    rows = json.loads(next(cpu.glob("*-step.json")).read_text())["rows"]
    assert [row["way"] for row in rows] == list(gpu_step.WAYS)
    assert all({"host", "steady", "graph", "loss"} <= set(row) for row in rows)
    assert not any("problem" in row for row in rows)
    assert capsys.readouterr().out.count("memory 1.00") == len(rows)


def test_kernels(cpu, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "shapes", lambda _quick: [((2, 3, 4, 4), torch.float32, True)])
    monkeypatch.setattr(sys, "argv", ["gpu_kernels", "--quick"])
    gpu_kernels.main()
    rows = json.loads(next(cpu.glob("*-kernels.json")).read_text())["rows"]
    assert [row.get("problem") for row in rows] == [None] * len(rows)
    assert {"copy", "relu_pool", "relu_pool backward", "pool backward"} <= {row["operation"] for row in rows}
    assert all(row["microseconds"] > 0 for row in rows)


def test_the_page_is_what_the_results_say():
    assert gpu_page.PAGE.read_text() == gpu_page.page()


def test_a_part_that_fails_or_hangs_is_said(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.run("right", [sys.executable, "-c", "print('hello')"], 60).status == "passed"
    assert gpu.run("wrong", [sys.executable, "-c", "print('reason'); raise SystemExit(3)"], 60).failed
    assert gpu.run("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 1).failed
    assert "reason" in capsys.readouterr().out
    log = (tmp_path / "gpu.log").read_text()
    assert all(text in log for text in ("hello", "reason", "exit status 3", "not done after 1 s"))


def test_every_file_with_a_gpu_test_is_found():
    names = {path.stem for path in gpu.test_files()}
    assert {"test_triton_gpu", "test_native_gpu", "test_triton_losses", "test_fast_path"} <= names
