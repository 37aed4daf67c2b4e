"""What a training run leaves on disk: its settings, its folder, its metrics, and published files in its place."""

from moda.lazy import submodules

__getattr__ = submodules(__name__)
