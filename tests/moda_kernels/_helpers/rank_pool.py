"""A few processes in one gloo process group, kept alive between tests: starting them costs more than the tests."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60  # seconds for one collective, and for one call's answer beyond it


class RankError(Exception):
    """What a rank raised: `kind` is its class's name."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        super().__init__(f"{message}\n{trace}")
        self.kind, self.message = kind, message


class RankPool:
    """Runs functions on every rank. A function is a module's, takes its rank first, and returns what pickle takes."""

    def __init__(self, world_size: int, folder: Path) -> None:
        # A fork server that has PyTorch loaded starts a process in milliseconds, and no process inherits our threads.
        context = multiprocessing.get_context("forkserver")
        # One server a process of tests: whoever starts it loads what the others need, too (those not installed are left out).
        context.set_forkserver_preload(["moda.training", "lightning.pytorch.strategies", "torch.distributed.fsdp"])
        self._ranks: list[tuple[Any, Connection]] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, str(folder / "store"), theirs), daemon=True
            )
            process.start()
            self._ranks.append((process, ours))

    def outcomes(self, function: Callable[..., Any], *args: Any, by_rank: list[Any] | None = None) -> list[Any]:
        """Each rank's result, or the RankError it raised; `by_rank` gives each rank one more, last argument."""
        for rank, (_, connection) in enumerate(self._ranks):
            last = [] if by_rank is None else [by_rank[rank]]
            connection.send_bytes(pickle.dumps((function, [*args, *last])))
        return [self._answer(connection) for _, connection in self._ranks]

    def __call__(self, function: Callable[..., Any], *args: Any, by_rank: list[Any] | None = None) -> list[Any]:
        """Each rank's result; raises the first rank's error, if any raised one."""
        results = self.outcomes(function, *args, by_rank=by_rank)
        for result in results:
            if isinstance(result, RankError):
                raise result
        return results

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._ranks:
            connection.close()
            process.join(10)
            if process.is_alive():
                process.kill()

    @staticmethod
    def _answer(connection: Connection) -> Any:
        if not connection.poll(2 * TIMEOUT):
            raise TimeoutError("a rank gave no answer")
        kind, *content = pickle.loads(connection.recv_bytes())
        return content[0] if kind == "result" else RankError(*content)


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", f"file://{store}", timeout, world_size, rank)
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            break
        torch.manual_seed(0)
        try:
            answer = ("result", function(rank, *args))
        except Exception as error:
            answer = ("error", type(error).__name__, str(error), traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
