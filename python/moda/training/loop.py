"""Trains on Lightning by the paper's recipe, modular or standard; a run is logged, checkpointed and resumable.

`train(config, folder)` runs a whole training into a run folder (`moda.runs`). `ModularModule` is the Lightning module
behind it, for users who bring their own Trainer; without Lightning the loop is ten lines (see the README).

On one device a resumed training ends with bitwise the weights of one that was never stopped: the checkpoint holds
weights, optimiser, schedule and random state, and the order and augmentation of samples follow from (seed, epoch)
alone. (On a GPU this also takes deterministic kernels in the model: cuDNN is asked for them.)
"""

from __future__ import annotations

import copy
import inspect
import logging
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from moda.data import DataSplits
from moda.data.batches import Batch, BatchLoader, EpochOrder
from moda.files import remove_partial_files
from moda.hints import command_line
from moda.methods.base import TASK
from moda.methods.mwt import PreparedGates
from moda.methods.nemo import NeMo, Taught, TaughtLogits
from moda.observation.taps import Route, observe, taps_of
from moda.runs.config import AUTO, ON, RUNTIME_SETTINGS, TrainingConfig
from moda.runs.folder import RunFolder, create_model, load_data
from moda.runs.gated import method_of, with_gates
from moda.runs.lock import locked
from moda.runs.metrics import MetricsFile, read_metrics
from moda.training import graphed
from moda.training.checkpoint import CHECKPOINT_VERSION, SafeCheckpointIO, check_checkpoint, check_own_part
from moda.training.graph import scaler_of, why_eager
from moda.training.graphed import GraphedStep
from moda.training.processes import SHARDED, SHARDED_PRECISIONS, process_rank, shard, trainer_options, whole_weights
from moda.training.progress import TrainingProgress
from moda_kernels import ModularLoss, backends

__all__ = [
    "ModularModule",
    "RunFolder",
    "TrainingConfig",
    "TrainingInterrupted",
    "TrainingResult",
    "process_rank",
    "train",
]

MOST_CLASSES_SUMMED = 200
"""Over several processes, class sums of all classes are added up to so many classes, else of those present alone: where
the crossover lies depends on the model and the network (docs/distributed.md)."""

LOSSES = ("loss", "cross_entropy", "affinity", "dispersion", "compactness")
"""What is averaged over each epoch: the total, the task's loss, and the unweighted modular terms."""

STEP_COLUMNS = ("epoch", "step", "learning_rate", *LOSSES, "train_accuracy")
TEST_COLUMNS = ("test_cross_entropy", "test_accuracy", "seconds")
EPOCH_COLUMNS = (*STEP_COLUMNS, *TEST_COLUMNS)


