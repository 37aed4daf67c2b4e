"""The cost of the distributed loss's collective: bytes, simulated time, and a measurement that checks the simulation.

    python -m benchmarks.collective             # writes the tables of docs/distributed.md and its appendix
    python -m benchmarks.collective measure     # times local processes, writes benchmarks/results/collective/, and both
    python -m benchmarks.collective agreement   # times what it costs that ranks tell each other of changed layers

The model of time is latency and bandwidth: a message of b bytes over a link takes latency + b / bandwidth, where links
may differ: fast inside a node, slow between nodes.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from moda_kernels import modular_losses
from moda_kernels.distributed import owners_pay

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "collective"
PAGES = (ROOT / "docs" / "distributed.md", ROOT / "docs" / "distributed_tables.md")

FLOAT, LABEL = 4, 8  # bytes
SAMPLES = 64  # per rank and step
RANKS = (2, 8, 64, 1024)
CLASSES = (10, 1000, 21841)
NODE = 8  # GPUs


# ---- What travels -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """Taps as (neurons, positions), and parameters."""

    name: str
    taps: tuple[tuple[int, int], ...]
    parameters: int

    @property
    def neurons(self) -> int:
        """D: neurons of all taps."""
        return sum(neurons for neurons, _ in self.taps)

    @property
    def activation_bytes(self) -> int:
        """Bytes of one sample's activations."""
        return FLOAT * sum(neurons * positions for neurons, positions in self.taps)


def _vgg16() -> Network:
    blocks = [(64, 224, 2), (128, 112, 2), (256, 56, 3), (512, 28, 3), (512, 14, 3)]
    convolutions = [(width, side * side) for width, side, count in blocks for _ in range(count)]
    return Network("VGG16", (*convolutions, (4096, 1), (4096, 1)), 138_357_544)


def _resnet50() -> Network:
    taps = [(64, 112 * 112)]
    for width, side, blocks in [(64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3)]:
        for block in range(blocks):
            entry = side if block or width == 64 else 2 * side  # the stride is in the 3 x 3 convolution
            taps += [(width, entry * entry), (width, side * side), (4 * width, side * side)]
    return Network("ResNet50", tuple(taps), 25_557_032)


NETWORKS = (_vgg16(), _resnet50(), Network("ViT-B/16", ((3072, 197),) * 12, 86_567_656))


def buffer_bytes(classes: float, neurons: int) -> float:
    """Bytes of the buffer that is all-reduced: class sums, sums of squares, class sizes and two numbers."""
    return FLOAT * (classes * (neurons + 2) + 2)


def present_classes(classes: int, samples: float) -> float:
    """The mean number of classes among `samples` samples, if all classes are equally likely."""
    if classes == 1:
        return 1
    return -classes * math.expm1(samples * math.log1p(-1 / classes))


# ---- How long it takes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """Seconds per message, bytes per second, in one direction."""

    latency: float
    bandwidth: float

    def seconds(self, size: float) -> float:
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """Nodes of `NODE` GPUs: links inside one, and from GPU to GPU of different ones."""

    name: str
    inside: Link
    between: Link

    def ring(self, ranks: int) -> list[Link]:
        """The kinds of links in a ring."""
        return [self.inside, self.between] if ranks > NODE else [self.inside]

    def tree_depth(self, ranks: int) -> float:
        """Latency from a leaf to the root."""
        inside, between = min(ranks, NODE), math.ceil(ranks / NODE)
        return math.ceil(math.log2(inside)) * self.inside.latency + math.ceil(math.log2(between)) * self.between.latency

    def all_reduce(self, size: float, ranks: int) -> float:
        """A ring, or a pair of pipelined trees where that is faster, as NCCL chooses."""
        slowest = self.between if ranks > NODE else self.inside
        tree = 2 * self.tree_depth(ranks) + 2 * size / slowest.bandwidth
        return min(ring_seconds(self.ring(ranks), size / ranks, 2 * (ranks - 1)), tree)

    def all_gather(self, size: float, ranks: int) -> float:
        """`size` bytes from every rank to every rank: a ring, or by doubling where that is faster."""
        slowest = self.between if ranks > NODE else self.inside
        doubling = self.tree_depth(ranks) + (ranks - 1) * size / slowest.bandwidth
        return min(ring_seconds(self.ring(ranks), size, ranks - 1), doubling)

    def all_to_all(self, size: float, ranks: int) -> float:
        """`size` bytes from every rank, shared among all others: a message to each, one after the other."""
        near = min(ranks, NODE) - 1
        far = ranks - 1 - near
        return near * self.inside.seconds(size / ranks) + far * self.between.seconds(size / ranks)


