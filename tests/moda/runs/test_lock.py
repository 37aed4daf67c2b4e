"""Locks: one process at a time, whoever is in the way is named, and what was left behind locks nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from moda.files import LOCK, is_temporary
from moda.runs.lock import HELD_BY, BusyError, locked
from tests.moda._helpers.processes import environment

HOLD = (
    "import sys, time; from pathlib import Path; from moda.runs.lock import locked\n"
    "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def hold():
    started = []

    def start(target):
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(target)], stdout=subprocess.PIPE, env=environment())
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("name", ["", "table.csv"], ids=["folder", "file"])
def test_another_process_waits_its_turn(tmp_path, hold, name):
    target = tmp_path / name if name else tmp_path
    other = hold(target)
    with (
        pytest.raises(BusyError, match=rf"process {other.pid} of .* is writing there; wait until it ends"),
        locked(target),
    ):
        pass
    other.kill()
    other.wait()
    (left,) = tmp_path.iterdir()
    assert is_temporary(left)
    with locked(target):
        assert json.loads(left.read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_process_may_take_its_lock_again(tmp_path):
    with locked(tmp_path):
        with locked(tmp_path):
            assert len(list(tmp_path.iterdir())) == 1
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_the_lock_of_another_host_is_believed(tmp_path):
    (tmp_path / LOCK).write_bytes(HELD_BY.to_bytes({"host": "elsewhere", "pid": 7}))
    with (
        pytest.raises(BusyError, match=r"process 7 of elsewhere was writing there; .* remove .*moda-lock"),
        locked(tmp_path),
    ):
        pass
    (tmp_path / LOCK).unlink()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 9])
def test_an_unfinished_lock_locks_nothing(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["format"] == "moda-lock"
