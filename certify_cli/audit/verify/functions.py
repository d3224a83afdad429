"""Activations by torch's own functions, for the check of a run.

Derivatives come from automatic differentiation, ranges of derivatives from their known extreme points (theory
section 0's table).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

Map = Callable[[Tensor], Tensor]

WIDENING = 1e-6
"""By which an interval is widened on either side before extreme points are looked up in it: they are stored rounded."""
SIDE = 1e-9
"""How far from a jump of phi'' the points on its two sides lie."""
UNIT = 2.0**-53
CELLS = 16
"""Cells of the grid on either side of a sample."""
SLACK = 1e-8
"""Relative widening of every range of a derivative: the points beside a jump, a stored extreme point, and rounding
together move a derivative by less."""


@dataclass(frozen=True)
class Function:
    """An activation phi, elementwise on float64.

    slope_extremes: extreme points of phi'.   curvature_extremes: those of phi'', and points on both sides of its jumps.
    known_slopes: values of phi' that are known: its limits, and those of straight pieces. (phi'' is 0 at both ends.)
    third: upper bound of sup |phi'''|; infinite where phi'' jumps.   kinks: where phi' jumps.
    smooth: phi' is continuous.   periodic: the ranges on an interval are those on the whole line.
    deviation: upper bound of the distance between the deployed operator and `value`.
    magnitude: upper bound of the numbers that `value` adds up, besides z and the result.
    """

    value: Map
    slope_extremes: tuple[float, ...] = ()
    curvature_extremes: tuple[float, ...] = ()
    third: float = math.inf
    smooth: bool = True
    deviation: float = 0.0
    periodic: bool = False
    known_slopes: tuple[float, ...] = (0.0,)
    magnitude: float = 1.0
    kinks: tuple[float, ...] = ()

    def slope(self, z: Tensor) -> Tensor:
        return _derivatives(self.value, z)[0]

    def curvature(self, z: Tensor) -> Tensor:
        return _derivatives(self.value, z)[1]

    def quotient_range(self, z: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Range, outward, of the quotient  k(t) = 2 (phi(z + t) - phi(z) - phi'(z) t) / t^2  for t in [low, high].

        All tensors have the same shape, and 0 lies in [low, high]. k is a weighted mean of phi'', so that its own slope
        is at most third / 3 (theory section 4), which bounds k between the points of a grid.
        """
        value, slope, curvature = self.value(z), self.slope(z), self.curvature(z)
        lower, upper = curvature, curvature
        for end in (low, high):
            for cell in range(1, CELLS + 1):
                t = end * (cell / CELLS)
                rounding = self.magnitude + value.abs() + self.amplification * (z.abs() + t.abs())
                error = 64 * UNIT * rounding / t.square()
                k = 2 * (self.value(z + t) - value - slope * t) / t.square()
                lower = torch.minimum(lower, torch.where(t == 0, curvature, (k - error).nan_to_num(nan=-math.inf)))
                upper = torch.maximum(upper, torch.where(t == 0, curvature, (k + error).nan_to_num(nan=math.inf)))
        between = torch.maximum(-low, high) * (self.third / (6 * CELLS)) + SLACK
        return lower - between, upper + between

    @cached_property
    def slopes(self) -> tuple[float, float]:
        """Range of phi' on the whole line, outward."""
        return _hull(self.slope, self.slope_extremes, self.known_slopes)

    @cached_property
    def curvatures(self) -> tuple[float, float]:
        """Range of phi'' on the whole line, outward."""
        return _hull(self.curvature, self.curvature_extremes, (0.0,))

    @cached_property
    def lipschitz(self) -> float:
        return max(map(abs, self.slopes))

    @property
    def amplification(self) -> float:
        """Upper bound, at least 1, of the factor by which an error of z grows in phi(z)."""
        return max(1.0, self.lipschitz)

    @property
    def largest_curvature(self) -> float:
        """sup |phi''|, an upper bound, where phi is smooth."""
        return max(map(abs, self.curvatures))

    def curvature_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Range of phi'' on [low, high], entrywise, outward."""
        if self.periodic:
            return torch.full_like(low, self.curvatures[0]), torch.full_like(low, self.curvatures[1])
        ends = torch.stack([self.curvature(low), self.curvature(high)])
        lower, upper = ends.amin(0), ends.amax(0)
        for point in self.curvature_extremes:
            extreme = float(self.curvature(torch.tensor([point], dtype=torch.float64)))
            inside = (low - WIDENING <= point) & (point <= high + WIDENING)
            lower = torch.where(inside, lower.clamp(max=extreme), lower)
            upper = torch.where(inside, upper.clamp(min=extreme), upper)
        slack = SLACK * (1 + torch.maximum(lower.abs(), upper.abs()))
        return lower - slack, upper + slack


def _hull(derivative: Map, points: tuple[float, ...], known: tuple[float, ...]) -> tuple[float, float]:
    """Range, outward, of a derivative that takes its extreme values at `points` or has them among `known`."""
    values = torch.cat(
        [derivative(torch.tensor(points, dtype=torch.float64)), torch.tensor(known, dtype=torch.float64)]
    )
    slack = SLACK * (1 + float(values.abs().max()))
    return float(values.min()) - slack, float(values.max()) + slack


def _derivatives(value: Map, z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (first,) = torch.autograd.grad(value(z).sum(), z, create_graph=True)
        second = torch.zeros_like(z)
        if first.requires_grad:
            second = torch.autograd.grad(first.sum(), z, allow_unused=True)[0]
        return first.detach(), torch.zeros_like(z) if second is None else second.detach()


THIRD = 0.0962251
"""Supremum of the third derivative of softplus (beta 1): 1 / (6 sqrt 3), rounded up."""
FROM_0_TO_1 = (0.0, 1.0)


def _softplus(beta: float, threshold: float | None = None, centred: bool = False) -> Function:
    level = math.log(2) / beta if centred else 0.0
    deviation = 0.0 if threshold is None else math.log1p(math.exp(-threshold)) / beta * (1 + SLACK)
    return Function(
        lambda z: -F.logsigmoid(-beta * z) / beta - level, curvature_extremes=(0.0,), third=THIRD * beta * beta,
        deviation=deviation, known_slopes=FROM_0_TO_1, magnitude=1 + level,
    )  # fmt: skip


def _exponential(alpha: float, width: float, gain: float = 1.0) -> Function:
    def value(z: Tensor) -> Tensor:
        return gain * torch.where(z > 0, z, alpha * torch.expm1(z.clamp(max=0) / width))

    side = SIDE * min(1.0, width)
    return Function(
        value, curvature_extremes=(-side, side), smooth=alpha == width, known_slopes=(0.0, gain, gain * alpha / width),
        magnitude=1 + gain * alpha, kinks=() if alpha == width else (0.0,),
    )  # fmt: skip


def _clip(low: float | None, high: float | None) -> Function:
    kinks = tuple(kink for kink in (low, high) if kink is not None)
    return Function(lambda z: z.clamp(low, high), smooth=False, known_slopes=FROM_0_TO_1, kinks=kinks)


def _hard_sigmoid(alpha: float, beta: float) -> Function:
    kinks = (-beta / alpha, (1 - beta) / alpha)
    return Function(
        lambda z: (alpha * z + beta).clamp(0, 1), smooth=False, deviation=1e-15, known_slopes=(0.0, alpha),
        magnitude=1 + abs(beta), kinks=kinks,
    )  # fmt: skip


FUNCTIONS: dict[str, Callable[..., Function]] = {
    "tanh": lambda: Function(torch.tanh, (0.0,), (-0.6584789484624084, 0.6584789484624084), 2.0),
    "sigmoid": lambda: Function(torch.sigmoid, (0.0,), (-1.3169578969248168, 1.3169578969248168), 0.125),
    "softplus": _softplus,
    "centred_softplus": lambda beta: _softplus(beta, centred=True),
    "log_sigmoid": lambda: Function(F.logsigmoid, curvature_extremes=(0.0,), third=THIRD, known_slopes=FROM_0_TO_1),
    "gelu": lambda: Function(
        F.gelu, (-math.sqrt(2), math.sqrt(2)), (-2.0, 0.0, 2.0), 0.77877, known_slopes=FROM_0_TO_1
    ),
    "gelu_tanh": lambda: Function(
        lambda z: F.gelu(z, approximate="tanh"),
        (-1.4185040087908283, 1.4185040087908283),
        (-2.013480724624258, 0.0, 2.013480724624258),
        0.77670,
        known_slopes=FROM_0_TO_1,
    ),
    "silu": lambda: Function(
        F.silu,
        (-2.3993572805154675, 2.3993572805154675),
        (-3.435840993535111, 0.0, 3.435840993535111),
        0.30819,
        known_slopes=FROM_0_TO_1,
    ),
    "mish": lambda: Function(
        lambda z: z * torch.tanh(-F.logsigmoid(-z)),
        (-2.256376396360793, 1.4905711794854284),
        (-3.2673378465204044, -0.08793443131491421, 2.114842563020877),
        0.58842,
        known_slopes=FROM_0_TO_1,
    ),
    "atan": lambda: Function(torch.atan, (0.0,), (-math.sqrt(1 / 3), math.sqrt(1 / 3)), 2.0),
    "erf": lambda: Function(torch.erf, (0.0,), (-math.sqrt(0.5), math.sqrt(0.5)), 2.25676),
    "sin": lambda: Function(torch.sin, (0.0, math.pi), (-math.pi / 2, math.pi / 2), 1.0, periodic=True),
    "softsign": lambda: Function(lambda z: z / (1 + z.abs()), (0.0,), (-SIDE, SIDE)),
    "elu": lambda alpha: _exponential(alpha, 1.0),
    "celu": lambda alpha: _exponential(alpha, alpha),
    "selu": lambda alpha, gamma: _exponential(alpha, 1.0, gamma),
    "relu": lambda: _clip(0.0, None),
    "leaky_relu": lambda negative_slope: Function(
        lambda z: torch.where(z > 0, z, negative_slope * z),
        smooth=False,
        known_slopes=(negative_slope, 1.0),
        kinks=(0.0,),
    ),
    "clip": _clip,
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": lambda: Function(
        F.hardswish, curvature_extremes=(0.0,), smooth=False, known_slopes=(0.0, 1.0, -0.5, 1.5), kinks=(-3.0, 3.0)
    ),
}
"""Activation by the name, called with the parameters, that a network gives it."""
