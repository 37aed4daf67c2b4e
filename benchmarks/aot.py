"""Compile every Triton kernel ahead of time for GPUs that this machine lacks, and read the resources it takes.

    python benchmarks/aot.py                 compile for all targets, write benchmarks/results/aot.json
    python benchmarks/aot.py --check         compile a sample (a tenth: every kernel and dtype, the
                                             targets in turn), compare with that file, exit 1 on a difference

Per kernel, variant and target: registers per thread, shared memory, stack frame, spilled bytes, and how many global
loads and stores of each width the machine code holds. Stack frame and spills must be zero (but for `Case.frame`); loads
and stores in the hot paths (`Case.wide`) must be 128 bits wide. Registers depend on the compiler, so they are compared
only under the Triton that wrote the file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported: the interpreter has nothing to compile

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RESULTS = Path(__file__).parent / "results" / "aot.json"
TARGETS = (80, 90, 100, 120)
DTYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32}


@dataclass(frozen=True)
class Case:
    """One kernel with one set of compile-time arguments; `wide`: its hot loads and stores must be 128 bits."""

    name: str
    kernel: Any
    signature: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    registers: int | None = None  # the launch's cap
    wide_loads: bool = True
    wide_stores: bool = True
    frame: int = 0  # bytes of stack that ptxas may take, which it does on some targets though registers are left


def cases() -> list[Case]:
    """Every kernel, every dtype, every compile-time variant that the launches use."""
    return [*_pooling_cases(), *_loss_cases(), *_relu_pool_cases(), *_norm_cases(), *_attribution_cases()]


def _signature(kernel: Any, pointers: dict[str, Any], constants: dict[str, Any]) -> dict[str, Any]:
    """Types of the arguments in order: constants, 64-bit integers, and pointers (8-byte integers unless given)."""
    types = {}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            types[parameter.name] = "constexpr"
        elif parameter.annotation_type:
            types[parameter.name] = parameter.annotation_type
        else:
            types[parameter.name] = pointers.get(parameter.name, "*i64")
    unknown = set(pointers) - set(types) | set(constants) - set(types)
    if unknown:
        raise ValueError(f"{kernel.__name__} has no argument {sorted(unknown)}")
    return types


def _case(name: str, kernel: Any, pointers: dict[str, Any], constants: dict[str, Any], **rest: Any) -> Case:
    return Case(name, kernel, _signature(kernel, pointers, constants), constants, **rest)


def _pooling_cases() -> Iterator[Case]:
    from moda_kernels.triton_kernels import pool_backward, pool_forward, tables

    for dtype, element in DTYPES.items():
        for access in (16, 8, 4, 2):
            if 8 * access < element.primitive_bitwidth:
                continue
            constants = {"DTYPE": element, "ACCESS": access}
            # Forward stores a mean per row: its wide stores are those of FLAT alone.
            wide = {} if access == 16 else {"wide_loads": False, "wide_stores": False}
            name = f"{dtype}/{access} bytes"
            kernel = pool_forward.pool_kernel
            yield _case(f"pool_kernel/{name}", kernel, {}, constants, registers=pool_forward.REGISTERS, **wide)
            yield _case(f"pool_backward_kernel/{name}", pool_backward.pool_backward_kernel, {}, constants, **wide)
    yield _case(
        "add_splits_kernel", pool_forward.add_splits_kernel, {}, {"BLOCK": pool_forward.SPLIT_BLOCK},
        wide_loads=False, wide_stores=False,
    )  # fmt: skip
    for size in tables._ENTRIES:
        narrow = {"wide_loads": False, "wide_stores": False}
        yield _case(f"write_kernel/{size}", tables._write_kernel, {"entries": ("i64",) * size}, {}, warps=1, **narrow)


def _loss_cases() -> Iterator[Case]:
    from moda_kernels.triton_kernels import losses_backward, pair_terms, preparation, segment_sums

    floats = dict.fromkeys(
        ("inverse", "terms", "partials", "weighted", "affinity", "dispersion", "compactness"), "*fp32"
    )
    floats |= dict.fromkeys(("upstream_affinity", "upstream_dispersion", "upstream_compactness"), "*fp32")
    floats |= dict.fromkeys(("parts", "sums"), "*fp64") | {"arrivals": "*i32"}

    def case(name: str, kernel: Any, constants: dict[str, Any], **rest: Any) -> Case:
        names = {parameter.name for parameter in kernel.params}
        return _case(name, kernel, {key: value for key, value in floats.items() if key in names}, constants, **rest)

    shape = {"ROWS": preparation.ROWS, "WIDTH": preparation.WIDTH, "COMPARED": preparation.COMPARED}
    for size, labels in ((128, True), (preparation.MOST_SAMPLES, True), (16, False)):
        name = f"prepare_kernel/{size if labels else 'norms'}"
        yield case(name, preparation.prepare_kernel, shape | {"LABELS": labels, "SIZE": size}, wide_stores=False)
    for variant, per_class, normalize in (("losses", False, True), ("class_sums", True, True), ("means", True, False)):
        constants = {"PER_CLASS": per_class, "NORMALIZE": normalize}
        yield case(f"block_sums_kernel/{variant}", segment_sums.block_sums_kernel, constants, wide_stores=False)
    for variant, per_class in (("losses", False), ("class_sums", True)):
        # Block sums are 1/32 of the rows; they are read and written a float64 per thread, 256 bytes per warp.
        narrow = {"wide_loads": False, "wide_stores": False}
        yield case(f"combine_kernel/{variant}", segment_sums.combine_kernel, {"PER_CLASS": per_class}, **narrow)
    for name, in_parts in (("parts", True), ("sums", False)):
        given = {"IN_PARTS": in_parts}
        terms = given | {"WIDTH": pair_terms.PARTIALS}
        yield case(f"pair_terms_kernel/{name}", pair_terms.pair_terms_kernel, terms, wide_stores=False)
        kernel, warps = losses_backward.losses_backward_kernel, losses_backward.WARPS
        yield case(f"losses_backward_kernel/{name}", kernel, given, warps=warps)


def _relu_pool_cases() -> Iterator[Case]:
    from moda_kernels.triton_kernels import layouts
    from moda_kernels.triton_kernels import relu_pool_backward as backward
    from moda_kernels.triton_kernels import relu_pool_forward as forward

    shapes: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "flat": (forward.relu_pool_flat_kernel, backward.relu_pool_flat_backward_kernel, {"TILE": layouts.TILE}),
    }
    for width in layouts.ROW_WIDTHS:
        tile = {"ROWS": layouts.TILE // width, "WIDTH": width}
        shapes[f"rows{width}"] = (forward.relu_pool_rows_kernel, backward.relu_pool_rows_backward_kernel, tile)
    for dtype, element in DTYPES.items():
        for shape, (ahead, back, tile) in shapes.items():
            for vec in (128 // element.primitive_bitwidth, 1):
                # A row of four values of two bytes is eight bytes long: no 16-byte access there.
                wide = vec > 1 and (vec == 4 or shape != "rows4")
                suffix = "wide" if vec > 1 else "narrow"
                vec = min(vec, tile.get("WIDTH", vec))
                name = f"{dtype}/{shape}/{suffix}"
                yield _relu_pool(f"relu_pool/{name}", ahead, f"*{dtype}", tile | {"VEC": vec}, wide)
                both = tile | {"VEC": vec, "HAS_DY": True, "HAS_DPOOLED": True}
                yield _relu_pool(f"relu_pool_backward/{name}", back, f"*{dtype}", both, wide)
        for vec in (128 // element.primitive_bitwidth, 1):
            name, wide = f"{dtype}/columns/{'wide' if vec > 1 else 'narrow'}", vec > 1
            neurons = layouts.LINE_BYTES * 8 // element.primitive_bitwidth
            ahead = forward.relu_pool_columns_kernel
            plain = _columns_tile(neurons, forward.MOST_POSITIONS) | {"VEC": vec, "NORM": False, "RESIDUAL": False}
            plain |= {"ACTIVATION": "relu"}
            yield _relu_pool(f"relu_pool/{name}", ahead, f"*{dtype}", plain, wide)
            lines = {"LINES": backward.COLUMNS_TILE // neurons, "NEURONS": neurons, "VEC": vec, "LARGE": False}
            both = lines | {"HAS_DY": True, "HAS_DPOOLED": True}
            back = backward.relu_pool_columns_backward_kernel
            yield _relu_pool(f"relu_pool_backward/{name}", back, f"*{dtype}", both, wide)
    yield _case(
        "add_parts_kernel", forward.add_parts_kernel, {"parts": "*fp32", "pooled": "*fp32"},
        {"BLOCK": forward.PARTS_BLOCK}, wide_loads=False, wide_stores=False,
    )  # fmt: skip


def _columns_tile(neurons: int, positions: int) -> dict[str, int]:
    from moda_kernels.triton_kernels.relu_pool_forward import COLUMNS_TILE

    positions = min(positions, COLUMNS_TILE // neurons)
    return {"SAMPLES": COLUMNS_TILE // (neurons * positions), "POSITIONS": positions, "NEURONS": neurons}


def _norm_cases() -> Iterator[Case]:
    from moda_kernels.triton_kernels import norm_apply

    joined = {"NEURONS": norm_apply.JOINED_NEURONS, "PARTS": norm_apply.JOINED_PARTS}
    narrow: dict[str, Any] = {"wide_loads": False, "wide_stores": False}
    numbers = dict.fromkeys(("sums", "saved", "weight", "bias", "running_mean", "running_var"), "*fp32")
    floats = {"momentum": "fp32", "eps": "fp32"}
    for training in (True, False):
        given = joined | {"TRAINING": training}
        name = "training" if training else "eval"
        have = dict.fromkeys(("RUNNING", "WEIGHT", "BIAS"), True)
        yield _case(f"numbers_kernel/{name}", norm_apply.numbers_kernel, numbers | floats, given | have, **narrow)
        joins = dict.fromkeys(("sums", "saved", "parameters", "means"), "*fp32")
        yield _case(f"join_kernel/{name}", norm_apply.join_kernel, joins, given, **narrow)
    for dtype in ("fp32", "bf16"):
        for wide in (True, False):
            yield from _norm_passes(dtype, wide, "relu")
        for activation in ("relu6", "silu"):
            yield from _norm_passes(dtype, True, activation)


def _norm_passes(dtype: str, wide: bool, activation: str) -> Iterator[Case]:
    """The four passes over an activation in rows and in columns; behind ReLU with a residual where accesses are wide.
    Statistics know no activation, and are left out behind any other than ReLU.
    """
    from moda_kernels.triton_kernels import layouts, norm_apply, norm_sums, relu_pool_forward

    itemsize, relu = DTYPES[dtype].primitive_bitwidth // 8, activation == "relu"
    activations = dict.fromkeys(("x", "y", "kept", "dy", "dx", "residual", "dresidual"), f"*{dtype}")
    floats = dict.fromkeys(("saved", "numbers", "sums", "pooled", "parts", "dpooled", "means"), "*fp32")

    def case(shape: str, kernel: Any, constants: dict[str, Any], residual: bool, writes: bool = True) -> Case:
        names = {parameter.name for parameter in kernel.params}
        vec = min(16 // itemsize, constants.get("WIDTH", 16)) if wide else 1
        given = constants | {"VEC": vec, "ALIGN": vec * itemsize, "LARGE": False, "RESIDUAL": residual}
        given |= {"ACTIVATION": activation}
        full = vec * itemsize == 16  # a row of four half-precision values has eight bytes
        variant = ("/residual" if residual else "") + ("" if relu else f"/{activation}")
        return _case(
            f"{kernel.__name__}/{shape}/{dtype}/{'wide' if wide else 'narrow'}{variant}",
            kernel,
            {name: kind for name, kind in (activations | floats).items() if name in names},
            {name: value for name, value in given.items() if name in names},
            wide_loads=full,
            wide_stores=full and writes,
            frame=8,
        )

    for residual in (False, True) if wide and relu else (False,):
        both = {"HAS_DY": True, "HAS_DPOOLED": True}
        back = {"HAS_DY": True, "HAS_DPOOLED": not residual, "MASKED": residual, "TRAINING": True}
        for width in (4, 256)[residual:] if wide else (64,):
            together = max(1, norm_sums.LINE // width)

            def tile(elements: int, together: int = together, width: int = width) -> dict[str, int]:
                return {"SAMPLES": max(1, elements // (together * width)), "NEURONS": together, "WIDTH": width}

            if not residual and relu:
                statistics = tile(norm_sums.STATISTICS_TILES.rows)
                yield case(f"rows{width}", norm_sums.statistics_rows_kernel, statistics, residual, False)
            sums = tile(norm_sums.GRADIENT_TILES.rows) | both
            yield case(f"rows{width}", norm_sums.gradient_sums_rows_kernel, sums, residual, residual)
            walked = {"ROWS": layouts.TILE // width, "WIDTH": width}
            yield case(f"rows{width}", norm_apply.apply_rows_kernel, walked, residual)
            gradient = {"ROWS": norm_apply.GRADIENT_ROWS_TILE // width, "WIDTH": width} | back
            yield case(f"rows{width}", norm_apply.gradient_rows_kernel, gradient, residual)
        neurons = layouts.LINE_BYTES // itemsize
        line = {"NEURONS": neurons}
        if not residual and relu:
            rows = {"ROWS": norm_sums.STATISTICS_TILES.columns_bytes // layouts.LINE_BYTES}
            yield case("columns", norm_sums.statistics_columns_kernel, line | rows, residual, False)
        rows = {"ROWS": norm_sums.GRADIENT_TILES.columns_bytes // layouts.LINE_BYTES}
        yield case("columns", norm_sums.gradient_sums_columns_kernel, line | rows | both, residual, residual)
        rows = {"ROWS": relu_pool_forward.COLUMNS_TILE // neurons}
        yield case("columns", norm_apply.gradient_columns_kernel, line | rows | back, residual)
        for positions in (4, relu_pool_forward.MOST_POSITIONS) if wide else (16,):
            shape = _columns_tile(neurons, positions) | {"NORM": True}
            yield case(f"columns{positions}", relu_pool_forward.relu_pool_columns_kernel, shape, residual)


def _attribution_cases() -> Iterator[Case]:
    from moda_kernels.triton_kernels import attribution, layouts
    from moda_kernels.triton_kernels.relu_pool_forward import PARTS_BLOCK

    columns = {"SPAN": layouts.SPAN, "POSITIONS": layouts.COLUMN_POSITIONS, "NEURONS": layouts.COLUMN_NEURONS}
    shapes: dict[str, tuple[Any, dict[str, Any]]] = {
        "flat": (attribution.attribution_flat_kernel, {"TILE": layouts.TILE}),
        "columns": (attribution.attribution_columns_kernel, columns),
    }
    for width in layouts.ROW_WIDTHS:
        shapes[f"rows{width}"] = (attribution.attribution_rows_kernel, {"ROWS": layouts.TILE // width, "WIDTH": width})
    for dtype, element in DTYPES.items():
        for shape, (kernel, tile) in shapes.items():
            for vec in (128 // element.primitive_bitwidth, 1):
                wide = vec > 1 and (vec == 4 or shape != "rows4")  # as for relu_pool
                name = f"attribution/{dtype}/{shape}/{'wide' if vec > 1 else 'narrow'}"
                pointers = {"x": f"*{dtype}", "g": f"*{dtype}"}
                pointers |= {key: "*fp32" for key in ("out", "parts") if key in {p.name for p in kernel.params}}
                constants = tile | {"VEC": min(vec, tile.get("WIDTH", vec))}
                yield _case(name, kernel, pointers, constants, wide_loads=wide, wide_stores=wide and shape == "flat")
    yield _case(
        "add_attribution_parts_kernel", attribution.add_attribution_parts_kernel, {"parts": "*fp32", "out": "*fp32"},
        {"BLOCK": PARTS_BLOCK}, wide_loads=False, wide_stores=False,
    )  # fmt: skip


def _relu_pool(name: str, kernel: Any, dtype: str, constants: dict[str, Any], wide: bool) -> Case:
    names = {parameter.name for parameter in kernel.params}
    pointers = {key: dtype for key in ("x", "y", "dy", "dx", "residual") if key in names}
    pointers |= {key: "*fp32" for key in ("pooled", "parts", "dpooled", "numbers") if key in names}
    return _case(name, kernel, pointers, constants, wide_loads=wide, wide_stores=wide)


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one target."""

    registers: int
    shared: int
    stack: int
    spills: int
    loads: dict[str, int]
    stores: dict[str, int]


