from __future__ import annotations

import json
import re
import zipfile

import pytest
import torch
from torch import nn

import moda
from moda.composition import export as exporting
from moda.composition.export import export, provenance_of, read_provenance
from moda.files import FormatError
from tests.moda._helpers.studying import make_run

pytestmark = pytest.mark.compiles


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A composed model, test images, and what it is made of."""
    finished = make_run(tmp_path_factory.mktemp("runs") / "run")
    model = moda.compose(finished.model, finished.decomposition(), [7, 1])
    origin = provenance_of(model, ["7", "1"], (3, 8, 8), "runs/x", finished.provenance())
    return model, finished.data.test.tensors[0][:6], origin


def expected(model, images):
    with torch.no_grad():
        return model(images)


def test_pt2(made, tmp_path):
    model, images, origin = made
    difference = export(model, images, tmp_path / "folder" / "m.pt2", origin)
    program = torch.export.load(tmp_path / "folder" / "m.pt2").module()
    for batch in (images, images[:1], torch.cat([images, images])):  # any number of images
        torch.testing.assert_close(program(batch), expected(model, batch), rtol=1e-4, atol=1e-5)
    assert difference < 1e-4
    assert read_provenance(tmp_path / "folder" / "m.pt2") == origin
    assert origin["classes"] == [7, 1]
    extra = {"moda.json": ""}
    torch.export.load(tmp_path / "folder" / "m.pt2", extra_files=extra)
    assert json.loads(extra["moda.json"])["source"]["weights_sha256"] == origin["source"]["weights_sha256"]


def test_no_image_travels_with_the_model(made, tmp_path):
    model, images, origin = made
    export(model, images, tmp_path / "m.pt2", origin)
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert images[0].numpy().tobytes() not in content


def test_onnx(made, tmp_path):
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, images, origin = made
    export(model, images, tmp_path / "m.onnx", origin)
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    for batch in (images, images[:1]):
        (logits,) = session.run(["logits"], {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected(model, batch), rtol=1e-4, atol=1e-5)
    assert read_provenance(tmp_path / "m.onnx") == origin
    assert json.loads(session.get_modelmeta().custom_metadata_map["moda"]) == origin
    (tmp_path / "none.onnx").write_bytes(b"\xff" * 9)
    with pytest.raises(FormatError, match="not an exported model: "):
        read_provenance(tmp_path / "none.onnx")


def test_a_file_that_computes_something_else_is_not_written(made, tmp_path, monkeypatch):
    model, images, origin = made
    monkeypatch.setattr(exporting, "_run_pt2", lambda data, batch: expected(model, batch) + 1)
    with pytest.raises(ValueError, match="the exported model's logits differ from the model's by 1"):
        export(model, images, tmp_path / "m.pt2", origin)
    assert not list(tmp_path.iterdir())


def test_bad_input_is_named(made, tmp_path, monkeypatch):
    model, images, origin = made
    with pytest.raises(ValueError, match=re.escape("path: expected a name that ends in .pt2 or .onnx, got 'm.pth'")):
        export(model, images, tmp_path / "m.pth", origin)
    with pytest.raises(ValueError, match="images: expected at least 2 to check with, got 1"):
        export(model, images[:1], tmp_path / "m.pt2", origin)
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(
        ImportError, match=re.escape("ONNX export needs onnxscript; install it: pip install 'moda-kernels[export]'")
    ):
        export(model, images, tmp_path / "m.onnx", origin)


def test_files_of_others_have_no_provenance(tmp_path):
    with pytest.raises(FormatError, match=r"none\.pt2: no such file"):
        read_provenance(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(FormatError, match="not an exported model: "):
        read_provenance(tmp_path / "text.pt2")
    with zipfile.ZipFile(tmp_path / "zip.pt2", "w") as archive:
        archive.writestr("archive/version", "1")
    with pytest.raises(FormatError, match="was not written by moda export: it has no moda-export entry"):
        read_provenance(tmp_path / "zip.pt2")


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(50, 8), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embedding(tokens)
        return {"embedded": x, "logits": self.head(torch.relu(self.hidden(x)).mean(1))}


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_tokens_and_several_outputs(tmp_path, suffix):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    modules = moda.Decomposition({"relu": torch.arange(48).view(4, 12) % 3 > 0}, metadata={"class_names": list("abcd")})
    tokens = torch.randint(50, (5, 7))
    composed = moda.compose(Tokens(), modules, [2, 0], example=tokens[:2])
    assert export(composed, tokens, tmp_path / f"m{suffix}") < 1e-5
    assert read_provenance(tmp_path / f"m{suffix}")["class_names"] == ["c", "a"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_other_types(tmp_path, suffix, dtype):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4)
    model, images = nn.Sequential(*layers).to(dtype), torch.randn(5, 3, 8, 8).to(dtype)
    composed = moda.compose(
        model, moda.Decomposition({"2": torch.arange(32).view(4, 8) % 3 > 0}), [2, 0], example=images[:2]
    )
    export(composed, images, tmp_path / f"m{suffix}")
    assert composed.training  # as it was
