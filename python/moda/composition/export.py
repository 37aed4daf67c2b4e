"""A composed model as one file that needs no moda to run: torch.export (.pt2) or ONNX, with its provenance inside."""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moda.checks import integer, items, json_value, mapping, text
from moda.composition.composed import ComposedModel
from moda.composition.ensemble import Ensemble
from moda.composition.source import to_source
from moda.files import Format, FormatError, as_path, write_bytes
from moda.inference import device_of, evaluating
from moda.structure import flatten_output

__all__ = ["FORMATS", "export", "provenance_of", "read_provenance", "to_source"]

EXPORT = Format(
    "moda-export",
    {
        "classes": items(integer(0), least=1),
        "class_names": items(text(empty=True)),
        "input_shape": items(integer(1)),
        "source_run": text(empty=True),
        "source": mapping(json_value),
    },
)
FORMATS = (".pt2", ".onnx")
ENTRY = "moda"
LONGEST_NOTE = 1 << 20
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference of a logit, relative to the largest one, between the model and the file read back, by dtype."""


def export(
    model: ComposedModel | Ensemble, images: Tensor, path: str | Path, provenance: Mapping[str, Any] | None = None
) -> float:
    """Write a composed model to a `.pt2` or `.onnx` file, and check that the file computes the same logits.

    The file takes batches of any size, `images` (N, C, H, W) or what else the model takes, and gives `logits`
    (N, len(classes)), or all outputs of a model that has several. It is written whole or not at all.

    Args:
        model: made by `moda.compose`, of one input; exported as it is in evaluation mode, on the CPU.
        images: (N, ...), N at least 2: inputs to check with, images or tokens.
        path: ends in .pt2 or .onnx.
        provenance: what `provenance_of` gives; by default what the model knows of itself, the names of its classes too.

    Returns:
        The largest difference of a logit between the model and the file read back.

    Raises:
        ValueError: the name ends in neither, there are fewer than two images, or the check fails.
        ImportError: ONNX was asked for and a package is missing; the message says how to install it.
    """
    path = as_path("path", path)
    if path.suffix not in FORMATS:
        raise ValueError(f"path: expected a name that ends in {' or '.join(FORMATS)}, got {path.name!r}")
    if len(images) < 2:
        raise ValueError(f"images: expected at least 2 to check with, got {len(images)}")
    if device_of(model).type != "cpu":
        model = copy.deepcopy(model).to("cpu")
    images = images.cpu()
    if provenance is None:
        names = model.class_names or tuple(map(str, model.classes))
        provenance = provenance_of(model, list(names), tuple(images.shape[1:]), "", {})
    note = json.dumps(dict(provenance), allow_nan=False)
    example = torch.zeros_like(images[:2])  # .pt2 files keep their example: not an image of somebody's
    with evaluating(model), torch.no_grad():
        with _quiet():
            data = _to_pt2(model, example, note) if path.suffix == ".pt2" else _to_onnx(model, example, note)
        expected = _joined([_tensors(model(part)) for part in _parts(images)])
    got = (_run_pt2 if path.suffix == ".pt2" else _run_onnx)(data, images)
    difference = 0.0
    for one, other in zip(got, expected, strict=True):
        apart = float((one.double() - other.double()).abs().max())
        if not apart <= TOLERANCE.get(other.dtype, 1e-4) * max(1.0, float(other.double().abs().max())):
            raise ValueError(f"{path.name}: the exported model's logits differ from the model's by {apart:.3g}")
        difference = max(difference, apart)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
    return difference


def provenance_of(
    model: ComposedModel | Ensemble,
    class_names: list[str],
    input_shape: tuple[int, ...],
    source_run: str,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """What an exported file says of itself.

    Args:
        model: the composed model.
        class_names: of its outputs, in order.
        input_shape: (C, H, W).
        source_run: the run it was composed from.
        source: how: hashes of weights and masks, threshold.
    """
    return {
        **EXPORT.header(),
        "classes": list(model.classes),
        "class_names": class_names,
        "input_shape": list(input_shape),
        "source_run": source_run,
        "source": dict(source),
    }


def read_provenance(path: str | Path) -> dict[str, Any]:
    """What `export` put into a file. The model is not loaded, and a .pt2 file needs no more than the standard library.

    Raises:
        FormatError (a ValueError): it is missing, no such file, or was not written by `moda export`.
        ImportError: an .onnx file, and the package onnx is missing.
    """
    path = as_path("path", path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    try:
        note = _note_of_pt2(path) if path.suffix == ".pt2" else _note_of_onnx(path)
    except (FormatError, ImportError):
        raise
    except Exception as error:  # a malformed file makes the readers stumble in many ways
        raise FormatError(f"{path}: not an exported model: {' '.join(str(error).split())}") from None
    if note is None:
        raise FormatError(f"{path}: was not written by moda export: it has no {EXPORT.name} entry")
    return EXPORT.parse(path, note)


def _note_of_pt2(path: Path) -> bytes | None:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if Path(name).name == f"{ENTRY}.json"]
        if names and archive.getinfo(names[0]).file_size > LONGEST_NOTE:
            # Compressed, it may be of any size.
            raise FormatError(f"{path}: expected a note of at most {LONGEST_NOTE} bytes")
        return archive.read(names[0]) if names else None


def _note_of_onnx(path: Path) -> bytes | None:
    model = _required("onnx").load(str(path), load_external_data=False)
    return next((entry.value.encode() for entry in model.metadata_props if entry.key == ENTRY), None)


def _to_pt2(model: nn.Module, images: Tensor, note: str) -> bytes:
    buffer = io.BytesIO()
    program = torch.export.export(model, (images,), dynamic_shapes=_any_batch())
    torch.export.save(program, buffer, extra_files={f"{ENTRY}.json": note})
    return buffer.getvalue()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch's exporters say of their own parts and of packages that are not needed here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _any_batch() -> dict[str, Any]:
    return {"args": ({0: torch.export.Dim("batch", min=1)},)}


def _run_pt2(data: bytes, images: Tensor) -> list[Tensor]:
    loaded = torch.export.load(io.BytesIO(data)).module()
    with torch.no_grad():
        return _joined([_tensors(loaded(part)) for part in _parts(images)])


def _tensors(outputs: Any) -> list[Tensor]:
    """The tensors among a model's outputs."""
    return flatten_output(outputs)[1]


