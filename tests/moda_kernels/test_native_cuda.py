"""The CUDA firing counter without a GPU: its walk lane by lane on the host, and what nvcc makes of it."""

from __future__ import annotations

import contextlib
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moda_kernels import _native_calls, closed_form, native
from moda_kernels.tally import Tally
from tests.moda_kernels._helpers.firing_batches import (
    DTYPES,
    assert_sums,
    batch_of_layers,
    count_emulated,
    counted,
    neurons_last,
    one_per_row,
    summed,
)
from tests.moda_kernels._helpers.native_needed import needs_native

pytestmark = [needs_native, pytest.mark.compiles]

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("samples", "classes"), [(1, 1), (5, 3), (70, 3), (70, 1000)])
@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_the_walk_counts_as_the_oracle(dtype: torch.dtype, samples: int, classes: int, threshold: float):
    """With a table in shared memory (3 classes) and without (1000), less and more than a block's chunk of samples."""
    generator = torch.Generator().manual_seed(samples)
    layers = batch_of_layers(samples, dtype, generator)
    labels = torch.randint(-1, classes + 1, (samples,), generator=generator)
    for kind in (labels, labels.int()):
        mine = counted(count_emulated, layers, kind, classes, threshold)
        for a, b in zip(mine, counted(closed_form.count_firings, layers, labels, classes, threshold), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("samples", "classes"), [(1, 1), (5, 3), (70, 3), (70, 1000)])
