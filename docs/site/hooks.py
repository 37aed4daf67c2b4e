"""What the site has besides the pages in docs/: README and its neighbours, the examples, the command, and formulas.

Pages link to files of the repository as they do on GitHub; here such links are led to the page or copy that the site
has of them. A link to a file that does not exist is left alone, and `mkdocs build --strict` fails on it.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

import typer
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from moda.cli.app import commands

ROOT = Path(__file__).resolve().parents[2]
PROJECT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "CODE_OF_CONDUCT.md": "project/code_of_conduct.md",
}
"""Files of the repository's root, and the pages that the site makes of them."""
HOME = {page: name for name, page in PROJECT.items()}
EXAMPLES, COMMAND, COPIES = "reference/examples.md", "reference/command.md", "repository/"
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
CELL = re.compile(r"<td[^>]*>.*?</td>", re.DOTALL)
FORMULA = re.compile(r'<(div|span) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List every folder of results among the findings: each has a README that a script made."""
    findings: list[Any] = next(section["Findings"] for section in config.nav or [] if "Findings" in section)
    listed = {page for entry in findings for page in ([entry] if isinstance(entry, str) else entry.values())}
    pages = (path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs").glob("*/README.md")))
    findings += [page for page in pages if page not in listed]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in docs/: pages of other files, and copies of those that pages link to."""
    made = {page: (ROOT / name).read_text("utf-8") for name, page in PROJECT.items()}
    made |= {EXAMPLES: examples(), COMMAND: command_page()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    for page in [file for file in files if file.is_documentation_page()]:
        links = {link for _, link, _ in LINK.findall(page.content_string)}
        for path in sorted(filter(None, (copy_of(page.src_uri, link) for link in links))):
            if files.get_file_from_path(COPIES + path) is None:
                files.append(File.generated(config, COPIES + path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files of the repository to what the site has of them."""
    here = page.file.src_uri

    def led(found: re.Match[str]) -> str:
        before, link, after = found.groups()
        target = destination(here, link)
        if target is None:
            return found[0]
        if target.startswith(EXAMPLES):
            after = ")"
        return f"{before}{posixpath.relpath(target, posixpath.dirname(here) or '.')}{after}"

    return LINK.sub(led, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers show without a script, and bars in the code of tables as GitHub shows them."""

    def drawn(found: re.Match[str]) -> str:
        latex = re.sub(r"^\\[\[(]|\\[\])]$", "", found[2].strip()).strip()
        for entity, sign in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
            latex = latex.replace(entity, sign)
        return convert(latex, display="block" if found[1] == "div" else "inline")

    return CELL.sub(lambda cell: cell[0].replace("\\|", "|"), FORMULA.sub(drawn, html))


def in_repository(page: str, link: str) -> str | None:
    """The path in the repository that a link of a page means; None for one that leads out of it."""
    if re.match(r"[a-z]+:|/", link):
        return None
    folder = "" if page in HOME else posixpath.join("docs", posixpath.dirname(page))
    path = posixpath.normpath(posixpath.join(folder, link))
    return None if path.startswith("..") or not (ROOT / path).exists() else path


def destination(page: str, link: str) -> str | None:
    """Where the site has what a link of a page means; None where the link is right as it is."""
    path = in_repository(page, link)
    if path is None:
        return None
    if path in PROJECT:
        return PROJECT[path]
    if path == "examples":
        return EXAMPLES
    if path.startswith("examples/") and path.endswith(".py"):
        return f"{EXAMPLES}#{Path(path).stem}"
    if path.startswith("docs/"):
        inside = path.removeprefix("docs/")
        return None if page not in HOME else (inside if (ROOT / path).is_file() else index_of(inside))
    return COPIES + path if (ROOT / path).is_file() else None


def index_of(folder: str) -> str:
    """The page that stands for a folder of docs/: its README, or the first of its files."""
    if (ROOT / "docs" / folder / "README.md").exists():
        return f"{folder}/README.md"
    return min(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / folder).iterdir())


def copy_of(page: str, link: str) -> str | None:
    """The file that the site copies for a link; None where there is nothing to copy."""
    target = destination(page, link)
    return target.removeprefix(COPIES) if target and target.startswith(COPIES) else None


def examples() -> str:
    """A page with every example whole."""
    parts = ["# Examples\n\nEach is complete and run by a test. They are in the folder `examples/` of a clone.\n"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text("utf-8")
        summary = ast.get_docstring(ast.parse(source)) or ""
        parts.append(f"## {path.name} {{ #{path.stem} }}\n\n{summary}\n\n```python\n{source.rstrip()}\n```\n")
    return "\n".join(parts)


def command_page() -> str:
    """A page with every command, its arguments and options."""
    parts = [
        "# The command\n\n"
        "`moda COMMAND --help` says the same, with examples. `moda --install-completion` completes commands and "
        "options in your shell (bash, zsh, fish, PowerShell); `moda --debug ...` shows the traceback of an error.\n"
    ]
    parts += [described(name, deferred.load()) for name, deferred in commands().items() if not deferred.hidden]
    return "\n".join(parts)


def described(name: str, command: Any) -> str:
    """The section of one command."""
    with typer.Context(command, info_name=f"moda {name}") as context:
        usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"## moda {name} {{ #{name} }}\n", f"`moda {name} {usage}`\n", (command.help or "").strip() + "\n"]
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        names = ", ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])
        text = " ".join((getattr(parameter, "help", None) or "").replace("\\[", "[").split()).replace("|", "\\|")
        rows.append(f"| {names} | {text} |")
    lines += ["| argument or option | meaning |\n|---|---|\n" + "\n".join(rows) + "\n"]
    samples = re.findall(r"\[cyan\]\$ (.*?)\[/cyan\]", command.epilog or "")
    if samples:
        lines.append("```sh\n" + "\n".join(samples) + "\n```\n")
    return "\n".join(lines)
