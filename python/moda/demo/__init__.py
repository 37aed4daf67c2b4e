"""Demonstrates modular training on handwritten digits, from the training to the page."""

from moda.lazy import submodules

__getattr__ = submodules(__name__)
