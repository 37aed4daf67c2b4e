"""What the tests of masks, compositions and measures share: models that hide nothing, and random modules of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from moda.composition.compose import compose
from moda.composition.masking import mask
from moda.decomposition.container import Decomposition
from moda.observation.taps import observe, taps_of


def lively(model: nn.Module, seed: int = 0, mode: bool = False) -> nn.Module:
    """`model` in float64 with norms that change zeros into something else, weights that do not vanish, biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _NormBase):
            if module.running_mean is not None:
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
                nn.init.normal_(module.bias, 0, 0.3, generator=generator)
        elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.3, generator=generator)
    return model.double().train(mode)


def watched(model: nn.Module, *example: Tensor) -> nn.Module:
    """The model itself, observed; probed too, if an example is given."""
    observe(model, example=example or None)
    return model


def widths(model: nn.Module, x: Tensor) -> dict[str, int]:
    """Neurons per tap of an observed model."""
    taps = taps_of(model)
    assert taps is not None
    if not taps.probed:
        with torch.no_grad():
            model(x)
    return dict(zip(taps.names, taps.widths, strict=True))


def random_modules(neurons: dict[str, int], num_classes: int, share: float, seed: int = 0) -> Decomposition:
    """Every neuron is kept by every class with probability `share`."""
    generator = torch.Generator().manual_seed(seed)
    return Decomposition({tap: torch.rand(num_classes, c, generator=generator) < share for tap, c in neurons.items()})


def assert_law(model: nn.Module, x: Tensor, num_classes: int = 5, shares: Sequence[float] = (0.4, 0.0)) -> None:
    """compose == mask to 1e-10 in float64, for random masks, classes and orders; and the composed model is smaller."""
    whole_model = watched(lively(model))
    neurons = widths(whole_model, x)
    full = sum(parameter.numel() for parameter in model.parameters())
    changes, sizes = [], []
    for seed, share in enumerate(shares):
        decomposition = random_modules(neurons, num_classes, share, seed)
        generator = torch.Generator().manual_seed(seed)
        classes = torch.randperm(num_classes, generator=generator)[: 1 + 2 * seed % num_classes].tolist()
        with torch.no_grad():
            expected = mask(whole_model, decomposition, classes)(x)
            composed = compose(whole_model, decomposition, classes)
            got = composed(x)
            whole = whole_model(x)[:, classes]
        assert expected.shape[1] == len(classes)
        changes.append(not torch.allclose(expected, whole, atol=1e-6))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        sizes.append(sum(parameter.numel() for parameter in composed.parameters()))
    assert any(changes), "no mask changes anything: the test would prove nothing"
    assert max(sizes) <= full
    assert min(sizes) < full
