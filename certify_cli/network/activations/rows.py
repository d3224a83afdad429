"""The rows of the activation table, one per function (theory section 0).

A row is a rule that returns phi, phi' and phi'' as curves (function, critical points, error in units of u), decorated
with the names that torch and ONNX give the function. Critical points were computed with 50 digits, and the tests
compute them again; `exactly` marks float64 numbers, `nearly` rounded ones.

The stated errors count every operation as u, every library function as 8 u (4 ulp), and a rounded argument by its
condition number.

The file is long because it is a table: a reader who compares two rows, or adds one, has all of them here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from certify_cli.errors import ModelError
from certify_cli.network.activations.formulas import (
    erf_slope,
    gelu_curvature,
    gelu_slope,
    logistic,
    logistic_curvature,
    logistic_slope,
    mish_curvature,
    mish_gate,
    mish_slope,
    normal_distribution,
    sech_squared,
    softplus_value,
    tanh_gelu_curvature,
    tanh_gelu_gate,
    tanh_gelu_slope,
)
from certify_cli.network.activations.monotone_pieces import CriticalPoint, Curve, exactly, nearly
from certify_cli.network.activations.table import (
    ACTIVATIONS,
    Activation,
    from_module,
    from_name,
    from_onnx,
    row,
    spelled,
)
from certify_cli.numerics.rounding import UNIT, up

__all__ = ["ACTIVATIONS", "Activation", "from_module", "from_name", "from_onnx"]

INF = math.inf


def _limits(left: float, right: float) -> tuple[CriticalPoint, CriticalPoint]:
    """Exact limits at -inf and +inf."""
    return exactly(-INF, left), exactly(INF, right)


def _odd(abscissa: float, value: float) -> tuple[CriticalPoint, CriticalPoint]:
    return nearly(-abscissa, -value), nearly(abscissa, value)


def _even(abscissa: float, value: float) -> tuple[CriticalPoint, CriticalPoint]:
    return nearly(-abscissa, value), nearly(abscissa, value)


def _positive(row_name: str, parameter: str, number: float) -> None:
    if number <= 0:
        raise ModelError(f"{row_name} with {parameter}={number:g} is not supported: {parameter} must be positive")


# Sigmoid-like: everything follows from the logistic function and its derivatives.


@row(modules={nn.Tanh: spelled()}, onnx={"Tanh": spelled()})
def tanh() -> Activation:
    return Activation(
        value=Curve(torch.tanh, _limits(-1.0, 1.0), relative=8),
        slope=Curve(sech_squared, (*_limits(0.0, 0.0), exactly(0.0, 1.0)), relative=32),
        curvature=Curve(
            lambda z: -2.0 * torch.tanh(z) * sech_squared(z),
            (*_limits(0.0, 0.0), *_odd(0.6584789484624084, -0.769800358919501)),
            relative=48,
        ),
        third_sup=2.0,
    )


@row(modules={nn.Sigmoid: spelled()}, onnx={"Sigmoid": spelled()})
def sigmoid() -> Activation:
    return Activation(
        value=Curve(logistic, _limits(0.0, 1.0), relative=24),
        slope=Curve(logistic_slope, (*_limits(0.0, 0.0), exactly(0.0, 0.25)), relative=32),
        curvature=Curve(
            logistic_curvature,
            (*_limits(0.0, 0.0), *_odd(1.3169578969248168, -0.09622504486493763)),
            relative=48,
        ),
        third_sup=0.125,
    )


def _with_softplus_derivatives(value: Curve, beta: float, deviation: float = 0.0) -> Activation:
    return Activation(
        value=value,
        slope=Curve(lambda z: logistic(beta * z), _limits(0.0, 1.0), relative=24, absolute=1),
        curvature=Curve(
            lambda z: beta * logistic_slope(beta * z),
            (*_limits(0.0, 0.0), exactly(0.0, beta / 4)),
            relative=34,
            absolute=beta,
        ),
        third_sup=up(beta * beta / (6 * math.sqrt(3)), 5),
        deviation=deviation,
    )


@row(modules={nn.Softplus: spelled(beta="beta", threshold="threshold")}, onnx={"Softplus": spelled()})
def softplus(beta: float = 1.0, threshold: float | None = None) -> Activation:
    """log(1 + exp(beta z)) / beta. The deployed operator returns z where beta z > threshold (see `deviation`)."""
    _positive("softplus", "beta", beta)
    if threshold is not None and threshold < 20:
        raise ModelError(
            f"softplus with threshold={threshold:g} departs too far from softplus to be certified: "
            f"rebuild the model with a threshold of at least 20 (torch's default)"
        )
    deviation = 0.0 if threshold is None else up(math.log1p(math.exp(-threshold)) / beta, 8)
    value = Curve(lambda z: softplus_value(z, beta), _limits(0.0, INF), relative=20, absolute=1 / beta)
    return _with_softplus_derivatives(value, beta, deviation)


@row()
def centred_softplus(beta: float = 1.0) -> Activation:
    """(softplus(beta z) - log 2) / beta, which is 0 at 0."""
    _positive("centred_softplus", "beta", beta)

    def value(z: Tensor) -> Tensor:
        return z.clamp(min=0.0) + torch.log1p(torch.expm1(-(beta * z).abs()) / 2) / beta

    limits = nearly(-INF, -math.log(2) / beta), exactly(INF, INF)
    return _with_softplus_derivatives(Curve(value, limits, relative=32), beta)


@row(modules={nn.LogSigmoid: spelled()})
def log_sigmoid() -> Activation:
    return Activation(
        value=Curve(lambda z: -softplus_value(-z, 1.0), _limits(-INF, 0.0), relative=20),
        slope=Curve(lambda z: logistic(-z), _limits(1.0, 0.0), relative=24),
        curvature=Curve(lambda z: -logistic_slope(z), (*_limits(0.0, 0.0), exactly(0.0, -0.25)), relative=32),
        third_sup=up(0.09622504486493763, 4),
    )


# Gated: z times a distribution function. Their derivatives reach their limits long before the clamps of the formulas.


@row(
    modules={nn.GELU: spelled(requires={"approximate": "none"})},
    onnx={"Gelu": spelled(requires={"approximate": "none"}, defaults={"approximate": "none"})},
)
def gelu() -> Activation:
    return Activation(
        value=Curve(
            lambda z: z * normal_distribution(z),
            (*_limits(0.0, INF), nearly(-0.7517915246935645, -0.16997120747990366)),
            relative=16,
            absolute=2,
        ),
        slope=Curve(
            gelu_slope,
            (
                *_limits(0.0, 1.0),
                nearly(-1.4142135623730951, -0.12890414518515478),
                nearly(1.4142135623730951, 1.1289041451851547),
            ),
            absolute=24,
        ),
        curvature=Curve(
            gelu_curvature,
            (*_limits(0.0, 0.0), nearly(0.0, 0.7978845608028654), *_even(2.0, -0.1079819330263761)),
            absolute=32,
        ),
        third_sup=up(0.7787696350557323, 4),
    )


@row(
    modules={nn.GELU: spelled(requires={"approximate": "tanh"})},
    onnx={"Gelu": spelled(requires={"approximate": "tanh"}, defaults={"approximate": "none"})},
)
def gelu_tanh() -> Activation:
    return Activation(
        value=Curve(
            lambda z: z * logistic(tanh_gelu_gate(z)[1]),
            (*_limits(0.0, INF), nearly(-0.7524614220710163, -0.17004075057125406)),
            relative=24,
            absolute=8,
        ),
        slope=Curve(
            tanh_gelu_slope,
            (
                *_limits(0.0, 1.0),
                nearly(-1.4185040087908283, -0.12899306865877178),
                nearly(1.4185040087908283, 1.1289930686587717),
            ),
            absolute=64,
        ),
        curvature=Curve(
            tanh_gelu_curvature,
            (
                *_limits(0.0, 0.0),
                nearly(0.0, 0.7978845608028654),
                *_even(2.013480724624258, -0.10791351589036792),
            ),
            absolute=128,
        ),
        third_sup=up(0.7766914503985405, 4),
    )


@row(modules={nn.SiLU: spelled()}, onnx={"Swish": spelled(requires={"alpha": 1.0}, defaults={"alpha": 1.0})})
def silu() -> Activation:
    return Activation(
        value=Curve(
            lambda z: z * logistic(z),
            (*_limits(0.0, INF), nearly(-1.2784645427610737, -0.2784645427610738)),
            relative=24,
        ),
        slope=Curve(
            lambda z: logistic(z) + z * logistic_slope(z),
            (
                *_limits(0.0, 1.0),
                nearly(-2.3993572805154675, -0.09983932012886691),
                nearly(2.3993572805154675, 1.099839320128867),
            ),
            absolute=40,
        ),
        curvature=Curve(
            lambda z: 2 * logistic_slope(z) + z * logistic_curvature(z),
            (*_limits(0.0, 0.0), exactly(0.0, 0.5), *_even(3.435840993535111, -0.036914373199893186)),
            absolute=48,
        ),
        third_sup=up(0.3081815157964791, 4),
    )


@row(modules={nn.Mish: spelled()}, onnx={"Mish": spelled()})
def mish() -> Activation:
    return Activation(
        value=Curve(
            lambda z: z * mish_gate(z)[0],
            (*_limits(0.0, INF), nearly(-1.1924312145154952, -0.30884341301725043)),
            relative=40,
        ),
        slope=Curve(
            mish_slope,
            (
                *_limits(0.0, 1.0),
                nearly(-2.256376396360793, -0.11252612238946255),
                nearly(1.4905711794854284, 1.088498161251728),
            ),
            absolute=80,
        ),
        curvature=Curve(
            mish_curvature,
            (
                *_limits(0.0, 0.0),
                nearly(-3.2673378465204044, -0.04173207070661102),
                nearly(-0.08793443131491421, 0.6442046372369724),
                nearly(2.114842563020877, -0.05903335695393629),
            ),
            absolute=160,
        ),
        third_sup=up(0.5884120448690197, 4),
    )


# Other smooth functions.


@row(onnx={"Atan": spelled()})
def atan() -> Activation:
    return Activation(
        value=Curve(torch.atan, (nearly(-INF, -math.pi / 2), nearly(INF, math.pi / 2)), relative=8),
        slope=Curve(lambda z: 1 / (1 + z.square()), (*_limits(0.0, 0.0), exactly(0.0, 1.0)), relative=4),
        curvature=Curve(
            lambda z: -2 * z / (1 + z.square()).square(),
            (*_limits(0.0, 0.0), *_odd(0.5773502691896257, -0.649519052838329)),
            relative=12,
        ),
        third_sup=2.0,
    )


@row(onnx={"Erf": spelled()})
def erf() -> Activation:
    return Activation(
        value=Curve(torch.erf, _limits(-1.0, 1.0), relative=8),
        slope=Curve(erf_slope, (*_limits(0.0, 0.0), nearly(0.0, 1.1283791670955126)), relative=12, absolute=1),
        curvature=Curve(
            lambda z: -2 * z * erf_slope(z),
            (*_limits(0.0, 0.0), *_odd(0.7071067811865476, -0.9678828980765734)),
            relative=14,
            absolute=2,
        ),
        third_sup=up(2.256758334191025, 4),
    )


@row(onnx={"Sin": spelled()})
def sin() -> Activation:
    # no slack: a periodic curve itself allows for rounded abscissae
    def wave(function: Callable[[Tensor], Tensor], top: float) -> Curve:
        return Curve(function, (exactly(top, 1.0), exactly(top - math.pi, -1.0)), absolute=8, period=2 * math.pi)

    return Activation(
        value=wave(torch.sin, math.pi / 2),
        slope=wave(torch.cos, 0.0),
        curvature=wave(lambda z: -torch.sin(z), -math.pi / 2),
        third_sup=1.0,
    )


@row(modules={nn.Softsign: spelled()}, onnx={"Softsign": spelled()})
def softsign() -> Activation:
    return Activation(
        value=Curve(lambda z: z / (1 + z.abs()), _limits(-1.0, 1.0), relative=4),
        slope=Curve(lambda z: (1 + z.abs()).square().reciprocal(), (*_limits(0.0, 0.0), exactly(0.0, 1.0)), relative=6),
        curvature=Curve(
            lambda z: torch.where(z < 0, 2, -2) / (1 + z.abs()) ** 3,
            (*_limits(0.0, 0.0), exactly(0.0, -2.0, 2.0)),
            relative=12,
        ),
        third_sup=6.0,
    )


# Exponential on the left, linear on the right.


def _exponential_linear(alpha: float, width: float, scale: float) -> Activation:
    """scale z for z > 0, scale alpha (exp(z/width) - 1) below; phi' is continuous exactly where alpha = width."""
    depth, steepness = scale * alpha, scale * alpha / width

    def value(z: Tensor) -> Tensor:
        return scale * z.clamp(min=0.0) + depth * torch.expm1(z.clamp(max=0.0) / width)

    def slope(z: Tensor) -> Tensor:
        return torch.where(z > 0, scale, steepness * torch.exp(z.clamp(max=0.0) / width))

    def curvature(z: Tensor) -> Tensor:
        return torch.where(z > 0, 0.0, torch.exp(z.clamp(max=0.0) / width) * (scale / width))

    smooth = alpha == width
    at_zero = exactly(0.0, scale) if smooth else nearly(0.0, scale, steepness)
    largest = scale / width
    return Activation(
        value=Curve(value, (nearly(-INF, -depth), exactly(INF, INF)), relative=16, absolute=depth),
        slope=Curve(slope, (*_limits(0.0, scale), at_zero), relative=16, absolute=steepness),
        curvature=Curve(curvature, (*_limits(0.0, 0.0), nearly(0.0, 0.0, largest)), relative=16, absolute=largest)
        if smooth
        else None,
        third_sup=up(largest / width, 4) if smooth else None,
    )


