"""Idioms of calling: how activations and what stands around them are written."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.moda._helpers.zoo.entry import CLASSES, images
from tests.moda._helpers.zoo.written.idiom import Small, SmallImages, idiom

# -- calls that carry `out=None` or otherwise look as if they overwrote


@idiom("normalize_and_reuse")
class Normalize(Small):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(CLASSES, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h) + F.linear(F.normalize(h), self.w)


@idiom("residual_of_normalized")
class ResidualNormalized(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h + F.normalize(h, dim=1))


@idiom("cosine_head")
class CosineHead(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return 10 * F.linear(F.normalize(h), F.normalize(self.b.weight))


@idiom("norms_and_reuse")
class Norms(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        total = torch.norm(h, dim=1, keepdim=True) + h.norm(dim=1, keepdim=True)
        return self.b(h / (total + torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-6))


@idiom("out_is_none")
class OutIsNone(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(torch.add(h, 1, out=None) + torch.tensordot(h, torch.eye(8), dims=1) + h)


@idiom("out_is_a_buffer")
class OutIsGiven(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        with torch.no_grad():
            kept = torch.empty(0)
            torch.mul(h, 2, out=kept)
        return self.b(h + kept)


# -- activations, however they are called


@idiom("activation_made_in_forward", images(8))
class MadeInForward(SmallImages):
    def forward(self, x: Tensor) -> Tensor:
        h = nn.ReLU()(self.a(x))
        return self.b(nn.GELU()(nn.AdaptiveAvgPool2d(1)(h).flatten(1)))


@idiom("methods_of_tensors")
class Methods(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        h = self.a(h[:, :6]).relu_()
        return self.b(h + 0).relu()


@idiom("functions_of_torch")
class TorchFunctions(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        h = torch.relu_(self.a(h[:, :6]))
        h = torch.selu(h) + torch.celu(h) + torch.prelu(h, h.new_full((1,), 0.1))
        return self.b(h)


@idiom("many_activation_functions")
class ManyFunctions(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        kinds = (F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish, F.softplus)
        return self.b(sum(kind(h) for kind in kinds))


@idiom("many_activation_modules")
class ManyModules(Small):
    def __init__(self) -> None:
        super().__init__()
        kinds = (
            nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.PReLU(8), nn.RReLU(), nn.ELU(), nn.SELU(), nn.CELU(),
            nn.GELU(approximate="tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Softplus(),
        )  # fmt: skip
        self.kinds = nn.ModuleList(kinds)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.stack([kind(h) for kind in self.kinds]).sum(0))


@idiom("gates_only")
class Gates(Small):
    """Sigmoid and tanh are no activations: there is one tap, behind the ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.sigmoid(h) * torch.tanh(h) * F.relu(h))


@idiom("function_kept_as_an_attribute")
class KeptFunction(Small):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.smooth = F.relu, partial(F.gelu, approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.smooth(self.act(self.a(x)) - 0.1))


@idiom("functions_in_a_table")
class FunctionTable(Small):
    TABLE = {"relu": torch.relu, "silu": F.silu}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        for name in ("relu", "silu"):
            h = getattr(torch, name)(h) if name == "relu" else self.TABLE[name](h)
        return self.b(h)


@idiom("modules_in_a_dict")
class ModulesInDict(Small):
    def __init__(self) -> None:
        super().__init__()
        self.acts = nn.ModuleDict({"relu": nn.ReLU(), "lrelu": nn.LeakyReLU(), "prelu": nn.PReLU()})

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(sum(self.acts[name](h) for name in sorted(self.acts)))


class ScaledReLU(nn.ReLU):
    """A subclass of an activation that does more than its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


@idiom("subclass_of_an_activation")
class Subclassed(Small):
    def __init__(self) -> None:
        super().__init__()
        self.act = ScaledReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


class Wrapped(nn.Module):
    """An activation chosen by name, inside a module of the user's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = getattr(nn, name)()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@idiom("activation_inside_a_wrapper")
class InsideWrapper(Small):
    def __init__(self) -> None:
        super().__init__()
        self.acts = nn.Sequential(Wrapped("ReLU"), Wrapped("Mish"))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.acts(self.a(x)))


