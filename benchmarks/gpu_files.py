"""What the measurements on a GPU write: files in benchmarks/results/gpu, and in $OUT where that is set."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moda.bench import machine
from moda.bench.results import file_name

DEVICE = "cuda"
RESULTS = Path(__file__).parent / "results" / "gpu"


def options(about: str | None, quick: str) -> argparse.Namespace:
    """What a measurement is asked for: `quick`, of which `quick` says what it leaves out, and `warm`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--warm", action="store_true", help="run once, write nothing")
    return parser.parse_args()


def describe() -> dict[str, Any]:
    """The GPU, versions, commit and date."""
    return machine.describe(torch.device(DEVICE))


@dataclass
class GpuResults:
    """Rows that are written anew, whole, whenever some are added: what was measured is never lost."""

    name: str
    machine: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write the rows behind the others."""
        self.rows += rows
        text = json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n"
        RESULTS.mkdir(exist_ok=True)
        for folder in (RESULTS, *([Path(os.environ["OUT"])] if os.environ.get("OUT") else [])):
            (folder / f"{file_name(self.machine['device']).removesuffix('.json')}-{self.name}.json").write_text(text)
