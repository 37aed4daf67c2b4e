"""The networks of the other methods: the published checkpoints' keys, sizes and outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moda import models
from moda.models.incecnn import InceCNN
from moda.models.rescnn import ResCNN
from moda.models.simcnn import SimCNN
from moda.models.vit import DeiT, Size, ViT

Golden = Callable[[str], dict[str, np.ndarray]]


def state_of(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The state that a file of golden data holds, an array per tensor or all of them in one."""
    if "state_names" not in arrays:
        prefix = "state/"
        return {name[len(prefix) :]: torch.tensor(array) for name, array in arrays.items() if name.startswith(prefix)}
    state, start = {}, 0
    for name, sizes in zip(arrays["state_names"], arrays["state_shapes"], strict=True):
        shape = [int(size) for size in sizes if size]
        stop = start + int(np.prod(shape))
        state[str(name)] = torch.tensor(arrays["state_values"][start:stop]).reshape(shape)
        start = stop
    return state


def pictures(arrays: dict[str, np.ndarray]) -> Tensor:
    return (torch.tensor(arrays["x_u8"]).float() - 128) / 64


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("simcnn", {}, 15_245_130),
        ("simcnn", {"batch_norm": True}, 33_646_666),
        ("rescnn", {}, 16_010_122),
        ("rescnn", {"batch_norm": True}, 16_018_698),
        ("incecnn", {}, 12_637_898),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, options: dict[str, bool], count: int):
    with torch.device("meta"):
        model = getattr(models, name)(**options)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", ["simcnn", "rescnn"])
def test_plain_networks_compute_what_the_published_ones_do(golden: Golden, name: str):
    arrays = golden(f"peers/cs_model_{name}")
    widths = arrays["conv_cfg"][:, 1].tolist()
    classes = arrays["logits64"].shape[1]
    model = SimCNN(widths, (16, 16), classes, 3, 32) if name == "simcnn" else ResCNN(widths, classes, 3, 32)
    model.load_state_dict(state_of(arrays))
    logits = model.double().eval()(pictures(arrays).double())
    np.testing.assert_allclose(logits.detach().numpy(), arrays["logits64"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["simcnn", "rescnn", "incecnn"])
def test_normed_networks_take_the_published_keys(golden: Golden, name: str):
    arrays = golden(f"peers/gs_splitter_{name}")
    widths = arrays["conv_cfg"][:, 1].tolist()
    made: dict[str, Callable[[], nn.Module]] = {
        "simcnn": lambda: SimCNN(widths, (16, 16), 4, 3, 32, batch_norm=True),
        "rescnn": lambda: ResCNN(widths, 4, 3, 32, batch_norm=True),
        "incecnn": lambda: InceCNN(widths[:3], [widths[3:6], widths[6:9], widths[9:]], 4, 3),
    }
    model = made[name]()
    state = state_of(arrays)
    model.load_state_dict(state)
    assert {key for key in model.state_dict() if not key.endswith("num_batches_tracked")} <= state.keys()
    assert model.eval()(pictures(arrays)).shape == (12, 4)


@pytest.mark.parametrize(("name", "kind"), [("vit", ViT), ("deit", DeiT)])
def test_transformers_compute_what_the_published_ones_do(golden: Golden, name: str, kind: type[nn.Module]):
    """The golden module that keeps every neuron: fresh norms behind the first layer, ReLU and a linear layer at the end."""
    arrays = golden(f"peers/nemo_module_{name}")
    assert bool(arrays["masks_2"].all())
    layers, hidden, heads, mlp, image, patch = arrays["cfg"].tolist()
    state = state_of(arrays)
    backbone = kind(Size(layers, hidden, heads, mlp, image, patch), 2, 3).get_submodule(name)
    prefix = f"{name}."
    backbone.load_state_dict({key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)})
    for path, module in backbone.named_modules():
        if isinstance(module, nn.LayerNorm) and not path.startswith("encoder.layer.0."):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    tokens = backbone.double().eval()(pictures(arrays).double())[:, 0]
    logits = tokens.relu() @ torch.tensor(arrays["head_w_2"]).double().T + torch.tensor(arrays["head_b_2"]).double()
    np.testing.assert_allclose(logits.detach().numpy(), arrays["logits64_2"], rtol=1e-8, atol=1e-9)


def test_deit_gives_both_classifiers_logits_or_their_mean():
    model = models.deit_small(width=0.05, image_size=8).eval()
    images = torch.randn(2, 3, 8, 8)
    own, distilled = model(images, separate=True)
    assert own.shape == distilled.shape == (2, 10)
    assert not torch.equal(own, distilled)
    torch.testing.assert_close(model(images), (own + distilled) / 2)


@pytest.mark.parametrize("name", ["simcnn", "rescnn", "incecnn", "vit_small", "deit_small"])
def test_every_network_trains_at_a_tenth_of_its_width(name: str):
    model = models.create(name, num_classes=3, in_channels=1, width=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = nn.functional.cross_entropy(model(torch.randn(4, 1, 32, 32)), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert any(not torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: models.simcnn(image_size=16), ValueError, "image_size: expected at least 32, got 16"),
        (lambda: models.simcnn(dropout=1), ValueError, r"dropout: expected a number in \[0, 1\), got 1"),
        (lambda: models.rescnn(dropout="0"), TypeError, "dropout: expected a number, got str"),
        (lambda: ResCNN([8] * 11, 10, 3, 32), ValueError, "widths: expected 12 numbers, equal where outputs are added"),
        (lambda: ResCNN([8, 4, *[8] * 10], 10, 3, 32), ValueError, "equal where outputs are added"),
        (lambda: SimCNN([8] * 12, (8, 8), 10, 3, 32), ValueError, "widths, hidden: expected 13 and 2 numbers"),
        (lambda: InceCNN([8] * 3, [[8] * 3] * 2, 10, 3), ValueError, "stem, groups: expected 3 and 3 times 3 numbers"),
        (lambda: models.vit_small(image_size=30), ValueError, "image_size: expected a multiple of the patch's 4"),
        (lambda: Size(hidden=10, heads=3), ValueError, r"hidden: expected a multiple of heads \(3\), got 10"),
        (lambda: models.create("incecnn", width=0), ValueError, "width: expected a positive number"),
    ],
)
def test_bad_sizes_are_named(make: Callable[[], nn.Module], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make()
