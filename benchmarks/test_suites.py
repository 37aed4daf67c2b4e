"""The quick cases of `moda bench` for pytest-benchmark: `pytest benchmarks --benchmark-only`.

To compare two versions of the code with pytest-benchmark's own tools (`--benchmark-autosave`, `--benchmark-compare`).
The figures in the documentation come from `moda bench`, which takes contenders in turn.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from moda.bench.case import Case, Contender
from moda.bench.plan import Plan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = Plan(DEVICE, quick=True).cases()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case.suite}-{case.name}".replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Case, dict[str, Contender]]]:
    """A case and its contenders, built once."""
    yield request.param, {contender.name: contender for contender in request.param.build()}
    gc.collect()


@pytest.mark.parametrize("name", ["standard", "reference", "torch", "triton", "native", "ours"])
def test_contender(case: tuple[Case, dict[str, Contender]], name: str, benchmark: BenchmarkFixture) -> None:
    described, contenders = case
    if name not in contenders:
        pytest.skip(f"no contender of {described.suite}: {described.name}")
    contender = contenders[name]
    if contender.skipped:
        pytest.skip(contender.skipped)
    assert contender.check() == ""
    phase, timed = list(contender.phases.items())[-1]
    benchmark.group = f"{described.suite}: {described.name}, {phase}"
    benchmark.extra_info.update({**described.parameters, "bytes": described.moved.get(phase)})

    def synchronised(state: object) -> None:
        timed.call(state)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, setup=lambda: ((timed.prepare(),), {}), rounds=5, warmup_rounds=1)
