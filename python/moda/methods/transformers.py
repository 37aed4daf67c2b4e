"""NeMo's modules of vision transformers: the neurons that are not kept are physically absent.

Query and key keep the neurons that both masks have. Absent ones are zeros of the full heads, so that attention is that
of the whole network with its dropped neurons at 0. The residual stream behind an encoder layer keeps what the mask of
that layer's last linear layer keeps, and every norm takes mean and variance over the neurons that are left.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda.models.vit import DeiT, ViT

VisionTransformer: TypeAlias = "ViT | DeiT"

_PARTS = {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "attended": "attention.output.dense",
    "hidden": "intermediate.dense",
    "output": "output.dense",
}
"""The linear layers of an encoder layer, by what their neurons are called here."""


class CutTransformer(nn.Module):
    """A vision transformer of some of its neurons, up to the features of its class token.

    Its tensors have the names of the whole network's; the classifiers are no part of it.

    Args:
        model: the network; its tensors are copied, and gates that it has are left out.
        masks: (C,) bool by the path of a linear layer of an encoder layer; all neurons of other layers are kept.
        published: let norms behind the first cut layer begin anew (weight 1, bias 0) as the published code does,
            instead of keeping the trained values of the neurons that are left.

    Attributes:
        kept: indices of the neurons of the residual stream that are left at the end.

    Raises:
        ValueError: a mask is of no such layer, of another width, or leaves nothing of the residual stream.
    """

    kept: Tensor

    def __init__(self, model: VisionTransformer, masks: Mapping[str, Tensor], *, published: bool = False) -> None:
        super().__init__()
        self._name = "deit" if isinstance(model, DeiT) else "vit"
        backbone = getattr(model, self._name)
        layers = backbone.encoder.layer
        path = f"{self._name}.encoder.layer"
        _check_masks(model, masks, path, len(layers))
        stream = torch.arange(backbone.layernorm.normalized_shape[0], device=backbone.layernorm.weight.device)
        cut: list[nn.Module] = []
        for index, layer in enumerate(layers):
            own = {part: masks.get(f"{path}.{index}.{place}") for part, place in _PARTS.items()}
            if len(stream) == layer.attention.attention.query.in_features and all(m is None for m in own.values()):
                cut.append(copy.deepcopy(layer))
                continue
            made = _CutLayer(layer, stream, own, fresh=published)
            stream = made.stream
            cut.append(made)
        parts = nn.Module()
        parts.embeddings = copy.deepcopy(backbone.embeddings)
        parts.encoder = nn.Module()
        parts.encoder.layer = nn.ModuleList(cut)
        parts.layernorm = _cut_norm(backbone.layernorm, stream, fresh=published)
        self.add_module(self._name, parts)
        self.register_buffer("kept", stream, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to the class token's features, (N, neurons kept)."""
        backbone = self.get_submodule(self._name)
        tokens = backbone.get_submodule("embeddings")(x)
        for layer in backbone.get_submodule("encoder.layer").children():
            tokens = layer(tokens)
        features: Tensor = backbone.get_submodule("layernorm")(tokens)
        return features[:, 0]

    def classifier(self, model: VisionTransformer, classes: list[int]) -> nn.Linear:
        """The network's own classifier of the class token: rows of some classes, columns that are left."""
        layer = model.cls_classifier if isinstance(model, DeiT) else model.classifier
        return _cut_linear(layer, torch.tensor(classes, device=self.kept.device), self.kept)


