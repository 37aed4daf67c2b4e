"""Holds what a training run leaves on disk: settings, folder, metrics; and what reads published checkpoints."""

from moda.lazy import submodules

__getattr__ = submodules(__name__)
