"""Fine-tuning of modules: what is trained, and which epoch is taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moda.methods.finetune import FineTunedEpoch, FineTuning, HeadedModule, fine_tune


def body(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).double()


def batches(seed: int, classes: int = 4, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        labels = torch.randint(0, classes, (12,), generator=generator)
        made.append((torch.randn(12, 5, generator=generator).double() + labels[:, None], labels))
    return made


@pytest.mark.parametrize("settings", [FineTuning(epochs=3), FineTuning.for_deit().changed(epochs=2)])
def test_it_goes_as_a_loop_written_by_hand(settings: FineTuning):
    """Samples of other classes are left out, labels are positions, the cosine does not come to its end."""
    module = HeadedModule(body(), 4, [3, 1], 4)
    reference = HeadedModule(body(), 4, [3, 1], 4)
    reference.load_state_dict(module.state_dict())
    found = fine_tune(module, batches(0), settings=settings)
    if settings.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(reference.parameters(), 0.05, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(reference.parameters(), 5e-4, weight_decay=0.05)
    losses = []
    for epoch in range(settings.epochs):
        rate = settings.learning_rate * (1 + torch.tensor(epoch * torch.pi / settings.horizon).cos().item()) / 2
        optimizer.param_groups[0]["lr"] = rate
        steps = []
        for inputs, labels in batches(0):
            rows = (labels == 3) | (labels == 1)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(reference(inputs[rows]), (labels[rows] == 1).long())
            loss.backward()
            optimizer.step()
            steps.append(float(loss.detach()))
        losses.append(sum(steps) / len(steps))
    assert [epoch.loss for epoch in found.epochs] == pytest.approx(losses, rel=1e-6)
    assert found.chosen == settings.epochs - 1
    assert not module.training
    for mine, theirs in zip(module.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("by", ["validation", "test"])
def test_the_first_most_accurate_epoch_is_taken(by: str):
    seen: list[FineTunedEpoch] = []
    states: list[dict[str, Tensor]] = []
    module = HeadedModule(body(), 4, [0, 2], 4)

    def note(epoch: FineTunedEpoch) -> None:
        seen.append(epoch)
        states.append({key: value.clone() for key, value in module.state_dict().items()})

    settings = FineTuning(epochs=6, learning_rate=0.3)
    data = {by: batches(7, count=1)}
    found = fine_tune(module, batches(1), settings=settings, published=by == "test", report=note, **data)
    accuracies = [epoch.accuracy for epoch in seen]
    assert found.chosen == accuracies.index(max(accuracies))
    assert found.epochs == tuple(seen)
    assert len(set(accuracies)) > 1
    assert all(torch.equal(value, states[found.chosen][key]) for key, value in module.state_dict().items())


def test_without_any_right_answer_the_last_epoch_is_taken():
    """The published code returns nothing there, and stops."""
    module = HeadedModule(body(), 4, [0, 2], 4)
    with torch.no_grad():
        module.head[1].bias.copy_(torch.tensor([100.0, -100.0]))
    inputs = torch.zeros(3, 5).double()
    found = fine_tune(
        module,
        [(batches(1)[0][0], torch.zeros(12).long())],
        settings=FineTuning(epochs=2, learning_rate=1e-6),
        validation=[(inputs, torch.full((3,), 2))],
    )
    assert found.chosen == 1
    assert [epoch.accuracy for epoch in found.epochs] == [0, 0]


ONE = batches(0, count=1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fine_tune(body(), ONE, [0, 1, 2, 3], test=ONE), ValueError, "test: choosing an epoch by test data"),
        (
            lambda: fine_tune(body(), ONE, [0, 1, 2, 3], test=ONE, validation=ONE, published=True),
            ValueError,
            "test, validation: expected one of them",
        ),
        (lambda: fine_tune(body(), ONE), ValueError, "classes: expected the classes of the module's logits"),
        (lambda: fine_tune(body(), []), ValueError, "classes: expected the classes"),
        (lambda: fine_tune(body(), ONE, [9, 8, 7, 6]), ValueError, r"loader: expected samples of the classes \[9, 8"),
        (lambda: fine_tune(body(), [], [0, 1]), ValueError, r"loader: expected samples of the classes \[0, 1\]"),
        (
            lambda: fine_tune(HeadedModule(body(), 4, [0, 1], 4), ONE, [1, 0]),
            ValueError,
            r"classes: expected those of the module, \[0, 1\], got \[1, 0\]",
        ),
        (lambda: HeadedModule(body(), 4, [0, 4], 4), ValueError, r"classes: expected classes in \[0, 4\), got \[4\]"),
        (lambda: FineTuning(epochs=0), ValueError, "epochs: expected"),
        (lambda: FineTuning(optimizer="lion"), ValueError, "optimizer: expected"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make()
