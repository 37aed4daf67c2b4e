"""The command line, end to end: what it prints, what it writes, and one readable line for every mistake."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moda_kernels
from moda import requirements
from moda.cli import app as cli
from moda.cli.arguments import parse_classes
from moda.composition import measure
from moda.decomposition.container import Decomposition
from moda.runs.folder import RunFolder, load_data
from moda.runs.metrics import read_metrics
from tests.moda._helpers.processes import Moda, assert_same_weights, environment, wait_for


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "moda", *map(str, arguments)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits run, trained far enough to have modules worth the name, and decomposed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for arguments in (["train", str(folder), "--epochs", "6", "--seed", "1"], ["decompose", str(folder)]):
            patch.setattr(sys, "argv", ["moda", *arguments])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert ended.value.code == 0
    return folder


# ---- the way through ----------------------------------------------------------------------------------------------


def test_run_folder(run: Path) -> None:
    assert {path.name for path in run.iterdir()} >= {
        "config.json", "metrics.csv", "steps.csv", "model.safetensors", "decomposition", "checkpoints",
    }  # fmt: skip
    settings = json.loads((run / "config.json").read_text())
    assert settings["format"] == "moda-run"
    assert settings["training"]["epochs"] == 6
    assert settings["training"]["seed"] == 1
    assert len(read_metrics(run / "metrics.csv")) == 6


def test_evaluate(moda: Moda, run: Path) -> None:
    status, out, err = moda("evaluate", run)
    share = 100 * read_metrics(run / "metrics.csv")[-1]["test_accuracy"]
    assert (status, err) == (0, "")
    assert out == f"small_vgg: {share:.2f} % of the test samples\n"
    assert share > 80


def test_decompose(moda: Moda, run: Path) -> None:
    status, out, _ = moda("decompose", run)
    trained = RunFolder.open(run)
    model = trained.load_model(load_data(trained.config))
    example = torch.zeros(2, 3, 8, 8)
    decomposition = Decomposition.load(run / "decomposition")
    sizes = [100 * measure.size(model, decomposition, [k], example=example) for k in range(10)]
    assert status == 0
    assert re.findall(r"of 320 │ +([\d.]+) %", out) == [f"{size:.1f}" for size in sizes]
    assert f"Mean module: {sum(sizes) / 10:.1f} % of the parameters" in out


def test_threshold_is_used(moda: Moda, run: Path) -> None:
    before = Decomposition.load(run / "decomposition")
    assert moda("decompose", run, "--threshold", "0.5")[0] == 0
    lower = Decomposition.load(run / "decomposition")
    assert moda("decompose", run)[0] == 0
    assert [one.settings["threshold"] for one in (before, lower)] == [0.9, 0.5]
    assert all((lower.masks[tap] >= mask).all() for tap, mask in before.masks.items())
    assert sum(int(mask.sum()) for mask in lower.masks.values()) > sum(
        int(mask.sum()) for mask in before.masks.values()
    )


def test_other_rules(moda: Moda, run: Path) -> None:
    try:
        status, out, _ = moda("decompose", run, "--rule", "attribution", "--epsilon", "0.1")
        assert status == 0
        assert Decomposition.load(run / "decomposition").settings == {"rule": "attribution", "epsilon": 0.1}
        assert "Mean module:" in out
        status, _, err = moda("decompose", run, "--rule", "share", "--epsilon", "auto", "--tolerance", "1.5")
        assert status == 0
        chosen = Decomposition.load(run / "decomposition").settings["epsilon"]
        assert f"epsilon {chosen:g}: at most 1.5 points lost on 288 samples" in err  # a fifth of the training split
        status, _, err = moda("decompose", run, "--rule", "share", "--threshold", "0.5")
        assert status == 2
        assert "--threshold: goes with firing rates, got it with activation shares" in " ".join(err.split())
    finally:
        assert moda("decompose", run)[0] == 0
    assert Decomposition.load(run / "decomposition").settings["rule"] == "firing"


def test_compose_and_evaluate(moda: Moda, run: Path, tmp_path: Path) -> None:
    status, out, _ = moda("compose", run, "--classes", "7, 1,3", "--output", tmp_path / "small")
    assert status == 0
    accuracy, parameters = re.search(r"composed │ +([\d.]+) % │ +([\d,]+) \(", out).groups()  # type: ignore[union-attr]
    status, out, _ = moda("evaluate", tmp_path / "small")
    assert status == 0
    assert out == f"composed of 7, 1, 3: {accuracy} % of their test samples, {parameters} parameters\n"
    assert json.loads((tmp_path / "small" / "composed.json").read_text())["classes"] == [7, 1, 3]
    status, out, _ = moda("evaluate", run, "--classes", "7,1,3")
    assert re.search(rf"composed │ +{accuracy} %", out)
    whole = re.search(r"whole +│ +([\d.]+) % │ 100,138 \(100 %\)", out)
    assert whole is not None
    trained = RunFolder.open(run)
    data = load_data(trained.config)
    images, labels = data.test.tensors  # type: ignore[attr-defined]
    members = torch.isin(labels, torch.tensor([1, 3, 7]))
    logits = trained.load_model(data)(images[members])[:, [1, 3, 7]]
    share = (torch.tensor([1, 3, 7])[logits.argmax(1)] == labels[members]).double().mean()
    assert whole.group(1) == f"{100 * float(share):.2f}"


def test_no_command_replaces_what_it_should_not(moda: Moda, run: Path, tmp_path: Path) -> None:
    """Neither the trained weights, nor the masks, nor a result unless that is asked for."""
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    for target, reason in ((run, "holds no composed.json"), (run / "decomposition", "holds no composed.json")):
        status, _, err = moda("compose", run, "--classes", "1,7", "-o", target)
        assert (status, reason in err, err.count("\n")) == (1, True, 1)
    status, _, err = moda("compose", run, "--classes", "1,7", "-o", run / "config.json")
    assert (status, "expected a folder, found a file" in err) == (1, True)
    for command in (["report", run], ["export", run, "--classes", "1"]):
        status, _, err = moda(*command, "-o", run / "config.json")
        assert (status, "config.json: exists already; replace it with --force" in err) == (1, True)
    for command in (["report", run, "--force"], ["export", run, "--classes", "1", "--force"]):
        (tmp_path / "thesis.pt2").write_text("no result of ours")
        status, _, err = moda(*command, "-o", tmp_path / "thesis.pt2")
        assert (status, "thesis.pt2: holds something else than such a result" in err) == (1, True)
    target = tmp_path / "composed"
    assert moda("compose", run, "--classes", "1,7", "-o", target)[0] == 0
    status, _, err = moda("compose", run, "--classes", "1,8", "-o", target)
    assert (status, "holds a result already; replace it with --force" in err) == (1, True)
    assert json.loads((target / "composed.json").read_text())["classes"] == [1, 7]
    assert moda("compose", run, "--classes", "1,8", "-o", target, "--force")[0] == 0
    assert json.loads((target / "composed.json").read_text())["classes"] == [1, 8]
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == before


def test_paths_are_printed_as_they_are_and_quoted_in_hints(
    moda: Moda, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is printed can be copied: neither markup nor line breaks change a path, and a shell reads it back."""
    monkeypatch.setenv("COLUMNS", "40")
    folder = tmp_path / "my  [red]runs[/red] :smile: é 'x'"
    shutil.copytree(run, folder)
    status, out, _ = moda("decompose", folder)
    assert (status, f"Modules: {folder}/decomposition/\n" in out) == (0, True)
    hint = next(line for line in out.splitlines() if line.startswith("Next: "))
    assert shlex.split(hint.removeprefix("Next: ")) == ["moda", "compose", str(folder), "--classes", "0,1"]
    shutil.rmtree(folder / "decomposition")
    status, _, err = moda("compose", folder, "-c", "1")
    assert shlex.split(err.partition("do it with: ")[2].strip()) == ["moda", "decompose", str(folder)]
    (folder / "model.safetensors").unlink()
    status, _, err = moda("decompose", folder)
    assert shlex.split(err.partition("finish it with: ")[2].strip()) == ["moda", "train", str(folder), "--resume"]


