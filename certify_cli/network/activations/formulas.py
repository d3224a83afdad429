"""Formulas of the smooth activations, safe in floating point; plain functions of a tensor, entrywise.

They use w = exp(-|z|) <= 1, so that nothing overflows and cancellation stays within the errors stated in `rows`. Where
a huge z would meet a factor that has underflowed, z is clamped far beyond the point where the derivative has reached
its limit in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logistic(z: Tensor) -> Tensor:
    """1 / (1 + exp(-z))."""
    w = torch.exp(-z.abs())
    return torch.where(z >= 0, 1.0, w) / (1.0 + w)


def logistic_slope(z: Tensor) -> Tensor:
    """First derivative of `logistic`."""
    w = torch.exp(-z.abs())
    return w / (1.0 + w).square()


def logistic_curvature(z: Tensor) -> Tensor:
    """Second derivative of `logistic`."""
    w = torch.exp(-z.abs())
    return z.sign() * torch.expm1(-z.abs()) * w / (1.0 + w) ** 3


def sech_squared(z: Tensor) -> Tensor:
    """1 / cosh(z)^2, the derivative of tanh."""
    return 4.0 * logistic_slope(2.0 * z)


def softplus_value(z: Tensor, beta: float) -> Tensor:
    """log(1 + exp(beta z)) / beta."""
    return z.clamp(min=0.0) + torch.log1p(torch.exp(-(beta * z).abs())) / beta


def normal_density(z: Tensor) -> Tensor:
    """Density of the standard normal distribution."""
    return torch.exp(-z.square() / 2) * (1 / math.sqrt(2 * math.pi))


def normal_distribution(z: Tensor) -> Tensor:
    """Distribution function of the standard normal distribution."""
    return torch.erfc(z * -math.sqrt(0.5)) / 2


def gelu_slope(z: Tensor) -> Tensor:
    """First derivative of GELU in its erf form, z times `normal_distribution`."""
    z = z.clamp(-40.0, 40.0)
    return normal_distribution(z) + z * normal_density(z)


def gelu_curvature(z: Tensor) -> Tensor:
    """Second derivative of GELU in its erf form."""
    z = z.clamp(-40.0, 40.0)
    return (2.0 - z.square()) * normal_density(z)


TANH_GELU = 2 * math.sqrt(2 / math.pi)
"""GELU's tanh form is z times the logistic function of p(z) = TANH_GELU (z + 0.044715 z^3)."""


def tanh_gelu_gate(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z clamped to +-30, p, p' and p''."""
    z = z.clamp(-30.0, 30.0)
    cube = 0.044715 * z.square()
    return z, TANH_GELU * z * (1 + cube), TANH_GELU * (1 + 3 * cube), 6 * TANH_GELU * 0.044715 * z


def tanh_gelu_slope(z: Tensor) -> Tensor:
    """First derivative of GELU in its tanh form."""
    z, p, p1, _ = tanh_gelu_gate(z)
    return logistic(p) + z * logistic_slope(p) * p1


def tanh_gelu_curvature(z: Tensor) -> Tensor:
    """Second derivative of GELU in its tanh form."""
    z, p, p1, p2 = tanh_gelu_gate(z)
    return logistic_slope(p) * (2 * p1 + z * p2) + z * logistic_curvature(p) * p1.square()


def mish_gate(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """t = tanh(softplus(z)) and its first two derivatives, as fractions of polynomials in w = exp(-|z|).

    With e = exp(z): t = e (e + 2) / d, t' = 4 e (e + 1) / d^2, t'' = 4 e (2 + 2e - 3e^2 - 2e^3) / d^3 and
    d = e^2 + 2e + 2; for z > 0 numerator and denominator are divided by the leading power of e.
    """
    w = torch.exp(-z.abs())
    right = z > 0
    d = torch.where(right, 1 + 2 * w + 2 * w * w, 2 + 2 * w + w * w)
    t = torch.where(right, 1 + 2 * w, w * (w + 2)) / d
    t1 = torch.where(right, 4 * w * w * (1 + w), 4 * w * (w + 1)) / d.square()
    left_cubic = 2 + 2 * w - 3 * w * w - 2 * w**3
    right_cubic = 2 * w**3 + 2 * w * w - 3 * w - 2
    return t, t1, torch.where(right, 4 * w * w * right_cubic, 4 * w * left_cubic) / d**3


def mish_slope(z: Tensor) -> Tensor:
    """First derivative of Mish, z tanh(softplus(z))."""
    t, t1, _ = mish_gate(z)
    return t + z * t1


def mish_curvature(z: Tensor) -> Tensor:
    """Second derivative of Mish."""
    _, t1, t2 = mish_gate(z)
    return 2 * t1 + z * t2


def erf_slope(z: Tensor) -> Tensor:
    """Derivative of the error function."""
    return torch.exp(-z.square()) * (2 / math.sqrt(math.pi))
