"""Builds the study's page from its sections."""

from __future__ import annotations

from moda.report.page import Section, draw_all, render
from moda.report.study.inputs import DATA_NAMES, Inputs
from moda.report.study.modules import modules, similarities
from moda.report.study.overview import headlines, overview
from moda.report.study.replacement import replacement
from moda.report.study.reuse import reuse
from moda.report.study.setting import runs, settings_and_paper
from moda.report.study.sweeps import sweeps
from moda.report.study.training import accuracy_and_time, terms
from moda.report.study.words import listed
from moda_kernels import __version__

__all__ = ["study_page"]


def study_page(inputs: Inputs, title: str | None = None) -> str:
    """Return the page as HTML that needs no other file.

    Args:
        inputs: the results to show, from `read_inputs`.
        title: the page's heading; with None it names the models and data.
    """
    sections = _sections(inputs)
    return render(
        "study.html",
        title=title or _title(inputs),
        subtitle=_subtitle(inputs),
        headlines=headlines(inputs.settings),
        sections=sections,
        drawings=draw_all(sections),
        made_by="moda report",
        method="Method: DNN Modularization via Activation-Driven Training, arXiv 2411.01074.",
        version=__version__,
    )


def _sections(inputs: Inputs) -> list[Section]:
    settings = inputs.settings
    sections: list[Section] = []
    if settings:
        sections += [
            overview(settings),
            accuracy_and_time(settings),
            reuse(settings),
            modules(settings),
            similarities(settings),
            terms(settings),
            sweeps(settings),
        ]
    sections.append(replacement(inputs.replacements))
    if settings:
        sections.append(settings_and_paper(settings))
    return [*sections, runs(inputs)]


def _title(inputs: Inputs) -> str:
    if not inputs.settings:
        return "Replacing a class of a weak model"
    data = dict.fromkeys(DATA_NAMES.get(s.config.data, s.config.data) for s in inputs.settings)
    return f"Modular training on {listed(list(data))}"


def _subtitle(inputs: Inputs) -> str:
    if not inputs.settings:
        return "Weak models before and after a strong model\u2019s module took over one class."
    names = listed([setting.name for setting in inputs.settings])
    epochs = _range({run.config.epochs for run in inputs.runs})
    counts = {len({run.config.seed for run in (*s.modular, *s.standard)}) for s in inputs.settings}
    repeated = f", with {_range(counts)} seeds; numbers are means over them" if max(counts) > 1 else ""
    return (
        f"{names}, trained for {epochs} epochs the standard way and modular (affinity, dispersion, compactness), then "
        f"decomposed into one module per class{repeated}."
    )


def _range(numbers: set[int]) -> str:
    ends = dict.fromkeys((min(numbers), max(numbers)))
    return " to ".join(map(str, ends))
