"""Studies trained runs: reuse, replacement, sweeps and analysis."""

from moda.lazy import submodules

__getattr__ = submodules(__name__)
