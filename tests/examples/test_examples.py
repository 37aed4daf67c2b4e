"""Every example runs as it stands, on little data, and is short enough to read."""

from __future__ import annotations

import runpy
import socket
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LITTLE = {
    "ddp.py": (["--epochs", "1"], "samples counted"),
    "deploy_onnx.py": (["--epochs", "1", "--folder", "{tmp}"], "onnxruntime: ["),
    "hugging_face.py": (["--epochs", "1", "--samples", "128"], "of the parameters"),
    "lightning_module.py": (["--epochs", "1"], "parameters of each class's module"),
    "plain_loop.py": (["--epochs", "1"], "of the parameters"),
    "replace_module.py": (["--epochs", "2"], "replaced: accuracy"),
    "swap_the_loss.py": (["--batch-size", "32"], "agree"),
    "timm_model.py": (["--model", "resnet10t", "--epochs", "1", "--samples", "128"], "accuracy on two classes"),
}
LONGEST = 80


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def test_every_example_is_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(LITTLE)


@pytest.mark.parametrize("name", LITTLE)
def test_example_is_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < LONGEST


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *(argument.format(tmp=tmp_path) for argument in arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", LITTLE)
def test_example_runs(name, monkeypatch, tmp_path, capfd):
    arguments, expected = LITTLE[name]
    if name == "ddp.py":  # as torchrun starts one process; more of them are tested in tests/moda/training
        for variable, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", free_port())):
            monkeypatch.setenv(variable, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    run(name, arguments, monkeypatch, tmp_path)
    assert expected in capfd.readouterr().out


def test_bert_of_the_hugging_face_example(monkeypatch, tmp_path, capfd):
    arguments = ["--architecture", "bert", "--epochs", "1", "--samples", "128"]
    run("hugging_face.py", arguments, monkeypatch, tmp_path)
    assert "bert: loss" in capfd.readouterr().out