@idiom("forward_called_without_the_module")
class ForwardCalled(Small):
    """`module.forward(x)` runs no hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.b.forward(self.act.forward(self.a.forward(x)))


@idiom("methods_call_each_other")
class Methodical(Small):
    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x))

    def head(self, h: Tensor) -> Tensor:
        return self.b(F.gelu(h))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def _free(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.relu(layer(x))


@idiom("function_outside_the_class")
class FreeFunction(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(_free(x, self.a))


@idiom("gated_unit")
class SwiGlu(Small):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 16)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.gate(x).chunk(2, dim=-1)
        return self.b(F.silu(gate) * value)


@idiom("clamp_as_an_activation")
class Clamped(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).clamp(min=0)
        return self.b(F.relu(h - 0.1))


# -- in place


@idiom("in_place_functions", images(8))
class InPlace(SmallImages):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.c = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.a(x)), inplace=True)
        h = F.silu(self.c(h).add_(h), inplace=True)
        return self.b(F.hardswish(h, inplace=True).mean((2, 3)))


@idiom("in_place_on_a_view")
class InPlaceOnView(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        h[:, 4:].mul_(2)
        F.relu(h[:, :4], inplace=True)
        return self.b(h)


@idiom("in_place_on_a_chunk")
class InPlaceOnChunk(Small):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.a(x) + 0.0
        first = whole.narrow(1, 0, 4)
        first = self.act(first)
        return self.b(whole) + first.sum()


@idiom("activation_overwritten_later")
class OverwrittenLater(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.a(x) + 0.0)
        h += 1
        h[:, 0] = 0
        h *= 2
        return self.b(h)


@idiom("alias_overwritten_later")
class AliasOverwritten(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.a(x) + 0.0)
        also = h.view(-1, 2, 4).transpose(1, 2)
        also.add_(1)
        return self.b(h)


@idiom("dropout_in_place", images(8))
class DropoutInPlace(SmallImages):
    def __init__(self) -> None:
        super().__init__()
        self.rest = nn.Sequential(nn.Hardswish(inplace=True), nn.Dropout2d(0.3, inplace=True), nn.SiLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.rest(self.a(x)).mean((2, 3)))


@idiom("preactivation_in_place", images(8))
class Preactivation(SmallImages):
    """The shortcut reads what the in-place activation overwrote: people rely on it."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        shortcut = h
        h = self.c(F.relu(h, inplace=True))
        return self.b(F.relu(h + shortcut).mean((2, 3)))


@idiom("masked_fill_and_where")
class Masked(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        h = torch.where(h > 0.5, h, torch.zeros_like(h)).masked_fill(h > 2, 2.0)
        return self.b(F.elu(h))


# -- einsum, einops, odd products


@idiom("einsum")
class Einsum(Small):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(F.relu(torch.einsum("nc,cd->nd", h, self.w)))


@idiom("einops_functions", images(8))
class Einops(SmallImages):
    def forward(self, x: Tensor) -> Tensor:
        from einops import rearrange, reduce, repeat

        h = F.relu(self.a(x))
        tokens = rearrange(h, "n c (h p) (w q) -> n (h w) (p q c)", p=2, q=2)
        tokens = F.gelu(tokens + repeat(tokens.mean(1), "n d -> n t d", t=tokens.size(1)))
        return self.b(reduce(tokens, "n t (p c) -> n c", "mean", p=4))


@idiom("einops_layers", images(8))
class EinopsLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from einops.layers.torch import Rearrange, Reduce

        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Rearrange("n c h w -> n (h w) c"), nn.Linear(8, 12), nn.GELU(),
            Reduce("n t c -> n c", "mean"), nn.Linear(12, CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@idiom("bilinear_and_outer")
class Bilinear(Small):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(8, 6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.pair(F.relu(self.a(x)), x)))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x * 2

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient * 3


@idiom("autograd_function_of_the_users")
class OwnFunction(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(Doubled.apply(F.relu(self.a(x)))))


@idiom("gradient_hook_in_forward")
class GradientHook(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if h.requires_grad:
            h.register_hook(lambda gradient: gradient * 0.5)
        return self.b(h)


@idiom("gradient_taken_in_forward")
class GradientInForward(Small):
    """A model whose forward differentiates, as energy models and physics networks do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = F.softplus(self.a(x)).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return self.b(F.pad(force, (0, 2)))


@idiom("vmapped_part")
class Vmapped(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.b(h + torch.vmap(lambda row: row.cumsum(0))(h))


@idiom("tensor_subclass_input")
class SubclassInput(Small):
    """The model wraps its input in a tensor subclass of its own, as fastai and MONAI do."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x.as_subclass(Labelled)))
        return self.b(h).as_subclass(Tensor)


class Labelled(Tensor):
    pass


@idiom("complex_numbers")
class Complex(Small):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        spectrum = torch.fft.rfft(h)
        return self.b(torch.fft.irfft(spectrum * 0.5, n=8) + F.relu(spectrum.abs().sum(-1, keepdim=True)))
