"""Everything that needs an NVIDIA GPU, in one command that works offline: `make gpu`.

    build     the package with the native extension, from this checkout, with what is installed already
    tests     every test marked `gpu`
    sanitize  compute-sanitizer's memcheck and racecheck over one small run of every kernel
    bench     the suites of `moda bench`, written to benchmarks/results/<device>.json

Each step runs in a process of its own under a time limit; the limits sum to less than eight minutes. A step that fails
does not stop the others; one line per step is printed last. Exit status 0 when none failed.

    python benchmarks/gpu.py [--full]        --full: the whole benchmark instead of its quick form, without a limit
    python benchmarks/gpu.py --small         only the small run, in this process (what the sanitizer runs)
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"build": 90, "tests": 150, "memcheck": 45, "racecheck": 45, "bench": 90}  # seconds
_BENCH = """
import sys
from pathlib import Path
from moda.bench.command import bench
sys.exit(not bench(quick=sys.argv[1] == "quick", device="cuda", suites=(), folder=Path("benchmarks/results")))
"""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step."""

    step: str
    status: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.status not in ("passed", "skipped: compute-sanitizer is not installed")


def run(step: str, command: Sequence[str], limit: float | None, **environment: str) -> Outcome:
    """One step in a process of its own, its output passed on."""
    print(f"\n--- {step}: {' '.join(command[:6])}", flush=True)
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_INTERPRET": "0"} | environment
    begin = time.perf_counter()
    try:
        code = subprocess.run(command, cwd=ROOT, env=variables, timeout=limit, check=False).returncode
        status = "passed" if code == 0 else f"FAILED with exit status {code}"
    except subprocess.TimeoutExpired:
        status = f"FAILED: not done after {limit:.0f} s"
    return Outcome(step, status, time.perf_counter() - begin)


def build() -> Outcome:
    """Install this checkout in place, with no network and nothing else touched."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    flags = ["--no-build-isolation", "--no-deps", "--editable", "."]
    return run("build", [*pip, *flags], LIMITS["build"])


def tests() -> Outcome:
    """Every test marked gpu, in the files that have one: others may import what is not installed here."""
    files = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in (text := path.read_text()) or "triton_oracle" in text
    )
    # pyproject.toml's addopts names settings of plugins that may not be installed here.
    options = ["-m", "gpu", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return run("tests", [sys.executable, "-m", "pytest", *options, *files], LIMITS["tests"])


def sanitize(tool: str) -> Outcome:
    """compute-sanitizer over the small run; every tensor in an allocation of its own, so that its ends are known."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return Outcome(tool, "skipped: compute-sanitizer is not installed", 0.0)
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "benchmarks/gpu.py", "--small"]
    return run(tool, command, LIMITS[tool], PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def bench(full: bool) -> Outcome:
    """The suites of `moda bench`, results into benchmarks/results."""
    size = "full" if full else "quick"
    return run("bench", [sys.executable, "-c", _BENCH, size], None if full else LIMITS["bench"])


def small() -> None:
    """Every kernel once, forward and backward, at sizes that leave partial tiles everywhere."""
    import torch

    from moda_kernels import modular_losses, relu_pool, triton_kernels

    labels = torch.randint(3, (70,), device="cuda")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        shapes = [(5,), (130,), (3, 2, 2), (5, 3), (3, 4, 4), (3, 7, 7), (2, 14, 14), (1, 33, 33)]
        layers = [torch.randn(70, *shape, device="cuda").relu().to(dtype) for shape in shapes]
        layers.append(torch.randn(70, 2, 48, 48, device="cuda", dtype=dtype).to(memory_format=torch.channels_last))
        layers = [layer.requires_grad_() for layer in layers]
        sum(modular_losses(layers, labels, backend="triton")).backward()
        for layer in layers:
            y, pooled = relu_pool(layer, backend="triton")
            (y.sum() + pooled.sum()).backward()
        triton_kernels.class_sums(triton_kernels.pool([layer.detach() for layer in layers]), labels, 3)
    torch.cuda.synchronize()
    assert all(layer.grad.isfinite().all() for layer in layers)
    print("every kernel ran")


def environment() -> str:
    """Device and versions, on one line."""
    code = (
        "import torch, triton; print(torch.cuda.get_device_name(), '- torch', torch.__version__, '- triton', "
        "triton.__version__, '- CUDA', torch.version.cuda)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the whole benchmark instead of its quick form")
    parser.add_argument("--small", action="store_true", help="run every kernel once in this process")
    arguments = parser.parse_args()
    if arguments.small:
        small()
        return 0
    device = environment()
    if not device:
        print("no CUDA device, PyTorch or Triton here: `make gpu` needs all three", file=sys.stderr)
        return 2
    outcomes = [build(), tests(), sanitize("memcheck"), sanitize("racecheck"), bench(arguments.full)]
    print(f"\n{device}")
    for outcome in outcomes:
        print(f"{outcome.step:<10} {outcome.seconds:6.0f} s  {outcome.status}")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
