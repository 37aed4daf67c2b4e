"""The Lightning callback against the same training written by hand."""

from __future__ import annotations

import copy

import lightning
import pytest
import torch
import torch.nn.functional as F

import moda
from moda.training.callback import ModularCallback
from moda_kernels import ModularLoss


class Plain(lightning.LightningModule):
    """Somebody's own module: no word of moda in it."""

    def __init__(self, as_dict=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = moda.models.small_vgg(num_classes=4, width=0.25)
        self.as_dict = as_dict

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch["x"]), batch["y"])
        return {"loss": loss, "other": 1} if self.as_dict else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def batches():
    torch.manual_seed(1)
    return [{"x": torch.randn(16, 3, 8, 8), "y": torch.randint(4, (16,))} for _ in range(3)]


def fit(module, callbacks, **options):
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
    return trainer


def by_hand(loss):
    module = Plain()
    model = moda.instrument(module.net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        for batch in batches():
            optimizer.zero_grad()
            total = F.cross_entropy(model(batch["x"]), batch["y"]) + loss(model.activations(), batch["y"])
            total.backward()
            optimizer.step()
    return module.net.state_dict()


@pytest.mark.parametrize("as_dict", [False, True])
def test_trains_as_the_loop_written_by_hand(as_dict):
    module = Plain(as_dict)
    network, step = module.net, module.training_step
    callback = ModularCallback(ModularLoss(0.5, 2.0, 0.1), attribute="net", labels=lambda batch: batch["y"])
    trainer = fit(module, [callback])
    assert module.net is network
    assert module.training_step == step
    expected = by_hand(ModularLoss(0.5, 2.0, 0.1, backend="reference"))
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    logged = {name: value.item() for name, value in trainer.logged_metrics.items()}
    assert set(logged) == {"affinity", "dispersion", "compactness"}
    assert 0 < logged["dispersion"] < 1


def test_without_the_callback_training_differs():
    module = Plain()
    fit(module, [])
    expected = by_hand(ModularLoss())
    assert not torch.allclose(module.net.state_dict()["features.0.weight"], expected["features.0.weight"], atol=1e-4)


def test_the_trained_network_is_a_plain_one():
    module = Plain()
    fit(module, [ModularCallback(attribute="net", labels=lambda batch: batch["y"])])
    clone = copy.deepcopy(module)
    assert list(clone.net.state_dict()) == list(Plain().net.state_dict())
    rates = moda.count_firings(moda.instrument(clone.net), [(b["x"], b["y"]) for b in batches()], 4, progress=False)
    assert rates.class_sizes.sum().item() == 48


def test_a_wrong_attribute_is_named():
    with pytest.raises(AttributeError, match="attribute: expected the name of the network in Plain, got 'model'"):
        fit(Plain(), [ModularCallback()])
