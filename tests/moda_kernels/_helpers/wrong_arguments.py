"""Values that are wrong for an argument, and what an error about one has to say: our words, beginning with its name."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None, "a string": lambda: "0", "a long string": lambda: "x" * 1_000_000, "half a character": lambda: "\ud800",
    "bytes": lambda: b"x", "a float": lambda: 1.5, "a whole float": lambda: 2.0, "True": lambda: True, "-3": lambda: -3, "NaN": lambda: float("nan"),
    "-inf": lambda: float("-inf"), "a huge integer": lambda: 10**5000, "a large integer": lambda: 2**40, "complex": lambda: 1j,
    "no entry": list, "[None]": lambda: [None], "[-1]": lambda: [-1], "[NaN]": lambda: [float("nan")], "[99]": lambda: [99], "huge integers": lambda: [10**5000],
    "strings": lambda: ["a", "a"], "a generator": lambda: (n for n in range(2)), "a set": lambda: {0, 1}, "a mapping": lambda: {"a": 1},
    "a mapping of integers": lambda: {1: 2}, "an object": object, "a class": lambda: dict, "a module": lambda: torch.nn.Linear(3, 3),
    "an array": lambda: np.zeros((4, 3), np.float32), "arrays": lambda: [np.zeros((4, 3), np.float32)], "an array's number": lambda: np.float64("nan"),
    "a 0-d tensor": lambda: torch.tensor(0.5), "a tensor": lambda: torch.rand(4, 3), "integers": lambda: [torch.ones(4, 3, dtype=torch.int64)],
    "a complex tensor": lambda: torch.ones(4, 3, dtype=torch.complex64), "a sparse tensor": lambda: torch.eye(4).to_sparse(),
    "a tensor without numbers": lambda: torch.empty(4, 3, device="meta"), "an empty tensor": lambda: torch.empty(0),
    "a quantised tensor": lambda: torch.quantize_per_tensor(torch.rand(4, 3), 0.1, 0, torch.quint8), "a dtype": lambda: torch.float32,
}  # fmt: skip
FLAGS = ("True",)
NUMBERS = ("a float", "a whole float", "a large integer", "a huge integer")
ROOT = Path(__file__).resolve().parents[3]


def check_refused(name: str, call: Callable[[Any], object], right: Collection[str] = (), words: str = "") -> None:
    """Give every wrong value to `call`; each is to be refused by an error that begins with `name`, or with `words`.

    Args:
        name: the argument's name.
        call: takes the argument.
        right: the keys of `WRONG` that are not wrong for it.
        words: what errors begin with, where that is not the argument's name.
    """
    for kind, make in WRONG.items():
        if kind in right:
            continue
        value = make()
        with pytest.raises((TypeError, ValueError)) as caught:
            call(value)
        message = str(caught.value)
        assert message.startswith(words or name), f"{kind}: {message[:300]}"
        assert len(message) < 1100, kind
        last = Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename).resolve()
        assert last.is_relative_to(ROOT), f"{kind}: raised by {last}"
