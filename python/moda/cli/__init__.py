"""Holds the `moda` command, one file per group of its commands."""

from moda.lazy import submodules

__getattr__ = submodules(__name__)
