"""The C++ of csrc under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, without Python."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from moda_kernels import native
from tests.moda_kernels._helpers.native_needed import needs_native

pytestmark = [needs_native, pytest.mark.compiles]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "csrc/cpu/parallel.cpp",
    "csrc/cpu/memory.cpp",
    "csrc/cuda/firing_emulated.cpp",
    "csrc/cuda/statistics_emulated.cpp",
    "csrc/cpu/kernels.cpp",
    "csrc/cpu/norm_relu_pool.cpp",
    "csrc/cpu/norm_activation_pool.cpp",
)
COMPILER = shutil.which("g++")
OPTIONS = {  # as in CMakeLists.txt
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}


def compile_check(program: Path, sanitizers: str, isa: str) -> None:
    """The program of tests/csrc with the kernels of one instruction set."""
    flags = ["-std=c++17", "-O0", "-g1", "-pthread", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    sources = [str(ROOT / name) for name in ("tests/csrc/cpu_kernels_check.cpp", *SOURCES)]
    command = [
        str(COMPILER),
        *flags,
        *OPTIONS[isa],
        f"-DMODA_ISA={isa}",
        f"-I{ROOT / 'csrc'}",
        *sources,
        "-ldl",
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize(("sanitizers", "isa"), [("address,undefined", "widest"), ("thread", "portable")])
def test_no_sanitizer_finds_anything(tmp_path: Path, sanitizers: str, isa: str):
    isa = native.build_info()["cpu_isas"][-1] if isa == "widest" else isa
    program = tmp_path / "check"
    compile_check(program, sanitizers, isa)
    # ThreadSanitizer's memory map wants addresses that are not randomised too far.
    run = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    done = subprocess.run(
        [*run, str(program)],
        capture_output=True,
        text=True,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "checked 16 shapes\n"
