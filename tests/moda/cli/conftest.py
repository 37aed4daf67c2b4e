"""What the tests of the command line share: the command, run in this process."""

from __future__ import annotations

import sys

import pytest

from moda.cli import app as cli
from tests.moda._helpers.processes import Moda


@pytest.fixture
def moda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Moda:
    """Runs the command in this process: exit status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moda", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        return int(ended.value.code or 0), output.out, output.err

    return run
