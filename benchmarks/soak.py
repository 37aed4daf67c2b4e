"""Breaks files, trainings and inputs for hours, by what the tests do in seconds, and prints one table.

    python -m benchmarks.soak                                        # as `make soak`
    python -m benchmarks.soak --mutations 4000 --kills 30 --inputs 2000 --seed 7

Everything follows from the seed but the moments of the kills, which a machine's load moves. The exit status is 1 if a
reader raised anything but a FormatError that names the file, a training that was killed and resumed ended with other
weights than one that was not, or an input crashed the process or gave a wrong number.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tests.moda import test_hostile_files as files
from tests.moda.training import test_training as trainings

ROOT = Path(__file__).parents[1]
KILLS_OF_A_RUN = 25

Outcome = tuple[int, str]
"""How many were done, and what came of them."""


def mutated_files(count: int, seed: int, folder: Path) -> Outcome:
    """Read mutations of every file that we read."""
    files.write_everything(folder / "written")
    each = -(-count // len(files.READERS))
    refused = 0
    for name in files.READERS:
        shutil.copytree(folder / "written", folder / "changed")
        refused += files.mutate_often(folder / "changed", name, each, f"{name} {seed}")
        shutil.rmtree(folder / "changed")
    done = each * len(files.READERS)
    return done, f"{refused} refused by name, {done - refused} read, no other exception"


def killed_trainings(count: int, seed: int, folder: Path) -> Outcome:
    """Kill trainings at random moments; each must end with the weights of one that was not."""
    whole = trainings.tiny_train(folder / "whole", **trainings.KILLED_OFTEN)
    killed = runs = 0
    while killed < count:
        run = folder / f"run-{runs}"
        killed += trainings.kill_often(run, min(KILLS_OF_A_RUN, count - killed), seed + runs)
        resumed = trainings.tiny_train(run, resume="auto", **trainings.KILLED_OFTEN)
        trainings.assert_same_weights(trainings.weights(resumed), trainings.weights(whole))
        runs += 1
    return killed, f"{runs} trainings, all with the weights of one that never stopped, bit for bit"


def hostile_inputs(count: int, seed: int, folder: Path) -> Outcome:
    """Give tensors that no kernel expects to every public function, in processes of their own."""
    done = rounds = 0
    while done < count:
        environment = {**os.environ, "MODA_HOSTILE_SEED": str(seed + rounds)}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
        run = subprocess.run(
            [sys.executable, "-m", "tests.moda_kernels._helpers.hostile"],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        lines = run.stdout.splitlines()
        wrong = [line for line in lines if line.startswith("wrong")]
        if run.returncode or wrong or lines[-1:] != ["done"]:
            raise AssertionError(f"exit status {run.returncode} at {lines[-1:]}: {wrong[:3]} {run.stderr[-1000:]}")
        done, rounds = done + len(lines) - 1, rounds + 1
    return done, "each gave the right numbers or an exception; no crash"


PARTS: dict[str, Callable[[int, int, Path], Outcome]] = {
    "mutations": mutated_files,
    "kills": killed_trainings,
    "inputs": hostile_inputs,
}


def main() -> None:
    """Run the parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=20_000, help="changed files to read")
    parser.add_argument("--kills", type=int, default=150, help="trainings to kill")
    parser.add_argument("--inputs", type=int, default=3_000, help="hostile inputs to kernels and losses")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("what", "done", "seconds", "outcome", title=f"Soak, seed {given.seed}", title_justify="left")
    failed = False
    for name, part in PARTS.items():
        begin = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder:
                done, outcome = part(getattr(given, name), given.seed, Path(folder))
        except Exception:
            traceback.print_exc()
            failed, done, outcome = True, 0, "FAILED, see above"
        table.add_row(name, f"{done:,}", f"{time.perf_counter() - begin:.0f}", outcome)
    Console(width=120).print(table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
