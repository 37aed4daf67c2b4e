"""Builds the native extensions of `moda_kernels` through CMake; everything else is in pyproject.toml.

What is built follows from what the machine has, and every choice can be forced (docs/build.md lists the variables):

    no C++ compiler        a pure-Python package, and one line that says so
    a C++ compiler         `_native`: the CPU half
    and nvcc               the CUDA half too; if it does not compile, the CPU half alone, and one line that says so
    and PyTorch            `_autograd`, for this PyTorch alone; Python does the same where it is not there
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
ARCHITECTURE_NAMES = {"ampere": "8.0 8.6", "ada": "8.9", "hopper": "9.0", "blackwell": "10.0 12.0"}
GIB_PER_JOB = 2  # what one nvcc process is allowed for
KERNELS = "moda_kernels._native"
BUILDING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


class BuildError(SystemExit):
    """Ends the build with one line that says what to type next."""

    def __init__(self, message: str) -> None:
        super().__init__(f"moda-kernels: {message}")


def say(message: str) -> None:
    """One plain line on the build's output."""
    print(f"moda-kernels: {message}", file=sys.stderr, flush=True)


def choice(name: str) -> bool | None:
    """The variable `name`: unset (None), 0 (False) or 1 (True)."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise BuildError(f"{name}: expected 0, 1 or unset, got {value!r}")
    return None if value == "" else value == "1"


def find_program(name: str) -> str | None:
    """`name` from PATH, or from the scripts of this Python: its environment need not be activated.

    The path is absolute, as a build runs in a folder of its own and PATH may have relative entries.
    """
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    return str(Path(found).absolute()) if found else None


def find_compiler() -> str | None:
    """The C++ compiler's path: CXX, or the first of the usual names."""
    if os.environ.get("CXX"):
        return shutil.which(shlex.split(os.environ["CXX"])[0])
    return next((path for path in map(shutil.which, ("c++", "g++", "clang++")) if path), None)


def find_nvcc() -> str | None:
    """The path of nvcc: CUDACXX, CUDA_HOME, CUDA_PATH, PATH, then where the installer puts it."""
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes]
    found += [shutil.which("nvcc")]
    if not homes:
        found += [shutil.which("nvcc", path="/usr/local/cuda/bin")]
    return next((path for path in found if path), None)


def why_not_native() -> str | None:
    """Why the extension cannot be built here; None if it can."""
    if choice("MODA_NATIVE") is False:
        return "MODA_NATIVE=0"
    if os.name != "posix":
        return f"no native kernels for {sys.platform}"
    if find_compiler() is None:
        return "no C++ compiler found (CXX, c++, g++, clang++); install one, e.g. `apt-get install g++`"
    if find_program("cmake") is None:
        return "cmake not found; `pip install cmake ninja`"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 not found; `pip install pybind11`"
    return None


@dataclass(frozen=True)
class Cuda:
    """What builds the CUDA half."""

    nvcc: str
    architectures: str  # as CMAKE_CUDA_ARCHITECTURES


def find_cuda() -> Cuda | None:
    """What MODA_CUDA asks for and the machine has.

    Raises:
        BuildError: MODA_CUDA=1 and there is no nvcc, or the architectures asked for make no sense to it.
    """
    wanted = choice("MODA_CUDA")
    if wanted is False:
        return None
    nvcc = find_nvcc()
    if nvcc is None and wanted:
        raise BuildError(
            "MODA_CUDA=1 but nvcc was not found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda). Install the CUDA "
            "toolkit (https://developer.nvidia.com/cuda-downloads) and type `CUDA_HOME=/usr/local/cuda MODA_CUDA=1 "
            "pip install .`; or leave the CUDA half out: `MODA_CUDA=0 pip install .`"
        )
    return None if nvcc is None else Cuda(nvcc, architectures(nvcc))


def find_torch() -> Path | None:
    """The package of the PyTorch to build for; None if there is none, or MODA_AUTOGRAD=0.

    pip hides what is installed from a build, so another interpreter is asked, which does not read pip's variables.

    Raises:
        BuildError: MODA_AUTOGRAD=1 and there is no PyTorch.
    """
    wanted = choice("MODA_AUTOGRAD")
    if wanted is False:
        return None
    look = "import importlib.util; found = importlib.util.find_spec('torch'); print(found.origin if found else '')"
    for isolated in ([], ["-I"]):
        asked = subprocess.run([sys.executable, *isolated, "-c", look], capture_output=True, text=True, check=False)
        package = Path(asked.stdout.strip() or "/nonexistent").parent
        if (package / "include").is_dir():
            return package
    if wanted:
        raise BuildError("MODA_AUTOGRAD=1 but no PyTorch was found; install it first")
    return None


