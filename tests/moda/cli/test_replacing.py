"""What commands do where something is already: nothing else is touched, and a result only with --force, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from moda.demo.folder import check_demo_folder, replaced
from moda.demo.results import DEMO
from moda.files import check_study_folder, write_json
from moda.runs.config import TrainingConfig
from moda.runs.folder import RunFolder
from moda.study.comparison import COMPARISON
from tests.moda._helpers.processes import Moda


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_demo(folder: Path, word: str) -> None:
    """What a demo of one seed leaves, as far as its place is concerned."""
    for name in ("standard", "modular"):
        (folder / "runs" / "seed-0" / name).mkdir(parents=True)
        (folder / "runs" / "seed-0" / name / "config.json").write_text(word)
    (folder / "demo.html").write_text(word)
    (folder / "demo.png").write_text(word)
    write_json(folder / "results.json", {**DEMO.header(), "word": word})


# ---- moda demo ----------------------------------------------------------------------------------------------------


def test_a_demo_is_replaced_with_force_alone(moda: Moda, tmp_path: Path) -> None:
    write_demo(tmp_path, "old")
    before = contents(tmp_path)
    status, _, err = moda("demo", tmp_path)
    assert (status, f"{tmp_path}: holds a demo already; replace it with --force" in err) == (1, True)
    assert contents(tmp_path) == before
    check_demo_folder(tmp_path, force=True)


@pytest.mark.parametrize(
    "stranger", ["notes.txt", "runs/mine/config.json", "runs/seed-0/mine/config.json", "runs/notes.txt/x"]
)
def test_a_demo_replaces_nothing_else(moda: Moda, tmp_path: Path, stranger: str) -> None:
    write_demo(tmp_path, "old")
    (tmp_path / stranger).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / stranger).write_text("mine")
    before = contents(tmp_path)
    status, _, err = moda("demo", tmp_path, "--force")
    assert (status, "which no demo made; choose another folder" in err) == (1, True)
    assert contents(tmp_path) == before


def test_a_folder_of_runs_is_no_demo(moda: Moda, tmp_path: Path) -> None:
    """`moda demo .` where somebody's runs are."""
    RunFolder.create(tmp_path / "runs" / "seed-0" / "standard", TrainingConfig())
    before = contents(tmp_path)
    for options in ((), ("--force",)):
        status, _, err = moda("demo", tmp_path, *options)
        assert (status, "holds 'runs', which no demo made" in err) == (1, True)
    assert contents(tmp_path) == before


def test_a_demo_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    write_demo(tmp_path, "old")
    before = contents(tmp_path)
    with suppress(KeyboardInterrupt), replaced(tmp_path) as making:
        write_demo(making, "new")
        raise KeyboardInterrupt
    assert contents(tmp_path) == before
    with replaced(tmp_path) as making:
        write_demo(making, "new")
    assert contents(tmp_path) == {name: data.replace(b"old", b"new") for name, data in before.items()}


