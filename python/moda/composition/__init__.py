"""The smaller model of some classes: masked, composed, replaced, measured, exported."""

from moda.lazy import submodules

__getattr__ = submodules(__name__)
