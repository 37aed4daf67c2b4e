"""Puts the study's page together."""

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
    """The page, HTML that needs nothing beside itself.

    Args:
        inputs: what to show, see `read_inputs`.
        title: its heading; None: one that names the models and data.
    """
    sections = _sections(inputs)
    return render(
        "study.html",
        title=title or _title(inputs),
        subtitle=_subtitle(inputs),
        headlines=headlines(inputs.settings),
        sections=sections,
        drawings=draw_all(sections),
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
    seeds = {run.config.seed for run in inputs.runs}
    epochs = sorted({run.config.epochs for run in inputs.runs})
    budget = f"{epochs[0]} epochs" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]} epochs"
    repeated = f", with {len(seeds)} seeds; numbers are means over them" if len(seeds) > 1 else ""
    return (
        f"{names}, trained for {budget} the standard way and modular (affinity, dispersion, compactness), then cut "
        f"into one module per class{repeated}."
    )
