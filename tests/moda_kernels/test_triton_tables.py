"""The launches themselves: how many, and the tables they read."""

from __future__ import annotations

import pytest
import torch
import triton.runtime.interpreter as interpreter

from moda_kernels import triton_kernels
from moda_kernels.triton_kernels import tables
from tests.moda_kernels._helpers.triton_oracle import DEVICES, leaves, make_layers

pytestmark = pytest.mark.parametrize("device", DEVICES[:1])  # counts what the interpreter launches


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels launched so far."""
    names = []
    call = interpreter.GridExecutor.__call__

    def counting(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counting)
    return names


def _launches(names, layers):
    names.clear()
    inputs = leaves(layers)
    losses = triton_kernels.grouped_losses(inputs, torch.tensor([0, 1, 0]))
    forward = list(names)
    names.clear()
    sum(losses).backward()
    return forward, list(names)


def test_launches_do_not_depend_on_the_number_of_layers(launched, device):
    layers = make_layers([(3, 2, 2), (5,), (2, 2, 4)], 3, torch.float32, device)
    forward, backward = _launches(launched, layers)
    assert forward == ["pool_kernel", "prepare_kernel", "block_sums_kernel", "pair_terms_kernel"]
    assert backward == ["losses_backward_kernel", "pool_backward_kernel"]
    assert _launches(launched, layers * 7) == (forward, backward)


def test_rows_that_are_not_aligned_take_one_launch_more(launched, device):
    layers = make_layers([(3, 2, 2), (2, 3, 3), (4, 7, 7), (3, 5)], 3, torch.float32, device)
    forward, backward = _launches(launched, layers)
    assert forward[:3] == ["pool_kernel", "pool_kernel", "prepare_kernel"]
    assert backward == ["losses_backward_kernel", "pool_backward_kernel", "pool_backward_kernel"]


def test_a_layer_that_is_its_own_pool_is_not_copied(launched, device):
    forward, backward = _launches(launched, make_layers([(5,), (3,)], 3, torch.float32, device))
    assert "pool_kernel" not in forward
    assert backward == ["losses_backward_kernel"]


def test_long_channels_last_maps_take_one_launch_more(launched, device):
    layers = make_layers([(2, 48, 48)], 3, torch.float32, device)
    layers[0] = layers[0].to(memory_format=torch.channels_last)
    forward, _ = _launches(launched, layers * 2)
    assert forward[:2] == ["pool_kernel", "add_splits_kernel"]
    assert len(forward) == 5


# 335 entries are a launch of 256 and one of fewer; addresses and sizes beyond 32 bits and negative values survive.
def test_a_table_written_during_a_capture_holds_what_a_copied_one_does(launched, device):
    entries = [2**40 + 3, -1, 0, 1, 16, 2**33, 2**59, *range(328)]
    written = tables._written_by_kernels(entries, torch.device(device))
    assert written.tolist() == entries
    assert launched == ["_write_kernel"] * 2
    assert tables.device_table([entries[:7], entries[7:]], torch.device(device)).tolist() == entries
