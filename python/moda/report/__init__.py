"""Pages of figures for people: PNG, and self-contained HTML. Needs the extra `train` (matplotlib, jinja2)."""

from __future__ import annotations

from importlib.util import find_spec

from moda.lazy import submodules

_missing = [package for package in ("matplotlib", "jinja2") if find_spec(package) is None]
if _missing:
    raise ImportError(f"figures need {' and '.join(_missing)}: pip install 'moda-kernels[train]'")

__getattr__ = submodules(__name__)
