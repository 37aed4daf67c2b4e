"""Plays a newcomer: a fresh clone, an empty environment, README's commands and script word for word, timed.

    python -m benchmarks.first_hour                # takes some ten minutes; writes benchmarks/results/first-hour.json
    python -m benchmarks.first_hour --keep FOLDER  # and leaves the clone in FOLDER

The steps are read from README.md of the clone, so that what is timed is what people read. A step that fails ends the
run with its output and exit status 1, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moda.files import write_bytes

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "first-hour.json"
FIRST_RESULT = "make demo"
SCRIPT = "first.py"
PLAYED = (FIRST_RESULT, SCRIPT, "moda doctor", "moda train", "moda decompose", "moda compose", "moda evaluate")
"""How the commands of README begin that a newcomer gives; the others take hours, more machines, or run the tests."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Step:
    """A step, and what it took.

    Attributes:
        command: the line as README has it.
        seconds: wall-clock time.
    """

    command: str
    seconds: float


def commands(readme: str) -> list[str]:
    """The command lines of README that a newcomer gives, in README's order."""
    found = re.findall(rf"`(\S*python {re.escape(SCRIPT)})`", readme)
    for language, text in FENCE.findall(readme):
        if language == "sh":
            found += [line.partition(" #")[0].strip() for line in text.splitlines()]
    played = [line for line in found if line.startswith(PLAYED) or line.endswith(SCRIPT)]
    return sorted(played, key=lambda line: (line != FIRST_RESULT, not line.endswith(SCRIPT)))


def script(readme: str) -> str:
    """The complete script of README: its first block of Python."""
    return next(text for language, text in FENCE.findall(readme) if language == "python")


def play(clone: Path) -> list[Step]:
    """Give README's commands in a clone.

    Raises:
        SystemExit: a step failed; its output is printed.
    """
    readme = (clone / "README.md").read_text("utf-8")
    (clone / SCRIPT).write_text(script(readme), "utf-8")
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    path = os.pathsep.join([str(clone / ".venv" / "bin"), os.environ.get("PATH", "")])
    steps = []
    for command in commands(readme):
        begin = time.perf_counter()
        done = subprocess.run(
            command, shell=True, cwd=clone, env={**inherited, "PATH": path}, capture_output=True, text=True, check=False
        )
        steps.append(Step(command, round(time.perf_counter() - begin, 1)))
        print(f"{steps[-1].seconds:7.1f} s  {command}", flush=True)
        if done.returncode:
            sys.exit(f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}\n{command}: exit status {done.returncode}")
    return steps


def megabytes(folder: Path) -> int:
    """What a folder takes on the disk."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return round(sum(path.stat().st_blocks * 512 for path in files) / 1e6)


def result(clone: Path, steps: Sequence[Step]) -> dict[str, Any]:
    """What is written down of a run."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True).stdout
    version = [str(clone / ".venv" / "bin" / "python"), "-c", "import torch; print(torch.__version__)"]
    torch = subprocess.run(version, capture_output=True, text=True, check=True).stdout
    return {
        "commit": commit.strip(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[1], 1),
        "python": sys.version.split()[0],
        "torch": torch.strip(),
        "environment_megabytes": megabytes(clone / ".venv"),
        "first_result_minutes": round(steps[0].seconds / 60, 1),
        "minutes": round(sum(step.seconds for step in steps) / 60, 1),
        "steps": [asdict(step) for step in steps],
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="the folder to clone into; a temporary one if it is not given")
    folder = parser.parse_args(arguments).keep or Path(tempfile.mkdtemp())
    clone = folder / "moda-kernels"
    try:
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone)], check=True)
        write_bytes(RESULT, (json.dumps(result(clone, play(clone)), indent=1) + "\n").encode())
        print(f"written to {RESULT}")
    finally:
        if "--keep" not in arguments:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
