"""Rules compared on the digits: how small modules get, and what they lose (docs/attribution.md).

    python -m benchmarks.rules_study out/          train what is not trained, measure what is not measured
    python -m benchmarks.rules_study out/ --seeds 0 --networks "CNN"

Each network is trained twice, with the modular loss (1, 1, 0.3) and without. Scores are counted over the samples that
it was trained on; epsilon is chosen on the held-out fifth of the training split; the test split is scored once, at the
published threshold and at the epsilon chosen. A call that was stopped goes on. The results are out/results.json; what
was run so far is docs/attribution/results.json.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import moda
from benchmarks.rules_networks import CLASSES, NETWORKS, Network, Parts, parts
from moda.composition.measure import module_sizes
from moda.decomposition.choice import EpsilonChoice, choose_epsilon
from moda.decomposition.container import Decomposition
from moda_kernels import ModularLoss

CANDIDATES = (0.02, 0.05, 0.1, 0.2)
TOLERANCE = 0.5
SUBSETS = 50
BATCH = 120


@dataclass(frozen=True)
class Run:
    """One trained network."""

    name: str
    modular: bool
    seed: int

    @property
    def network(self) -> Network:
        return NETWORKS[self.name]

    def folder(self, out: Path) -> Path:
        return out / self.name / ("modular" if self.modular else "standard") / f"seed-{self.seed}"


def trained(run: Run, out: Path, data: Parts) -> nn.Module:
    """The network with its weights, trained if there are none."""
    torch.manual_seed(run.seed)
    model = run.network.make(run.network.image_size)
    file = run.folder(out) / "model.safetensors"
    if not file.exists():
        _train(model, run, data.training)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    model.load_state_dict(load_file(file))
    return model.eval()


def _train(model: nn.Module, run: Run, samples: TensorDataset) -> None:
    images, labels = samples.tensors
    network = run.network
    weights = model.parameters()
    optimiser = torch.optim.AdamW(weights, 1e-3) if network.adam else torch.optim.SGD(weights, 0.05, 0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, network.epochs)
    modular_loss = ModularLoss(1.0, 1.0, 0.3)
    taps = moda.observe(model) if run.modular else None
    model.train()
    for _ in range(network.epochs):
        for chosen in torch.randperm(len(labels)).split(64):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            if taps is not None:
                loss = loss + modular_loss(taps.activations(), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    if taps is not None:
        taps.remove()


def measured(run: Run, out: Path) -> dict[str, Any]:
    """Sizes and accuracies of one network's modules by every rule."""
    data = parts(run.network.image_size, run.seed)
    model = trained(run, out, data)
    scored, held_out = DataLoader(data.training, BATCH), DataLoader(data.held_out, BATCH)
    rates = moda.count_firings(model, scored, CLASSES, progress=False)
    rules: dict[str, Any] = {"firing": _scored(model, moda.decompose(rates), data.test)}
    for name, score in (("share", moda.activation_shares), ("attribution", moda.attribute)):
        start = time.perf_counter()
        scores = score(model, scored, CLASSES, progress=False)
        seconds = time.perf_counter() - start
        choice = choose_epsilon(scores, model, held_out, tolerance=TOLERANCE, candidates=CANDIDATES, progress=False)
        curve = _curve(model, scores, choice)
        chosen = _scored(model, moda.decompose(scores, epsilon=choice.epsilon), data.test)
        rules[name] = {"epsilon": choice.epsilon, "curve": curve, "seconds": seconds, **chosen}
    images, labels = data.test.tensors
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    settings = {"network": run.name, "modular": run.modular, "seed": run.seed, "epochs": run.network.epochs}
    return {**settings, "test_accuracy": _percent(right), "rules": rules}


def _curve(model: nn.Module, scores: Any, choice: EpsilonChoice) -> list[dict[str, float]]:
    """Per epsilon what pairs lose on the held-out samples, and the size of a one-class module."""
    points = []
    for point in choice.curve:
        modules = moda.decompose(scores, epsilon=point.epsilon)
        points.append({"epsilon": point.epsilon, "loss": point.loss, "size": _size(model, modules)})
    return points


def _scored(model: nn.Module, modules: Decomposition, test: TensorDataset) -> dict[str, Any]:
    """Size of a one-class module, of the composition of two, and accuracies on the test split, in percent."""
    subsets = {2: list(combinations(range(CLASSES), 2)), 5: _subsets_of_five(), 10: [tuple(range(CLASSES))]}
    accuracies = {}
    for classes, chosen in subsets.items():
        whole, part = (
            sum(values) / len(chosen) for values in zip(*_accuracies(model, modules, chosen, test), strict=True)
        )
        accuracies[str(classes)] = {"model": whole, "modules": part}
    return {"size": _size(model, modules), "accuracies": accuracies}


def _size(model: nn.Module, modules: Decomposition) -> float:
    """Mean share of the model's parameters that a one-class module holds."""
    return float(module_sizes(moda.instrument(model), modules).mean())


def _subsets_of_five() -> list[tuple[int, ...]]:
    return sorted(random.Random(0).sample(list(combinations(range(CLASSES), 5)), SUBSETS))


def _accuracies(
    model: nn.Module, modules: Decomposition, subsets: Sequence[tuple[int, ...]], test: TensorDataset
) -> Iterator[tuple[float, float]]:
    """Per subset the accuracy of the whole model, with these logits alone competing, and of the masked one."""
    images, labels = test.tensors
    with torch.no_grad():
        logits = torch.cat([model(part) for part in images.split(BATCH)])
        for classes in subsets:
            member = torch.isin(labels, torch.tensor(classes))
            right = torch.tensor([classes.index(int(label)) for label in labels[member]])
            masked = moda.mask(model, modules, classes)
            part = torch.cat([masked(some) for some in images[member].split(BATCH)])
            whole = logits[member][:, list(classes)]
            yield _percent(whole.argmax(1) == right), _percent(part.argmax(1) == right)


def _percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", default="", help="those whose name has this in it")
    arguments = parser.parse_args()
    file = arguments.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else []
    done = {(entry["network"], entry["modular"], entry["seed"]) for entry in results}
    for seed in arguments.seeds:
        for name in NETWORKS:
            for modular in (True, False):
                if arguments.networks not in name or (name, modular, seed) in done:
                    continue
                results.append(measured(Run(name, modular, seed), arguments.out))
                arguments.out.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(results, indent=1) + "\n")
                print(_line(results[-1]), flush=True)


def _line(entry: dict[str, Any]) -> str:
    """One network's results on a line."""
    told = [f"{entry['network']}, {'modular' if entry['modular'] else 'standard'}, seed {entry['seed']}:"]
    for rule, values in entry["rules"].items():
        losses = (f"{pair['model'] - pair['modules']:+.2f}" for pair in values["accuracies"].values())
        told.append(f"{rule} {100 * values['size']:.1f} % ({', '.join(losses)})")
    return " ".join(told)


if __name__ == "__main__":
    main()
