"""Cases of norm_relu_pool, and its float64 truth. The GPU tests import this: no hypothesis here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moda_kernels.batch_norm import BatchNorm

MOMENTUM, EPS = 0.3, 1e-3


@dataclass(frozen=True)
class Case:
    """Inputs of one call, and the gradients that flow into its results."""

    x: Tensor
    norm: BatchNorm
    dy: Tensor | None
    dpooled: Tensor | None

    def leaves(self) -> list[Tensor]:
        """What gradients are asked for."""
        found = (self.x, self.norm.residual, self.norm.weight, self.norm.bias)
        return [tensor for tensor in found if tensor is not None]


@dataclass(frozen=True)
class Outcome:
    """Results, running statistics afterwards, gradients by name."""

    y: Tensor
    pooled: Tensor
    running: tuple[Tensor, Tensor] | None
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Everything, by name."""
        running = {} if self.running is None else dict(zip(("running_mean", "running_var"), self.running, strict=True))
        return {"y": self.y, "pooled": self.pooled, **running, **self.gradients}


def neurons_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def make_case(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    last: bool = False,
    residual: bool = False,
    affine: bool = True,
    running: bool = True,
    training: bool = True,
    half_parameters: bool = False,
    constant: bool = True,
    activation: str = "relu",
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """Neurons of different means and scales; one may be constant, one has no positive output. dpooled in the accumulation dtype."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    neurons = shape[1]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    per_neuron = (1, neurons, *[1] * (len(shape) - 2))
    x = normal(*shape) * (0.5 + normal(neurons).abs()).view(per_neuron) + 3 * normal(neurons).view(per_neuron)
    if constant and neurons > 2:
        x[:, 1] = 0.75
    x = x.to(dtype)
    arrange = neurons_last if last and len(shape) > 2 else torch.Tensor.contiguous
    parameters = dtype if half_parameters else wide
    weight, bias = normal(neurons).to(parameters), normal(neurons).to(parameters)
    if activation != "relu":
        weight *= 3  # reaches every bound
    bias[-1] = -100
    norm = BatchNorm(
        running_mean=normal(neurons).to(parameters).to(device) if running else None,
        running_var=(0.5 + normal(neurons).abs()).to(parameters).to(device) if running else None,
        weight=weight.to(device) if affine else None,
        bias=bias.to(device) if affine else None,
        residual=arrange(normal(*shape).to(dtype)).to(device) if residual else None,
        training=training,
        momentum=MOMENTUM,
        eps=EPS,
        activation=activation,
    )
    dy, dpooled = arrange(normal(*shape).to(dtype)), normal(*shape[:2]).to(wide)
    return Case(arrange(x).to(device), norm, dy.to(device), dpooled.to(device))


def as_leaves(case: Case, dtype: torch.dtype | None = None) -> Case:
    """Copies of the tensors, of another dtype if one is given, that require gradients where gradients flow."""

    def copy(tensor: Tensor | None, leaf: bool) -> Tensor | None:
        if tensor is None:
            return None
        made = tensor.detach().clone().to(dtype or tensor.dtype)
        return made.requires_grad_() if leaf else made

    norm = case.norm
    x = copy(case.x, True)
    assert x is not None
    copied = norm._replace(
        running_mean=copy(norm.running_mean, False),
        running_var=copy(norm.running_var, False),
        weight=copy(norm.weight, True),
        bias=copy(norm.bias, True),
        residual=copy(norm.residual, True),
    )
    return replace(case, x=x, norm=copied, dy=copy(case.dy, False), dpooled=copy(case.dpooled, False))


def outcome(case: Case, run: object, dtype: torch.dtype | None = None) -> Outcome:
    """What `run(x, norm)` gives for copies of the case's tensors."""
    mine = as_leaves(case, dtype)
    y, pooled = run(mine.x, mine.norm)  # type: ignore[operator]
    results = [(out, g) for out, g in ((y, mine.dy), (pooled, mine.dpooled)) if g is not None]
    upstream = [g.to(out.dtype) for out, g in results]
    found = torch.autograd.grad([out for out, _ in results], mine.leaves(), upstream)
    names = [
        name
        for name, t in zip(
            ("x", "residual", "weight", "bias"),
            (mine.x, mine.norm.residual, mine.norm.weight, mine.norm.bias),
            strict=True,
        )
        if t is not None
    ]
    running = None if mine.norm.running_mean is None else (mine.norm.running_mean, mine.norm.running_var)
    return Outcome(y.detach(), pooled.detach(), running, dict(zip(names, found, strict=True)))


def truth(x: Tensor, norm: BatchNorm, fires: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition, step by step, in the dtype of x; running statistics as PyTorch documents them.

    `fires` says where a ReLU or ReLU6 lets its input through; that itself does unless given.
    """
    over = (0, *range(2, x.dim()))
    shape = (1, -1, *[1] * (x.dim() - 2))
    if norm.training:
        mean, var = x.mean(over), x.var(over, unbiased=False)
        if norm.running_mean is not None and norm.running_var is not None:
            count = x.numel() // x.shape[1]
            norm.running_mean.lerp_(mean.detach(), norm.momentum)
            norm.running_var.lerp_(var.detach() * count / (count - 1), norm.momentum)
    else:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, var = norm.running_mean, norm.running_var
    z = (x - mean.view(shape)) / (var.view(shape) + norm.eps).sqrt()
    if norm.weight is not None:
        z = z * norm.weight.view(shape)
    if norm.bias is not None:
        z = z + norm.bias.view(shape)
    if norm.residual is not None:
        z = z + norm.residual
    y = DEFINITIONS[norm.activation](z)
    if fires is not None:
        y = torch.where(fires, z, y.detach())
    return y, y if y.dim() == 2 else y.abs().flatten(2).mean(2)


DEFINITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": lambda z: z.clamp(0, 6),
    "hardswish": lambda z: z * (z + 3).clamp(0, 6) / 6,
    "silu": lambda z: z * torch.sigmoid(z),
    "gelu": lambda z: z * torch.special.ndtr(z),
}


def passes(y: Tensor, norm: BatchNorm) -> Tensor:
    """Where a ReLU or ReLU6 that gave y lets its input through."""
    return (y > 0) & (y < 6) if norm.activation == "relu6" else y > 0


def aten(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Three operations of PyTorch in the dtype of x."""
    z = F.batch_norm(x, *norm[:4], norm.training, norm.momentum, norm.eps)
    y = getattr(F, norm.activation)(z if norm.residual is None else z + norm.residual)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return y, y.to(wide) if y.dim() == 2 else y.abs().mean(tuple(range(2, y.dim())), dtype=wide)


def assert_three_way(case: Case, run: object, *, ulps: float = 8) -> Outcome:
    """`run` errs, element by element, no more than ATen in the same dtype plus `ulps` units in the last place: of the largest
    element in the accumulation dtype, and of the element itself in the dtype of the result.
    """
    ours, theirs, exact = outcome(case, run), outcome(case, aten), outcome(case, truth, torch.float64)
    fires = passes(ours.y, case.norm)
    if case.norm.rectifies and not torch.equal(fires, passes(exact.y, case.norm)):
        # Where the truth is as good as 0 the mask may go either way (y itself is compared below); the gradients then follow it.
        exact = replace(exact, gradients=outcome(case, lambda x, norm: truth(x, norm, fires), torch.float64).gradients)
    wide = torch.finfo(torch.float64 if case.x.dtype == torch.float64 else torch.float32).eps
    for name, expected in exact.named().items():
        mine, same = ours.named()[name], theirs.named()[name]
        assert mine.dtype == same.dtype, name
        assert mine.shape == expected.shape, name
        # An own pool is y, widened: it was rounded as y is.
        rounded = case.x.dtype if name == "pooled" and case.x.numel() == expected.numel() else mine.dtype
        own = torch.finfo(rounded).eps
        expected = expected.double()
        allowed = (same.double() - expected).abs() + ulps * wide * expected.abs().max() + own * expected.abs() + 1e-30
        if mine.dtype in (torch.float16, torch.bfloat16) and name in exact.gradients:
            allowed += own * expected.abs().max()  # g is rounded before it is multiplied: by a residual, by an own pool
        if name in ("weight", "bias"):  # sums of terms of either sign that are far larger than their sum
            terms = (case.x.numel() / case.x.shape[1]) ** 0.5
            allowed += 2 * wide * terms
            if case.x.dim() == 2:  # PyTorch rounds the sum of both gradients of y, which is its own pool
                allowed += torch.finfo(case.x.dtype).eps * terms
        excess = (mine.double() - expected).abs() - allowed
        excess = torch.where(mine.isnan() | expected.isnan(), torch.inf, excess)
        worst = int(excess.argmax())
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape))
        assert not (excess > 0).any(), (
            f"{name} at {at}: truth {expected[at].item():.9g}, ATen {same[at].item():.9g}, "
            f"ours {mine[at].item():.9g}, allowed error {allowed[at].item():.3g}"
        )
    return ours
