"""Heads that decompositions carry: they come back whole, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moda.decomposition.container import Decomposition
from moda.decomposition.heads import HEAD_TENSORS, head_parameters
from moda.files import FormatError, write_tensors
from tests.moda._helpers.decomposing import example


def heads(classes: int = 3, hidden: int = 2, logits: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = ((classes, hidden, logits), (classes, hidden), (classes, 1, hidden), (classes, 1))
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(*shape, generator=generator).to(dtype)
        for name, shape in zip(HEAD_TENSORS, shapes, strict=True)
    }


def with_heads(**changes: object) -> Decomposition:
    return Decomposition(example().masks, method="gradsplitter", combine="probability", heads={**heads(), **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_heads_come_back_whole(tmp_path: Path, dtype: torch.dtype):
    made = Decomposition(example().masks, combine="probability", heads=heads(dtype=dtype))
    made.save(tmp_path)
    loaded = Decomposition.load(tmp_path)
    assert loaded.combine == "probability"
    assert list(loaded.heads) == list(HEAD_TENSORS)
    for name, tensor in heads(dtype=dtype).items():
        assert torch.equal(loaded.heads[name], tensor)
        assert loaded.heads[name].dtype == dtype
    assert head_parameters(loaded.heads) == 2 * 5 + 2 + 2 + 1


def test_own_logits_need_no_head(tmp_path: Path):
    with_heads().save(tmp_path)
    Decomposition(example().masks, method="cnnsplitter", combine="logit").save(tmp_path)
    loaded = Decomposition.load(tmp_path)
    assert (loaded.combine, loaded.heads, head_parameters(loaded.heads)) == ("logit", {}, 0)
    assert not (tmp_path / "heads.safetensors").exists()
    assert "heads_sha256" not in json.loads((tmp_path / "decomposition.json").read_text())


def test_damaged_missing_and_foreign_heads_are_refused(tmp_path: Path):
    with_heads().save(tmp_path)
    path = tmp_path / "heads.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"heads\.safetensors: its SHA-256 is"):
        Decomposition.load(tmp_path)
    path.unlink()
    with pytest.raises(FormatError, match=r"heads\.safetensors: no such file"):
        Decomposition.load(tmp_path)
    description = json.loads((tmp_path / "decomposition.json").read_text())
    description["heads_sha256"] = write_tensors(path, heads(classes=2))
    (tmp_path / "decomposition.json").write_text(json.dumps(description))
    with pytest.raises(
        FormatError, match=r"decomposition\.json: heads\['hidden.weight'\]: expected shape \(3, neurons"
    ):
        Decomposition.load(tmp_path)
    del description["heads_sha256"]
    (tmp_path / "decomposition.json").write_text(json.dumps(description))
    with pytest.raises(FormatError, match="heads: expected heads where outputs combine by 'probability'"):
        Decomposition.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"combine": "probability"}, ValueError, "heads: expected heads where outputs combine by 'probability'"),
        (
            {"combine": "logit", "heads": heads()},
            ValueError,
            "heads: expected no heads where outputs combine by 'logit'",
        ),
        ({"heads": heads()}, ValueError, "heads: expected no heads where outputs combine by 'rows'"),
        (
            {"combine": "probability", "heads": [1]},
            TypeError,
            "heads: expected a mapping of names to tensors, got list",
        ),
        (
            {"combine": "probability", "heads": {"hidden.weight": heads()["hidden.weight"]}},
            ValueError,
            "heads: expected the tensors hidden.weight, hidden.bias, output.weight, output.bias, got hidden.weight",
        ),
    ],
)
def test_bad_heads_are_named(options: dict[str, object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        Decomposition(example().masks, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"hidden.weight": heads(classes=2)["hidden.weight"]},
            ValueError,
            r"'hidden.weight'\]: expected shape \(3, neur",
        ),
        ({"hidden.bias": torch.zeros(3, 3)}, ValueError, r"'hidden.bias'\]: expected shape \(3, 2\) .* got \(3, 3\)"),
        ({"output.weight": torch.zeros(3, 2)}, ValueError, r"'output.weight'\]: expected shape \(3, 1, 2\)"),
        ({"output.bias": torch.zeros(3, 1).double()}, ValueError, "in torch.float32, got .* in torch.float64"),
        ({"output.bias": torch.zeros(3, 1).long()}, TypeError, "expected a floating-point tensor, got torch.int64"),
        ({"output.bias": 3}, TypeError, "expected a floating-point tensor, got int"),
    ],
)
def test_bad_tensors_of_heads_are_named(change: dict[str, object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        with_heads(**change)
