"""Training over real processes: the same run for any number of them, with either strategy; one that dies ends the others."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from moda.data.splits import DataSplits, InMemory
from moda.files import read_tensors
from moda.runs.config import TrainingConfig
from moda.runs.folder import RunFolder
from moda.runs.metrics import read_metrics
from moda.training.loop import train
from moda.training.progress import TrainingProgress

SAMPLES, CLASSES, BATCH = (
    42,
    3,
    15,
)  # three steps per epoch, the last of 12: over four processes 4, 4, 4, 3 and 3, 3, 3, 3
SECONDS = 600  # for any of the processes here


def make_data(dtype: torch.dtype) -> DataSplits:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(SAMPLES) % CLASSES
    images = torch.randn(SAMPLES, 1, 4, 4, generator=generator, dtype=torch.float64) + labels[:, None, None, None]
    images = images.to(dtype)
    split = InMemory(images, labels)
    return DataSplits(split, split, InMemory(images[:17], labels[:17]), CLASSES, ("a", "b", "c"), (1, 4, 4))


def make_model(dtype: torch.dtype) -> nn.Module:
    """No batch norm: its statistics are of a process's own samples. One layer large enough to be sharded by itself."""
    torch.manual_seed(11)
    layers = [
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 1100),
        nn.ReLU(),
        nn.Linear(1100, CLASSES),
    ]
    return nn.Sequential(*layers).to(dtype)


class Pausing(TrainingProgress):
    """Stays in a step for a while, so that a signal meets it there."""

    def __init__(self, seconds: float = 0.0, stop_after: int = 10**9) -> None:
        super().__init__(shown=False)
        self.seconds, self.stop_after, self.steps = seconds, stop_after, 0

    def step(self) -> None:
        time.sleep(self.seconds)
        self.steps += 1
        if self.steps == self.stop_after:
            raise KeyboardInterrupt


def run(folder: Path, *, resume: bool = False, pausing: dict | None = None, **settings: object):
    defaults = {
        "model": "tiny", "data": "tiny", "epochs": 3, "batch_size": BATCH, "seed": 3, "accelerator": "cpu",
        "precision": "64-true", "log_every_steps": 1, "checkpoint_every_steps": 1, "timeout": 60,
    }  # fmt: skip
    config = TrainingConfig(**{**defaults, **settings})
    dtype = torch.float64 if config.precision == "64-true" else torch.float32
    progress = Pausing(**(pausing or {}))
    return train(config, folder, resume=resume, model=make_model(dtype), data=make_data(dtype), progress=progress)