@pytest.mark.parametrize("command", ["evaluate", "decompose", "compose"])
def test_a_flipped_bit_in_the_weights_is_seen(moda: Moda, run: Path, tmp_path: Path, command: str) -> None:
    for name in ("config.json", "checksums.json", "model.safetensors"):
        shutil.copyfile(run / name, tmp_path / name)
    weights = bytearray((run / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    status, _, err = moda(command, tmp_path, *(["-c", "1"] if command == "compose" else []))
    assert (status, err.count("\n")) == (1, 1)
    assert f"{tmp_path / 'model.safetensors'}: its SHA-256 is " in err
    assert "it was damaged or changed" in err


def test_lightning_that_is_missing_or_unsafe(moda: Moda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to install, from every command that trains, and nothing is made."""
    commands = {
        "train": ["train", tmp_path / "x"],
        "study": ["study", tmp_path / "x"],
        "replace": ["replace", tmp_path / "x", "--data", "digits", "--image-size", "16", "--strong-model", "small_vgg"],
        "demo": ["demo", tmp_path / "x"],
    }
    for version, words in ((None, "pip install 'moda-kernels[train]'"), ("2.5.6", "pip install 'lightning>=2.6'")):
        monkeypatch.setattr(requirements, "_installed", lambda package, version=version: version)
        for arguments in commands.values():
            for loaded in [name for name in sys.modules if name.startswith(("moda.training", "moda.demo.run"))]:
                monkeypatch.delitem(sys.modules, loaded)
            status, out, err = moda(*arguments)
            assert (status, out, err.count("\n")) == (1, "", 1)
            assert err.startswith("moda: training needs Lightning")
            assert words in err
    assert not (tmp_path / "x").exists()


def test_resume_auto(moda: Moda, tmp_path: Path) -> None:
    """One command line begins, finds the run finished, and refuses other settings."""
    line = ["train", tmp_path / "run", "--epochs", "1", "--width", "0.25", "--resume", "auto"]
    status, out, _ = moda(*line)
    assert (status, "already finished" in out) == (0, False)
    status, out, _ = moda(*line[:-2], "--resume=auto")
    assert (status, "already finished after 1 epochs" in out) == (0, True)
    status, _, err = moda(*line, "--lr", "0.5")
    assert (status, "--learning-rate: the run to resume was started with 0.05" in err) == (1, True)
    status, _, err = moda(*line, "--resume")
    assert (status, "--resume: given twice" in err) == (2, True)


def test_doctor(moda: Moda) -> None:
    status, out, err = moda("doctor")
    assert (status, err) == (0, "")
    assert re.search(rf"torch +yes +{re.escape(torch.__version__)}", out)
    assert re.search(r"backend +reference +yes +available", out)
    assert re.search(r"triton +(yes +available|no +\w+)", out)
    assert re.search(r"native +extension +(yes|no) +\w+", out)
    if not torch.cuda.is_available():
        assert re.search(r"cuda +no +(this PyTorch is built without CUDA|PyTorch sees no GPU)", out)


def test_doctor_as_json(moda: Moda) -> None:
    status, out, err = moda("doctor", "--json")
    assert (status, err) == (0, "")
    said = json.loads(out)
    found = {(finding["topic"], finding["name"]): finding for finding in said["findings"]}
    assert found["package", "torch"]["detail"] == torch.__version__
    assert found["backend", "reference"]["ok"] is True
    built = found["native", "extension"]["ok"]
    assert (said["native"] is not None) == built
    assert not built or len(said["native"]["source_digest"]) == 64


def test_doctor_fits_a_terminal(moda: Moda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cut: what stands in the table is what it says as JSON."""
    said = json.loads(moda("doctor", "--json")[1])
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = moda("doctor")
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    words = "".join(out.split())
    for finding in said["findings"]:
        assert finding["name"] in words
        assert all(word in words for word in finding["detail"].split()), finding


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_alone_it_shows_the_help(moda: Moda, debug: list[str]) -> None:
    assert moda(*debug) == (0, moda("--help")[1], "")


def test_version(moda: Moda) -> None:
    assert moda("--version") == (0, f"moda-kernels {moda_kernels.__version__}\n", "")


@pytest.mark.parametrize("name", [name for name, each in cli.commands().items() if not each.hidden])
def test_paragraphs_of_the_help_flow(moda: Moda, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line ends where the terminal does, or with its paragraph."""
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = moda(name, "--help")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    lines = [line.strip() for line in out.partition("╭")[0].splitlines()][3:]
    for line, following in itertools.pairwise(lines):
        assert not line or not following or len(line) + 1 + len(following.split()[0]) > 77, line


def test_completion_knows_commands_and_options(moda: Moda, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, expected in (("moda deco", "decompose"), ("moda train --learn", "--learning-rate")):
        monkeypatch.setenv("_MODA_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        status, out, _ = moda()
        assert (status, out.split()) == (0, [expected])


@pytest.mark.parametrize("name", ["train", "decompose", "compose", "evaluate", "doctor", "demo"])
def test_help_has_examples(moda: Moda, name: str) -> None:
    status, out, err = moda(name, "--help")
    assert (status, err) == (0, "")
    assert "Examples" in out
    assert f"$ moda {name}" in out


@pytest.mark.parametrize("arguments", [["--help"], [], ["trian"]])
def test_main_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from moda.cli.app import main\n"
        f"sys.argv = ['moda', *{arguments}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'numpy', 'lightning', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_main_help_shows_what_each_command_does(moda: Moda) -> None:
    status, out, _ = moda("--help")
    assert status == 0
    for name, command in cli.commands().items():
        summary = (command.load().help or "").partition("\n")[0]
        assert (f"{name} " in out) != command.hidden
        if not command.hidden:
            assert command.help == summary
            assert len(summary) > 20
            assert summary.split()[0] in out


def test_resume_after_ctrl_c(moda: Moda, tmp_path: Path) -> None:
    """A real process, a real signal: one line, status 130, and the same weights in the end."""
    options = ["--epochs", "6", "--seed", "2", "--width", "0.25"]
    process = subprocess.Popen(
        command("train", tmp_path / "run", *options),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them, and so their children, ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = tmp_path / "run" / "metrics.csv"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("moda: interrupted after ")
    assert err.splitlines()[-1].endswith(f"go on with: moda train {tmp_path / 'run'} --resume")
    assert all(line.startswith("training: epoch ") for line in err.splitlines()[:-1])
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert moda("train", tmp_path / "run", "--resume")[0] == 0
    assert moda("train", tmp_path / "whole", *options)[0] == 0
    assert_same_weights(
        RunFolder.open(tmp_path / "run").load_weights(), RunFolder.open(tmp_path / "whole").load_weights()
    )
    status, out, _ = moda("train", tmp_path / "run", "--resume")
    assert status == 0
    assert "already finished after 6 epochs" in out


def test_two_processes(moda: Moda, tmp_path: Path) -> None:
    """Lightning starts the second; one writes, and the modular terms are those of the whole batch."""
    shared = ["--epochs", "1", "--seed", "2", "--width", "0.25", "--accelerator", "cpu", "--log-every", "1"]
    done = subprocess.run(
        command("train", tmp_path / "two", *shared, "--devices", "2", "--strategy", "ddp"),
        env=environment(), capture_output=True, text=True, check=True, timeout=1000,
    )  # fmt: skip
    assert done.stdout.count("Next: moda decompose") == 1
    assert moda("train", tmp_path / "one", *shared)[0] == 0
    two, one = (read_metrics(tmp_path / name / "steps.csv") for name in ("two", "one"))
    assert len(two) == len(one) == 12
    for name in ("affinity", "dispersion", "compactness"):
        # Batch norm sees half of the batch in each process, so the activations differ a little.
        assert two[0][name] == pytest.approx(one[0][name], rel=0.02)


# ---- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["trian"], 2, "No such command 'trian'"),
        (["train"], 2, "Missing argument"),
        (["train", "{tmp}/x", "--speed", "3"], 2, "--speed"),
        (["train", "{tmp}/x", "--epochs", "many"], 2, "Invalid value for '--epochs'"),
        (["train", "{tmp}/x", "--epochs", "0"], 1, "epochs: expected at least 1, got 0"),
        (["train", "{tmp}/x", "--lr", "-1"], 1, "--learning-rate: expected a finite number greater than 0, got -1.0"),
        (["train", "{tmp}/x", "--model", "vgg99"], 1, "--model: expected one of lenet5, vgg16, "),
        (["train", "{tmp}/x", "--data", "mnist"], 1, "--data: expected one of digits, cifar10, "),
        (["train", "{tmp}/x", "--class-list", "l"], 1, "--class-list: options: digits takes seed, channels, image_size, got class_list"),
        (["train", "{tmp}/x", "--model", "lenet5"], 1, "image_size"),
        (["train", "{tmp}/x", "--standard", "--affinity", "1"], 2, "--standard trains without the modular terms; drop --affinity"),
        (["train", "{run}"], 1, "{run}: holds a run already; resume it, or choose another folder"),
        (["train", "{run}", "--resume", "--batch-size", "8"], 2, "--resume takes the settings of {run}/config.json; drop --batch-size"),
        (["train", "{tmp}/x", "--resume"], 1, "{tmp}/x: no such folder"),
        (["decompose", "{tmp}/x"], 1, "{tmp}/x: no such folder"),
        (["decompose", "{tmp}"], 1, "{tmp}: holds no run (it has no config.json)"),
        (["decompose", "{run}", "--threshold", "2"], 1, "threshold: expected a number in [0, 1], got 2.0"),
        (["decompose", "{run}", "--backend", "gpu"], 1, "backend: expected one of 'auto', "),
        (["compose", "{run}"], 2, "--classes: name the classes"),
        (["compose", "{run}", "--classes", "1,dog"], 1, "classes: expected names or indices of 10 classes (0, 1, 2,"),
        (["compose", "{run}", "--classes", "1,1"], 1, "classes: expected every class once, got 1 more than once"),
        (["compose", "{run}", "--classes", "10"], 1, "classes: expected names or indices of 10 classes"),
        (["evaluate", "{tmp}/x"], 1, "{tmp}/x: no such folder"),
        (["demo", "{run}"], 1, "which no demo made; choose another folder"),
        (["demo", "{run}/config.json"], 1, "{run}/config.json: expected a folder, found a file"),
        (["demo", "--seeds", "0"], 2, "Invalid value for '--seeds'"),
    ],
)  # fmt: skip
def test_mistake_is_one_line(
    moda: Moda, run: Path, tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    places = {"run": str(run), "tmp": str(tmp_path)}
    given, out, err = moda(*(argument.format(**places) for argument in arguments))
    assert given == status
    assert out == ""
    assert err.startswith("moda: ")
    assert err.count("\n") == 1
    assert message.format(**places) in err
    assert not (tmp_path / "x").exists()


def test_debug_shows_the_traceback(moda: Moda, tmp_path: Path) -> None:
    status, _, err = moda("evaluate", tmp_path / "x", "--debug")
    assert status == 1
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1] == f"moda: {tmp_path / 'x'}: no such folder"


def test_run_that_is_not_decomposed(moda: Moda, run: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    status, _, err = moda("compose", tmp_path, "--classes", "1")
    assert status == 1
    assert err == f"moda: {tmp_path}: is not decomposed yet; do it with: moda decompose {tmp_path}\n"
    status, out, _ = moda("evaluate", tmp_path, "--classes", "1,2")
    assert status == 0
    assert "whole" in out
    assert "composed" not in out


def test_weights_of_another_model(moda: Moda, run: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    settings = json.loads((run / "config.json").read_text())
    settings["training"]["width"] = 2.0
    (tmp_path / "config.json").write_text(json.dumps(settings))
    status, _, err = moda("evaluate", tmp_path)
    assert status == 1
    assert err.startswith(f"moda: {tmp_path / 'model.safetensors'}: not the weights of small_vgg: ")
    assert err.count("\n") == 1


def test_unfinished_run(moda: Moda, run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    status, _, err = moda("decompose", tmp_path)
    assert status == 1
    assert "its training is not finished" in err


@pytest.mark.parametrize(
    ("text", "expected"), [("cat", [1]), ("2,0", [2, 0]), (" dog , cat", [2, 1]), ("0", [2]), ("1", [1])]
)
def test_parse_classes(text: str, expected: list[int]) -> None:
    """A class whose name looks like an index is meant by its name."""
    names = ("bird", "cat", "dog")
    if text == "0":
        names = ("bird", "cat", "0")
    assert parse_classes(text, names) == expected
