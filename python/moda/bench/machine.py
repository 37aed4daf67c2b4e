"""Describes the machine that is measured: its name, versions and limits."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moda.bench.clock import Budget, Clock, CudaClock, HostClock, Quartiles, Timed, interleave
from moda_kernels import __version__, backends

_CALLS = 200
_PACKAGES = ("torch", "triton", "numpy", "lightning")


def clock_for(device: torch.device) -> Clock:
    """Return the clock for a device."""
    return CudaClock(cache_bytes(device)) if device.type == "cuda" else HostClock(cache_bytes(device))


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last-level cache in bytes; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_size(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=32 << 20)


def _size(path: Path) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] if match else 0


def memory_bytes(device: torch.device) -> int:
    """Return the device's free memory in bytes; 4 GiB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return 4 << 30
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(match[1]) << 10 if match else 4 << 30


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} {'thread' if threads == 1 else 'threads'}"


def _processor() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to judge a number: device, machine, versions, source, date and load."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cache_bytes": cache_bytes(device),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": _versions(),
        "backends": {name: str(status) for name, status in backends().items()},
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **_commit(),
    }


def _versions() -> dict[str, str]:
    versions = {"moda-kernels": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if driver:
        versions["driver"] = driver.splitlines()[0]
    return versions


def _commit() -> dict[str, Any]:
    """Return the commit of the measured source and whether the working tree had changes; None outside a checkout."""
    folder = Path(__file__).parent
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if not commit:
        return {"commit": None, "modified": None}
    changes = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "modified": bool(changes)}


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else ""


def limits(device: torch.device, clock: Clock, budget: Budget) -> dict[str, Any]:
    """Measure what no kernel on this machine can beat: copy bandwidth (bytes read and written) and the cost of one
    call.

    The call is an addition to one element, repeated back to back.
    """
    floats = _copied_floats(device)
    source, target = torch.ones(floats, device=device), torch.empty(floats, device=device)
    one = torch.ones(1, device=device)

    def calls(_: object) -> None:
        for _call in range(_CALLS):
            one.add_(1)

    samples = interleave({"copy": Timed(lambda _: target.copy_(source)), "calls": Timed(calls)}, clock, budget)
    copy = Quartiles.of([8 * floats / seconds for seconds in samples["copy"]])
    return {
        "copy_bytes": 8 * floats,
        "copy_bytes_per_second": asdict(copy),
        "call_seconds": asdict(Quartiles.of([seconds / _CALLS for seconds in samples["calls"]])),
    }


def _copied_floats(device: torch.device) -> int:
    """Return the size of a buffer of at least 8 times the last-level cache and 256 MiB, within an eighth of memory."""
    wanted = max(8 * cache_bytes(device), 256 << 20)
    return min(wanted, memory_bytes(device) // 8) // 4
