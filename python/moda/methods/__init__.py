"""Modularization methods: ways to get one module per class out of a network."""

from moda.lazy import submodules

__getattr__ = submodules(__name__)
