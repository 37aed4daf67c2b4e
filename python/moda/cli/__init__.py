"""The `moda` command."""

from moda.lazy import submodules

__getattr__ = submodules(__name__)