def step_columns(config: TrainingConfig) -> tuple[str, ...]:
    """Give the columns of a run's steps.csv; a method that trains gates has its own terms in the place of MODA's."""
    return ("epoch", "step", "learning_rate", *LOSSES[:2], *config.terms, "train_accuracy")


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM; the last checkpoint is whole."""


@dataclass(frozen=True)
class TrainingResult:
    """The result of `train`.

    Attributes:
        run: the run folder.
        model: the trained model, on the CPU.
        metrics: the last epoch's row of metrics.csv.
        seconds: wall-clock time of the epochs trained by this call, tests included, without set-up.
    """

    run: RunFolder
    model: nn.Module
    metrics: dict[str, float]
    seconds: float


class ModularModule(lightning.LightningModule):
    """Trains with cross-entropy plus the modular loss, by SGD with cosine annealing as in the paper (arXiv 2411.01074).

    A step adds to sums on the device and synchronises nothing; the epoch's means are read once at its end. Logged
    per epoch under the names of `LOSSES` and as train_accuracy, test_accuracy, test_cross_entropy, learning_rate. Means
    over an epoch weigh every batch by its samples.

    Args:
        model: is observed if `config` is modular, unless it is already; `taps.remove()` ends that.
        config: weights of the terms, epochs, learning rate, momentum, backend and route.
        num_classes: labels are in [0, num_classes); of use with several processes (see `moda_kernels.ModularLoss`).
        gates: of the model, where the method of `config` trains gates (`moda.runs.gated.with_gates`).
        teacher: a trained network from which a distilled one learns.

    Raises:
        ValueError: the method of `config` trains gates, and there are none, or the other way round; or the model is not
            a distilled one.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        num_classes: int | None = None,
        gates: PreparedGates | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if config.gated != (gates is not None):
            raise ValueError(f"gates: expected {'some' if config.gated else 'none'} with the method {config.method!r}")
        self.config = config
        observed = config.modular and not config.gated
        self.modular_loss = _modular_loss(config, num_classes) if observed else None
        self.model = model
        self.taps = (taps_of(model) or observe(model, route=cast(Route, config.route))) if observed else None
        self.losses = (*LOSSES[:2], *config.terms) if config.modular else LOSSES[:2]
        self._method = method_of(config) if gates is not None else None
        self.__dict__["gates"] = gates  # their network is this one's `model`
        self.__dict__["taught"] = None if teacher is None else _taught(model, teacher)
        self.epoch_metrics: dict[str, float] = {}
        self.last_step: Tensor | None = None
        self.learning_rate = config.learning_rate
        self._train_sums: Tensor | None = None
        self._test_sums: Tensor | None = None
        self._random_state: dict[str, Tensor] = {}
        self._sharded = False
        self._graphed: GraphedStep | None = None
        self._eager = ""

    def setup(self, stage: str) -> None:
        """With several processes the modular terms are those of the batch that they hold together.

        A teacher, which is no part of this module, comes to its device.
        """
        if self.__dict__["taught"] is not None:
            self.__dict__["taught"].__dict__["teacher"].to(self.device)
        if self.modular_loss is not None and self.trainer.world_size > 1:
            self.modular_loss.group = "world"

    def configure_model(self) -> None:
        """Share out the weights, where the strategy does that."""
        if self.device_mesh is not None and not self._sharded:
            shard(self.model, self.device_mesh["data_parallel"])
            self._sharded = True

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's logits."""
        logits: Tensor = self.model(images)
        return logits

    @property
    def eager(self) -> str:
        """Why steps are not captured in a CUDA graph; empty where they are, or are about to be."""
        return self._eager if self._graphed is None else self._graphed.reason

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return cross-entropy plus the weighted modular terms, or plus the terms of a method that trains gates.

        Where steps are captured, the gradients are there afterwards.

        Raises:
            RuntimeError: steps were to be captured, and cannot be.
        """
        images, labels = batch
        if self._graphed is None:
            objective, self.last_step = self._objective(images, labels, self._weight(batch_idx))
        else:
            with torch.autocast(self.device.type, enabled=False):  # in which no backward pass should run
                objective, self.last_step = self._graphed.backward(images, labels)
            self._check_graph()
        self._train_sums = _add(self._train_sums, self.last_step, len(labels))
        self.learning_rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        return objective

    def _objective(self, images: Tensor, labels: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """Return what is minimised, the cross-entropy in it times `weight`, and the row of what is logged."""
        taught: Taught | None = self.__dict__["taught"]
        outputs = self.model(images) if taught is None else taught(images)
        if self._method is not None:
            return self._gated_objective(outputs, labels)
        cross_entropy = F.cross_entropy(outputs, labels)
        correct = (outputs.argmax(1) == labels).sum() / len(labels)
        loss = cross_entropy
        objective = cross_entropy if weight == 1 else cross_entropy * weight
        terms: tuple[Tensor, ...] = ()
        if self.modular_loss is not None and self.taps is not None:
            modular = self.modular_loss(self.taps.activations(), labels)
            loss, objective = loss + modular, objective + modular
            terms = self.modular_loss.last or ()
        return objective, _row([loss, cross_entropy, *terms, correct])

    def _gated_objective(self, outputs: Tensor | TaughtLogits, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a method that trains gates, and the row of what is logged."""
        method: Any = self._method  # NeMo alone takes what a teacher says
        terms: dict[str, Tensor] = method.loss(self.__dict__["gates"], outputs, labels)
        logits = outputs.logits + outputs.distilled if isinstance(outputs, TaughtLogits) else outputs
        cross_entropy, others = terms[TASK], [terms[name] for name in self.config.terms]
        weights = [getattr(self.config, name) for name in self.config.terms]
        loss = torch.stack(
            [cross_entropy, *(weight * term for weight, term in zip(weights, others, strict=True))]
        ).sum()
        correct = (logits.argmax(1) == labels).sum() / len(labels)
        return loss, _row([loss, cross_entropy, *others, correct])

    def _graphed_step(self) -> GraphedStep | None:
        """Return what captures steps, if the settings let it."""
        self._eager = why_eager(self.config, self.trainer)
        if self._eager:
            return None

        def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            with self.trainer.precision_plugin.forward_context():
                return self._objective(images, labels, 1.0)

        return GraphedStep(self.model, objective, self.trainer.optimizers[0], scaler=scaler_of(self.trainer))

    def _check_graph(self) -> None:
        if self.config.graph == ON and self.eager:
            raise RuntimeError(f"graph: {ON!r} asked for, but {self.eager}; with 'auto' the steps run eagerly")

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, where the step has not done so itself."""
        if self._graphed is None:
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Drop the gradients of the step before, where the step has not done so itself: this is called behind it."""
        if self._graphed is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def _weight(self, batch_idx: int) -> float:
        """Return the weight of this process's cross-entropy, not 1 where processes hold unequal shares of a batch."""
        order = getattr(self.trainer.train_dataloader, "order", None)
        return order.weight(batch_idx) if isinstance(order, EpochOrder) else 1.0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up accuracy and cross-entropy on test samples."""
        images, labels = batch
        logits = self.model(images)
        correct = (logits.argmax(1) == labels).sum() / len(labels)
        row = _row([F.cross_entropy(logits, labels), correct])
        self._test_sums = _add(self._test_sums, row, len(labels))

    def configure_optimizers(self) -> Any:
        """Return SGD with cosine annealing to 0 over the epochs, stepped once per epoch."""
        optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=self.config.learning_rate,
            momentum=self.config.momentum,
            nesterov=self.config.momentum > 0,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.config.epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def on_train_start(self) -> None:
        """Go on with the random numbers that the interrupted training would have drawn.

        Raises:
            RuntimeError: steps were to be captured in a CUDA graph, and cannot be.
        """
        self._graphed = self._graphed_step()
        self._check_graph()
        if self.trainer.world_size > 1:  # each process its own dropout
            torch.manual_seed(self.config.seed + self.trainer.global_rank + self.trainer.global_step)
        elif self._random_state:
            torch.set_rng_state(self._random_state["cpu"])
            if self.device.type == "cuda" and "cuda" in self._random_state:
                torch.cuda.set_rng_state(self._random_state["cuda"], self.device)

    def on_train_epoch_start(self) -> None:
        """Begin new means."""
        self._train_sums = None

    def on_validation_epoch_start(self) -> None:
        """Begin new means."""
        self._test_sums = None

    def on_train_epoch_end(self) -> None:
        """Read the means of the epoch, which is its one synchronisation."""
        metrics = dict(zip((*self.losses, "train_accuracy"), self._means(self._train_sums), strict=True))
        if self._test_sums is not None:
            names = ("test_cross_entropy", "test_accuracy")
            metrics |= dict(zip(names, self._means(self._test_sums), strict=True))
        self.epoch_metrics = {"learning_rate": self.learning_rate, **metrics}
        self.log_dict(self.epoch_metrics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not save: the settings, random state and the means so far."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["moda"] = {
            "format_version": CHECKPOINT_VERSION,
            "config": self.config.to_dict(),
            "random_state": state,
            "train_sums": None if self._train_sums is None else self._over_processes(self._train_sums),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what `on_save_checkpoint` added.

        Raises:
            FormatError: the checkpoint is of another version or of a training with other settings.
        """
        ours = check_own_part("checkpoint", checkpoint.get("moda"), self.config)
        self._random_state = ours["random_state"]
        sums = ours["train_sums"]
        if sums is not None:  # of all processes: one of them goes on from it
            self._train_sums = sums.to(self.device) * (self.trainer.global_rank == 0)

    def _means(self, sums: Tensor | None) -> list[float]:
        if sums is None:
            raise RuntimeError("no batch was trained in this epoch")
        total = self._over_processes(sums).tolist()
        return [value / total[-1] for value in total[:-1]]

    def _over_processes(self, sums: Tensor) -> Tensor:
        total: Tensor = self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")
        return total


