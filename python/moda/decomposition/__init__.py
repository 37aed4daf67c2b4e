"""From firing rates to one module per class."""

from moda.lazy import submodules

__getattr__ = submodules(__name__)
