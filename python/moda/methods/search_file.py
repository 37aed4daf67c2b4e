"""The file in which CNNSplitter keeps a search, so that one that was stopped goes on as it would have."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moda.checks import digest, integer, items, json_value, mapping, number, optional, record, text
from moda.files import Format, format_errors

_WORD = 2**32 - 1
_bits = text(longest=1 << 26)

SEARCH = Format(
    "moda-search",
    {
        "settings": mapping(json_value),
        "orders_sha256": digest,
        "sensitive": items(text()),
        "generation": integer(0),
        "shape": items(integer(1, 1 << 24), least=3, most=3),
        "populations": _bits,
        "best": _bits,
        "fitness": items(items(number())),
        "accuracy": optional(number(0, 1)),
        "best_score": number(),
        "since_best": integer(0),
        "arrays": record(
            {
                "key": items(integer(0, _WORD), least=624, most=624),
                "position": integer(0, 624),
                "has_gauss": integer(0, 1),
                "gauss": number(),
            }
        ),
        "draws": items(integer(0, _WORD), least=625, most=625),
    },
)
"""A search in progress; populations and the best chromosomes are bits in hexadecimal digits."""


def write_search(
    path: Path, state: Mapping[str, Any], settings: Mapping[str, Any], orders: Mapping[str, npt.NDArray[np.int64]]
) -> None:
    """Write what `Search.state_dict` gave.

    Args:
        path: the file.
        state: the state.
        settings: those of the search, as JSON holds them.
        orders: per tap each class's neurons by falling importance, which stand for the network and the data.
    """
    arrays = state["arrays"]
    SEARCH.write(
        path,
        {
            "settings": dict(settings),
            "orders_sha256": _hash(orders),
            "sensitive": list(state["sensitive"]),
            "generation": state["generation"],
            "shape": list(state["populations"].shape),
            "populations": _hex(state["populations"]),
            "best": _hex(state["best"]),
            "fitness": state["fitness"].tolist(),
            "accuracy": state["accuracy"],
            "best_score": state["best_score"],
            "since_best": state["since_best"],
            "arrays": {
                "key": arrays["state"]["key"].tolist(),
                "position": int(arrays["state"]["pos"]),
                "has_gauss": int(arrays["has_gauss"]),
                "gauss": float(arrays["gauss"]),
            },
            "draws": list(state["draws"][1]),
        },
    )


def read_search(path: Path, settings: Mapping[str, Any], orders: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, Any]:
    """Read what `write_search` wrote, as `Search.load_state_dict` takes it.

    Raises:
        FormatError (a ValueError): the file is malformed.
        ValueError: it is of a search with other settings, or of another network or other data.
    """
    entries = SEARCH.read(path)
    for name, wanted in settings.items():
        if entries["settings"].get(name) != wanted:
            raise ValueError(
                f"{path}: is of a search with {name}={entries['settings'].get(name)!r}, this one has {wanted!r}; go on "
                "with the settings that it was begun with, or begin anew"
            )
    if entries["orders_sha256"] != _hash(orders):
        raise ValueError(f"{path}: is of a search of another network, or on other data; begin anew")
    with format_errors(path):
        classes, individuals, genes = entries["shape"]
        fitness = np.array(entries["fitness"], np.float64)
        if fitness.shape != (classes, individuals):
            raise ValueError(f"fitness: expected {classes} lists of {individuals} numbers")
        return {
            "sensitive": tuple(entries["sensitive"]),
            "generation": entries["generation"],
            "populations": _unpacked("populations", entries["populations"], (classes, individuals, genes)),
            "best": _unpacked("best", entries["best"], (classes, genes)),
            "fitness": fitness,
            "accuracy": entries["accuracy"],
            "best_score": entries["best_score"],
            "since_best": entries["since_best"],
            "arrays": {
                "bit_generator": "MT19937",
                "state": {"key": np.array(entries["arrays"]["key"], np.uint32), "pos": entries["arrays"]["position"]},
                "has_gauss": entries["arrays"]["has_gauss"],
                "gauss": entries["arrays"]["gauss"],
            },
            "draws": (3, tuple(entries["draws"]), None),  # 3 is the version of Python's generator states
        }


def _hash(orders: Mapping[str, npt.NDArray[np.int64]]) -> str:
    made = hashlib.sha256()
    for tap, order in orders.items():
        made.update(f"{tap} {order.shape} ".encode())
        made.update(np.ascontiguousarray(order, "<i8").tobytes())
    return made.hexdigest()


def _hex(genes: npt.NDArray[np.uint8]) -> str:
    return np.packbits(genes).tobytes().hex()


def _unpacked(name: str, digits: str, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    count = math.prod(shape)
    try:
        packed = np.frombuffer(bytes.fromhex(digits), np.uint8)
    except ValueError:
        raise ValueError(f"{name}: expected hexadecimal digits") from None
    if len(packed) != (count + 7) // 8:
        raise ValueError(f"{name}: expected {count} bits, got {8 * len(packed)}")
    return np.unpackbits(packed, count=count).reshape(shape)