def _modular_loss(config: TrainingConfig, num_classes: int | None) -> ModularLoss:
    weights = config.affinity, config.dispersion, config.compactness
    few = num_classes if num_classes is not None and num_classes <= MOST_CLASSES_SUMMED else None
    return ModularLoss(*weights, backend=config.backend, num_classes=few)


def _row(values: list[Tensor]) -> Tensor:
    return torch.stack([value.detach().float() for value in values])


def _add(sums: Tensor | None, row: Tensor, samples: int) -> Tensor:
    """Add values times samples, and samples, to sums; in float64 where the device has it."""
    if sums is None:
        dtype = torch.float32 if row.device.type == "mps" else torch.float64
        sums = torch.zeros(len(row) + 1, dtype=dtype, device=row.device)
    sums[:-1].add_(row, alpha=samples)
    sums[-1].add_(samples)
    return sums


class _Data(lightning.LightningDataModule):
    """Gives each process its share of the training and test samples."""

    def __init__(self, splits: DataSplits, config: TrainingConfig) -> None:
        super().__init__()
        self.splits = splits
        self.config = config

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.splits.train, self.config.seed)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.splits.test, None)

    def _loader(self, dataset: Dataset[Any], seed: int | None) -> BatchLoader:
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("the data module belongs to no trainer")
        samples = len(dataset)  # type: ignore[arg-type]
        if min(samples, self.config.batch_size) < trainer.world_size:
            raise ValueError(
                f"batch_size: expected a sample for each of {trainer.world_size} processes, got batches of "
                f"{self.config.batch_size} from {samples} samples"
            )
        order = EpochOrder(
            samples,
            self.config.batch_size,
            seed,
            trainer.global_rank,
            trainer.world_size,
        )
        on_gpu = trainer.strategy.root_device.type == "cuda"
        return BatchLoader(dataset, order, num_workers=self.config.num_workers, pin_memory=on_gpu)


