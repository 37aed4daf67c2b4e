"""Composition over the zoo: the law, and parameters left over the ideal cut (docs/composition.md).

    python -m benchmarks.composition_zoo                      measure the models that are not measured yet
    python -m benchmarks.composition_zoo --only 'timm/*' --again
    python -m benchmarks.composition_zoo --brief              a third of the work
    python -m benchmarks.composition_zoo --render             write the table into docs/composition.md

Every model is composed with random masks for two class subsets, in float64 and in float32, with as many free sizes as
it allows. `--brief` composes in float64 alone and casts the composed and the masked model for float32, and leaves the
number of samples free alone; the results say so. They are benchmarks/results/composition-zoo.json; a call that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "composition-zoo.json", ROOT / "docs" / "composition.md"
LIMIT = 600.0
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
GOAL = 0.1
START, END = "<!-- zoo -->", "<!-- /zoo -->"


# ---- measuring ------------------------------------------------------------------------------------------------------


def measured(name: str, brief: bool, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What composition makes of one model of the zoo; with what is `known` of it, of float32 alone."""
    import torch

    from tests.moda._helpers.zoo import ZOO
    from tests.moda._helpers.zoo_law import NoTapsError, verdict

    found: dict[str, Any] = {"family": ZOO[name].family, "brief": brief}
    started = time.process_time()
    for dtype in (torch.float64, torch.float32) if known is None else (torch.float32,):
        key = str(dtype).removeprefix("torch.")
        if key in found:
            break  # measured by a cast
        try:
            wanted = known is None and "whole" not in found
            result = verdict(ZOO[name], dtype, measure=wanted, cast=brief and key == "float64")
        except NoTapsError:
            return {**found, "status": "no activations"}
        except ValueError as error:
            return {**found, "status": "refused", "why": _plain(str(error))}
        except Exception as error:
            if key == "float64" and not _runs(ZOO[name], dtype):
                continue  # the model itself does not run in this precision
            place = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{key}: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
            return {**found, "status": "failed", "why": _plain(why)}
        for mode, error in result.errors.items():
            own, _, single = mode.partition(", ")
            found.setdefault(single or key, {})[own] = error
        for mode in result.shaky:
            own, _, single = mode.partition(", ")
            found.setdefault(f"{single or key}_shaky", []).append(own)
        if result.refused:
            found["refused"] = {mode: _plain(why) for mode, why in result.refused.items()}
        if result.left is not None:
            found |= {"whole": result.left.whole, "left": result.left.composed, "lean": result.left.lean}
            found |= {"ideal": result.left.ideal, "even": result.left.even}
        found["any_batch"] = result.any_batch
    if known is not None:
        return {**known, **{key: value for key, value in found.items() if key.startswith("float32")}}
    return {**found, "status": "composed", "seconds": round(time.process_time() - started, 2)}


def _runs(entry: Any, dtype: Any) -> bool:
    """Whether the model itself runs in a precision."""
    from tests.moda._helpers.zoo_law import inputs_of, made

    args, kwargs = inputs_of(entry, 2, 1, dtype)
    try:
        made(entry, dtype)(*args, **kwargs)
    except Exception:
        return False
    return True


def _plain(message: str) -> str:
    """A message without the folders of this machine."""
    return re.sub(r"/\S*/site-packages/|/\S*/vision/|/\S*/tests/", "", message)[:400]


def _work(connection: Connection, brief: bool) -> None:
    import tests.conftest  # noqa: F401  # makes torchvision and timm importable

    warnings.simplefilter("ignore")
    if brief:
        from moda.composition import capture

        capture.FREEDOMS = capture.FREEDOMS[1:]
    while True:
        name, known = connection.recv()
        connection.send(measured(name, brief, known))


