"""Everything that needs an NVIDIA GPU, in one command that works offline: `make gpu`.

    build      the package with the native extension, from this checkout, with what is installed already
    tests      every test marked `gpu`, a process for each file
    sanitize   compute-sanitizer's memcheck and racecheck over one small run of every kernel
    warm       what the measurements compile, compiled
    step       the price of a training step (gpu_step.py)
    kernels    bandwidth of the kernels (gpu_kernels.py)
    bench      the suites of `moda bench`, quick

What measures nothing runs side by side first; then the GPU belongs to one measurement at a time. Every part is a
process under a time limit, and one that fails does not stop the others. The output of a part is printed when it ends
and kept in $OUT, if that is set, with the results. One line a part comes last; exit status 0 when none failed.

    python benchmarks/gpu.py [--full] [--skip PART ...]     --full: all shapes, the whole benchmark, without limits
    python benchmarks/gpu.py --small                        only the small run, in this process (for the sanitizer)
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"build": 150, "tests": 130, "sanitize": 100, "warm": 110, "step": 130, "kernels": 60, "bench": 90}  # seconds
SHOWN = 6000  # characters of the output of a part that failed
_BENCH = """
import sys
from pathlib import Path
from moda.bench.command import bench
sys.exit(not bench(quick=sys.argv[1] == "quick", device="cuda", suites=(), folder=Path("benchmarks/results")))
"""
_ONE_PROCESS = ("test_triton_gpu", "test_native_gpu")  # they watch streams, races and memory
_printing = threading.Lock()


@dataclass(frozen=True)
class Outcome:
    """The outcome of a part."""

    part: str
    status: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.status not in ("passed", "skipped: compute-sanitizer is not installed")


def run(part: str, command: Sequence[str], limit: float | None, *, show: bool = False, **variables: str) -> Outcome:
    """One part in a process of its own; its output is kept, and printed if it failed or is asked for."""
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_INTERPRET": "0"} | variables
    environment["PYTHONUNBUFFERED"] = "1"
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output, _ = process.communicate(timeout=limit)
        status = "passed" if process.returncode == 0 else f"FAILED with exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        status = f"FAILED: not done after {limit:.0f} s"
    outcome = Outcome(part, status, time.perf_counter() - begin)
    with _printing:
        print(f"\n--- {part}: {outcome.seconds:.0f} s, {status}", flush=True)
        print(output[-SHOWN:] if outcome.failed or show else output[-300:], flush=True)
        if os.environ.get("OUT"):
            with (Path(os.environ["OUT"]) / "gpu.log").open("a") as log:
                log.write(f"\n===== {part}: {status}\n{output}")
    return outcome


def build() -> Outcome:
    """Install this checkout in place, with no network and nothing else touched, for the GPU that is here."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    flags = ["--no-build-isolation", "--no-deps", "--editable", "."]
    return run("build", [*pip, *flags], LIMITS["build"], MODA_CUDA_ARCHS=os.environ.get("MODA_CUDA_ARCHS", "native"))


def test_files() -> list[Path]:
    """The files that have a test marked gpu: others may import what is not installed here."""
    return sorted(
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in (text := path.read_text()) or "triton_oracle" in text
    )


def tests(path: Path) -> Outcome:
    """The tests marked gpu of one file."""
    # pyproject.toml's addopts names settings of plugins that may not be installed here.
    options = ["-m", "gpu", "-q", "-ra", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    if path.stem not in _ONE_PROCESS and _has("xdist"):
        options += ["-n", "3"]
    command = [sys.executable, "-m", "pytest", *options, str(path.relative_to(ROOT))]
    outcome = run(path.stem, command, LIMITS["tests"])
    return Outcome(outcome.part, "passed", outcome.seconds) if outcome.status.endswith("status 5") else outcome


def _has(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def sanitize(tool: str) -> Outcome:
    """compute-sanitizer over the small run; every tensor in an allocation of its own, so that its ends are known."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return Outcome(tool, "skipped: compute-sanitizer is not installed", 0.0)
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "benchmarks/gpu.py", "--small"]
    return run(tool, command, LIMITS["sanitize"], PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def measure(part: str, full: bool) -> Outcome:
    """A measurement that has the GPU to itself."""
    if part == "bench":
        command = [sys.executable, "-c", _BENCH, "full" if full else "quick"]
    else:
        command = [sys.executable, "-m", f"benchmarks.gpu_{part}", *([] if full else ["--quick"])]
    return run(part, command, None if full else LIMITS[part], show=True)


def warm(part: str) -> Outcome:
    """A measurement's compilations."""
    command = [sys.executable, "-m", f"benchmarks.gpu_{part}", "--quick", "--warm"]
    return run(f"warm {part}", command, LIMITS["warm"])


def small() -> None:
    """Every kernel once, forward and backward, at sizes that leave partial tiles everywhere."""
    import torch

    from moda_kernels import FiringCounter, modular_losses, native, norm_relu_pool, relu_pool, triton_kernels

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
            for residual in (None, layer.detach()):
                y, pooled = norm_relu_pool(layer, None, None, residual=residual, training=True, backend="triton")
                (y.sum() + pooled.sum()).backward()
        detached = [layer.detach() for layer in layers]
        triton_kernels.class_sums(triton_kernels.pool(detached), labels, 3)
        if native.unavailable(torch.device("cuda")) is None:
            FiringCounter(3, backend="native", sums=True).update(detached, labels)
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


def side_by_side(skipped: Sequence[str]) -> list[Outcome]:
    """What measures nothing. The tests and the sanitizer of what is built wait for the build."""
    futures: list[Future[Outcome]] = []
    with ThreadPoolExecutor(32) as pool:

        def submit(part: str, call: Callable[..., Outcome], *arguments: object) -> None:
            if part not in skipped:
                futures.append(pool.submit(call, *arguments))

        submit("build", build)
        built = futures[0] if futures else None

        def after_build(call: Callable[..., Outcome], *arguments: object) -> Outcome:
            if built is not None:
                built.result()
            return call(*arguments)

        for path in test_files():
            if "native" in path.stem:
                submit("tests", after_build, tests, path)
            else:
                submit("tests", tests, path)
        for part in ("step", "kernels"):
            if part not in skipped:
                submit("warm", warm, part)
        for tool in ("memcheck", "racecheck"):
            submit("sanitize", after_build, sanitize, tool)
        return [future.result() for future in futures]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all shapes and the whole benchmark")
    parser.add_argument(
        "--skip", nargs="+", default=[], choices=list(LIMITS), metavar="PART", help="parts to leave out"
    )
    parser.add_argument("--small", action="store_true", help="run every kernel once in this process")
    arguments = parser.parse_args()
    if arguments.small:
        small()
        return 0
    device = environment()
    if not device:
        print("no CUDA device, PyTorch or Triton here: `make gpu` needs all three", file=sys.stderr)
        return 2
    outcomes = side_by_side(arguments.skip)
    outcomes += [measure(part, arguments.full) for part in ("step", "kernels", "bench") if part not in arguments.skip]
    print(f"\n{device}")
    for outcome in outcomes:
        print(f"{outcome.part:<26} {outcome.seconds:6.0f} s  {outcome.status}")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
