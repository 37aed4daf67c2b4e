"""The activations that follow a batch norm (norm.py), and their gradients, for the kernels of one or the other.

    relu, relu6              z between bounds; the gradient passes where y is between them (without a residual z, as the
                             activation's dtype holds it), and where it is NaN
    hardswish, silu, gelu    y = z * gate(z); the gradient is of z in float32

ACTIVATION is one of batch_norm.ACTIVATIONS. Everything is in float32, and finite where z is.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """What the activation makes of z. A comparison with NaN is false."""
    if ACTIVATION == "relu":
        y = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "relu6":
        y = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    else:
        y = z * _gate(z, ACTIVATION)
    return y


@triton.jit
def magnitude(y, ACTIVATION: tl.constexpr):
    """|y|."""
    if ACTIVATION == "hardswish" or ACTIVATION == "silu" or ACTIVATION == "gelu":
        y = tl.abs(y)
    return y


@triton.jit
def gradient_of(
    centred, scale, bias, kept, share, dy,
    DTYPE: tl.constexpr, RESIDUAL: tl.constexpr, HAS_DY: tl.constexpr, HAS_DPOOLED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """The gradient of z = centred * scale + bias [+ residual], from that of y and the share of pooled's in |y|.

    With RESIDUAL, `kept` is y where the activation rectifies, and else the residual. An absent tensor is never touched.
    The share passes to y by the sign that y has in DTYPE.
    """
    gradient = share
    if ACTIVATION == "relu" or ACTIVATION == "relu6":
        if HAS_DY:
            gradient += dy
        told = kept
        if not RESIDUAL:
            told = (centred * scale + bias).to(DTYPE).to(tl.float32)
        gradient = tl.where(told <= 0, 0.0, gradient)
        if ACTIVATION == "relu6":
            gradient = tl.where(told >= 6, 0.0, gradient)
    else:
        z = centred * scale + bias
        if RESIDUAL:
            z += kept
        gate = _gate(z, ACTIVATION)
        if HAS_DPOOLED:
            y = (z * gate).to(DTYPE).to(tl.float32)
            gradient = tl.where(y > 0, share, tl.where(y < 0, -share, 0.0))
        if HAS_DY:
            gradient += dy
        if ACTIVATION == "hardswish":
            slope = tl.where(z < 3, z * 0.3333333333333333 + 0.5, 1.0)  # of NaN 1, as in PyTorch on a GPU
            gradient = tl.where(z <= -3, 0.0, gradient * slope)
        elif ACTIVATION == "silu":
            gradient *= gate * (1 + z * (1 - gate))
        else:
            gradient *= gate + z * (tl.exp(-0.5 * z * z) * 0.3989422804014327)
    return gradient


@triton.jit
def _gate(z, ACTIVATION: tl.constexpr):
    """By what z is multiplied: between 0 and 1."""
    if ACTIVATION == "hardswish":
        gate = tl.minimum(tl.maximum(z + 3, 0.0), 6.0) * 0.16666666666666666  # 6 times which is 1 in float32
    elif ACTIVATION == "silu":
        gate = 1 / (1 + tl.exp2(z * -1.4426950408889634))  # exp(-z), in fewer registers
    else:
        tl.static_assert(ACTIVATION == "gelu")
        gate = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
    return gate
