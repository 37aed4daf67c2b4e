from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest
import torch

from moda_kernels import (
    BackendUnavailableError,
    FiringCounter,
    backends,
    class_means,
    class_similarity,
    modular_losses,
    relu_pool,
)
from moda_kernels.backends import _MODULES, NAMES, Backend, Status, select

BATCH = ([torch.ones(2, 3)], torch.tensor([0, 1]))


def test_every_backend_has_a_status():
    status = backends()
    assert tuple(status) == NAMES
    assert status["torch"]
    assert str(status["torch"]) == "available"
    assert not Status(False, "no GPU")
    assert str(Status(False, "no GPU")) == "no GPU"
    for one in status.values():
        assert one.available != bool(one.reason)


def test_unknown_name_is_an_error_that_lists_the_known_ones():
    message = "backend: expected one of 'auto', 'reference', 'torch', 'triton', 'native', got 'cuda'"
    with pytest.raises(ValueError, match=re.escape(message)):
        modular_losses(*BATCH, backend="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_a_named_backend_that_cannot_run_says_why():
    with pytest.raises(BackendUnavailableError, match="backend='triton' cannot run grouped_losses: .+"):
        modular_losses(*BATCH, backend="triton")


def test_environment_stands_in_for_auto(monkeypatch):
    for name, module in [("reference", "moda_kernels.reference"), ("torch", "moda_kernels.closed_form")]:
        monkeypatch.setenv("MODA_BACKEND", name)
        assert select("grouped_losses", "auto", BATCH[0]).__name__ == module
    assert select("grouped_losses", "reference", BATCH[0]).__name__ == "moda_kernels.reference"  # a name wins


def test_environment_backend_without_the_operation_leaves_it_to_auto(monkeypatch):
    monkeypatch.setenv("MODA_BACKEND", "reference")
    assert "class_sums" not in select("pool", "auto", BATCH[0]).OPS
    assert select("class_sums", "auto", BATCH[0]).__name__ != "moda_kernels.reference"


def test_environment_with_an_unknown_name_is_an_error(monkeypatch):
    monkeypatch.setenv("MODA_BACKEND", "fast")
    with pytest.raises(ValueError, match="MODA_BACKEND: expected one of"):
        relu_pool(torch.ones(2, 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_environment_with_a_backend_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setenv("MODA_BACKEND", "triton")
    with pytest.raises(BackendUnavailableError, match="MODA_BACKEND='triton' cannot run grouped_losses"):
        modular_losses(*BATCH)
    counter = FiringCounter(2)  # triton has no counter: auto decides
    counter.update(*BATCH)
    assert counter.class_sizes.tolist() == [1, 1]


def test_import_needs_neither_triton_nor_lightning_nor_a_gpu():
    code = "import sys, moda_kernels; sys.exit(bool({'triton', 'lightning', 'moda'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_operations_have_the_signatures_of_the_protocol(name):
    module = _MODULES[name]
    for operation in module.OPS:
        ours = inspect.signature(getattr(module, operation)).parameters
        contract = inspect.signature(getattr(Backend, operation)).parameters
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in list(contract.values())[1:]
        ]
        assert operation in module.DTYPES


def test_documented_modules_come_with_the_package():
    code = "import moda_kernels; moda_kernels.native.unavailable(), moda_kernels.distributed, moda_kernels.closed_form"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_similarity_runs_the_backend_it_was_given(monkeypatch):
    ran = []
    for name in ("torch", "native"):
        module = _MODULES[name]

        def spy(*args, name=name, sums=module.class_sums, **kwargs):
            ran.append(name)
            return sums(*args, **kwargs)

        monkeypatch.setattr(module, "class_sums", spy)
    class_similarity(*BATCH, 2, backend="torch")
    class_means(*BATCH, 2, backend="torch")
    assert ran == ["torch", "torch"]
