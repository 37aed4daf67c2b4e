"""The callback for Hugging Face's Trainer against a loop by hand, and its errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
    TrainingArguments,
)

import moda
from moda.hf import ModularTrainerCallback
from moda.observation.taps import taps_of
from moda_kernels import ModularLoss

SIZES = {
    "vocab_size": 17, "max_position_embeddings": 8, "num_labels": 3, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
BATCH = 6


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """24 sequences of 8 tokens in three classes."""

    def __init__(self, labels: bool = True, each_token: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randint(0, 17, (24, 8), generator=generator)
        self.items = {"input_ids": self.inputs}
        if labels:
            self.items["labels"] = self.inputs % 3 if each_token else self.inputs.sum(1) % 3

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.items.items()}


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def bert(kind: type[nn.Module] = BertForSequenceClassification) -> nn.Module:
    torch.manual_seed(0)
    return kind(BertConfig(**SIZES))


def train(model: nn.Module, data: Dataset, callback: ModularTrainerCallback, folder, accumulation: int = 1) -> None:
    arguments = TrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=BATCH // accumulation, use_cpu=True, optim="sgd",
        gradient_accumulation_steps=accumulation, learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    InOrder(model=model, args=arguments, train_dataset=data, callbacks=[callback]).train()


def by_hand(model: nn.Module, data: Dataset, accumulation: int = 1) -> None:
    model.train()
    loss_of_modules = ModularLoss(0.5, 0.25, 0.125)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with moda.observe(model) as taps:
        for _ in range(2):
            for i, batch in enumerate(DataLoader(data, BATCH // accumulation)):
                loss = model(**batch).loss + loss_of_modules(taps.activations(), batch["labels"])
                (loss / accumulation).backward()
                if (i + 1) % accumulation == 0:
                    optimizer.step()
                    optimizer.zero_grad()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trains_as_a_loop_by_hand(tmp_path, accumulation):
    model, data = bert(), Tokens()
    model.accepts_loss_kwargs = False  # each batch's loss is a mean, which the Trainer divides
    reference, plain = copy.deepcopy(model), copy.deepcopy(model)
    callback = ModularTrainerCallback(ModularLoss(0.5, 0.25, 0.125))
    train(model, data, callback, tmp_path, accumulation)
    by_hand(reference, data, accumulation)
    for (name, ours), theirs in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
    assert any(not torch.equal(ours, old) for ours, old in zip(model.parameters(), plain.parameters(), strict=True))
    assert callback.loss.last.compactness > 0


def test_a_batch_has_its_share_of_a_step(tmp_path):
    """The Trainer tells how many items a step has where losses are to be summed over its batches."""
    model = bert().train()
    batch = next(iter(DataLoader(Tokens(), BATCH)))
    expected = model(**batch).loss
    callback = ModularTrainerCallback()
    callback.on_train_begin(TrainingArguments(str(tmp_path), use_cpu=True), None, None, model=model)
    whole = model(**batch).loss - expected
    half = model(**batch, num_items_in_batch=torch.tensor(2 * BATCH)).loss - expected
    assert whole > 0
    torch.testing.assert_close(half, whole / 2, rtol=1e-5, atol=1e-6)


def test_leaves_no_trace(tmp_path):
    model = bert()
    kind = type(model)
    train(model, Tokens(), ModularTrainerCallback(), tmp_path)
    assert taps_of(model) is None
    assert type(model) is kind
    assert not model._forward_hooks


def test_keeps_the_taps_of_an_observed_model(tmp_path):
    model = bert()
    taps = moda.observe(model)
    train(model, Tokens(), ModularTrainerCallback(), tmp_path)
    assert taps_of(model) is taps


def test_evaluation_gets_no_modular_loss(tmp_path):
    model, data = bert(), Tokens()
    batch = next(iter(DataLoader(data, BATCH)))
    callback = ModularTrainerCallback()
    train(model, data, callback, tmp_path)
    model.eval()
    expected = model(**batch).loss
    callback.on_train_begin(TrainingArguments(str(tmp_path), use_cpu=True), None, None, model=model)
    assert torch.equal(model(**batch).loss, expected)
    callback.on_train_end(None, None, None, model=model)


def test_a_training_that_failed_is_forgotten(tmp_path):
    model = bert()
    callback = ModularTrainerCallback()
    with pytest.raises(ValueError, match="expected one integer for each sample"):
        train(model, Tokens(labels=False), callback, tmp_path)
    train(model, Tokens(), callback, tmp_path)
    assert taps_of(model) is None


def test_labels_of_tokens_are_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"one integer for each sample.*labels=\.\.\."):
        train(bert(BertForTokenClassification), Tokens(each_token=True), ModularTrainerCallback(), tmp_path)


def test_labels_may_be_made_of_the_arguments(tmp_path):
    callback = ModularTrainerCallback(labels=lambda arguments: arguments["labels"][:, 0])
    train(bert(BertForTokenClassification), Tokens(each_token=True), callback, tmp_path)
    assert callback.loss.last is not None
