from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import moda
from moda.decomposition.settings import FiringRule
from moda.files import FormatError
from moda.runs.config import TrainingConfig
from moda.runs.finished import FinishedRun
from moda.runs.published import (
    agreement,
    described,
    find_published,
    import_run,
    load_published_masks,
    load_published_weights,
)
from tests.moda._helpers.studying import make_run

CONFIG = TrainingConfig(model="small_vgg", width=0.25, seed=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


class Harmful:
    """A pickle that would make a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_become_a_run(finished, tmp_path):
    state = finished.run.load_weights()
    torch.save(state, tmp_path / "model.pt")
    run = import_run(tmp_path / "model.pt", tmp_path / "run", CONFIG)
    imported = FinishedRun.open(run.path, "cpu")
    images = finished.data.test.tensors[0][:4]
    with torch.no_grad():
        assert torch.equal(imported.model(images), finished.model(images))
    assert load_published_weights(tmp_path / "model.pt").keys() == state.keys()


def test_masks_as_the_published_code_writes_them(finished, tmp_path):
    ours = finished.decomposition()
    path = tmp_path / "model.pt.mod_mask.thres0.8.pt"
    torch.save({k: [mask[k] for mask in ours.masks.values()] for k in range(10)}, path)
    theirs = load_published_masks(path, finished.taps.names)
    assert theirs.settings == FiringRule(0.8).settings()
    assert list(theirs.masks) == list(finished.taps.names)
    assert all(torch.equal(theirs.masks[tap], ours.masks[tap]) for tap in ours.masks)
    for layer in agreement(ours, theirs):
        kept = int(ours.masks[layer.tap].sum())
        assert (layer.agreement, layer.both, layer.only_first, layer.only_second) == (1, kept, 0, 0)


def test_agreement_counts_entries():
    first = moda.Decomposition({"a": torch.tensor([[True, True, False], [False, False, True]])})
    second = moda.Decomposition({"a": torch.tensor([[True, False, True], [True, False, True]])})
    (layer,) = agreement(first, second)
    assert (layer.agreement, layer.both, layer.only_first, layer.only_second) == (0.5, 2, 1, 2)
    with pytest.raises(ValueError, match="second: expected the taps, classes and neurons of the first"):
        agreement(first, moda.Decomposition({"b": torch.ones(2, 3, dtype=torch.bool)}))


@pytest.mark.parametrize("load", [load_published_weights, lambda path: load_published_masks(path, ["a"])])
def test_nothing_in_a_file_is_run(tmp_path, load):
    torch.save({0: [Harmful(tmp_path / "harm")]}, tmp_path / "bad.pt")
    with pytest.raises(FormatError, match=r"bad\.pt: not a file of tensors alone, and so not read: "):
        load(tmp_path / "bad.pt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(2)], "expected a mask per class 0, 1, ..., got list of 1"),
        ({}, "expected a mask per class 0, 1, ..., got dict of 0"),
        ({1: [torch.ones(2) > 0]}, "expected a mask per class 0, 1, ..., got dict of 1"),
        ({0: [torch.ones(2) > 0] * 2}, "class 0: expected 1 masks, one per tap, got list of 2"),
        ({0: torch.ones(1)}, "class 0: expected 1 masks, one per tap, got Tensor of 1"),
        ({0: [torch.ones(2)]}, "masks['a']: expected a bool tensor, got torch.float32"),
        ({0: [torch.ones(2) > 0], 1: [torch.ones(3) > 0]}, "stack expects each tensor to be equal size"),
        ({0: ["x"]}, "m.pt: "),
    ],
)
def test_other_masks_are_refused(tmp_path, value, message):
    torch.save(value, tmp_path / "m.pt")
    with pytest.raises(FormatError, match=re.escape(message)):
        load_published_masks(tmp_path / "m.pt", ["a"])


def test_other_weights_are_refused(finished, tmp_path):
    torch.save([1], tmp_path / "m.pt")
    with pytest.raises(FormatError, match="expected a state_dict .*, got list of 1"):
        load_published_weights(tmp_path / "m.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(FormatError, match="not a file of tensors alone"):
        load_published_weights(tmp_path / "text.pt")
    with pytest.raises(FormatError, match=r"none\.pt: no such file"):
        load_published_weights(tmp_path / "none.pt")
    torch.save({"x": torch.ones(1)}, tmp_path / "m.pt")
    with pytest.raises(FormatError, match=r"m\.pt: not the weights of small_vgg: .*Missing key"):
        import_run(tmp_path / "m.pt", tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()


# ---- the artifact's folders ---------------------------------------------------------------------------------------


def place(root, *parts):
    path = root.joinpath(*parts, "model.pt")
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_folders_say_what_was_trained(tmp_path):
    settings = "model__bs128__ep200__lr0.05__aff1.0_dis0.5_comp0.3"
    place(tmp_path, "vgg16_cifar10", settings, "v1690000000")
    newest = place(tmp_path, "vgg16_cifar10", settings, "v1700000000")
    standard = place(tmp_path, "resnet18_cifar100", "model__bs64__ep100__lr0.1__aff0.0_dis0.0_comp0.0", "v1")
    weak = place(tmp_path, "lenet5_mixed_svhn_for_repair", "model__bs128__ep200__lr0.05", "v_testRepair_weak_mod")
    place(tmp_path, "notes", "old", "v1")
    found = {run.weights: run for run in find_published(tmp_path)}
    assert set(found) == {newest, standard, weak}
    modular = found[newest]
    assert (modular.model, modular.data, modular.affinity, modular.dispersion, modular.compactness) == (
        "vgg16",
        "cifar10",
        1,
        0.5,
        0.3,
    )
    assert modular.masks().name == "model.pt.mod_mask.thres0.9.pt"
    config = found[standard].config(data_root="d")
    assert (config.epochs, config.batch_size, config.learning_rate, config.modular, config.data_root) == (
        100,
        64,
        0.1,
        False,
        "d",
    )
    assert found[weak].data == "mixed_svhn_for_repair"
    assert described(newest, width=0.5) == modular.config(width=0.5)
    assert described(tmp_path / "model.pt", model="vgg16", data="svhn") == TrainingConfig(model="vgg16", data="svhn")
    with pytest.raises(ValueError, match="its folders are not named as the artifact's; say the data: --data"):
        described(tmp_path / "model.pt", model="vgg16")
    with pytest.raises(FormatError, match="nowhere: no such folder"):
        find_published(tmp_path / "nowhere")
