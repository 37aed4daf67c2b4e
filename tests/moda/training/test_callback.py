"""The Lightning callback against the same training written by hand."""

from __future__ import annotations

import contextlib
import copy

import lightning
import pytest
import torch
import torch.nn.functional as F

import moda
from moda.observation.taps import taps_of
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
    model = module.net
    taps = moda.observe(model, route="grouped")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        for batch in batches():
            optimizer.zero_grad()
            total = F.cross_entropy(model(batch["x"]), batch["y"]) + loss(taps.activations(), batch["y"])
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
    rates = moda.count_firings(clone.net, [(b["x"], b["y"]) for b in batches()], 4, progress=False)
    assert rates.class_sizes.sum().item() == 48


def test_a_wrong_attribute_is_named():
    with pytest.raises(AttributeError, match="attribute: expected the name of the network in Plain, got 'model'"):
        fit(Plain(), [ModularCallback()])


class Failing(Plain):
    def __init__(self, error=None):
        super().__init__()
        self.error = error

    def training_step(self, batch, batch_idx):
        if self.error is not None and batch_idx == 1:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("same", [True, False])
def test_a_fit_that_fails_leaves_a_plain_module_that_can_be_fitted_again(error, same):
    module, labels = Failing(error), lambda batch: batch["y"]
    callback = ModularCallback(attribute="net", labels=labels)
    with contextlib.suppress(BaseException):
        fit(module, [callback])
    assert taps_of(module.net) is None
    assert "training_step" not in vars(module)
    module.error = None
    fit(module, [callback if same else ModularCallback(attribute="net", labels=labels)])
    assert taps_of(module.net) is None
    assert "training_step" not in vars(module)


class ByHand(Plain):
    def __init__(self, backward="manual"):
        super().__init__()
        self.automatic_optimization = False
        self.backward_by = backward

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self.net(batch["x"]), batch["y"])
        if self.backward_by == "manual":
            self.manual_backward(loss)
        else:
            loss.backward()
        optimizer.step()


def test_a_module_that_optimises_by_hand_is_trained_with_the_loss():
    module = ByHand()
    fit(module, [ModularCallback(ModularLoss(0.5, 2.0, 0.1), attribute="net", labels=lambda batch: batch["y"])])
    expected = by_hand(ModularLoss(0.5, 2.0, 0.1, backend="reference"))
    for key, value in module.net.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    assert not {"training_step", "manual_backward"} & vars(module).keys()


def test_a_backward_pass_that_nobody_can_add_the_loss_to_is_an_error():
    with pytest.raises(RuntimeError, match="call it in the place of loss.backward"):
        fit(ByHand("tensor"), [ModularCallback(attribute="net", labels=lambda batch: batch["y"])])
