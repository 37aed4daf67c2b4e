"""Finds out what is installed, which devices there are, which backends can run, and how to help those that cannot."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from dataclasses import dataclass
from typing import Any

import torch

import moda_kernels
from moda_kernels import native

_EXTRAS = {
    "triton": "",
    "lightning": "train",
    "tensorboard": "train",
    "scikit-learn": "train",
    "matplotlib": "train",
    "jinja2": "train",
    "torchvision": "vision",
}
_REQUIRED = ("moda-kernels", "torch", "numpy", "safetensors", "typer", "rich")


@dataclass(frozen=True)
class Finding:
    """One finding, a line of the report.

    Attributes:
        topic: one of "package", "device", "backend" and "native".
        name: of the package, device, ...
        ok: whether it is there.
        detail: version or property; where it is missing, why, and what to do about it.
    """

    topic: str
    name: str
    ok: bool
    detail: str


def examine() -> list[Finding]:
    """Everything worth knowing about this installation. Nothing here raises for what is missing."""
    return [*_packages(), *_devices(), *_backends(), _native()]


def _packages() -> list[Finding]:
    system = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    findings = [Finding("package", "python", sys.version_info >= (3, 10), system)]
    for name in _REQUIRED:
        version = _version(name)
        detail = version or f"not installed; pip install {name}"
        findings.append(Finding("package", name, version is not None, detail))
    for name, extra in _EXTRAS.items():
        version = _version(name)
        advice = (
            f"pip install 'moda-kernels[{extra}]'" if extra else "comes with PyTorch's CUDA builds; pip install triton"
        )
        findings.append(Finding("package", name, version is not None, version or f"not installed (optional); {advice}"))
    return findings


def _version(package: str) -> str | None:
    if package == "moda-kernels":
        return moda_kernels.__version__
    if package == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[Finding]:
    findings = [Finding("device", "cpu", True, f"{platform.machine()}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            detail = (
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                f"compute capability {properties.major}.{properties.minor}"
            )
            findings.append(Finding("device", f"cuda:{index}", True, detail))
        return findings
    if torch.version.cuda is None and torch.version.hip is None:
        reason = "this PyTorch is built without CUDA; for an NVIDIA GPU install one that is (https://pytorch.org)"
    else:
        reason = "PyTorch sees no GPU: check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
    findings.append(Finding("device", "cuda", False, reason))
    return findings


def _backends() -> list[Finding]:
    return [Finding("backend", name, bool(status), str(status)) for name, status in moda_kernels.backends().items()]


def _native() -> Finding:
    """What the compiled extension was built with."""
    try:
        info = native.build_info()
    except (ImportError, RuntimeError, OSError) as error:
        return Finding("native", "extension", False, " ".join(str(error).split()))
    return Finding("native", "extension", True, ", ".join(f"{key} {_short(value)}" for key, value in info.items()))


def build() -> dict[str, Any] | None:
    """What the compiled extension was built with, whole; None if there is none."""
    try:
        return dict(native.build_info())
    except (ImportError, RuntimeError, OSError):
        return None


def _short(value: Any) -> str:
    """An entry as a person reads it: a digest by its first digits, a list without its brackets."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    text = str(value)
    return text[:12] if len(text) == 64 else text or "none"