def architectures(nvcc: str) -> str:
    """CMAKE_CUDA_ARCHITECTURES from MODA_CUDA_ARCHS, TORCH_CUDA_ARCH_LIST or the default list."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    for variable in ("MODA_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        if os.environ.get(variable):
            return parse_architectures(os.environ[variable], variable, known)
    chosen = [arch for arch in DEFAULT_ARCHITECTURES if arch in known]
    if not chosen:
        raise BuildError(f"{nvcc} knows none of sm_{', sm_'.join(DEFAULT_ARCHITECTURES)}; set MODA_CUDA_ARCHS")
    return ";".join([*(f"{arch}-real" for arch in chosen), f"{chosen[-1]}-virtual"])


def parse_architectures(text: str, variable: str, known: set[str]) -> str:
    """`8.0;9.0+PTX`, `80 90`, `sm_90a` or `Hopper`, mixed as you like, or `native`, as CMAKE_CUDA_ARCHITECTURES."""
    if text.strip() == "native":
        return "native"
    for name, numbers in ARCHITECTURE_NAMES.items():
        text = re.sub(name, numbers, text, flags=re.IGNORECASE)
    chosen: list[str] = []
    for word in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(?:sm_)?(\d+)(?:\.(\d))?([af]?)(\+PTX)?", word)
        if match is None:
            raise BuildError(f"{variable}: expected e.g. '8.0;9.0+PTX' or '80;90', got {word!r} in {text!r}")
        number = match[1] + (match[2] or "")
        if known and number not in known:
            raise BuildError(f"{variable}: nvcc does not know {word!r}; it knows {', '.join(sorted(known, key=int))}")
        chosen.append(f"{number}{match[3]}-real")
        if match[4]:
            chosen.append(f"{number}{match[3]}-virtual")
    return ";".join(dict.fromkeys(chosen))


def jobs() -> int:
    """Compilers to run at once: MODA_BUILD_JOBS or MAX_JOBS, else by cores and free memory."""
    for variable in ("MODA_BUILD_JOBS", "MAX_JOBS"):
        if os.environ.get(variable):
            if not os.environ[variable].isdigit() or int(os.environ[variable]) < 1:
                raise BuildError(f"{variable}: expected a number of at least 1, got {os.environ[variable]!r}")
            return int(os.environ[variable])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, free_memory() // (GIB_PER_JOB << 30)))


def free_memory() -> int:
    """Bytes that can be allocated here without swapping, as far as the machine and its container tell."""
    limits = [1 << 50]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        limits += [int(match[1]) << 10] if match else []
    cgroup = Path("/sys/fs/cgroup")
    maximum, current = cgroup / "memory.max", cgroup / "memory.current"
    if maximum.is_file() and current.is_file() and maximum.read_text().strip().isdigit():
        limits.append(max(0, int(maximum.read_text()) - int(current.read_text())))
    return min(limits)


class BuildNative(build_ext):
    """CMake configure and build, then the extension put where setuptools wants it."""

    folder: Path | None = None  # where the kernels were built

    def run(self) -> None:
        """Build every extension: the kernels, then autograd."""
        # An editable build keeps its objects, so that the next one compiles only what changed.
        if self.inplace or self.editable_mode:
            self.build_temp = str(ROOT / "build" / str(sysconfig.get_config_var("SOABI")))
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Build an extension into setuptools' build folder."""
        built = self._kernels() if ext.name == KERNELS else self._autograd()
        if built is None:
            ext.optional = True  # nothing to put in place, and that is no error
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)

    def _kernels(self) -> Path | None:
        cuda = find_cuda()
        try:
            return self._cmake(cuda)
        except subprocess.CalledProcessError as error:
            return self._without_what_failed(cuda, error)

    def _autograd(self) -> Path | None:
        """Autograd for the PyTorch that was found, beside kernels that did build; nothing if it fails and may."""
        if self.folder is None:
            return None
        cmake = find_program("cmake")
        assert cmake is not None, "why_not_native() has looked"
        try:
            subprocess.run([cmake, "--build", str(self.folder), "--target", "_autograd"], check=True)
        except subprocess.CalledProcessError as error:
            if choice("MODA_AUTOGRAD"):
                raise BuildError(f"autograd did not build: {shlex.join(error.cmd)} failed (see above)") from error
            say("autograd did not build (see above); Python does the same. MODA_AUTOGRAD=1 makes this an error")
            return None
        return next((self.folder / "out").glob("_autograd*.so"))

    def _without_what_failed(self, cuda: Cuda | None, error: subprocess.CalledProcessError) -> Path | None:
        """The CPU half when only the CUDA half failed, nothing if that fails too; an error if it was required."""
        if cuda and choice("MODA_CUDA") is None:
            say("the CUDA half did not build (see above); building the CPU half alone. MODA_CUDA=1 makes this an error")
            try:
                return self._cmake(None)
            except subprocess.CalledProcessError as again:
                error = again
        if choice("MODA_CUDA") or choice("MODA_NATIVE"):
            raise BuildError(f"the native kernels did not build: {shlex.join(error.cmd)} failed (see above)") from error
        say("the native kernels did not build (see above); going on without. MODA_NATIVE=1 makes this an error")
        return None

    def _cmake(self, cuda: Cuda | None) -> Path:
        import pybind11

        cmake, ninja = find_program("cmake"), find_program("ninja")
        assert cmake is not None, "why_not_native() has looked"
        folder = Path(self.build_temp).resolve() / ("native-cuda" if cuda else "native-cpu")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(folder)),
            f"-DCMAKE_BUILD_TYPE={os.environ.get('CMAKE_BUILD_TYPE') or 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'out'}",
            f"-DMODA_CUDA={'ON' if cuda else 'OFF'}",
            f"-DMODA_TORCH={find_torch() or ''}",
        ]
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if cuda:
            configure += [
                f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}",
                f"-DCMAKE_CUDA_ARCHITECTURES={cuda.architectures}",
            ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(folder), "--parallel", str(jobs())], check=True)
        self.folder = folder
        say(f"built the native kernels for {f'CPU and CUDA ({cuda.architectures})' if cuda else 'CPU'}")
        return next((folder / "out").glob("_native*.so"))


def extensions() -> list[Extension]:
    """The native extensions, or none with one line that says why."""
    reason = why_not_native()
    if reason is None:
        names = [KERNELS, *(["moda_kernels._autograd"] if find_torch() else [])]
        return [Extension(name, sources=[]) for name in names]
    if choice("MODA_NATIVE") or choice("MODA_CUDA") or choice("MODA_AUTOGRAD"):
        raise BuildError(f"the native kernels were asked for but cannot be built: {reason}")
    if BUILDING & set(sys.argv):
        say(f"installing without the native kernels: {reason}")
    return []


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