def compile_case(case: Case, capability: int) -> Resources:
    """Compile for one compute capability (90 for sm_90) and read the machine code."""
    names = list(case.signature)
    # PyTorch's allocator aligns to 512 bytes, so every pointer argument is 16-byte aligned, or the launch disregards
    # its alignment. relu_pool's narrow variants are for pointers that are not aligned.
    loose = {parameter.name for parameter in case.kernel.params if parameter.do_not_specialize_on_alignment}
    pointers = [name for name, kind in case.signature.items() if isinstance(kind, str) and kind.startswith("*")]
    aligned = [name for name in pointers if name not in loose]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if "narrow" not in case.name}
    options = {"num_warps": case.warps} | ({"maxnreg": case.registers} if case.registers else {})
    source = ASTSource(case.kernel, case.signature, constexprs=case.constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, sass = _disassemble(compiled.asm["cubin"])
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return Resources(
        numbers["REG"], compiled.metadata.shared, numbers["STACK"], spills + numbers["LOCAL"],
        _widths("LDG", sass), _widths("STG", sass),
    )  # fmt: skip


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code of a cubin, by the cuobjdump that Triton ships."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = [subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout
               for flag in ("--dump-resource-usage", "--dump-sass")]  # fmt: skip
    return run[0], run[1]


