"""The site that `make docs` builds: whole, without a broken link, and without a network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.moda._helpers.processes import environment

ROOT = Path(__file__).resolve().parents[2]
LOADED = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=["']?(https?:)?//[^>]*>""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings_handlers", "latex2mathml"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**environment(), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_nothing_is_loaded_from_a_network(site: Path):
    """Links may lead out of the site; scripts, styles, fonts and pictures may not come from there."""
    for path in site.rglob("*.html"):
        for found in LOADED.finditer(path.read_text("utf-8")):
            assert 'rel="canonical"' in found[0] or "rel=canonical" in found[0], (path.name, found[0])


def test_formulas_are_drawn_without_a_script(site: Path):
    page = (site / "affinity.html").read_text("utf-8")
    assert "<math" in page
    assert "arithmatex" not in page.partition("<article")[2].partition("</article>")[0]


def test_every_public_name_is_in_the_reference(site: Path):
    import moda
    import moda_kernels

    text = "".join(path.read_text("utf-8") for path in (site / "reference").glob("*.html"))
    anchors = set(re.findall(r'id="([\w.]+)"', text))
    for package in (moda, moda_kernels):
        for name in package.__all__:
            value = getattr(package, name)
            home = getattr(value, "__module__", None)
            if home is None or not callable(value):
                continue
            assert f"{home}.{value.__qualname__}" in anchors, name


def test_readme_leads_to_pages_of_the_site(site: Path):
    page = (site / "index.html").read_text("utf-8")
    for target in ("tutorial.html", "how-to/train.html", "reference/examples.html", "project/contributing.html"):
        assert f'href="{target}' in page or f"href={target}" in page, target
    assert (site / "demo" / "demo.png").exists()
