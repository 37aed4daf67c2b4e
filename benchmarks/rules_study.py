"""Rules compared on the digits: how small modules get, and what they lose (docs/attribution/README.md).

    python -m benchmarks.rules_study OUT           train what is not trained, measure what is not measured
    python -m benchmarks.rules_study OUT --seeds 0 --networks CNN "ViT, 8x8"
    python -m benchmarks.rules_page OUT            the page, from what OUT holds

Each network is trained twice, with the modular loss (1, 1, 0.3) and without. Scores are counted over the samples that
it was trained on; epsilon is chosen on the held-out fifth of the training split; the test split is scored once, at the
published threshold and at the epsilon chosen. A call that was stopped goes on, and several may
work on one folder at the same time: each takes what no other has.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import moda
from benchmarks.rules_networks import CLASSES, NETWORKS, Network, Parts, parts
from moda.decomposition.choice import choose_epsilon
from moda.decomposition.container import Decomposition
from moda.decomposition.files import save_rates, save_scores
from moda.decomposition.scores import NeuronScores
from moda.files import parse_json, read_bytes, read_tensors, write_json, write_tensors
from moda.runs.lock import BusyError, locked
from moda_kernels import ModularLoss

EPSILONS = (0.02, 0.05, 0.1, 0.2, 0.3)
SUBSETS = 50
BATCH = 360
SCORES = {"share": moda.activation_shares, "attribution": moda.attribute}


@dataclass(frozen=True)
class Trained:
    """One training: a network, with the modular loss or without, and a seed."""

    name: str
    modular: bool
    seed: int

    @property
    def network(self) -> Network:
        return NETWORKS[self.name]

    @property
    def training(self) -> str:
        return "modular" if self.modular else "standard"

    def folder(self, out: Path) -> Path:
        """Where its files are: weights, scores and accuracies."""
        slug = self.name.lower().replace(",", "").replace(" ", "-")
        return out / slug / self.training / f"seed-{self.seed}"

    def model(self, out: Path, data: Parts) -> nn.Module:
        """The network with its weights, trained if there are none, in evaluation mode."""
        torch.manual_seed(self.seed)
        model = self.network.build()
        file = self.folder(out) / "model.safetensors"
        if not file.exists():
            _train(model, self, data.training)
            write_tensors(file, model.state_dict())
        model.load_state_dict(read_tensors(file))
        return model.eval()

    def results(self, out: Path) -> dict[str, Any] | None:
        """What `measured` gave; None if nothing did yet."""
        file = self.folder(out) / "accuracies.json"
        return parse_json(file, read_bytes(file, 1 << 20)) if file.exists() else None


def trainings(networks: Sequence[str] = ("",), seeds: Sequence[int] = (0, 1, 2)) -> list[Trained]:
    """All trainings of these seeds, seed by seed, of the networks whose name has one of these in it."""
    names = dict.fromkeys(name for part in networks for name in NETWORKS if part in name)
    return [Trained(name, modular, seed) for seed, name, modular in product(seeds, names, (True, False))]


def _train(model: nn.Module, run: Trained, samples: TensorDataset) -> None:
    images, labels = samples.tensors
    network = run.network
    weights = model.parameters()
    optimiser = torch.optim.AdamW(weights, 3e-3) if network.adam else torch.optim.SGD(weights, 0.05, 0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, network.epochs)
    modular_loss = ModularLoss(1.0, 1.0, 0.3)
    taps = moda.observe(model) if run.modular else None
    model.train()
    for _ in range(network.epochs):
        for chosen in torch.randperm(len(labels)).split(network.batch):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            if taps is not None:
                loss = loss + modular_loss(taps.activations(), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    if taps is not None:
        taps.remove()


def measured(run: Trained, out: Path) -> dict[str, Any]:
    """Accuracies of one network's modules by every rule; the scores are written beside them."""
    data = parts(run.network.image_size, run.seed)
    model = run.model(out, data)
    folder, scored = run.folder(out), DataLoader(data.training, BATCH)
    with moda.observe(model):
        test = _Test(model, data.test)
        rates = moda.count_firings(model, scored, CLASSES, progress=False)
        save_rates(rates, folder / "firing")
        rules: dict[str, Any] = {"firing": {"accuracies": test.accuracies(moda.decompose(rates))}}
        for name, score in SCORES.items():
            scores = score(model, scored, CLASSES, progress=False)
            save_scores(scores, folder / name)
            rules[name] = _by_budget(test, scores, DataLoader(data.held_out, BATCH))
    return {
        "network": run.name,
        "modular": run.modular,
        "seed": run.seed,
        "epochs": run.network.epochs,
        "test_accuracy": test.accuracy,
        "rules": rules,
    }