# Assumed, round figures of what such links give in practice.
CLUSTERS = (
    Cluster("NVLink, 400 Gbit/s between nodes", Link(3e-6, 200e9), Link(8e-6, 40e9)),
    Cluster("PCIe, 25 Gbit/s between nodes", Link(8e-6, 12e9), Link(30e-6, 2.5e9)),
)
HOST_READ = 20e-6  # seconds: a synchronisation of device and host, assumed


def ring_seconds(links: Sequence[Link], chunk: float, steps: int) -> float:
    """Seconds of a ring, in which every rank sends a chunk to the next one in each step.

    A rank goes on when it has sent its chunk and got another. The rank with the slowest link never waits, and no rank
    is later than it, so the slowest link sets the pace.
    (tests/benchmarks/test_collective.py plays it message by message.)
    """
    return steps * max(link.seconds(chunk) for link in links)


@dataclass(frozen=True)
class Step:
    """A training step of a network with a number of classes on a number of ranks."""

    network: Network
    classes: int
    ranks: int

    @property
    def rows(self) -> dict[str, float]:
        """Classes of all, of the global batch and of one rank's batch."""
        batches = {"all": math.inf, "present": SAMPLES * self.ranks, "owners": SAMPLES}
        return {way: present_classes(self.classes, samples) for way, samples in batches.items()}

    def sent(self) -> dict[str, float]:
        """Bytes that a rank sends in a step, by each way."""
        width, share = self.network.neurons, (self.ranks - 1) / self.ranks
        labels = (self.ranks - 1) * LABEL * (2 + SAMPLES)
        return {
            "all": 2 * share * buffer_bytes(self.rows["all"], width),
            "present": labels + 2 * share * buffer_bytes(self.rows["present"], width),
            "owners": labels + share * FLOAT * (2 * self.rows["owners"] + 4) * (width + 1),
            "activations": (self.ranks - 1) * SAMPLES * self.network.activation_bytes,
        }

    def seconds(self, cluster: Cluster) -> dict[str, float]:
        """Simulated time of each way, and of the engine's all-reduce of the gradients."""
        width, ranks = self.network.neurons, self.ranks
        labels = cluster.all_gather(LABEL * (2 + SAMPLES), ranks) + HOST_READ
        rows = FLOAT * self.rows["owners"] * (width + 1)
        return {
            "all": cluster.all_reduce(buffer_bytes(self.rows["all"], width), ranks),
            "present": labels + cluster.all_reduce(buffer_bytes(self.rows["present"], width), ranks),
            "owners": labels
            + 2 * cluster.all_to_all(rows, ranks)
            + cluster.all_reduce(2 * FLOAT * (width + 1), ranks)
            + cluster.all_reduce(2 * FLOAT, ranks),
            "activations": cluster.all_gather(SAMPLES * self.network.activation_bytes, ranks),
            "gradients": cluster.all_reduce(FLOAT * self.network.parameters, ranks),
        }

    @property
    def chosen(self) -> str:
        """The way that `moda_kernels` takes without `num_classes`."""
        present, own = round(self.rows["present"]), round(self.rows["owners"])
        return "owners" if owners_pay(present, own, self.network.neurons, self.ranks) else "present"


def crossover(cluster: Cluster, network: Network, ranks: int) -> int:
    """The largest number of classes for which sending all of them is the fastest way."""
    low, high = 1, 1 << 24
    while high - low > 1:
        middle = (low + high) // 2
        step = Step(network, middle, ranks)
        seconds = step.seconds(cluster)
        low, high = (middle, high) if seconds["all"] <= seconds[step.chosen] else (low, middle)
    return low


# ---- A measurement ------------------------------------------------------------------------------------------------

MEASURED_RANKS = (2, 4)
SIZES = tuple(1 << power for power in range(6, 25, 2))  # bytes
REPEATS = 50
ROUNDS = 100
# Class sums of CIFAR's VGG16 (width 1: 13 convolutions, two hidden layers) as one buffer.
STEP_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512, 512)
STEP_CLASSES, STEP_SAMPLES = 10, 32


