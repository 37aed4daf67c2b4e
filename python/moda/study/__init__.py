"""Reuse, replacement, sweeps and analysis over trained runs."""

from moda.lazy import submodules

__getattr__ = submodules(__name__)
