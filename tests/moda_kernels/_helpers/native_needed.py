"""Skips tests of the native extension where it cannot be: on a machine without a compiler, where the package does without."""

from __future__ import annotations

import shutil

import pytest

from moda_kernels import native

needs_native = pytest.mark.skipif(
    native.unavailable() is not None and not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason=f"needs a C++ compiler: {native.unavailable()}",
)