def measure() -> dict[str, Any]:
    """Seconds of collectives between local processes, the fastest of `REPEATS`: noise only adds."""
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[
            0
        ],  # load by other work before the measurement; the figures mean little unless it is near 0
        "backend": "gloo",
    }
    runs = {}
    for ranks in MEASURED_RANKS:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_rank, (ranks, folder), nprocs=ranks)
            runs[str(ranks)] = json.loads((Path(folder) / "times.json").read_text())
    return {"machine": machine, "torch": torch.__version__, "repeats": REPEATS, "runs": runs}


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    times: dict[str, Any] = {"all_reduce": {}}
    for size in SIZES:
        times["all_reduce"][str(size)] = _best_seconds(partial(dist.all_reduce, torch.zeros(size // FLOAT)))
    times["losses"] = _step_seconds()
    if rank == 0:
        (Path(folder) / "times.json").write_text(json.dumps(times))
    dist.destroy_process_group()


def _best_seconds(run: Callable[[], object]) -> float:
    for _ in range(3):
        run()
    seconds = []
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _step_seconds() -> dict[str, float]:
    """Forward and backward of the losses on pooled rows, without a group, and with one in both ways."""
    rows = _rows()
    return {
        "local": _best_seconds(_step(rows, None, None)),
        "dense": _best_seconds(_step(rows, "world", STEP_CLASSES)),
        "present": _best_seconds(_step(rows, "world", None)),
    }


def _rows() -> list[Tensor]:
    return [torch.rand(STEP_SAMPLES, width, requires_grad=True) for width in STEP_WIDTHS]


def _step(rows: list[Tensor], group: str | None, num_classes: int | None) -> Callable[[], object]:
    labels = torch.randint(STEP_CLASSES, (STEP_SAMPLES,))
    return lambda: sum(modular_losses(rows, labels, group=group, num_classes=num_classes)).backward()


# ---- What the number costs by which ranks agree ------------------------------------------------------------------


def agreement() -> dict[str, Any]:
    """Seconds of an all-reduce with and without the number that says that a rank's layers are others than before."""
    load, ranks = os.getloadavg()[0], {}
    for count in MEASURED_RANKS:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_agreeing_rank, (count, folder), nprocs=count)
            ranks[str(count)] = json.loads((Path(folder) / "times.json").read_text())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    date = datetime.now(timezone.utc).date().isoformat()
    return {"date": date, "commit": commit.strip(), "load": load, "rounds": ROUNDS, "ranks": ranks}


def _agreeing_rank(rank: int, ranks: int, folder: str) -> None:
    """Take turns: a buffer without the number; one with it, which is read; a whole step of the losses."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    with_number = torch.zeros(int(buffer_bytes(STEP_CLASSES, sum(STEP_WIDTHS))) // FLOAT)
    without = torch.zeros(len(with_number) - 1)

    def agreed() -> Tensor:
        dist.all_reduce(with_number)
        magnitude, changed = with_number[-2:].split(1)
        if float(changed) > 0:
            raise RuntimeError("expected ranks that agree")
        return torch.where(changed > 0, torch.nan, magnitude)

    runs = {"without": partial(dist.all_reduce, without), "with": agreed, "step": _step(_rows(), "world", STEP_CLASSES)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS):
        for name in sorted(runs, reverse=bool(turn % 2)):
            dist.barrier()
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    if rank == 0:
        entries = {
            name: {"fastest": min(values), "median": statistics.median(values)} for name, values in seconds.items()
        }
        (Path(folder) / "times.json").write_text(json.dumps(entries))
    dist.destroy_process_group()


def agreement_table(measured: dict[str, Any]) -> str:
    """The table of `agreement`; the share is that of a step of the losses."""
    ranks = measured["agreement"]["ranks"]
    head = ["", *(f"{count} processes" for count in ranks)]
    names = {
        "without": "all-reduce without the number",
        "with": "with it, and read",
        "step": "losses, forward and backward",
    }
    rows = [[text, *(human_seconds(run[key]["fastest"]) for run in ranks.values())] for key, text in names.items()]
    costs = [run["with"]["fastest"] - run["without"]["fastest"] for run in ranks.values()]
    shares = [cost / run["step"]["fastest"] for cost, run in zip(costs, ranks.values(), strict=True)]
    rows.append(
        ["the number, of a step", *(f"{human_seconds(c)}, {s:.1%}" for c, s in zip(costs, shares, strict=True))]
    )
    return table(head, rows)


def fit(times: dict[str, float], ranks: int) -> Link:
    """Fit latency to the smallest message and bandwidth to the largest; times in between are predictions."""
    sizes = sorted(map(int, times))
    steps = 2 * (ranks - 1)
    latency = times[str(sizes[0])] / steps
    bandwidth = sizes[-1] / ranks / (times[str(sizes[-1])] / steps - latency)
    return Link(latency, bandwidth)


# ---- Tables -------------------------------------------------------------------------------------------------------


def human_bytes(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def human_seconds(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.0f} {unit}" if seconds >= 100 * scale else f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def steps() -> list[Step]:
    return [Step(network, classes, ranks) for network in NETWORKS for classes in CLASSES for ranks in RANKS]


def bytes_table() -> str:
    head = ["network", "classes", "ranks", "with `num_classes`", "present classes", "by owner", "activations"]
    rows = []
    for step in steps():
        sent = step.sent()
        sizes = {way: human_bytes(size) for way, size in sent.items()}
        sizes[step.chosen] = f"**{sizes[step.chosen]}**"
        rows.append([step.network.name, str(step.classes), str(step.ranks), *sizes.values()])
    return table(head, rows)


def seconds_table(cluster: Cluster) -> str:
    head = [
        "network",
        "classes",
        "ranks",
        "with `num_classes`",
        "present classes",
        "by owner",
        "activations",
        "gradients",
    ]
    rows = []
    for step in steps():
        cells = {way: human_seconds(seconds) for way, seconds in step.seconds(cluster).items()}
        cells[step.chosen] = f"**{cells[step.chosen]}**"
        rows.append([step.network.name, str(step.classes), str(step.ranks), *cells.values()])
    return table(head, rows)


def crossover_table() -> str:
    head = ["cluster", "network", *(f"{r} ranks (N = {SAMPLES * r})" for r in RANKS)]
    rows = [
        [cluster.name, network.name, *(str(crossover(cluster, network, ranks)) for ranks in RANKS)]
        for cluster in CLUSTERS
        for network in NETWORKS
    ]
    return table(head, rows)


def measured_table(measured: dict[str, Any]) -> str:
    """The table of measured times beside those of the model, which is fitted to the first and the last row."""
    runs = measured["runs"]
    links = {ranks: fit(run["all_reduce"], int(ranks)) for ranks, run in runs.items()}
    head = ["bytes", *(f"{ranks} processes: {what}" for ranks in runs for what in ("measured", "model"))]
    rows = []
    for size in SIZES:
        cells = []
        for ranks, run in runs.items():
            ring = [links[ranks]] * int(ranks)
            model = ring_seconds(ring, size / int(ranks), 2 * (int(ranks) - 1))
            cells += [human_seconds(run["all_reduce"][str(size)]), human_seconds(model)]
        rows.append([human_bytes(size), *cells])
    return table(head, rows)


def step_table(measured: dict[str, Any]) -> str:
    runs = measured["runs"]
    head = ["losses, forward and backward", *(f"{ranks} processes" for ranks in runs)]
    names = {"local": "without a group", "dense": "with `num_classes`", "present": "present classes"}
    rows = [[text, *(human_seconds(run["losses"][key]) for run in runs.values())] for key, text in names.items()]
    return table(head, rows)


def tables() -> dict[str, str]:
    """The tables of the pages, by the names of their places in them."""
    made = {"bytes": bytes_table(), "crossover": crossover_table()}
    made |= {f"seconds-{index}": seconds_table(cluster) for index, cluster in enumerate(CLUSTERS)}
    for path in sorted(RESULTS.glob("*.json")):
        measured = json.loads(path.read_text())
        if "agreement" in measured:
            made[f"agreement-{path.stem}"] = agreement_table(measured)
        made |= {f"measured-{path.stem}": measured_table(measured), f"step-{path.stem}": step_table(measured)}
    return made


def filled(page: str) -> str:
    """A page with its tables made anew; each stands between `<!-- table NAME -->` and `<!-- end -->`."""
    for name, text in tables().items():
        before, mark, rest = page.partition(f"<!-- table {name} -->\n")
        if mark:
            page = before + mark + text + "\n" + rest[rest.index("<!-- end -->") :]
    return page


def main(arguments: Sequence[str]) -> None:
    if arguments:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"cpu-{os.cpu_count()}-cores.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        made = {"agreement": agreement()} if arguments == ["agreement"] else measure()
        path.write_text(json.dumps({**known, **made}, indent=1) + "\n")
        print(f"written to {path}")
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