def test_the_sums_are_the_oracle_s(dtype: torch.dtype, samples: int, classes: int):
    """Fewer samples than a block's teams and more, classes of one sample and of many; the counts beside the sums."""
    generator = torch.Generator().manual_seed(samples)
    layers = batch_of_layers(samples, dtype, generator)
    long = torch.randn(2 * samples, 5, 1111, generator=generator).to(dtype)[
        ::2
    ]  # many steps of a row; of a team of warps
    layers += [long.contiguous(), neurons_last(long)]
    labels = torch.randint(-1, classes + 1, (samples,), generator=generator)
    expected = counted(closed_form.count_firings, layers, labels, classes, 0.1)
    for kind in (labels, labels.int()):
        counts, sums = summed(count_emulated, layers, kind, classes, 0.1)
        assert all(map(torch.equal, counts, expected))
        assert_sums(sums, layers, labels, classes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_fires_beside_a_sum(dtype: torch.dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = torch.tensor([0.0, -0.0, smallest, -smallest, float("nan"), -float("inf"), 0.1, -0.1], dtype=dtype)
    x = torch.zeros(1, 8, 33, dtype=dtype)
    x[0, :, 20] = values
    for layer in (values[None], x, neurons_last(x)):
        for threshold, fires in ((0.0, [0, 0, 1, 1, 1, 1, 1, 1]), (0.1, [0, 0, 0, 0, 1, 1, 0, 0])):
            (counts, _, _), (sums,) = summed(count_emulated, [layer], torch.tensor([0]), 1, threshold)
            assert counts.tolist() == [fires]
            assert sums.isnan().tolist() == [[False] * 4 + [True] + [False] * 3]
            assert sums[0, 5].item() == (float("inf") if layer.dim() > 2 else -float("inf"))


def test_every_half_is_converted_as_in_torch():
    """All 65536 bit patterns of the two half-precision formats, each as a class of its own."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, -1, 1)
        counts, sums = summed(count_emulated, [x], torch.zeros(1, dtype=torch.int64), 1, 0.0)
        expected = (x.float().abs()[:, :, 0] + 1) - 1
        assert torch.equal(counts[0][0] == 0, x[0, :, 0] == 0)
        torch.testing.assert_close(sums[0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_position_is_read_and_none_beside_the_row(dtype: torch.dtype):
    """One firing position at a time, between neighbours that fire: rows of every alignment and length around a warp's steps."""
    width = torch.empty((), dtype=dtype).itemsize
    for positions in (2, 15, 33, 128 // width, 512 // width + 3, 2048 // width + 7):
        for start in range(16 // width):
            buffer = torch.ones(start + 3 * positions + 16, dtype=dtype)
            row = buffer[start + positions : start + 2 * positions].view(1, 1, positions)
            row.zero_()
            labels = torch.zeros(1, dtype=torch.int64)
            assert counted(count_emulated, [row], labels, 1, 0.0)[0].item() == 0
            for at in range(positions):
                row[0, 0, at] = -1
                assert counted(count_emulated, [row], labels, 1, 0.0)[0].item() == 1
                row[0, 0, at] = 0


@pytest.mark.parametrize("neurons", [1, 5, 64])
def test_a_sample_that_several_warps_share(neurons: int):
    """One to eight warps, each of which stops for itself; every position is somebody's."""
    labels = torch.zeros(1, dtype=torch.int64)
    for positions in (60, 130, 300, 700, 3000):
        x = neurons_last(torch.zeros(1, neurons, positions))
        assert counted(count_emulated, [x], labels, 1, 0.0)[0].sum() == 0
        for at in range(0, positions, 1 if positions < 3000 else 89):
            x[0, at % neurons, at] = 1
            assert counted(count_emulated, [x], labels, 1, 0.0)[0][0].tolist() == [
                at % neurons == c for c in range(neurons)
            ]
            x[0, at % neurons, at] = 0


@pytest.mark.parametrize("layout", ["positions last", "neurons last"])
def test_blocks_of_few_samples_where_samples_are_large(layout: str):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 4, (37,), generator=generator)
    for positions in (9, 600, 5000, 40000):
        x = one_per_row(37, (3, positions), generator)
        layers = [x if layout == "positions last" else neurons_last(x)]
        expected = counted(closed_form.count_firings, layers, labels, 4, 0.0)
        assert all(map(torch.equal, counted(count_emulated, layers, labels, 4, 0.0), expected))


def test_more_layers_than_a_launch_takes():
    generator = torch.Generator().manual_seed(0)
    layers = [one_per_row(9, (5 + i % 7, 3, 4), generator) for i in range(130)]
    labels = torch.randint(0, 4, (9,), generator=generator)
    expected = counted(closed_form.count_firings, layers, labels, 4, 0.0)
    assert all(map(torch.equal, counted(count_emulated, layers, labels, 4, 0.0), expected))
    counts, sums = summed(count_emulated, layers, labels, 4, 0.0)
    assert all(map(torch.equal, counts, expected))
    assert_sums(sums, layers, labels, 4)


@pytest.mark.parametrize("name", ["firing_basic", "firing_signed", "firing_exact_rates"])
def test_published_counts(name: str, golden):
    data = golden(name)
    layers = sum(key.startswith("counts_l") for key in data)
    batches = sum(key.startswith("labels_b") for key in data)
    classes = int(data["num_classes"])
    totals = [torch.zeros(data[f"counts_l{i:02d}"].shape, dtype=torch.int64) for i in range(layers)]
    for b in range(batches):
        activations = [torch.from_numpy(data[f"act_b{b:02d}_l{i:02d}"]) for i in range(layers)]
        labels = torch.from_numpy(data[f"labels_b{b:02d}"])
        for total, count in zip(totals, counted(count_emulated, activations, labels, classes, 0.0), strict=False):
            total += count
    for i, total in enumerate(totals):
        assert total.tolist() == data[f"counts_l{i:02d}"].tolist()


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@needs_nvcc
@pytest.mark.parametrize(("source", "kernels"), [("firing.cu", 1), ("statistics.cu", 2)])
def test_no_architecture_spills(tmp_path: Path, source: str, kernels: int):
    """Every architecture of the default list, and the PTX of the newest, as setup.py builds them."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    chosen = setup["architectures"](shutil.which("nvcc")).split(";")
    assert chosen == ["80-real", "86-real", "89-real", "90-real", "100-real", "120-real", "120-virtual"]
    numbers = [arch.removesuffix("-real") for arch in chosen if arch.endswith("-real")]
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        f"-I{CSRC}",
        "-c",
        str(CSRC / "cuda" / source),
        "-o",
        str(tmp_path / "kernels.o"),
    ]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    done = subprocess.run([*command, "-Xptxas", "-v"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"for 'sm_(\d+)a?'", done.stderr) == [number for number in numbers for _ in range(kernels)]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills == [("0", "0", "0")] * len(numbers) * kernels


@needs_nvcc
@pytest.mark.parametrize(("source", "types"), [("firing.cu", 3), ("statistics.cu", 4)])
def test_loads_are_16_bytes_wide_and_pass_the_caches(tmp_path: Path, source: str, types: int):
    ptx = tmp_path / "kernels.ptx"
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "-ptx",
        "-arch=compute_90",
        f"-I{CSRC}",
        str(CSRC / "cuda" / source),
        "-o",
        str(ptx),
    ]
    subprocess.run(command, check=True)
    loads = re.findall(r"ld\.global\.cs\.v4\.\w+", ptx.read_text())
    # Per width or element type: the first step's, kUnroll of a later step's and kUnroll of a column's.
    assert len(loads) >= types * (1 + 4 + 4)


def test_a_cuda_error_is_an_exception_with_its_name():
    """A device that does not exist, or no driver at all: the extension imports either way."""
    if not native.build_info()["cuda"]:
        pytest.skip("the extension was built without CUDA")
    with pytest.raises(RuntimeError, match=r"^cudaError(InvalidDevice|InsufficientDriver|NoDevice): "):
        _native_calls.extension().count_firings_cuda([], (0, 1, 0, 1, 0, 0), 99, 0)
    with pytest.raises(RuntimeError, match=r"^cudaError(InvalidDevice|InsufficientDriver|NoDevice): "):
        _native_calls.extension().class_statistics_cuda([], (0, 1, 0, 1, 0, 0, 0), 99, 0)


class RecordedCalls:
    """Stands in for the extension and remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def __getattr__(self, name: str):
        return lambda fields, batch, *where: self.calls.append((name, len(fields), len(batch), *where))


def test_cuda_tensors_go_to_the_cuda_kernel(monkeypatch: pytest.MonkeyPatch):
    """With their device and the current stream of it; device addresses in a CPU kernel would be a crash."""
    recorded = RecordedCalls()
    monkeypatch.setattr(_native_calls, "extension", lambda: recorded)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda x: 4096)
    with FakeTensorMode():
        on = {"device": "cuda:1"}
        layers, labels = (
            [torch.empty(4, 3, 5, 5, **on), torch.empty(4, 6, **on)],
            torch.zeros(4, dtype=torch.int64, **on),
        )
        counts = [torch.zeros(2, width, dtype=torch.int64, **on) for width in (3, 6)]
        sizes, invalid = torch.zeros(2, dtype=torch.int64, **on), torch.zeros((), dtype=torch.int64, **on)
        for sums in ([], [x.float() for x in counts]):
            _native_calls.count_firings(layers, labels, 0.0, Tally(counts, sizes, invalid, sums))
    assert recorded.calls == [("count_firings_cuda", 2 * 7, 6, 1, 77), ("class_statistics_cuda", 2 * 10, 7, 1, 77)]


def test_a_build_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch):
    real = _native_calls.extension()
    cpu_only = {**real.build_info(), "cuda": False}
    monkeypatch.setattr(real, "build_info", lambda: cpu_only)
    assert "built without CUDA" in str(native.unavailable(torch.device("cuda")))
    assert native.unavailable(torch.device("cpu")) is None
