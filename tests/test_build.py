"""Building and installing: what a user's machine may lack, and what the build then says and leaves."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).resolve().parents[1]
IN_THE_BUILD = ("setup.py", "CMakeLists.txt", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE")
NOT_IN_THE_BUILD = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
VARIABLES = (
    *(
        "MODA_NATIVE",
        "MODA_CUDA",
        "MODA_AUTOGRAD",
        "MODA_CUDA_ARCHS",
        "TORCH_CUDA_ARCH_LIST",
        "MODA_BUILD_JOBS",
        "MAX_JOBS",
    ),
    *("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH"),
)


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions of setup.py, none of the variables that it reads being set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def copy_of_the_sources(folder: Path) -> Path:
    for name in IN_THE_BUILD:
        shutil.copy2(ROOT / name, folder / name)
    for name in ("csrc", "moda_kernels", "python"):
        shutil.copytree(ROOT / name, folder / name, ignore=NOT_IN_THE_BUILD)
    return folder


def python(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**environment, **variables},
    )


def build_wheel(source: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "-v", "-w", str(folder))
    return python("-m", "pip", "wheel", *options, str(source), cwd=folder, **variables)


def install(wheel: Path, target: Path) -> None:
    done = python("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=target)
    assert done.returncode == 0, done.stderr


def use(target: Path, empty: Path) -> str:
    """What a program prints that uses the package installed in `target`, from an empty folder."""
    done = python(str(ROOT / "tests" / "use_package.py"), str(target), cwd=empty, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def folders(root: Path, *names: str) -> list[Path]:
    made = [root / name for name in names]
    for folder in made:
        folder.mkdir()
    return made


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_source_archive_to_wheel_to_use_with_a_broken_nvcc(tmp_path: Path):
    """A CUDA half that does not build costs the CUDA half, and one line."""
    source, wheels, target, empty, tools = folders(tmp_path, "source", "wheels", "target", "empty", "tools")
    copy_of_the_sources(source)
    done = python("-m", "build", "--sdist", "--no-isolation", "-o", str(wheels), cwd=source)
    assert done.returncode == 0, done.stderr
    (archive,) = wheels.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        inside = {"/".join(name.split("/")[1:]) for name in file.getnames()}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")} | {"CMakeLists.txt"} <= inside

    nvcc = tools / "nvcc"
    nvcc.write_text('#!/bin/sh\n[ "$1" = --list-gpu-arch ] && echo compute_90 && exit 0\necho broken >&2\nexit 1\n')
    nvcc.chmod(0o755)
    # Not optimised, which takes a third of the time; the environment of the tests holds what is.
    done = build_wheel(archive, wheels, CUDACXX=str(nvcc), MODA_AUTOGRAD="0", CMAKE_BUILD_TYPE="Debug")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "moda-kernels: the CUDA half did not build (see above); building the CPU half alone" in output
    assert "moda-kernels: built the native kernels for CPU\n" in output
    (wheel,) = wheels.glob("*.whl")
    assert re.search(r"-cp\d+-cp\d+-linux_", wheel.name)
    with zipfile.ZipFile(wheel) as file:
        packed = file.namelist()
    assert sum(name.startswith("moda_kernels/_native.") for name in packed) == 1
    assert not [name for name in packed if name.startswith(("csrc", "tests", "setup"))]

    install(wheel, target)
    assert use(target, empty) == "True available"


def test_no_compiler_gives_a_pure_python_package_and_one_line(tmp_path: Path):
    source, wheels, target, empty = folders(tmp_path, "source", "wheels", "target", "empty")
    copy_of_the_sources(source)
    done = build_wheel(source, wheels, CXX="/nonexistent", PATH=str(empty))
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    lines = [line.strip() for line in output.splitlines() if line.strip().startswith("moda-kernels:")]
    assert lines == [
        "moda-kernels: installing without the native kernels: no C++ compiler found (CXX, c++, g++, clang++); "
        "install one, e.g. `apt-get install g++`"
    ]
    (wheel,) = wheels.glob("*-py3-none-any.whl")
    install(wheel, target)
    assert use(target, empty).startswith("False the native extension is not built")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"MODA_CUDA": "1", "CUDACXX": "/nonexistent/nvcc"},
            r"MODA_CUDA=1 but nvcc was not found .*type `CUDA_HOME=/usr/local/cuda MODA_CUDA=1 pip install \.`",
        ),
        ({"MODA_CUDA": "yes"}, r"MODA_CUDA: expected 0, 1 or unset, got 'yes'"),
        ({"MODA_NATIVE": "1", "CXX": "/nonexistent"}, r"asked for but cannot be built: no C\+\+ compiler found"),
        ({"MODA_CUDA": "1", "MODA_NATIVE": "0"}, r"asked for but cannot be built: MODA_NATIVE=0"),
    ],
)
def test_what_was_asked_for_and_cannot_be_had_ends_the_build(tmp_path: Path, variables: dict[str, str], message: str):
    source, wheels = folders(tmp_path, "source", "wheels")
    copy_of_the_sources(source)
    done = build_wheel(source, wheels, **variables)
    assert done.returncode != 0
    assert re.search(message, done.stdout + done.stderr)
    assert not list(wheels.glob("*.whl"))


def test_the_command_that_a_missing_nvcc_names_is_not_hidden_in_a_traceback(tmp_path: Path):
    copy_of_the_sources(tmp_path)
    done = python("setup.py", "build_ext", cwd=tmp_path, MODA_CUDA="1", CUDACXX="/nonexistent/nvcc")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("moda-kernels: MODA_CUDA=1 but nvcc was not found")


KNOWN = {"75", "80", "86", "89", "90", "100", "120"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0;9.0+PTX", "80-real;90-real;90-virtual"),
        ("80 90", "80-real;90-real"),
        ("8.0,8.6", "80-real;86-real"),
        ("sm_90a", "90a-real"),
        ("Hopper", "90-real"),
        ("Ampere Blackwell+PTX", "80-real;86-real;100-real;120-real;120-virtual"),
        ("9.0 90 9.0", "90-real"),
        ("12.0+PTX", "120-real;120-virtual"),
        ("native", "native"),
    ],
)
def test_architectures_as_people_write_them(setup_py: dict[str, Any], text: str, expected: str):
    assert setup_py["parse_architectures"](text, "MODA_CUDA_ARCHS", KNOWN) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", r"MODA_CUDA_ARCHS: expected e\.g\. '8\.0;9\.0\+PTX' or '80;90', got 'fast'"),
        ("8.0;7.0", r"nvcc does not know '7\.0'; it knows 75, 80, 86, 89, 90, 100, 120"),
    ],
)
def test_architectures_that_are_none(setup_py: dict[str, Any], text: str, message: str):
    with pytest.raises(SystemExit, match=message):
        setup_py["parse_architectures"](text, "MODA_CUDA_ARCHS", KNOWN)


def test_the_project_s_variable_goes_before_pytorch_s(setup_py: dict[str, Any], tmp_path: Path, monkeypatch):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_80 compute_86 compute_90\n")
    nvcc.chmod(0o755)
    assert setup_py["architectures"](str(nvcc)) == "80-real;86-real;90-real;90-virtual"  # what this nvcc knows
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert setup_py["architectures"](str(nvcc)) == "86-real"
    monkeypatch.setenv("MODA_CUDA_ARCHS", "90")
    assert setup_py["architectures"](str(nvcc)) == "90-real"


def test_nvcc_is_looked_for_where_the_variables_say(setup_py: dict[str, Any], tmp_path: Path, monkeypatch):
    (home,) = folders(tmp_path, "bin")
    (home / "nvcc").write_text("#!/bin/sh\n")
    (home / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py["find_nvcc"]() == str(home / "nvcc")
    monkeypatch.setenv("CUDACXX", "/nonexistent/nvcc")
    assert setup_py["find_nvcc"]() is None
    monkeypatch.setenv("MODA_CUDA", "0")
    assert setup_py["find_cuda"]() is None


def test_the_pytorch_to_build_for(setup_py: dict[str, Any], monkeypatch):
    assert (setup_py["find_torch"]() / "include" / "torch" / "csrc").is_dir()
    monkeypatch.setenv("MODA_AUTOGRAD", "0")
    assert setup_py["find_torch"]() is None
    monkeypatch.setattr(sys, "executable", shutil.which("true"))  # an interpreter that knows none
    monkeypatch.setenv("MODA_AUTOGRAD", "1")
    with pytest.raises(SystemExit, match="MODA_AUTOGRAD=1 but no PyTorch was found; install it first"):
        setup_py["find_torch"]()


def test_jobs_follow_memory_and_the_variables(setup_py: dict[str, Any], monkeypatch):
    monkeypatch.setitem(setup_py["jobs"].__globals__, "free_memory", lambda: 5 << 30)
    assert setup_py["jobs"]() == min(2, len(os.sched_getaffinity(0)))
    monkeypatch.setitem(setup_py["jobs"].__globals__, "free_memory", lambda: 1 << 30)
    assert setup_py["jobs"]() == 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert setup_py["jobs"]() == 7
    monkeypatch.setenv("MODA_BUILD_JOBS", "3")
    assert setup_py["jobs"]() == 3
    monkeypatch.setenv("MODA_BUILD_JOBS", "many")
    with pytest.raises(SystemExit, match="MODA_BUILD_JOBS: expected a number of at least 1, got 'many'"):
        setup_py["jobs"]()
