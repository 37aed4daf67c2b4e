from __future__ import annotations

import json
import re

import pytest

from moda.files import FormatError
from moda.study.results_file import ResultsFile, read_note, read_rows

COLUMNS = ("name", "value")


def table(path, source=None):
    return ResultsFile.open(path, "moda-x", COLUMNS, {"weights": "abc"} if source is None else source)


def test_a_killed_table_goes_on(tmp_path):
    path = tmp_path / "folder" / "x.csv"
    first = table(path)
    first.append({"name": "a", "value": 0.1})
    first.append({"name": "b", "value": None})
    with path.open("a") as file:
        file.write("c,0.")  # killed while writing
    second = table(path)
    assert second.rows == [{"name": "a", "value": "0.1"}, {"name": "b", "value": ""}]
    second.append({"name": "c", "value": 0.25})
    second.note(finished=True, summary={"mean": 1})
    assert path.read_text() == "name,value\na,0.1\nb,\nc,0.25\n"
    note = read_note(path, "moda-x")
    assert (note["source"], note["finished"], note["summary"]) == ({"weights": "abc"}, True, {"mean": 1})


def test_numbers_come_back_to_the_bit(tmp_path):
    values = [1 / 3, 1e-300, 0.1 + 0.2]
    made = table(tmp_path / "x.csv")
    for value in values:
        made.append({"name": "n", "value": value})
    assert [float(row["value"]) for row in read_rows(tmp_path / "x.csv", COLUMNS)] == values


def test_results_of_another_study_are_never_mixed_in(tmp_path):
    table(tmp_path / "x.csv").append({"name": "a", "value": 1})
    with pytest.raises(FormatError, match=re.escape("weights is 'abc' there and 'def' now; write to another file")):
        table(tmp_path / "x.csv", {"weights": "def"})
    with pytest.raises(FormatError, match=re.escape("standard is None there and 'def' now")):
        table(tmp_path / "x.csv", {"weights": "abc", "standard": "def"})
    assert (tmp_path / "x.csv").read_text() == "name,value\na,1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\na\n", "expected the columns name, value, got ['name']"),
        ("name,value\na\n", "expected 2 cells in every row"),
        ("name,value\na,1,2\n", "expected 2 cells in every row"),
        ("", "expected the columns name, value, got None"),
    ],
)
def test_malformed_tables_are_refused(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(FormatError, match=re.escape(message)):
        read_rows(tmp_path / "x.csv", COLUMNS)


def test_a_kill_before_the_first_row_is_no_obstacle(tmp_path, monkeypatch):
    """The note is written first; an earlier release wrote it last, and could leave a table of no rows without one."""
    written = []
    monkeypatch.setattr("moda.study.results_file.write_bytes", lambda path, data: written.append(path.name))
    table(tmp_path / "x.csv")
    assert written == ["x.csv"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    monkeypatch.undo()
    (tmp_path / "x.json").unlink()
    (tmp_path / "x.csv").write_text("name,value\n")
    assert table(tmp_path / "x.csv").rows == []
    assert read_note(tmp_path / "x.csv", "moda-x")["finished"] is False


def test_a_table_without_its_note_is_refused(tmp_path):
    table(tmp_path / "x.csv").append({"name": "a", "value": 1})
    note = tmp_path / "x.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"source": []}))
    with pytest.raises(FormatError, match="x.json: source: expected an object, got list"):
        table(tmp_path / "x.csv")
    note.unlink()
    with pytest.raises(FormatError, match=r"x\.json: no such file"):
        table(tmp_path / "x.csv")
    with pytest.raises(FormatError, match=r"none\.csv: no such file"):
        read_rows(tmp_path / "none.csv", COLUMNS)


def test_a_table_is_begun_anew_where_that_is_asked_for_and_nothing_else_is_replaced(tmp_path):
    table(tmp_path / "x.csv").append({"name": "a", "value": 1})
    other = {"weights": "def"}
    anew = ResultsFile.open(tmp_path / "x.csv", "moda-x", COLUMNS, other, force=True)
    assert (anew.rows, read_note(tmp_path / "x.csv", "moda-x")["source"]) == ([], other)
    assert (tmp_path / "x.csv").read_text() == "name,value\n"
    (tmp_path / "config.json").write_text('{"format": "moda-run", "format_version": 1}')
    (tmp_path / "thesis.csv").write_text("chapter,pages\n1,20\n")
    for name in ("config.csv", "thesis.csv"):  # config.json would be the note
        with pytest.raises(FormatError, match='expected "format": "moda-x"|expected the columns name, value'):
            ResultsFile.open(tmp_path / name, "moda-x", COLUMNS, other, force=True)
    assert (tmp_path / "config.json").read_text() == '{"format": "moda-run", "format_version": 1}'
    assert (tmp_path / "thesis.csv").read_text() == "chapter,pages\n1,20\n"
    assert not (tmp_path / "config.csv").exists()
