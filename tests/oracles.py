"""Activations in 50-digit arithmetic, and places and intervals on which they are hard."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import Tensor

from certify_cli.network.activations import Activation
from certify_cli.network.activations.interval_bounds import ActivationOnInterval

mpmath.mp.dps = 50

Exact = Callable[[mpf], mpf]


def _logistic(z: mpf) -> mpf:
    w = mpmath.exp(-abs(z))
    return 1 / (1 + w) if z >= 0 else w / (1 + w)


def _softplus(z: mpf) -> mpf:
    return max(z, mpf(0)) + mpmath.log1p(mpmath.exp(-abs(z)))


def _mish(z: mpf) -> mpf:
    return z * mpmath.tanh(_softplus(z))


def _tanh_gelu(z: mpf) -> mpf:
    return z * _logistic(2 * mpmath.sqrt(2 / mpmath.pi) * (z + mpf("0.044715") * z**3))


def _elu(alpha: float, width: float, lipschitz_constant: float) -> Exact:
    return lambda z: (
        lipschitz_constant * z if z > 0 else mpf(lipschitz_constant) * mpf(alpha) * mpmath.expm1(z / mpf(width))
    )


def _clip(low: mpf, high: mpf) -> Exact:
    return lambda z: min(max(z, low), high)


SELU = (1.6732632423543772, 1.0507009873554805)

# Every row at least once, as (name, parameters): (exact function, exact places where phi' or phi'' jumps).
EXACT: dict[tuple[str, tuple[float, ...]], tuple[Exact, tuple[float, ...]]] = {
    ("tanh", ()): (mpmath.tanh, ()),
    ("sigmoid", ()): (_logistic, ()),
    ("softplus", (1.0,)): (_softplus, ()),
    ("softplus", (5.0, 20.0)): (lambda z: _softplus(5 * z) / 5, ()),
    ("softplus", (0.3,)): (lambda z: _softplus(mpf(0.3) * z) / mpf(0.3), ()),
    ("centred_softplus", (5.0,)): (lambda z: (_softplus(5 * z) - mpmath.log(2)) / 5, ()),
    ("log_sigmoid", ()): (lambda z: -_softplus(-z), ()),
    ("gelu", ()): (lambda z: z * mpmath.erfc(-z / mpmath.sqrt(2)) / 2, ()),
    ("gelu_tanh", ()): (_tanh_gelu, ()),
    ("silu", ()): (lambda z: z * _logistic(z), ()),
    ("mish", ()): (_mish, ()),
    ("atan", ()): (mpmath.atan, ()),
    ("erf", ()): (mpmath.erf, ()),
    ("sin", ()): (mpmath.sin, ()),
    ("softsign", ()): (lambda z: z / (1 + abs(z)), (0.0,)),
    ("elu", (1.0,)): (_elu(1.0, 1.0, 1.0), (0.0,)),
    ("elu", (0.7,)): (_elu(0.7, 1.0, 1.0), (0.0,)),
    ("celu", (0.3,)): (_elu(0.3, 0.3, 1.0), (0.0,)),
    ("selu", ()): (_elu(SELU[0], 1.0, SELU[1]), (0.0,)),
    ("relu", ()): (lambda z: max(z, mpf(0)), (0.0,)),
    ("leaky_relu", (0.01,)): (lambda z: z if z > 0 else mpf(0.01) * z, (0.0,)),
    ("leaky_relu", (-0.5,)): (lambda z: z if z > 0 else -z / 2, (0.0,)),
    ("clip", (0.0, 6.0)): (_clip(mpf(0), mpf(6)), (0.0, 6.0)),
    ("hard_sigmoid", (0.2, 0.3)): (lambda z: min(max(mpf(0.2) * z + mpf(0.3), mpf(0)), mpf(1)), (-1.5, 3.5)),
    ("hard_sigmoid", ()): (lambda z: min(max(mpf(1 / 6) * z + mpf(0.5), mpf(0)), mpf(1)), (-3.0, 3.0)),
    ("hard_swish", ()): (lambda z: z * min(max(z + 3, mpf(0)), mpf(6)) / 6, (-3.0, 3.0)),
}
CASES = [pytest.param(name, numbers, id=f"{name}{numbers or ''}") for name, numbers in EXACT]
EVERY_CASE = pytest.mark.parametrize(("name", "numbers"), CASES)


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def length(activation: Activation) -> float:
    sup = activation.curvature_sup
    return 3.0 if math.isinf(sup) else activation.lipschitz / sup


def random_spans(activation: Activation, count: int, longest: float) -> ActivationOnInterval:
    """z over all features, ends from a thousandth of `longest` to `longest`, in units of the activation's length."""
    generator = torch.Generator().manual_seed(7)
    uniform = torch.rand(3, count, generator=generator, dtype=torch.float64)
    unit = length(activation)
    low, high = (longest * unit * 10 ** (3 * row - 3) for row in uniform[1:])
    return ActivationOnInterval(activation, (2 * uniform[0] - 1) * 4 * unit, 0.0, -low, high)


def chords(span: ActivationOnInterval) -> Tensor:
    phi = span.activation.value
    return (phi(span.z + span.hi) - phi(span.z + span.lo)) / (span.hi - span.lo)


def hard_places(activation: Activation) -> list[float]:
    """Turns, jumps and their neighbours; saturated, far, ordinary and at 0."""
    curves = [activation.slope] + ([activation.curvature] if activation.curvature is not None else [])
    critical_points = {
        point.abscissa for curve in curves for point in curve.critical_points if math.isfinite(point.abscissa)
    }
    return sorted(
        {side + place for place in critical_points for side in (-1e-13, 0.0, 1e-3)}
        | {-31.0, -1e4, 0.0, -1.7, 0.6, 25.0}
    )
