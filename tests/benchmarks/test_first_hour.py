"""What the newcomer's script takes from README, and how it gives the commands; the whole of it is run by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import first_hour

README = (first_hour.ROOT / "README.md").read_text("utf-8")


def test_every_step_is_found_in_readme():
    commands = first_hour.commands(README)
    assert commands[:2] == ["make demo", ".venv/bin/python first.py"]
    for beginning in first_hour.PLAYED[2:]:
        assert any(line.startswith(beginning) for line in commands), beginning
    assert not any("#" in line or "torchrun" in line for line in commands)


def test_the_script_of_readme_is_whole():
    text = first_hour.script(README)
    compile(text, "first.py", "exec")
    assert "moda.observe(" in text
    assert "moda.compose(" in text


def readme(command: str) -> str:
    return f"Run `.venv/bin/python first.py`:\n```python\nprint('x')\n```\n```sh\nmake demo\n{command}\n```\n"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("make", "moda", ".venv/bin/python"):
        tool = tmp_path / name if "/" in name else tmp_path / ".venv" / "bin" / name
        tool.write_text('#!/bin/sh\necho "$@" >> said; [ "$1" != broken ]\n')
        tool.chmod(0o755)
    return tmp_path


def test_commands_are_given_as_they_stand(clone):
    (clone / "README.md").write_text(readme("moda doctor   # what is there\nmoda study x"))
    assert [step.command for step in first_hour.play(clone)] == [
        "make demo",
        ".venv/bin/python first.py",
        "moda doctor",
    ]
    assert (clone / "said").read_text().splitlines() == ["demo", "first.py", "doctor"]
    assert (clone / "first.py").read_text() == "print('x')\n"


def test_a_step_that_breaks_ends_it(clone):
    (clone / ".venv" / "bin" / "moda").write_text("#!/bin/sh\necho why; exit 3\n")
    (clone / "README.md").write_text(readme("moda doctor"))
    with pytest.raises(SystemExit, match=r"(?s)why.*moda doctor: exit status 3"):
        first_hour.play(clone)


def test_readme_says_what_was_measured():
    measured = json.loads(first_hour.RESULT.read_text())
    said = re.search(r"first result after (\d+) minutes on (\d+) cores", " ".join(README.split()))
    assert said is not None
    assert int(said[1]) == -(-measured["first_result_minutes"] // 1)
    assert int(said[2]) == measured["cores"]
    assert [step["command"] for step in measured["steps"]] == first_hour.commands(README)
    assert re.fullmatch(r"[0-9a-f]{40}", measured["commit"])
