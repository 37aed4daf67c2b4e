"""No input crashes the process or gives a wrong number: it works, or it is an exception (helpers: _helpers/hostile.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_hostile_inputs():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    run = subprocess.run(
        [sys.executable, "-m", "tests.moda_kernels._helpers.hostile"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = run.stdout.splitlines()
    assert run.returncode == 0, f"died of {run.returncode} at {lines[-1:]}: {run.stderr[-2000:]}"
    assert [line for line in lines if line.startswith("wrong")] == []
    assert lines[-1] == "done"
    assert len(lines) > 2000