class _CutLayer(nn.Module):
    """An encoder layer of some of its neurons; the residual stream has those of `columns` before and `stream` after."""

    stream: Tensor
    columns: Tensor
    attended: Tensor

    def __init__(self, layer: nn.Module, columns: Tensor, masks: Mapping[str, Tensor | None], *, fresh: bool) -> None:
        super().__init__()
        linears = {part: _linear(layer, place) for part, place in _PARTS.items()}
        kept = {part: _kept(masks[part], linear) for part, linear in linears.items()}
        both = kept["query"][torch.isin(kept["query"], kept["key"])]
        self.width = linears["output"].out_features
        self.attention = nn.Module()
        self.attention.attention = _CutAttention(
            layer.get_submodule("attention.attention"), columns, both, kept["value"]
        )
        self.attention.output = _under_dense(_cut_linear(linears["attended"], kept["attended"], kept["value"]))
        self.intermediate = _under_dense(_cut_linear(linears["hidden"], kept["hidden"], kept["attended"]))
        self.intermediate.activation = copy.deepcopy(layer.get_submodule("intermediate.intermediate_act_fn"))
        self.output = _under_dense(_cut_linear(linears["output"], kept["output"], kept["hidden"]))
        self.layernorm_before = _cut_norm(layer.get_submodule("layernorm_before"), columns, fresh=fresh)
        self.layernorm_after = _cut_norm(layer.get_submodule("layernorm_after"), kept["attended"], fresh=fresh)
        for name, index in (("columns", columns), ("attended", kept["attended"]), ("stream", kept["output"])):
            self.register_buffer(name, index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream before the layer, (N, T, columns), to the one behind it."""
        attended = self.attention.get_submodule("output.dense")(
            self.attention.get_submodule("attention")(self.layernorm_before(x))
        )
        whole = _spread(x, self.columns, self.width) + _spread(attended, self.attended, self.width)
        hidden = self.intermediate.get_submodule("dense")(self.layernorm_after(whole[..., self.attended]))
        hidden = self.intermediate.get_submodule("activation")(hidden)
        made: Tensor = self.output.get_submodule("dense")(hidden) + whole[..., self.stream]
        return made


class _CutAttention(nn.Module):
    """Self-attention in heads of full width, of which some neurons are 0."""

    queried: Tensor
    valued: Tensor

    def __init__(self, attention: nn.Module, columns: Tensor, queried: Tensor, valued: Tensor) -> None:
        super().__init__()
        self.heads: int = attention.heads  # type: ignore[assignment]
        self.width = _linear(attention, "query").out_features
        self.query = _cut_linear(_linear(attention, "query"), queried, columns)
        self.key = _cut_linear(_linear(attention, "key"), queried, columns)
        self.value = _cut_linear(_linear(attention, "value"), valued, columns)
        self.register_buffer("queried", queried, persistent=False)
        self.register_buffer("valued", valued, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, T, columns) to (N, T, neurons of the values)."""
        query, key = (self._in_heads(linear(x), self.queried) for linear in (self.query, self.key))
        value = self._in_heads(self.value(x), self.valued)
        context: Tensor = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return context[..., self.valued]

    def _in_heads(self, rows: Tensor, kept: Tensor) -> Tensor:
        heads: Tensor = _spread(rows, kept, self.width).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads


def _check_masks(model: nn.Module, masks: Mapping[str, Tensor], path: str, layers: int) -> None:
    places = {f"{path}.{index}.{place}" for index in range(layers) for place in _PARTS.values()}
    for site, mask in masks.items():
        if site not in places:
            raise ValueError(f"decomposition: expected sites at linear layers of {path}, got {site!r}")
        neurons = _linear(model, site).out_features
        if mask.shape != (neurons,):
            raise ValueError(f"decomposition: site {site!r} has {len(mask)} neurons, the model {neurons}")
        if site.endswith("output.dense") and not bool(mask.any()):
            raise ValueError(
                f"decomposition: keeps no neuron at {site!r}, so that nothing of the residual stream is left"
            )


def _kept(mask: Tensor | None, linear: nn.Linear) -> Tensor:
    if mask is None:
        return torch.arange(linear.out_features, device=linear.weight.device)
    return mask.to(linear.weight.device).nonzero()[:, 0]


def _linear(module: nn.Module, path: str) -> nn.Linear:
    linear = module.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def _cut_linear(linear: nn.Linear, rows: Tensor, columns: Tensor) -> nn.Linear:
    made = nn.Linear(1, 1, bias=linear.bias is not None)
    made.in_features, made.out_features = len(columns), len(rows)
    made.weight = nn.Parameter(linear.weight.detach()[rows][:, columns].clone())
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach()[rows].clone())
    return made


def _cut_norm(norm: nn.Module, kept: Tensor, *, fresh: bool) -> nn.LayerNorm:
    assert isinstance(norm, nn.LayerNorm)
    made = nn.LayerNorm(len(kept), eps=norm.eps).to(norm.weight)
    if not fresh:
        made.weight = nn.Parameter(norm.weight.detach()[kept].clone())
        made.bias = nn.Parameter(norm.bias.detach()[kept].clone())
    return made


def _under_dense(linear: nn.Linear) -> nn.Module:
    made = nn.Module()
    made.dense = linear
    return made


def _spread(rows: Tensor, places: Tensor, width: int) -> Tensor:
    """(..., width): rows (..., len(places)) at their places, zeros elsewhere."""
    return rows.new_zeros(*rows.shape[:-1], width).index_copy(-1, places, rows)
