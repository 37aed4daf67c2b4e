"""Files of a run that were damaged or changed are refused; a kill while one is replaced leaves a folder that agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moda.files import FormatError
from moda.runs.checksums import read_checked, write_checked


def test_a_flipped_bit_is_seen(tmp_path):
    path = tmp_path / "checkpoints" / "x.bin"
    path.parent.mkdir()
    write_checked(tmp_path, path, b"abcdef")
    assert read_checked(tmp_path, path) == b"abcdef"
    for index in range(6):
        damaged = bytearray(b"abcdef")
        damaged[index] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"x\.bin: its SHA-256 is .* it was damaged or changed"):
            read_checked(tmp_path, path)


def test_a_file_of_an_earlier_release_is_read_unchecked(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"old")
    assert read_checked(tmp_path, tmp_path / "x.bin") == b"old"


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "of an earlier release"])
@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_kill_at_any_rename_leaves_a_file_that_can_be_read(tmp_path, monkeypatch, killed_at, noted):
    path = tmp_path / "x.bin"
    if noted:
        write_checked(tmp_path, path, b"first")
    else:
        path.write_bytes(b"first")
    rename, count = Path.replace, 0

    def kill(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == killed_at:
            raise KeyboardInterrupt
        return rename(self, target)

    for content in (b"second", b"third"):  # twice: what the first kill left must serve the second write
        count = 0
        before = read_checked(tmp_path, path)
        monkeypatch.setattr(Path, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            write_checked(tmp_path, path, content)
        monkeypatch.undo()
        assert read_checked(tmp_path, path) == (content if killed_at == 3 else before)
    write_checked(tmp_path, path, b"last")
    assert read_checked(tmp_path, path) == b"last"
    assert [len(digests) for digests in json.loads((tmp_path / "checksums.json").read_text())["files"].values()] == [1]
