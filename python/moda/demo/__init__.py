"""The demonstration on handwritten digits, from training to the page."""

from moda.lazy import submodules

__getattr__ = submodules(__name__)