def _by_budget(test: _Test, scores: NeuronScores, held_out: DataLoader[Any]) -> dict[str, Any]:
    """The epsilon chosen on the held-out samples, the curve there, and what its modules lose on the test split."""
    choice = choose_epsilon(scores, test.model, held_out, candidates=EPSILONS, progress=False)
    accuracies = test.accuracies(moda.decompose(scores, epsilon=choice.epsilon))
    return {"epsilon": choice.epsilon, "held_out": choice.to_dict()["curve"], "accuracies": accuracies}


class _Test:
    """The test split, and what the whole model makes of it."""

    def __init__(self, model: nn.Module, samples: TensorDataset) -> None:
        self.model = model
        self.loader = DataLoader(samples, BATCH)
        self._labels = samples.tensors[1]
        with torch.no_grad():
            self._logits = torch.cat([model(images) for images, _ in self.loader])

    @property
    def accuracy(self) -> float:
        """Of the whole model, in percent, as all others here."""
        return _percent(self._logits.argmax(1) == self._labels)

    def accuracies(self, modules: Decomposition) -> dict[str, dict[str, float]]:
        """Per number of classes the mean over subsets: the model with their logits alone competing, and the modules."""
        found = {}
        for size in (2, 5, 10):
            chosen = subsets(size)
            pairs = zip(*((self._whole(classes), self._masked(modules, classes)) for classes in chosen), strict=True)
            whole, part = (sum(values) / len(chosen) for values in pairs)
            found[str(size)] = {"model": whole, "modules": part}
        return found

    def _whole(self, classes: Sequence[int]) -> float:
        members = torch.isin(self._labels, torch.tensor(classes))
        best = torch.tensor(classes)[self._logits[members][:, list(classes)].argmax(1)]
        return _percent(best == self._labels[members])

    def _masked(self, modules: Decomposition, classes: Sequence[int]) -> float:
        return 100 * moda.measure.accuracy(moda.mask(self.model, modules, classes), self.loader, classes)


def subsets(size: int) -> list[tuple[int, ...]]:
    """All subsets of the classes of this size, or 50 that are drawn once for all networks."""
    every = list(combinations(range(CLASSES), size))
    return every if len(every) <= SUBSETS else sorted(random.Random(0).sample(every, SUBSETS))


def _percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())


def main() -> None:
    """Train and measure what is left to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", nargs="+", default=[""], help="those whose name has one of these in it, in turn")
    arguments = parser.parse_args()
    for run in trainings(arguments.networks, arguments.seeds):
        folder = run.folder(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(BusyError), locked(folder):
            if run.results(arguments.out) is None:
                entry = measured(run, arguments.out)
                write_json(folder / "accuracies.json", entry)
                print(*_told(entry), flush=True)


def _told(entry: dict[str, Any]) -> Iterator[str]:
    """One network's results as a line."""
    yield f"{entry['network']}, {'modular' if entry['modular'] else 'standard'}, seed {entry['seed']}:"
    yield f"{entry['test_accuracy']:.2f} %, lost on 2, 5 and 10 classes:"
    for rule, values in entry["rules"].items():
        losses = " ".join(f"{given['model'] - given['modules']:+.2f}" for given in values["accuracies"].values())
        yield f"{rule} {losses}" + (f" (epsilon {values['epsilon']:g})" if "epsilon" in values else "")


if __name__ == "__main__":
    main()
