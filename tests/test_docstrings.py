"""The examples in docstrings run and give what they say.

`pytest --doctest-modules moda_kernels python/moda` finds the same ones; here only modules that have an example are imported.
"""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (ROOT, ROOT / "python")
MODULES = sorted(
    str(path.relative_to(folder).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for folder, package in zip(FOLDERS, ("moda_kernels", "moda"), strict=True)
    for path in (folder / package).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
OPTIONAL = {"lightning", "matplotlib", "jinja2", "sklearn", "torchvision", "triton", "transformers"}
"""Packages without which a module's examples are left out."""


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").split(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"needs {error.name}")
    found = doctest.testmod(module, verbose=False)
    assert found.attempted > 0
    assert found.failed == 0


def test_front_doors_have_examples() -> None:
    """Of the kernels all do: nobody should have to guess what goes in and what comes out."""
    import moda_kernels

    for name in (
        "ModularLoss",
        "modular_losses",
        "FiringCounter",
        "ClassSimilarity",
        "class_similarity",
        "class_means",
        "pool",
        "relu_pool",
        "backends",
    ):
        assert ">>>" in (getattr(moda_kernels, name).__doc__ or ""), name
