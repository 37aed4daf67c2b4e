"""Triton's launcher over a driver that launches nothing: what a launch costs the host, on machines without a GPU.

Everything up to the driver's call is what runs on a GPU: PyTorch's autograd, our Python, Triton's specialisation of the
arguments, its launcher in C. The driver is a library of functions that do nothing, made here with a C compiler.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from moda.observation import taps
from moda_kernels import triton_kernels

_CAPABILITY = 90
_LIBRARY = "libcuda.so.1"
_ANSWERS = {
    "cuCtxGetCurrent": "(void **context) { *context = (void *)1; return 0; }",
    "cuModuleLoadData": "(void **module, const void *image) { *module = (void *)1; return 0; }",
    "cuModuleGetFunction": "(void **function, void *module, const char *name) { *function = (void *)1; return 0; }",
    "cuDeviceGetAttribute": "(int *value, int attribute, int device) { *value = 232448; return 0; }",
    "cuFuncGetAttribute": "(int *value, int attribute, void *function) { *value = 1024; return 0; }",
    "cuPointerGetAttribute": "(void *data, int attribute, unsigned long long at)"
    " { *(unsigned long long *)data = at; return 0; }",
    "cuGetErrorString": '(int error, const char **text) { *text = "stubbed"; return 0; }',
    "cuLaunchKernelEx": "(void *config, void *function, void **arguments, void **extra) { moda_launches++; return 0; }",
}
"""What functions of the driver answer that answer more than that all is well."""


def problem() -> str:
    """Say why launches cannot be measured here; empty if they can."""
    if torch.cuda.is_available():
        return "this machine has a GPU: `make gpu` measures what its driver takes too"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if shutil.which("cc") is None:
        return "there is no C compiler"
    return ""


@contextmanager
def stubbed_driver() -> Iterator[ctypes.c_long]:
    """Let tensors of the CPU go to Triton's kernels, which are compiled, and launched by a driver that does nothing.

    Observed models whose norms are fused fuse norms of any size.

    Gives the number of launches so far. What kernels should have written is whatever the memory holds.

    Raises:
        RuntimeError: see `problem`.
    """
    if reason := problem():
        raise RuntimeError(f"launches cannot be measured: {reason}")
    import triton

    driver, launches = _driver()
    with ExitStack() as stack:
        for name, value in (("DEVICES", None), ("unavailable", lambda device=None: None)):
            stack.enter_context(patch.object(triton_kernels, name, value))
        from moda_kernels.triton_kernels import tables

        stack.enter_context(patch.object(tables, "KEEPING", frozenset({"cpu"})))
        stack.enter_context(patch.object(taps, "NORMS_FUSED_FROM_BYTES", 0))
        stack.enter_context(patch.dict("os.environ", MODA_BACKEND="triton"))
        stack.enter_context(patch.object(triton.runtime.driver, "_active", driver))
        yield launches


@functools.cache
def _driver() -> tuple[Any, ctypes.c_long]:
    """Return Triton's driver for NVIDIA's GPUs over the stub, and the stub's count of launches."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    folder = Path(tempfile.mkdtemp(prefix="moda-stub-"))
    library = _library(Path(nvidia.__file__).with_name("driver.c").read_text(), folder)

    class Stubbed(nvidia.CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            with patch.object(triton.knobs.nvidia, "libcuda_path", str(folder)):
                self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", _CAPABILITY, 32)

        def get_device_capability(self, device: int = 0) -> tuple[int, int]:
            return divmod(_CAPABILITY, 10)

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            """There is one."""

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    driver = Stubbed()
    shutil.rmtree(folder)  # what is loaded stays
    return driver, ctypes.c_long.in_dll(library, "moda_launches")


def _library(source: str, folder: Path) -> ctypes.CDLL:
    """Compile and load a driver with every function that a source file calls or names."""
    names = sorted(set(re.findall(r"\bcu[A-Z]\w*", source)) | _ANSWERS.keys())
    lines = ["long moda_launches = 0;"]
    lines += [f"int {name}{_ANSWERS.get(name, '() { return 0; }')}" for name in names]
    (folder / "stub.c").write_text("\n".join(lines) + "\n")
    target = folder / _LIBRARY
    flags = ["-std=gnu11", "-w", "-O2", "-shared", "-fPIC", f"-Wl,-soname,{_LIBRARY}"]
    subprocess.run(["cc", *flags, "-o", str(target), str(folder / "stub.c")], check=True)
    return ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
