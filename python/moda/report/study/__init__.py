"""The study's page: training, reuse, modules, sweeps and replacement of many runs, beside the paper's numbers."""

from __future__ import annotations

from moda.lazy import submodules
from moda.report.study.build import study_page
from moda.report.study.inputs import Inputs, read_inputs

__all__ = ["Inputs", "read_inputs", "study_page"]

__getattr__ = submodules(__name__)