def _process(rank: int, processes: int, port: int, folder: str, settings: dict, answer: str) -> None:
    """What torchrun sets, and a training."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        result = run(Path(folder), **settings)
        weights = {name: value.numpy() for name, value in result.model.state_dict().items()}
        outcome = ("trained", weights)
    except BaseException as error:
        outcome = (type(error).__name__, str(error))
    partial = Path(answer + ".partial")
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(answer)
    os._exit(outcome[0] != "trained")  # as a process that fails: without a farewell to the others


class Processes:
    """A training over several processes, started and not waited for."""

    def __init__(self, context, count: int, folder: Path, **settings: object) -> None:
        port = free_port()
        self.answers = [f"{folder}-{time.monotonic_ns()}-{rank}" for rank in range(count)]
        self.started = [
            context.Process(target=_process, args=(rank, count, port, str(folder), settings, answer), daemon=True)
            for rank, answer in enumerate(self.answers)
        ]
        for process in self.started:
            process.start()

    def outcomes(self):
        """Per process: ("trained", weights), (name of an error, its message), or None if it was killed."""
        end = time.monotonic() + SECONDS
        for process in self.started:
            process.join(max(0.0, end - time.monotonic()))
            assert process.exitcode is not None, "a process did not end"
        paths = map(Path, self.answers)
        return [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]

    def trained(self):
        """The weights that each process ends with."""
        outcomes = self.outcomes()
        assert [kind for kind, _ in outcomes] == ["trained"] * len(outcomes), outcomes
        return [weights for _, weights in outcomes]

    def kill(self, rank: int) -> None:
        os.kill(self.started[rank].pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


@pytest.fixture(scope="module")
def processes():
    """Starts trainings; from a server that has everything loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moda.training", "lightning.pytorch.strategies", "torch.distributed.fsdp"])
    return lambda count, folder, **settings: Processes(context, count, folder, **settings)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one process, by precision."""
    folder = tmp_path_factory.mktemp("alone")
    return {precision: run(folder / precision, precision=precision) for precision in ("64-true", "32-true")}


def assert_same_run(folder: Path, alone) -> None:
    """The metrics, steps and final weights of the run on one process: float64 to 1e-10, float32 to 1e-4."""
    ours, precision = RunFolder.open(folder), RunFolder.open(folder).config.precision
    expected = alone[precision].run
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if precision == "64-true" else {"rtol": 1e-4, "atol": 1e-5}
    weights, whole = read_tensors(ours.weights), read_tensors(expected.weights)
    assert set(weights) == set(whole)
    for name, value in whole.items():
        torch.testing.assert_close(weights[name], value, **tolerance)
    close = 1e-7 if precision == "64-true" else 1e-3
    for row, theirs in zip(read_metrics(ours.metrics), read_metrics(expected.metrics), strict=True):
        row.pop("seconds"), theirs.pop("seconds")
        assert row == pytest.approx(theirs, rel=close)
    for row, theirs in zip(read_metrics(ours.steps), read_metrics(expected.steps), strict=True):
        for term in ("epoch", "step", "affinity", "dispersion", "compactness"):
            assert row[term] == pytest.approx(theirs[term], rel=close)


RUNS = [(4, {"precision": "64-true"}), (2, {"precision": "32-true", "strategy": "fsdp"})]


@pytest.mark.parametrize(("count", "settings"), RUNS, ids=str)
def test_the_same_run_on_any_number_of_processes(processes, tmp_path, alone, count, settings):
    """Shares of different sizes included. Files are written once; every process gets the trained model."""
    folder = tmp_path / "run"
    results = processes(count, folder, keep_every_epochs=3, **settings).trained()
    assert_same_run(folder, alone)
    final, kept = (read_tensors(folder / name) for name in ("model.safetensors", "checkpoints/epoch-0003.safetensors"))
    for name, value in final.items():
        assert torch.equal(kept[name], value)
        for weights in results:
            assert torch.equal(torch.from_numpy(weights[name]), value)


FSDP = {"precision": "32-true", "strategy": "fsdp"}
CHANGES = [
    ((2, {"precision": "32-true", "strategy": "ddp"}), (3, FSDP)),
    ((2, FSDP), (1, {"precision": "32-true"})),
    ((1, {}), (2, {"strategy": "ddp"})),
]


@pytest.mark.parametrize(("first", "second"), CHANGES, ids=["ddp_to_fsdp", "fsdp_to_one", "one_to_ddp"])
def test_resume_with_another_number_of_processes(processes, tmp_path, alone, first, second):
    """Stopped in the middle of the second epoch. The means of that epoch are of all its steps all the same."""
    folder = tmp_path / "run"
    for kind, _ in processes(first[0], folder, pausing={"stop_after": 5}, **first[1]).outcomes():
        assert kind == "TrainingInterrupted"
    processes(second[0], folder, resume=True, **second[1]).trained()
    assert_same_run(folder, alone)


def test_precisions_that_do_not_go_with_shared_out_weights(tmp_path):
    with pytest.raises(
        ValueError, match="precision: expected 32-true or bf16-mixed with strategy 'fsdp', got '64-true'"
    ):
        run(tmp_path / "run", strategy="fsdp", precision="64-true")
    assert not (tmp_path / "run").exists()


def wait_for_steps(folder: Path, steps: int) -> None:
    end, path = time.monotonic() + SECONDS, folder / "steps.csv"
    while not (path.exists() and path.read_text().count("\n") > steps):
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


@pytest.mark.parametrize("stalled", [False, True], ids=["killed", "stalled"])
def test_a_process_that_dies_or_stalls_ends_the_others_in_time(processes, tmp_path, alone, stalled):
    """Killed, it closes its connections; stopped, it is only silent, and the timeout ends the wait."""
    folder, timeout = tmp_path / "run", 4
    training = processes(2, folder, strategy="ddp", timeout=timeout, epochs=3, pausing={"seconds": 0.3})
    wait_for_steps(folder, 4)
    victim = training.started[1]
    os.kill(victim.pid, signal.SIGSTOP if stalled else signal.SIGKILL)
    since = time.monotonic()
    training.started[0].join(SECONDS)
    waited = time.monotonic() - since
    os.kill(victim.pid, signal.SIGKILL) if stalled else None
    survivor, killed = training.outcomes()
    assert killed is None
    assert survivor[0] not in ("trained", "TrainingInterrupted")
    assert waited < 3 * timeout
    if stalled:
        assert waited > 0.5 * timeout
    run(folder, resume=True)
    assert_same_run(folder, alone)


def test_batches_smaller_than_the_number_of_processes(processes, tmp_path):
    for kind, message in processes(2, tmp_path / "run", batch_size=1).outcomes():
        assert kind == "ValueError"
        assert message == "batch_size: expected a sample for each of 2 processes, got batches of 1 from 42 samples"


def test_torchrun_and_the_command(tmp_path):
    """The command itself, under torchrun, on real data: one run folder, one report, the same as on one process."""
    root = Path(__file__).resolve().parents[3]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "python")]),
        "OMP_NUM_THREADS": "1",
    }
    settings = (
        "--model lenet5 --data digits --image-size 16 --epochs 1 --batch-size 256 --accelerator cpu --log-every 1"
    )
    launch = (
        f"-m torch.distributed.run --standalone --nproc-per-node 2 -m moda train {tmp_path / 'two'} --strategy fsdp"
    )
    two = subprocess.run(
        [sys.executable, *launch.split(), *settings.split()],
        env=environment,
        timeout=SECONDS,
        capture_output=True,
        text=True,
    )
    assert two.returncode == 0, two.stderr
    one = train(
        TrainingConfig(
            model="lenet5",
            data="digits",
            data_options={"image_size": 16},
            epochs=1,
            batch_size=256,
            accelerator="cpu",
        ),
        tmp_path / "one",
        progress=TrainingProgress(shown=False),
    )
    weights = read_tensors(tmp_path / "two" / "model.safetensors")
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    assert two.stdout.count(str(tmp_path / "two")) <= 2
