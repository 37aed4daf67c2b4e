"""Idioms of axes: where the neurons lie, and whose sample a row belongs to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tests.moda._helpers.zoo.entry import CLASSES, Inputs, images, vectors
from tests.moda._helpers.zoo.written.idiom import SmallImages, idiom

# -- neurons in odd places


@idiom("tokens_of_patches", images(8))
class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.patches(x)).flatten(2).transpose(1, 2)
        x = x + self.mlp(self.norm(x))
        return self.head(F.silu(x).mean(1))


@idiom("as_many_tokens_as_channels", images(4))
class SquareTokens(Tokens):
    """4 positions and 8 channels, then 8 of both: sizes alone cannot tell the axes apart."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.patches(x)).flatten(2).transpose(1, 2)
        x = torch.cat([x, x], 1)
        return self.head(F.relu(x + self.mlp(self.norm(x))).mean(1))


@idiom("depthwise_between_tokens", images(8))
class MixFfn(nn.Module):
    """SegFormer's and PVT v2's MLP: tokens become an image for a depthwise convolution and tokens again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 16), nn.Linear(16, CLASSES)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, _, height, width = x.shape
        x = self.up(x.flatten(2).transpose(1, 2))
        x = self.depthwise(x.transpose(1, 2).view(n, 16, height, width))
        return self.b(F.gelu(x.flatten(2).transpose(1, 2)).mean(1))


@idiom("channels_last_block", images(8))
class ChannelsLastBlock(SmallImages):
    """As ConvNeXt: permute, layer norm and linear layers over the last axis, permute back."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = self.down(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return self.b(F.relu(x + y).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, linear: bool) -> None:
        super().__init__()
        self.linear = linear
        make = nn.Linear if linear else lambda i, o: nn.Conv2d(i, o, 1)
        self.down, self.up = make(channels, 4), make(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.linear:
            return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[:, :, None, None]
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


@idiom("squeeze_excitation", images(8))
class SqueezeExcitation(SmallImages):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SqueezeExcite(8, linear=False), SqueezeExcite(8, linear=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.second(F.relu(self.first(F.relu(self.a(x))))).mean((2, 3)))


@idiom("efficient_channel_attention", images(8))
class ChannelAttention(SmallImages):
    """A convolution along the channels: they lie where positions usually do."""

    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        weights = self.along(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return self.b((x * torch.sigmoid(weights)[:, :, None, None]).mean((2, 3)))


@idiom("activation_between_heads", vectors(5, 8))
class Heads(nn.Module):
    """Attention by hand whose values go through a ReLU split into heads: (N, heads, tokens, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        weights = (F.elu(q) @ F.relu(k).transpose(-2, -1)).softmax(-1)
        return self.head((weights @ F.relu(v)).transpose(1, 2).reshape(n, t, 8).mean(1))


@idiom("sequence_first", vectors(5, 8))
class SequenceFirst(nn.Module):
    """An encoder of PyTorch's with its own layout (T, N, C): samples lie in the second axis."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.transpose(0, 1)).mean(0))


@idiom("transformer_layer_of_torch", vectors(5, 8))
class TorchTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 12, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


@idiom("recurrent_then_relu", vectors(5, 8))
class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn, self.b = (
            nn.Linear(8, 8),
            nn.LSTM(8, 6, batch_first=True, bidirectional=True),
            nn.Linear(12, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(F.relu(self.a(x)))
        return self.b(F.relu(y).mean(1))


@idiom("convolution_over_time", vectors(20, 6))
class TimeConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(6, 8, 3, stride=2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x.transpose(1, 2))).transpose(1, 2).mean(1))


@idiom("volumes", vectors(2, 4, 6, 6))
class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.ReLU(inplace=True), nn.ConvTranspose3d(6, 4, 2, 2), nn.ReLU(),
            nn.AdaptiveMaxPool3d(1), nn.Flatten(), nn.Linear(4, CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@idiom("flattened_with_positions", images(8))
class FlattenedPositions(nn.Module):
    """A linear layer over channels and positions together, as VGG and LeNet have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Linear(4 * 9, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.a(x)), 2)
        return self.c(F.relu(self.b(h.view(h.size(0), -1))))


@idiom("channel_shuffle", images(8))
class ChannelShuffle(SmallImages):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        n, c, height, width = h.shape
        h = h.view(n, 2, c // 2, height, width).transpose(1, 2).reshape(n, c, height, width)
        return self.b(F.relu(self.grouped(h.roll(1, 1).flip(1))).mean((2, 3)))


@idiom("pixel_shuffle", images(8))
class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(4, 6, 3), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.pixel_shuffle(F.relu(self.a(x)), 2))
        return self.c(F.relu(self.b(h)).amax((2, 3)))


@idiom("split_in_uneven_parts", images(8))
class UnevenSplit(SmallImages):
    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.a(x)).split([3, 5], dim=1)
        return self.b(torch.cat([F.gelu(left), right * 2], 1).mean((2, 3)))


@idiom("maxout", images(8))
class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x)).unflatten(1, (8, 2)).amax(2)
        return self.b(F.relu(h).mean((2, 3)))


# -- rows that are no samples


@idiom("windows_in_the_batch", images(8))
class Windows(nn.Module):
    """As Swin: each sample becomes four windows, which lie in the batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).permute(0, 2, 3, 1)
        n = x.size(0)
        x = x.view(n, 2, 4, 2, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(n * 4, 16, 8)
        x = F.gelu(self.up(x))
        return self.b(x.view(n, 4, 16, 12).mean((1, 2)))


@idiom("frames_in_the_batch", vectors(4, 3, 8, 8))
class Frames(SmallImages):
    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        h = F.relu(self.a(x.flatten(0, 1))).mean((2, 3))
        return self.b(F.relu(h).view(n, t, -1).mean(1))


@idiom("frames_before_samples", vectors(4, 3, 8, 8))
class FramesFirst(SmallImages):
    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        h = F.relu(self.a(x.transpose(0, 1).flatten(0, 1))).mean((2, 3))
        return self.b(h.view(t, n, -1).mean(0))


@idiom("tokens_in_the_batch", vectors(5, 6))
class TokensInBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        return self.b(F.relu(self.a(x.reshape(n * t, -1))).reshape(n, t, -1).mean(1))


@idiom("two_views_in_the_batch", images(8))
class TwoViews(SmallImages):
    """Contrastive training: the views are stacked in the batch and averaged behind the head."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(torch.cat([x, x.flip(3)]))).mean((2, 3))
        one, two = self.b(h).chunk(2)
        return (one + two) / 2


@idiom("position_bias_network", vectors(5, 8))
class PositionBias(nn.Module):
    """A small network over positions, without samples: its rows belong to nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.register_buffer("offsets", torch.arange(-4.0, 5.0)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        table = self.bias(self.offsets).squeeze(1)
        places = torch.arange(5)
        weights = table[places[:, None] - places[None] + 4].softmax(-1)
        return self.b(F.relu(self.a(weights @ x)).mean(1))


@idiom("hypernetwork")
class HyperNetwork(nn.Module):
    """Weights made by a network of an embedding that every sample shares."""

    def __init__(self) -> None:
        super().__init__()
        self.task = nn.Parameter(torch.randn(1, 4))
        self.maker = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 48))
        self.b = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(x @ self.maker(self.task).view(6, 8)))


def _one_sample_less(batch: int, generator: Generator) -> Inputs:
    return (torch.randn(batch, 6, generator=generator), torch.randn(3, 6, generator=generator)), {}


@idiom("support_set", _one_sample_less)
class SupportSet(nn.Module):
    """A prototype classifier: three support samples beside the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor, support: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)) @ F.relu(self.a(support)).T)


@idiom("graph_of_samples")
class Graph(nn.Module):
    """Samples exchange messages: rows are samples, but they are not independent."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        adjacency = torch.eye(x.size(0)).roll(1, 0)
        return self.b(F.relu(self.c(adjacency @ F.relu(self.a(x)))))


@idiom("experts_by_boolean_index", vectors(8))
class Experts(nn.Module):
    """A mixture of experts that sends each sample to one expert: each sees only its own rows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)) for _ in range(2))
        self.b = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long()
        y = torch.zeros_like(x)
        for place, expert in enumerate(self.experts):
            rows = (chosen == place).nonzero().squeeze(1)
            y = y.index_add(0, rows, expert(x[rows]))
        return self.b(F.relu(x + y))