def _joined(batches: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def _parts(images: Tensor) -> tuple[Tensor, Tensor]:
    """Batches of different sizes, the same for the model and for the file."""
    return images[:1], images[1:]


def _to_onnx(model: nn.Module, images: Tensor, note: str) -> bytes:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _required(package)
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=_any_batch(),
        input_names=["images"],
        output_names=_output_names(model),
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no model")
    proto = program.model_proto
    entry = proto.metadata_props.add()
    entry.key, entry.value = ENTRY, note
    data: bytes = proto.SerializeToString()
    return data


def _output_names(model: nn.Module) -> list[str]:
    """`logits`, or of several outputs their paths."""
    if not isinstance(model, ComposedModel):
        return ["logits"]
    paths = list(model.routes["eval"].outputs.paths())
    return ["logits"] if len(paths) == 1 else [re.sub(r"\W+", "_", path).strip("_") or "output" for path in paths]


def _run_onnx(data: bytes, images: Tensor) -> list[Tensor]:
    """Run by onnxruntime; by ONNX's own evaluator where that lacks an operation for the type (float64, bfloat16)."""
    runtime = _required("onnxruntime")
    if images.dtype == torch.bfloat16:  # which NumPy, by which onnxruntime is given its inputs, does not have
        return _evaluated(data, images)
    try:
        session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except runtime.capi.onnxruntime_pybind11_state.NotImplemented:
        return _evaluated(data, images)
    batches = [session.run(None, {"images": part.numpy()}) for part in _parts(images)]
    return _joined([[torch.from_numpy(value) for value in values] for values in batches])


def _evaluated(data: bytes, images: Tensor) -> list[Tensor]:
    session = _required("onnx.reference").ReferenceEvaluator(_required("onnx").load_model_from_string(data))
    half = images.dtype == torch.bfloat16
    arrays = [
        part.float().numpy().astype(_required("ml_dtypes").bfloat16) if half else part.numpy()
        for part in _parts(images)
    ]
    batches = [session.run(None, {"images": array}) for array in arrays]
    return _joined([[torch.from_numpy(value.astype("float64")) for value in values] for values in batches])


def _required(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(f"ONNX export needs {package}; install it: pip install 'moda-kernels[export]'") from None
