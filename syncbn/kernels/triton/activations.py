"""Activations of :mod:`syncbn.kernels.triton.kernels`, as in torch for NaN and infinities.

ACTIVATION: a name of :data:`syncbn.kernels.activations.NAMES`, or "identity". NEGATIVE_SLOPE: slope
of "leaky_relu" below zero, 0 for all other names.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# fmt: off

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY_AT_ZERO = tl.constexpr(0.3989422804014327)


@triton.jit
def apply_activation(z, ACTIVATION: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr):
    """Return the activation of z."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "relu6":
        z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * NEGATIVE_SLOPE)
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "hardswish":
        z = z * _clamp(z + 3.0) / 6.0
    elif ACTIVATION == "gelu":
        z = z * _normal_cdf(z)
    else:
        tl.static_assert(ACTIVATION == "identity")
    return z


@triton.jit
def activation_backward(dy, z, ACTIVATION: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr):
    """Return the gradient of z from the gradient of the activation."""
    if ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        dy = dy * s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "hardswish":
        dy = tl.where(z <= -3, 0.0, tl.where(z >= 3, dy, dy * (z / 3.0 + 0.5)))
    elif ACTIVATION == "gelu":
        dy = dy * (_normal_cdf(z) + z * _DENSITY_AT_ZERO * tl.exp(-0.5 * z * z))
    elif ACTIVATION != "identity":
        dy = mask_gradient(dy, unit_derivative(z, ACTIVATION), NEGATIVE_SLOPE)
    return dy


@triton.jit
def unit_derivative(z, ACTIVATION: tl.constexpr):
    """Return where a piecewise linear activation has derivative 1, from its input or output."""
    if ACTIVATION == "leaky_relu":
        unit = z > 0
    elif ACTIVATION == "relu6":
        unit = (z > 0) & (z < 6)
    else:
        unit = (z <= 0) == 0
    return unit


@triton.jit
def mask_gradient(dy, unit, NEGATIVE_SLOPE: tl.constexpr):
    """Return dy where the derivative is 1, and dy times the slope elsewhere."""
    return tl.where(unit, dy, dy * NEGATIVE_SLOPE if NEGATIVE_SLOPE > 0 else 0.0)


@triton.jit
def _clamp(z):
    return tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))


@triton.jit
def _normal_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
