"""Runs a plan: every contender is checked, then timed, then noted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from moda.bench import machine
from moda.bench.allocator import kept_memory
from moda.bench.case import Case, Contender
from moda.bench.clock import Budget, Clock, Quartiles, interleave, ratios
from moda.bench.plan import SUITES, Plan
from moda.bench.results import MEASURED, SKIPPED, WRONG, Results, Row

Report = Callable[[str], None]


def run(
    device: torch.device, *, quick: bool = False, suites: Sequence[str] = SUITES, report: Report = lambda _: None
) -> Results:
    """Measure `suites` on `device`; `report` is called with every case before it begins."""
    clock = machine.clock_for(device)
    described = machine.describe(device)
    report("machine's limits")
    limits = machine.limits(device, clock, Budget(least=5 if quick else 15, most=15, seconds=0))
    rows: list[Row] = []
    cases = Plan(device, quick).cases(tuple(suites))
    for index, case in enumerate(cases):
        report(f"{index + 1}/{len(cases)} {case.suite}: {case.name}")
        rows += run_case(case, clock)
    return Results(described, limits, quick, tuple(rows))


def run_case(case: Case, clock: Clock) -> list[Row]:
    """Return the rows of one case: right contenders are timed, the others are noted with the reason."""
    with kept_memory() if case.keeps_memory else nullcontext():
        return _run_case(case, clock)


def _run_case(case: Case, clock: Clock) -> list[Row]:
    rows, right = [], []
    for contender in case.build():
        reason = contender.skipped or _problem(contender)
        if reason:
            status = SKIPPED if contender.skipped else WRONG
            rows.append(_row(case, contender, "", status, note=reason))
        else:
            right.append(contender)
    memory = {contender.name: contender.memory() for contender in right if contender.memory}
    for phase in dict.fromkeys(phase for contender in right for phase in contender.phases):
        rows += _time(case, phase, right, memory, clock)
    del right
    gc.collect()
    return rows


def _problem(contender: Contender) -> str:
    """Return what the check finds. A contender that raises is as unfit for timing as one that is wrong."""
    try:
        return contender.check()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"


def _time(case: Case, phase: str, contenders: Sequence[Contender], memory: dict[str, int], clock: Clock) -> list[Row]:
    timed = {contender.name: contender.phases[phase] for contender in contenders if phase in contender.phases}
    samples = interleave(timed, clock, case.budget)
    baseline = samples.get(case.baseline)
    return [
        _row(
            case,
            contender,
            phase,
            MEASURED,
            seconds=Quartiles.of(samples[contender.name]),
            ratio=ratios(samples[contender.name], baseline) if baseline else None,
            moved=case.moved.get(phase),
            memory=memory.get(contender.name),
            flops=contender.flops,
        )
        for contender in contenders
        if contender.name in samples
    ]


def _row(case: Case, contender: Contender, phase: str, status: str, **measured: object) -> Row:
    return Row(
        suite=case.suite,
        case=case.name,
        parameters=dict(case.parameters),
        baseline=case.baseline,
        contender=contender.name,
        phase=phase,
        status=status,
        **measured,  # type: ignore[arg-type]
    )


def default_folder() -> Path:
    """Return `benchmarks/results` in a checkout, else the current folder."""
    checkout = Path("benchmarks/results")
    return checkout if checkout.is_dir() else Path()
