"""The union of some classes' modules as MwT and NeMo reuse it: a network with a head of its own, to be fine-tuned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from moda.composition.compose import compose
from moda.composition.ensemble import united
from moda.decomposition.container import Decomposition, chosen_classes
from moda.inference import check_module
from moda.methods.finetune import HeadedModule
from moda.methods.gated import GENERATOR
from moda.methods.transformers import CutTransformer
from moda.models.vit import DeiT, ViT
from moda.observation.taps import Taps
from moda.outputs import Output
from moda_kernels.validation import check_flag, shown

Head = Literal["new", "own"]


class _Classified(nn.Module):
    """Features with a linear layer behind them."""

    def __init__(self, body: CutTransformer, classifier: nn.Linear, classes: list[int], num_classes: int) -> None:
        super().__init__()
        self.body, self.classifier = body, classifier
        self.classes, self.num_classes = tuple(classes), num_classes

    def forward(self, x: Any) -> Any:
        """Map images to the logits of the classes."""
        return self.classifier(self.body(x))


def union_module(
    model: nn.Module | Taps,
    decomposition: Decomposition,
    classes: Iterable[int],
    *,
    head: Head = "new",
    published: bool = False,
    example: Any = None,
    output: Output = None,
) -> nn.Module:
    """Build the network of the union of some classes' modules; neurons outside of it are absent, and so are gates.

    Of a convolutional network it keeps all K logits, which a new head `ReLU -> Linear(K, classes)` reads. Of a
    `moda.models` vision transformer with gates on linear layers it keeps the class token's features, which the head
    reads in the classifier's place.

    Args:
        model: the network that the modules are of, without its gates, or its taps at the decomposition's sites.
        decomposition: its outputs combine by "rows".
        classes: class indices, in the order of the outputs.
        head: "new" for a head that has to be fine-tuned (`moda.methods.fine_tune`); "own" for the network's own logits
            of the classes.
        published: let the norms of a transformer begin anew, see `CutTransformer`.
        example: what the network is called with, see `moda.compose`.
        output: see `moda.compose`.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    chosen = chosen_classes(decomposition, classes)
    check_flag(published, "published")
    if decomposition.combine != "rows":
        raise ValueError(f"decomposition: expected modules that unite ('rows'), got {decomposition.combine!r}")
    if not isinstance(head, str) or head not in ("new", "own"):
        raise ValueError(f"head: expected 'new' or 'own', got {shown(head)}")
    network = model.model if isinstance(model, Taps) else model
    check_module(network)
    gates = [path for path, _ in network.named_modules() if path.rpartition(".")[2] == GENERATOR]
    if gates:
        raise ValueError(f"model: has gates still ({gates[0]}); take them away with prepared.gates.remove()")
    if isinstance(network, ViT | DeiT) and _linear_sites(network, decomposition):
        return _transformer(network, decomposition, chosen, head, published=published)
    if head == "own":
        return compose(model, decomposition, chosen, example=example, output=output)
    every = range(decomposition.num_classes)
    body = compose(model, united(decomposition, chosen), every, example=example, output=output)
    return HeadedModule(body, decomposition.num_classes, chosen, decomposition.num_classes)


def _linear_sites(network: nn.Module, decomposition: Decomposition) -> bool:
    modules = dict(network.named_modules())
    return all(isinstance(modules.get(site), nn.Linear) for site in decomposition.sites)


def _transformer(
    network: ViT | DeiT, decomposition: Decomposition, classes: list[int], head: Head, *, published: bool
) -> nn.Module:
    body = CutTransformer(network, decomposition.select(classes), published=published)
    if head == "own":
        made: nn.Module = _Classified(body, body.classifier(network, classes), classes, decomposition.num_classes)
    else:
        made = HeadedModule(body, len(body.kept), classes, decomposition.num_classes)
    return made.train(network.training)
