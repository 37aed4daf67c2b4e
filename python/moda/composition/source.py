"""A way back to plain PyTorch: a composed model as a Python file that needs torch alone, and its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from moda.composition.composed import ComposedModel, Route, parameters_of
from moda.composition.graphs import code_of
from moda.files import as_path, check_own_folder, write_bytes, write_tensors
from moda.structure import Structure

__all__ = ["to_source"]

CODE_FILE = "model.py"
WEIGHTS_FILE = "model.safetensors"

_HEADER = '''"""A model of the classes {classes}, written by moda-kernels; it needs torch alone.

    from model import load
    model = load("model.safetensors")      # on the CPU, in evaluation mode

Tensors are called as in the model that this one was made from. The functions `evaluate` and `train` are what it does in
either mode.
"""

import json
import operator
import struct

import torch
from torch import nn

CLASSES = {classes}
CLASS_NAMES = {names}
PARAMETERS = {parameters}  # name -> whether it is trained; other tensors are buffers
SAVED = {saved}  # tensors that a state_dict holds
SAME = {same}  # further names of the same tensors


class Model(nn.Module):
    """The model: its tensors lie in modules named as they were."""

    def __init__(self, tensors):
        super().__init__()
        made = {{}}
        for name, tensor in tensors.items():
            made[name] = nn.Parameter(tensor, PARAMETERS[name]) if name in PARAMETERS else tensor
        made.update({{name: made[first] for name, first in SAME.items()}})
        for name, tensor in made.items():
            home, own = self._home(name)
            if isinstance(tensor, nn.Parameter):
                home._parameters[own] = tensor
            else:
                home._buffers[own] = tensor
                if name not in SAVED:
                    home._non_persistent_buffers_set.add(own)
{modules}
    def _home(self, name):
        home = self
        *path, own = name.split(".")
        for part in path:
            home = home._modules.setdefault(part, nn.Module())
        return home, own

    def _place(self, name, module):
        home, own = self._home(name)
        home._modules[own] = module

    def forward(self, *args, **kwargs):
        """As the model it was made from; outputs of the classes alone."""
        run = train if self.training else evaluate
        tensors = [*args, *kwargs.values()]
        return run(self, *tensors)


def load(path):
    """The model with the tensors of a safetensors file, in evaluation mode."""
    return Model(read(path)).eval()


def read(path):
    """The tensors of a safetensors file by name."""
    with open(path, "rb") as file:
        data = file.read()
    (length,) = struct.unpack("<Q", data[:8])
    kinds = {{
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
        "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    }}
    tensors = {{}}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            part = bytearray(data[8 + length + first : 8 + length + last])
            kind = kinds[entry["dtype"]]
            flat = torch.frombuffer(part, dtype=kind) if part else torch.empty(0, dtype=kind)
            tensors[name] = flat.reshape(entry["shape"])
    return tensors


'''


def to_source(composed: ComposedModel, folder: str | Path) -> Path:
    """Write a composed model as `model.py`, which needs torch alone, with its tensors in `model.safetensors`.

    Args:
        composed: made by `moda.compose`.
        folder: made if need be.

    Returns:
        The path of `model.py`.

    Raises:
        TypeError: `composed` was not made by `moda.compose`.
        ValueError: its inputs are not plain arguments (tensors in lists or dicts), it calls an operation that PyTorch
            alone does not have, or the folder is of another kind: a run, ...
    """
    if not isinstance(composed, ComposedModel):
        raise TypeError(f"composed: expected a model made by moda.compose, got {type(composed).__name__}")
    tensors = parameters_of(composed)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    header = _HEADER.format(
        classes=list(composed.classes),
        names=None if composed.class_names is None else list(composed.class_names),
        parameters={name: t.requires_grad for name, t in tensors.items() if isinstance(t, nn.Parameter)},
        saved=sorted(composed.state_dict()),
        same={name: first[id(t)] for name, t in tensors.items() if first[id(t)] != name},
        modules="".join(
            f"        self._place({name!r}, nn.{module!r})\n" for name, module in composed.activations().items()
        ),
    )
    parts = [
        _function(composed.routes.get(mode), name, tensors) for mode, name in (("eval", "evaluate"), ("train", "train"))
    ]
    folder = as_path("folder", folder)
    check_own_folder(folder, CODE_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_FILE, {name: tensors[name] for name in first.values()})
    write_bytes(folder / CODE_FILE, (header + "\n\n".join(parts)).encode())
    return folder / CODE_FILE


def _function(route: Route | None, name: str, tensors: Mapping[str, Tensor]) -> str:
    if route is None:
        return f'def {name}(self, *inputs):\n    raise RuntimeError("the model has no graph for this mode")\n'
    arguments = route.inputs.parts[0].parts + route.inputs.parts[1].parts
    if any(part.kind != "tensor" for part in arguments):
        raise ValueError("composed: its inputs are no plain tensors; write it with moda.save_composed instead")

    def state(path: str) -> str:
        *homes, own = path.split(".")
        kind = "_parameters" if isinstance(tensors[path], nn.Parameter) else "_buffers"
        return f"self{''.join(f'._modules[{home!r}]' for home in homes)}.{kind}[{own!r}]"

    def module(path: str) -> str:
        return "self" + "".join(f"._modules[{home!r}]" for home in path.split("."))

    lines = code_of(route.graph, state, module, name).splitlines()
    values = lines[-1].removeprefix("    return ")
    lines[-1] = f"    values = iter({values})"
    return "\n".join([*lines, f"    return {_nested(route.outputs)}"]) + "\n"


def _nested(structure: Structure) -> str:
    """An expression that takes the next values and nests them; data classes become dicts."""
    if structure.kind == "tensor":
        return "next(values)"
    if structure.kind == "constant":
        return repr(structure.value)
    parts = [_nested(part) for part in structure.parts]
    if structure.kind == "list":
        return f"[{', '.join(parts)}]"
    if structure.kind == "tuple":
        return f"({''.join(f'{part}, ' for part in parts)})"
    return f"{{{', '.join(f'{key!r}: {part}' for key, part in zip(structure.keys, parts, strict=True))}}}"