class Worker:
    """A process that measures one model after another, and is replaced where one takes too long or dies."""

    def __init__(self, limit: float, brief: bool) -> None:
        self.limit, self.brief = limit, brief
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, self.brief), daemon=True)
        self.process.start()
        other.close()

    def measure(self, name: str, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What was found of one model."""
        self.connection.send((name, known))
        try:
            if self.connection.poll(self.limit):
                found: dict[str, Any] = self.connection.recv()
                return found
            why = f"took more than {self.limit:.0f} s"
        except EOFError:
            why = "the process ended"
        self.stop()
        self._start()
        return {"status": "failed", "why": why, "brief": self.brief}

    def stop(self) -> None:
        """End the process."""
        self.process.kill()


# ---- the table ------------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each family, and one for all."""
    families = list(dict.fromkeys(found["family"] for found in results.values()))
    heads = ("family", "models", "composed", "law broken", "refused", "failed", "within 10 % of the ideal",
             "with `published=False`", "and groups of one shape", "over the ideal, median", "left, median")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += [_line(family, [r for r in results.values() if r["family"] == family]) for family in families]
    return "\n".join([*lines, _line("all", list(results.values()))])


def _line(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    composed = [row for row in rows if row["status"] == "composed"]
    counts = {status: sum(row["status"] == status for row in rows) for status in ("refused", "failed")}
    masked = [row for row in rows if row["status"] != "no activations"]
    broken = sum(not _holds(row) for row in composed)
    sized = [row for row in composed if row.get("ideal")]
    shares = [_share([_over(row, *keys) for row in sized]) for keys in (("left",), ("lean",), ("lean", "even"))]
    over, left = sorted(_over(row, "lean") for row in sized), sorted(row["left"] / row["whole"] for row in sized)
    middles = (f"{max(over[len(over) // 2], 0):.1%}", f"{left[len(left) // 2]:.2f}") if over else ("-", "-")
    cells = (name, len(masked), len(composed), broken, *counts.values(), *shares, *middles)
    return "| " + " | ".join(map(str, cells)) + " |"


def _over(row: Mapping[str, Any], left: str, ideal: str = "ideal") -> float:
    """By how much what is left is over an ideal; of rows that are older than a number, of what bounds it."""
    return float(row.get(left, row["left"]) / row.get(ideal, row["ideal"]) - 1)


def _share(over: Sequence[float]) -> str:
    close = sum(value <= GOAL for value in over)
    return f"{close} of {len(over)} ({close / len(over):.0%})" if over else "-"


def _holds(row: Mapping[str, Any]) -> bool:
    return all(
        error <= TOLERANCE[key] or mode in row.get(f"{key}_shaky", ())
        for key in TOLERANCE
        for mode, error in row.get(key, {}).items()
    )


def exceptions(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Models that were refused, failed, or stay larger than they have to."""
    for name, row in results.items():
        if row["status"] in ("refused", "failed"):
            yield f"- `{name}`: {row['status']}. {row['why'].splitlines()[0][:200]}"
        elif row.get("ideal") and _over(row, "left") > GOAL:
            whole = row["whole"]
            left, lean, ideal, even = (row.get(key, row["left"]) / whole for key in ("left", "lean", "ideal", "even"))
            yield (
                f"- `{name}`: {left:.3f} of the parameters are left, {lean:.3f} with published=False, of which "
                f"{ideal:.3f} have to be, {min(even, left):.3f} with groups of one shape."
            )


def render() -> None:
    """Write the table into the page, between its marks."""
    results = json.loads(RESULTS.read_text())
    page = PAGE.read_text()
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    brief = sum(bool(row.get("brief")) for row in results.values())
    said = f"{len(results)} models were measured, {brief} of them with `--brief`."
    PAGE.write_text(f"{before}{START}\n{table(results)}\n\n{said}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Composition over the zoo of models.")
    parser.add_argument("--only", default="*", help="names of models, with wildcards")
    parser.add_argument("--again", action="store_true", help="also those that are measured already")
    parser.add_argument("--failed", action="store_true", help="those that failed or were refused again")
    parser.add_argument("--lacking", action="store_true", help="in float32, those that have no result in it")
    parser.add_argument(
        "--brief", action="store_true", help="one export: float32 by a cast, free number of samples alone"
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that a model may take")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th model from the i-th on, for several machines")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="write the table and list what is not as it should be")
    options = parser.parse_args()
    if options.render:
        render()
        print("\n".join(exceptions(json.loads(RESULTS.read_text()))))
        return
    import tests.conftest  # noqa: F401
    from tests.moda._helpers.zoo import ZOO

    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    worker = Worker(options.limit, options.brief)
    first, step = map(int, options.part.split("/"))
    for name in list(ZOO)[first::step]:
        row = results.get(name, {})
        status = row.get("status")
        todo = status is None or options.again or (options.failed and status in ("failed", "refused"))
        lacking = options.lacking and status == "composed" and not row.get("float32")
        if not (fnmatch(name, options.only) and (todo or lacking)):
            continue
        results[name] = {"family": ZOO[name].family, **worker.measure(name, None if todo else row)}
        print(name, json.dumps(results[name]), flush=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    worker.stop()


if __name__ == "__main__":
    main()