def _widths(instruction: str, sass: str) -> dict[str, int]:
    """Number of instructions by bits per thread: {"128": 8, "32": 1}."""
    found = re.findall(rf"\b{instruction}\.(\S*)", sass)
    return dict(
        sorted(
            Counter(
                next((w for w in ("128", "64", "U16", "U8") if w in kind.split(".")), "32") for kind in found
            ).items()
        )
    )


def _task(name: str, capability: int) -> tuple[str, dict[str, Any]]:
    case = next(case for case in cases() if case.name == name)
    return f"{name}/sm_{capability}", asdict(compile_case(case, capability))


def jobs(complete: bool) -> list[tuple[str, int]]:
    """Which case on which target: all on all, or a sample in which the targets take turns."""
    names = [case.name for case in cases()]
    if complete:
        return [(name, target) for name in names for target in TARGETS]
    # relu_pool's cases come in fours (two alignments, forward and backward), those of attributions in twos, those of
    # pooling and norms in more: one of each four, another one each time.
    several = ("relu_pool", "pool_", "attribution", "statistics", "gradient", "apply")
    pooling = [name for name in names if name.startswith(several)]
    chosen = [name for index, name in enumerate(pooling) if index % 4 == index // 4 % 4]
    chosen += [name for name in names if name not in pooling]
    return [(name, TARGETS[index % len(TARGETS)]) for index, name in enumerate(chosen)]


def survey(complete: bool, workers: int) -> dict[str, dict[str, Any]]:
    """Resources by "case/target"."""
    # The workers are spawned, because the compiler's threads do not survive a fork.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return dict(sorted(pool.map(_task, *zip(*jobs(complete), strict=True))))


def faults(found: dict[str, dict[str, Any]]) -> list[str]:
    """What no kernel may show: a stack frame, spills, a hot path without 128-bit accesses."""
    wanted = {case.name: case for case in cases()}
    messages = []
    for key, numbers in found.items():
        case = wanted[key.rsplit("/", 1)[0]]
        if numbers["stack"] > case.frame or numbers["spills"] * 4 > case.frame:
            messages.append(f"{key}: stack frame {numbers['stack']} bytes, spills {numbers['spills']}")
        if case.wide_loads and "128" not in numbers["loads"]:
            messages.append(f"{key}: no 128-bit load among {numbers['loads']}")
        if case.wide_stores and "128" not in numbers["stores"]:
            messages.append(f"{key}: no 128-bit store among {numbers['stores']}")
    return messages


def differences(found: dict[str, dict[str, Any]], recorded: dict[str, Any]) -> list[str]:
    """Where `found` departs from the file: everything under the Triton that wrote it, else nothing but the cases."""
    kernels = recorded["kernels"]
    messages = [f"{key}: not in {RESULTS.name}" for key in found if key not in kernels]
    if recorded["triton"] == triton.__version__:
        messages += [f"{key}: recorded {kernels[key]}, found {numbers}" for key, numbers in found.items()
                     if key in kernels and kernels[key] != numbers]  # fmt: skip
    return messages


def write(found: dict[str, dict[str, Any]]) -> None:
    """The table as JSON, one line per case and target."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(numbers)}" for key, numbers in found.items())
    RESULTS.write_text(f'{{\n "triton": {json.dumps(triton.__version__)},\n "kernels": {{\n{lines}\n }}\n}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the recorded table instead of writing it")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    found = survey(not arguments.check, arguments.workers)
    messages = faults(found)
    if arguments.check:
        messages += differences(found, json.loads(RESULTS.read_text()))
    else:
        RESULTS.parent.mkdir(exist_ok=True)
        write(found)
    print("\n".join(messages) or f"{len(found)} compilations: no spills but those allowed, wide where they must be")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