@row(modules={nn.ELU: spelled(alpha="alpha")}, onnx={"Elu": spelled(alpha="alpha")})
def elu(alpha: float = 1.0) -> Activation:
    if alpha < 0:
        raise ModelError(f"elu with alpha={alpha:g} is not supported: alpha must not be negative")
    return _exponential_linear(alpha, 1.0, 1.0)


@row(modules={nn.CELU: spelled(alpha="alpha")}, onnx={"Celu": spelled(alpha="alpha")})
def celu(alpha: float = 1.0) -> Activation:
    _positive("celu", "alpha", alpha)
    return _exponential_linear(alpha, alpha, 1.0)


@row(
    modules={nn.SELU: spelled()},
    onnx={
        "Selu": spelled(
            alpha="alpha",
            gamma="gamma",
            defaults={"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875},
        )
    },
)
def selu(alpha: float = 1.6732632423543772, gamma: float = 1.0507009873554805) -> Activation:
    _positive("selu", "alpha", alpha)
    _positive("selu", "gamma", gamma)
    return _exponential_linear(alpha, 1.0, gamma)


# Piecewise linear, and hard swish.


def _piecewise(
    value: Curve, kinks: tuple[CriticalPoint, ...], *lines: tuple[float, float], deviation: float = 0.0
) -> Activation:
    """lines[i] = (slope, intercept) between kinks i-1 and i; the values of a kink are the slopes on its two sides."""
    slopes, intercepts = zip(*lines, strict=True)

    def steps(levels: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
        def level(z: Tensor) -> Tensor:
            result = torch.where(z.isnan(), z, levels[0])
            for kink, after in zip(kinks, levels[1:], strict=True):
                result = torch.where(z > kink.abscissa, after, result)
            return result

        return level

    slope = Curve(steps(slopes), (*_limits(slopes[0], slopes[-1]), *kinks))
    return Activation(value, slope, deviation=deviation, intercept=steps(intercepts))


@row(modules={nn.ReLU: spelled()}, onnx={"Relu": spelled()})
def relu() -> Activation:
    value = Curve(lambda z: z.clamp(min=0.0), _limits(0.0, INF))
    return _piecewise(value, (exactly(0.0, 0.0, 1.0),), (0.0, 0.0), (1.0, 0.0))


@row(
    modules={nn.LeakyReLU: spelled(negative_slope="negative_slope")},
    onnx={"LeakyRelu": spelled(negative_slope="alpha", defaults={"alpha": 0.009999999776482582})},
)
def leaky_relu(negative_slope: float = 0.01) -> Activation:
    left = -math.copysign(INF, negative_slope) if negative_slope else 0.0
    value = Curve(
        lambda z: torch.where(z > 0, z, negative_slope * z), (*_limits(left, INF), exactly(0.0, 0.0)), relative=2
    )
    return _piecewise(value, (exactly(0.0, negative_slope, 1.0),), (negative_slope, 0.0), (1.0, 0.0))


@row(
    modules={
        nn.ReLU6: spelled(low="min_val", high="max_val"),
        nn.Hardtanh: spelled(low="min_val", high="max_val"),
    },
    onnx={"Clip": spelled(low="min", high="max")},
)
def clip(low: float | None = None, high: float | None = None) -> Activation:
    """min(max(z, low), high); None for no limit on that side."""
    if low is None and high is None:
        raise ModelError("clip without low and high changes nothing: give it one of them")
    floor, ceiling = -INF if low is None else low, INF if high is None else high
    if floor >= ceiling:
        raise ModelError(f"clip from {floor:g} to {ceiling:g} is constant: low must be below high")
    kinks = tuple(exactly(abscissa, 0.0, 1.0) for abscissa in (low, high) if abscissa is not None)
    flat = [[] if level is None else [(0.0, level)] for level in (low, high)]
    return _piecewise(
        Curve(lambda z: z.clamp(low, high), _limits(floor, ceiling)), kinks, *flat[0], (1.0, 0.0), *flat[1]
    )


@row(
    modules={nn.Hardsigmoid: spelled()},
    onnx={"HardSigmoid": spelled(alpha="alpha", beta="beta", defaults={"alpha": 0.20000000298023224, "beta": 0.5})},
)
def hard_sigmoid(alpha: float = 1 / 6, beta: float = 0.5) -> Activation:
    """alpha z + beta, clipped to [0, 1]. The default is torch's, whose alpha is the rational 1/6."""
    _positive("hard_sigmoid", "alpha", alpha)
    value = Curve(
        lambda z: (alpha * z + beta).clamp(0.0, 1.0), _limits(0.0, 1.0), relative=4, absolute=4 * (1 + abs(beta))
    )
    slack = 8 * UNIT * (1 + abs(beta)) / alpha
    kinks = tuple(CriticalPoint((level - beta) / alpha, 0.0, alpha, slack) for level in (0.0, 1.0))
    lines = (0.0, 0.0), (alpha, beta), (0.0, 1.0)
    return _piecewise(value, kinks, *lines, deviation=UNIT if alpha == 1 / 6 else 0.0)


@row(modules={nn.Hardswish: spelled()}, onnx={"HardSwish": spelled()})
def hard_swish() -> Activation:
    """z min(max(z + 3, 0), 6) / 6."""

    def slope(z: Tensor) -> Tensor:
        return torch.where(z <= -3, 0.0, torch.where(z >= 3, 1.0, z / 3 + 0.5))

    return Activation(
        value=Curve(
            lambda z: z * ((z + 3).clamp(0.0, 6.0) / 6), (*_limits(0.0, INF), exactly(-1.5, -0.375)), relative=8
        ),
        slope=Curve(slope, (*_limits(0.0, 1.0), exactly(-3.0, -0.5, 0.0), exactly(3.0, 1.0, 1.5)), absolute=4),
    )
