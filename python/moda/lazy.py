"""Submodules as attributes: after `import moda`, `moda.study.reuse` imports what it names at that moment."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def submodules(package: str) -> Callable[[str], ModuleType]:
    """Give a package's `__getattr__`, which imports a submodule when its name is first used.

    Args:
        package: the package's own `__name__`.
    """

    def attribute(name: str) -> ModuleType:
        module = f"{package}.{name}"
        if name.startswith("_") or find_spec(module) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(module)

    return attribute
