"""Vision transformers under the keys of Hugging Face's checkpoints: ViT-S and the distilled DeiT-S, NeMo's networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moda.checks import check_count
from moda.models.options import check_width, scaled

_EPSILON = 1e-12
_LayerNorm: Callable[[int], nn.LayerNorm] = partial(nn.LayerNorm, eps=_EPSILON)


@dataclass(frozen=True)
class Size:
    """The size of a vision transformer.

    Attributes:
        layers: the number of encoder layers.
        hidden: the neurons of the residual stream, a multiple of `heads`.
        heads: the number of attention heads.
        mlp: the hidden neurons of each MLP.
        image: the height and width of the images, a multiple of `patch`.
        patch: the height and width of a patch.

    Raises:
        TypeError, ValueError: a number is not as above.
    """

    layers: int = 12
    hidden: int = 384
    heads: int = 12
    mlp: int = 1536
    image: int = 32
    patch: int = 4

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "mlp", "image", "patch"):
            check_count(name, getattr(self, name))
        if self.hidden % self.heads:
            raise ValueError(f"hidden: expected a multiple of heads ({self.heads}), got {self.hidden}")
        if self.image % self.patch:
            raise ValueError(f"image_size: expected a multiple of the patch's {self.patch}, got {self.image}")

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return (self.image // self.patch) ** 2


class _Attention(nn.Module):
    """Multi-head self-attention from (N, T, hidden) to (N, T, hidden), without the output projection."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.query = nn.Linear(size.hidden, size.hidden)
        self.key = nn.Linear(size.hidden, size.hidden)
        self.value = nn.Linear(size.hidden, size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class _Dense(nn.Module):
    """A linear layer under the name `dense`, with an activation behind it if one is given."""

    def __init__(self, inputs: int, outputs: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)
        self.intermediate_act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense(x)
        return x if self.intermediate_act_fn is None else self.intermediate_act_fn(x)


class _AttentionBlock(nn.Module):
    """Self-attention with its output projection."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention = _Attention(size)
        self.output = _Dense(size.hidden, size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.output(self.attention(x))
        return y


class _Layer(nn.Module):
    """An encoder layer with the norms in front of attention and MLP."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention = _AttentionBlock(size)
        self.intermediate = _Dense(size.hidden, size.mlp, nn.GELU())
        self.output = _Dense(size.mlp, size.hidden)
        self.layernorm_before = _LayerNorm(size.hidden)
        self.layernorm_after = _LayerNorm(size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        y: Tensor = x + self.output(self.intermediate(self.layernorm_after(x)))
        return y


class _Encoder(nn.Module):
    """The encoder layers in a row."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.layer = nn.ModuleList(_Layer(size) for _ in range(size.layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x)
        return x


class _Patches(nn.Module):
    """Maps (N, in_channels, image, image) images to (N, patches, hidden) tokens."""

    def __init__(self, size: Size, in_channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, size.hidden, size.patch, stride=size.patch)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.projection(x)
        return tokens.flatten(2).transpose(1, 2)


class _Embeddings(nn.Module):
    """Patch tokens behind one or two learnt tokens, with learnt positions."""

    def __init__(self, size: Size, in_channels: int, *, distilled: bool) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.hidden))
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, size.hidden)) if distilled else None
        self.position_embeddings = nn.Parameter(torch.zeros(1, size.patches + 1 + distilled, size.hidden))
        self.patch_embeddings = _Patches(size, in_channels)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embeddings(x)
        tokens = [token for token in (self.cls_token, self.distillation_token) if token is not None]
        rows = [token.expand(len(patches), -1, -1) for token in tokens]
        return torch.cat([*rows, patches], 1) + self.position_embeddings


class _Backbone(nn.Module):
    """Everything in front of the classifiers."""

    def __init__(self, size: Size, in_channels: int, *, distilled: bool) -> None:
        super().__init__()
        check_count("in_channels", in_channels)
        self.embeddings = _Embeddings(size, in_channels, distilled=distilled)
        self.encoder = _Encoder(size)
        self.layernorm = _LayerNorm(size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layernorm(self.encoder(self.embeddings(x)))
        return y


class ViT(nn.Module):
    """A vision transformer with pre-norm layers and a linear classifier on the class token.

    The keys of its state are those of `transformers.ViTForImageClassification`.

    Args:
        size: the network's size.
        num_classes: the number of logits.
        in_channels: the channels of the images.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(self, size: Size, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.vit = _Backbone(size, in_channels, distilled=False)
        self.classifier = nn.Linear(size.hidden, check_count("num_classes", num_classes))
        _init_transformer(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, image_size, image_size) images to (N, num_classes) logits."""
        logits: Tensor = self.classifier(self.vit(x)[:, 0])
        return logits


class DeiT(nn.Module):
    """A distilled vision transformer: a second token and classifier learn from a teacher.

    The keys of its state are those of `transformers.DeiTForImageClassificationWithTeacher`.

    Args:
        size: the network's size.
        num_classes: the number of logits.
        in_channels: the channels of the images.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(self, size: Size, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.deit = _Backbone(size, in_channels, distilled=True)
        self.cls_classifier = nn.Linear(size.hidden, check_count("num_classes", num_classes))
        self.distillation_classifier = nn.Linear(size.hidden, num_classes)
        _init_transformer(self)

    def forward(self, x: Tensor, *, separate: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Map (N, in_channels, image_size, image_size) images to (N, num_classes) logits.

        Args:
            x: the images.
            separate: return the logits of both classifiers, first the class token's, instead of their mean.
        """
        tokens = self.deit(x)
        logits, distilled = self.cls_classifier(tokens[:, 0]), self.distillation_classifier(tokens[:, 1])
        return (logits, distilled) if separate else (logits + distilled) / 2


def _init_transformer(model: nn.Module) -> None:
    """Give weights, tokens and positions truncated normal values of standard deviation 0.02, and biases zeros."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, _Embeddings):
            for parameter in module.parameters(recurse=False):
                nn.init.trunc_normal_(parameter, std=0.02)


def vit_small(num_classes: int = 10, in_channels: int = 3, width: float = 1.0, image_size: int = 32) -> ViT:
    """ViT-S as NeMo trains it from scratch: 12 layers, 12 heads, patches of 4x4.

    Args:
        num_classes: the number of logits.
        in_channels: the channels of the images.
        width: the multiplier of the neurons (384 in the residual stream and 1536 in the MLPs at 1).
        image_size: the height and width of the images, a multiple of 4.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    return ViT(_small(width, 12, image_size), num_classes, in_channels)


def deit_small(num_classes: int = 10, in_channels: int = 3, width: float = 1.0, image_size: int = 32) -> DeiT:
    """DeiT-S as NeMo trains it from scratch: 12 layers, 6 heads, patches of 4x4.

    Args:
        num_classes: the number of logits.
        in_channels: the channels of the images.
        width: the multiplier of the neurons (384 in the residual stream and 1536 in the MLPs at 1).
        image_size: the height and width of the images, a multiple of 4.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    return DeiT(_small(width, 6, image_size), num_classes, in_channels)


def _small(width: float, heads: int, image_size: int) -> Size:
    check_width(width)
    return Size(
        hidden=heads * scaled(384 // heads, width), heads=heads, mlp=scaled(1536, width), image=image_size, patch=4
    )