@pytest.mark.parametrize("moves", range(7))
def test_a_kill_leaves_the_old_demo_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    """Killed before the move of that number, of which there are six: what the next demo finds in its place is whole."""
    write_demo(tmp_path, "old")
    before, counted = contents(tmp_path), 0

    def stopping(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def moved(path: Path, target: Path) -> Path:
            nonlocal counted
            if counted == moves:
                os._exit(9)
            counted += 1
            return move(path, target)

        return moved

    child = os.fork()
    if not child:
        monkeypatch.setattr(Path, "rename", stopping(Path.rename))
        monkeypatch.setattr(Path, "replace", stopping(Path.replace))
        with replaced(tmp_path) as making:
            monkeypatch.undo()
            write_demo(making, "new")
            monkeypatch.setattr(Path, "rename", stopping(Path.rename))
            monkeypatch.setattr(Path, "replace", stopping(Path.replace))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (9 if moves < 6 else 0)
    with suppress(KeyboardInterrupt), replaced(tmp_path):
        raise KeyboardInterrupt
    new = {name: data.replace(b"old", b"new") for name, data in before.items()}
    assert contents(tmp_path) == (before if moves == 0 else new)


# ---- moda bench ---------------------------------------------------------------------------------------------------


def test_benchmarks_are_replaced_with_force_alone(moda: Moda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moda.bench import machine, results, runner

    def measured(*_: object, **__: object) -> results.Results:
        raise RuntimeError("it would measure now")

    monkeypatch.setattr(runner, "run", measured)
    line = ("bench", "--quick", "--device", "cpu", "--output", tmp_path)
    assert "it would measure now" in moda(*line)[2]
    path = tmp_path / results.file_name(machine.device_name(machine.torch.device("cpu")))
    results.BENCHMARKS.write(path, {"machine": {}, "limits": {}, "quick": True, "rows": []})
    assert f"{path}: exists already; replace it with --force" in moda(*line)[2]
    assert "it would measure now" in moda(*line, "--force")[2]
    for other in ('{"format": "thesis"}', "{}", "[1]", "three years of work"):
        path.write_text(other)
        assert f"{path}: is a file of another kind" in moda(*line, "--force")[2]
    assert "expected a folder, found a file" in moda("bench", "--quick", "--device", "cpu", "--output", path)[2]
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


# ---- moda compare -------------------------------------------------------------------------------------------------


def test_a_comparison_is_not_written_over_something_else(moda: Moda, tmp_path: Path) -> None:
    """Neither the page, nor the figures beside it, whose name follows from the page's."""
    runs = [RunFolder.create(tmp_path / name, TrainingConfig()).path for name in "ab"]
    before = contents(tmp_path)
    for options in ((), ("--force",)):
        status, _, err = moda("compare", *runs, "-o", runs[0] / "config.html", *options)
        reason = "is a file of another kind" if options else "config.json: exists already"
        assert (status, reason in err) == (1, True)
        status, _, err = moda("compare", *runs, "-o", runs[0] / "config.json", *options)
        assert (status, "output: expected a name that ends in .html, got 'config.json'" in err) == (1, True)
    (tmp_path / "mine.html").write_text("<!DOCTYPE html>\n<html>mine</html>")
    status, _, err = moda("compare", *runs, "-o", tmp_path / "mine.html", "--force")
    assert (status, "mine.html: holds something else than such a result" in err) == (1, True)
    (tmp_path / "mine.html").unlink()
    assert contents(tmp_path) == before


def test_a_page_of_runs_is_replaced_with_force_alone(moda: Moda, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", TrainingConfig()).path
    COMPARISON.write(run / "comparison.json", {"methods": []})
    status, _, err = moda("compare", run)
    assert (status, "comparison.json: exists already; replace it with --force" in err) == (1, True)
    status, _, err = moda("compare", run, "--force")
    assert (status, "its training is not finished" in err) == (1, True)


# ---- studies ------------------------------------------------------------------------------------------------------


def test_studies_go_into_no_folder_of_other_things(moda: Moda, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "thesis.txt").write_text("three years of work")
    (tmp_path / "empty").mkdir()
    commands = {
        "study.json": ("study", tmp_path),
        "replacement.json": (
            "replace",
            tmp_path,
            "--data",
            "digits",
            "--image-size",
            16,
            "--strong-model",
            "small_vgg",
        ),
        "comparison.json": ("compare", tmp_path),
    }
    for description, command in commands.items():
        for options in ((), ("--force",)):
            status, _, err = moda(*command, *options)
            assert (status, f"{tmp_path}: is not empty and holds no {description}" in err) == (1, True)
        status, _, err = moda(command[0], tmp_path / "thesis.txt", *command[2:])
        assert (status, "expected a folder, found a file" in err) == (1, True)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt", "empty"}


def test_a_study_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """A description may come late; until then a study is known by its parts, and other studies keep out."""
    (tmp_path / "small_vgg" / "seed-0").mkdir(parents=True)
    check_study_folder(tmp_path, "comparison.json", "*/seed-*")
    with pytest.raises(ValueError, match=r"is not empty and holds no study\.json"):
        check_study_folder(tmp_path, "study.json")
    (tmp_path / "study.json").write_text("{}")
    check_study_folder(tmp_path, "study.json")
    with pytest.raises(ValueError, match=r"is of another kind \(it has study\.json\)"):
        check_study_folder(tmp_path, "comparison.json", "*/seed-*")


def test_json_of_no_format_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    for there in ("{}", '{"methods": []}', "[]", "mine", '{"format": null}'):
        path.write_text(there)
        with pytest.raises(ValueError, match=r"comparison\.json: is a file of another kind"):
            COMPARISON.write(path, {"methods": []})
        assert path.read_text() == there
    for damaged in ("", json.dumps({"format": "moda-comparison"}), '{"format": "moda-comparison", "meth'):
        path.write_text(damaged)
        COMPARISON.write(path, {"methods": []})
        assert COMPARISON.read(path)["methods"] == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("train X --strategy x", "--strategy: expected one of auto, "),
        ("compare X --model vgg19", "--model: expected some of lenet5, "),
        ("compare X --model lenet5 --data digits", "image_size: expected at least "),
        ("replace X --strong-model x", "--strong-model: expected one of lenet5, "),
        ("replace X --weak-model x", "--weak-model: expected one of lenet5, "),
    ],
)
def test_what_cannot_be_done_makes_nothing(
    moda: Moda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, reason: str
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    status, _, err = moda(*line.split())
    assert (status, reason in err) == (1, True), err
    assert not list(tmp_path.iterdir())