class _RunRecorder(Checkpoint):
    """Writes the run folder, the rows of metrics before the checkpoint that stands for them.

    (A `Checkpoint` to Lightning, so that it is called after the module has read its means.)
    """

    def __init__(self, run: RunFolder, progress: TrainingProgress, *, resumed: bool) -> None:
        self.run = run
        self.progress = progress
        self.resumed = resumed
        self.seconds = 0.0
        self._epochs = MetricsFile(run.metrics)
        self._steps = MetricsFile(run.steps)
        self._since = time.perf_counter()
        self._said = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._since = time.perf_counter()
        if trainer.is_global_zero:
            step = trainer.global_step if self.resumed else None
            columns = step_columns(self.run.config)
            self._epochs.open((*columns, *TEST_COLUMNS), keep_until_step=step)
            self._steps.open(columns, keep_until_step=step)
            self.progress.start(trainer.max_epochs, trainer.num_training_batches, trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step, config = trainer.global_step, self.run.config
        self.progress.step()
        self._say_why_eager(trainer, pl_module)
        if _every(config.log_every_steps, step) and trainer.is_global_zero:
            self._log_step(trainer, pl_module)
        last = batch_idx + 1 == trainer.num_training_batches  # the epoch's own checkpoint follows
        if _every(config.checkpoint_every_steps, step) and not last:
            trainer.save_checkpoint(self.run.last_checkpoint)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self.seconds += seconds
        if trainer.is_global_zero:
            row = {"epoch": epoch, "step": trainer.global_step, **pl_module.epoch_metrics, "seconds": seconds}
            self._epochs.write(row)
            self.progress.epoch(epoch, row)
        if _every(self.run.config.keep_every_epochs, epoch):
            weights = whole_weights(pl_module.model)
            if trainer.is_global_zero:
                path = self.run.checkpoints / f"epoch-{epoch:04d}.safetensors"
                path.parent.mkdir(exist_ok=True)
                self.run.save_weights(weights, path)
        trainer.save_checkpoint(self.run.last_checkpoint)

    def _say_why_eager(self, trainer: Any, pl_module: Any) -> None:
        """Say once why steps are not captured in a CUDA graph, where that was to be expected."""
        expected = self.run.config.graph == AUTO and pl_module.device.type == graphed.DEVICE
        if expected and pl_module.eager and not self._said and trainer.is_global_zero:
            self._said = True
            self.progress.note(f"steps run eagerly: {pl_module.eager}")

    def _log_step(self, trainer: Any, pl_module: Any) -> None:
        figures = dict(zip((*pl_module.losses, "train_accuracy"), pl_module.last_step.tolist(), strict=True))
        figures["learning_rate"] = pl_module.learning_rate
        self._steps.write({"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **figures})
        if trainer.logger is not None:
            trainer.logger.log_metrics({f"step/{name}": value for name, value in figures.items()}, trainer.global_step)

    def close(self) -> None:
        """Close the files; nothing more will be written."""
        self.progress.stop()
        self._epochs.close()
        self._steps.close()


def _every(interval: int, count: int) -> bool:
    return interval > 0 and count % interval == 0


def train(
    config: TrainingConfig,
    folder: str | Path,
    *,
    resume: bool | Literal["auto"] = False,
    model: nn.Module | None = None,
    data: DataSplits | None = None,
    progress: TrainingProgress | None = None,
) -> TrainingResult:
    """Run a whole training, recorded in a run folder.

    Args:
        config: what to train and how.
        folder: the run folder, new or empty; with `resume` one that holds a run.
        resume: go on from the run's last checkpoint (from the beginning if it has none yet; not at all if the
            run is finished). `config` may then differ from the run's in `RUNTIME_SETTINGS` only. "auto" begins where
            there is no run yet, and goes on where there is one.
        model: train this one; `config.model` is then a name and nothing else. It is trained in place, but for
            strategy "fsdp", which shares out its weights and leaves it in pieces: the result has a whole copy.
        data: train on this; `config.data` is then a name and nothing else.
        progress: what to show; by default a progress bar.

    Raises:
        ValueError, TypeError: an argument is not as above, or the settings do not go together.
        FileNotFoundError, ImportError: the data set, or a package that it needs, is missing.
        FormatError (a ValueError): the run folder or its checkpoint is malformed.
        BusyError (a ValueError): another process is writing in the run folder.
        TrainingInterrupted (a KeyboardInterrupt): Ctrl-C or SIGTERM; the last checkpoint is whole.
    """
    _check_runnable(config)
    if resume not in (True, False, "auto"):
        raise ValueError(f"resume: expected True, False or 'auto', got {resume!r}")
    if resume == "auto":
        resume = (Path(folder) / "config.json").exists()
    if resume:
        _check_resumable(RunFolder.open(folder).config, config)
    data = load_data(config) if data is None else data
    torch.manual_seed(config.seed)
    model = create_model(config, data) if model is None else model
    with _observed_while_training(model):
        gates = with_gates(config, data, model) if config.gated else None
        module = ModularModule(model, config, data.num_classes, gates, _teacher(config, data))
        first = process_rank() == 0
        run = RunFolder.create(folder, config) if first and not resume else RunFolder(Path(folder), config)
        with locked(run.path) if first else nullcontext():
            if first and resume:
                remove_partial_files(run.path)
                remove_partial_files(run.checkpoints)
            return _trained(run, module, data, progress or TrainingProgress(), resume=resume)


def _teacher(config: TrainingConfig, data: DataSplits) -> nn.Module | None:
    """The model of the run that the settings name; None if they name none."""
    if config.teacher is None:
        return None
    run = RunFolder.open(config.teacher)
    if not run.finished:
        raise ValueError(f"teacher: {run.path} is not finished; train it to its end first")
    if run.config.data != config.data:
        raise ValueError(f"teacher: expected a run on {config.data}, got one on {run.config.data}")
    with torch.random.fork_rng(devices=[]):  # its initial weights are drawn, and replaced
        return run.load_model(data).requires_grad_(False).eval()


def _taught(model: nn.Module, teacher: nn.Module) -> Taught:
    """The model beside its teacher, if it has a classifier that learns from one."""
    if "separate" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"teacher: {type(model).__name__} is no distilled network; take deit_small, or drop --teacher")
    return Taught(model, teacher)


@contextmanager
def _observed_while_training(model: nn.Module) -> Iterator[None]:
    """Observe a plain model inside; afterwards it is plain again, also where training failed."""
    plain = taps_of(model) is None
    try:
        yield
    finally:
        taps = taps_of(model)
        if plain and taps is not None:
            taps.remove()


def _trained(
    run: RunFolder, module: ModularModule, data: DataSplits, progress: TrainingProgress, *, resume: bool
) -> TrainingResult:
    """Train what is left to train of a run."""
    config = run.config
    if run.finished:
        module.model.load_state_dict(run.load_weights())
        return TrainingResult(run, module.model, read_metrics(run.metrics)[-1], 0.0)
    resume = resume and run.last_checkpoint.exists()
    if resume:
        check_checkpoint(run, module)
    unsharded = _plain_copy(module.model) if config.strategy == SHARDED else None
    recorder = _RunRecorder(run, progress, resumed=resume)
    _fit(module, _Data(data, config), recorder, run.last_checkpoint if resume else None)
    weights = whole_weights(module.model)
    if module.trainer.is_global_zero:
        run.save_weights(weights)
    if unsharded is not None:
        unsharded.load_state_dict(weights)
    trained = module.model if unsharded is None else unsharded
    return TrainingResult(run, trained, read_metrics(run.metrics)[-1], recorder.seconds)


def _plain_copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    taps = taps_of(copied)
    if taps is not None:
        taps.remove()
    return copied


def _check_runnable(config: TrainingConfig) -> None:
    """Check what only this machine can tell."""
    on_gpu = config.accelerator in ("gpu", "cuda") or (config.accelerator == "auto" and torch.cuda.is_available())
    if config.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(f"accelerator: {config.accelerator!r} asked for, but PyTorch sees no GPU (see: moda doctor)")
    if config.graph == ON and not on_gpu:
        raise ValueError(f"graph: {ON!r} asked for, but training runs on no CUDA device; drop --graph, or take auto")
    if config.precision == "16-mixed" and not on_gpu:
        raise ValueError("precision: '16-mixed' needs a GPU; on the CPU use 'bf16-mixed'")
    known_strategies = ("auto", *StrategyRegistry.available_strategies())
    if config.strategy not in known_strategies:
        raise ValueError(f"strategy: expected one of {', '.join(known_strategies)}, got {config.strategy!r}")
    if config.strategy == SHARDED and config.precision not in SHARDED_PRECISIONS:
        expected = " or ".join(SHARDED_PRECISIONS)
        raise ValueError(f"precision: expected {expected} with strategy {SHARDED!r}, got {config.precision!r}")
    if config.gated and (config.devices > 1 or config.strategy == SHARDED):
        raise ValueError(f"devices: the method {config.method!r} trains on one device; drop --devices and --strategy")
    if config.teacher is not None and config.method != NeMo.name:
        raise ValueError(f"teacher: has no meaning with the method {config.method!r}; take --method {NeMo.name}")
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("tensorboard: the package is not installed: pip install tensorboard")
    if config.backend != "auto" and config.modular and not config.gated:
        known = backends()
        if config.backend not in known:
            raise ValueError(f"backend: expected one of 'auto', {', '.join(map(repr, known))}, got {config.backend!r}")
        if config.backend != "triton" and not known[config.backend]:
            raise ValueError(f"backend: {config.backend!r} cannot run here: {known[config.backend]}")


def _check_resumable(made_with: TrainingConfig, config: TrainingConfig) -> None:
    for name, value in config.to_dict().items():
        saved = getattr(made_with, name)
        if saved != value and name not in RUNTIME_SETTINGS:
            raise ValueError(f"{name}: the run to resume was started with {saved!r}, got {value!r}")


def _fit(module: ModularModule, data: _Data, recorder: _RunRecorder, checkpoint: Path | None) -> None:
    """Run Lightning's trainer without its advertising, and turn its ways of being interrupted into one."""
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with _quiet_lightning(), _deterministic_cudnn():
            _trainer(recorder).fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise TrainingInterrupted(_interruption(recorder.run)) from None
    finally:
        recorder.close()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupt)  # Lightning leaves it ignored


def _interruption(run: RunFolder) -> str:
    rows = read_metrics(run.metrics) if run.metrics.exists() else []
    done = int(rows[-1]["epoch"]) if rows else 0
    hint = command_line("train", run.path, "--resume")
    return f"interrupted after {done} of {run.config.epochs} epochs; go on with: {hint}"


def _trainer(recorder: _RunRecorder) -> lightning.Trainer:
    config = recorder.run.config
    return lightning.Trainer(
        accelerator=config.accelerator,
        precision=config.precision,  # type: ignore[arg-type]
        max_epochs=config.epochs,
        logger=_tensorboard(recorder.run) if config.tensorboard else False,
        log_every_n_steps=1,  # what is logged per step is the recorder's choice
        callbacks=[recorder],
        plugins=[SafeCheckpointIO(recorder.run)],
        default_root_dir=recorder.run.path,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **trainer_options(config),
    )


def _tensorboard(run: RunFolder) -> Any:
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(run.path, name="tensorboard", version="")


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Hide Lightning's hints (workers, checkpoints, cloud services) and show its errors."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _deterministic_cudnn() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
