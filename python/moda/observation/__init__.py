"""Observing a model's activations while it runs."""

from moda.lazy import submodules

__getattr__ = submodules(__name__)
