"""The activations once more, by torch's own functions: derivatives by automatic differentiation, ranges from the points
where they turn (theory section 0's table)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

Map = Callable[[Tensor], Tensor]

WIDER = 1e-6
"""Turning points are stored rounded: an interval is asked about this much wider."""
SIDE = 1e-9
"""How far from a jump its two sides are looked at."""
UNIT = 2.0**-53
CELLS = 16
"""Of the grid on either side of a sample."""
SLACK = 1e-8
"""Added to what is computed for a range: a side of a jump, a stored turning point, and rounding together move a
derivative by less."""


@dataclass(frozen=True)
class Function:
    """An activation. `bends` are the extreme points of phi', `turns` those of phi'' and both sides of its jumps;
    `steep` are values of phi' that are known: its limits, and those of straight pieces. phi'' is 0 at both ends.

    `smooth`: phi' is continuous. `deviation`: at most so far is the deployed operator from `value`. `everywhere`: a
    periodic function, whose ranges are those on the whole line. `third`: at least the third derivative's supremum,
    infinite where phi'' jumps. `size`: of the largest number that is added up in `value` besides z and the result.
    `kinks`: where phi' jumps.
    """

    value: Map
    bends: tuple[float, ...] = ()
    turns: tuple[float, ...] = ()
    third: float = math.inf
    smooth: bool = True
    deviation: float = 0.0
    everywhere: bool = False
    steep: tuple[float, ...] = (0.0,)
    size: float = 1.0
    kinks: tuple[float, ...] = ()

    def slope(self, z: Tensor) -> Tensor:
        return _derivatives(self.value, z)[0]

    def curvature(self, z: Tensor) -> Tensor:
        return _derivatives(self.value, z)[1]

    def bend_range(self, z: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Of k(t) = 2 (phi(z + t) - phi(z) - phi'(z) t) / t^2 for t in [low, high], which holds 0; outward.

        k is a mean of phi'' and moves by at most third / 3 (theory section 4), so that a grid says what lies between.
        """
        here, steep, bend = self.value(z), self.slope(z), self.curvature(z)
        lowest, highest = bend, bend
        for end in (low, high):
            for part in range(1, CELLS + 1):
                t = end * (part / CELLS)
                error = 64 * UNIT * (self.size + here.abs() + self.gain * (z.abs() + t.abs())) / t.square()
                k = 2 * (self.value(z + t) - here - steep * t) / t.square()
                lowest = torch.minimum(lowest, torch.where(t == 0, bend, (k - error).nan_to_num(nan=-math.inf)))
                highest = torch.maximum(highest, torch.where(t == 0, bend, (k + error).nan_to_num(nan=math.inf)))
        between = torch.maximum(-low, high) * (self.third / (6 * CELLS)) + SLACK
        return lowest - between, highest + between

    @cached_property
    def slopes(self) -> tuple[float, float]:
        """Least and most of phi' on the whole line, outward."""
        return _hull(self.slope, self.bends, self.steep)

    @cached_property
    def curvatures(self) -> tuple[float, float]:
        return _hull(self.curvature, self.turns, (0.0,))

    @cached_property
    def lipschitz(self) -> float:
        return max(map(abs, self.slopes))

    @property
    def gain(self) -> float:
        """By how much a rounding of z may grow, at most; at least 1."""
        return max(1.0, self.lipschitz)

    @property
    def bend(self) -> float:
        """sup |phi''|, where there is one."""
        return max(map(abs, self.curvatures))

    def curvature_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Of phi'' on [low, high], entrywise, outward."""
        if self.everywhere:
            return torch.full_like(low, self.curvatures[0]), torch.full_like(low, self.curvatures[1])
        ends = torch.stack([self.curvature(low), self.curvature(high)])
        least, most = ends.amin(0), ends.amax(0)
        for place in self.turns:
            extreme = float(self.curvature(torch.tensor([place], dtype=torch.float64)))
            inside = (low - WIDER <= place) & (place <= high + WIDER)
            least = torch.where(inside, least.clamp(max=extreme), least)
            most = torch.where(inside, most.clamp(min=extreme), most)
        slack = SLACK * (1 + torch.maximum(least.abs(), most.abs()))
        return least - slack, most + slack


def _hull(of: Map, places: tuple[float, ...], known: tuple[float, ...]) -> tuple[float, float]:
    found = torch.cat([of(torch.tensor(places, dtype=torch.float64)), torch.tensor(known, dtype=torch.float64)])
    slack = SLACK * (1 + float(found.abs().max()))
    return float(found.min()) - slack, float(found.max()) + slack


def _derivatives(value: Map, z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        (first,) = torch.autograd.grad(value(z).sum(), z, create_graph=True)
        second = torch.zeros_like(z)
        if first.requires_grad:
            second = torch.autograd.grad(first.sum(), z, allow_unused=True)[0]
        return first.detach(), torch.zeros_like(z) if second is None else second.detach()


THIRD = 0.0962251
"""Of the logistic curve's integral: 1 / (6 sqrt 3), up."""


FROM_0_TO_1 = (0.0, 1.0)


def _softplus(beta: float, threshold: float | None = None, centred: bool = False) -> Function:
    level = math.log(2) / beta if centred else 0.0
    deviation = 0.0 if threshold is None else math.log1p(math.exp(-threshold)) / beta * (1 + SLACK)
    return Function(
        lambda z: -F.logsigmoid(-beta * z) / beta - level, turns=(0.0,), third=THIRD * beta * beta, deviation=deviation,
        steep=FROM_0_TO_1, size=1 + level,
    )  # fmt: skip


def _exponential(alpha: float, width: float, gain: float = 1.0) -> Function:
    def value(z: Tensor) -> Tensor:
        return gain * torch.where(z > 0, z, alpha * torch.expm1(z.clamp(max=0) / width))

    side = SIDE * min(1.0, width)
    return Function(
        value, turns=(-side, side), smooth=alpha == width, steep=(0.0, gain, gain * alpha / width),
        size=1 + gain * alpha, kinks=() if alpha == width else (0.0,),
    )  # fmt: skip


def _clip(low: float | None, high: float | None) -> Function:
    kinks = tuple(kink for kink in (low, high) if kink is not None)
    return Function(lambda z: z.clamp(low, high), smooth=False, steep=FROM_0_TO_1, kinks=kinks)


def _hard_sigmoid(alpha: float, beta: float) -> Function:
    kinks = (-beta / alpha, (1 - beta) / alpha)
    return Function(
        lambda z: (alpha * z + beta).clamp(0, 1), smooth=False, deviation=1e-15, steep=(0.0, alpha),
        size=1 + abs(beta), kinks=kinks,
    )  # fmt: skip


FUNCTIONS: dict[str, Callable[..., Function]] = {
    "tanh": lambda: Function(torch.tanh, (0.0,), (-0.6584789484624084, 0.6584789484624084), 2.0),
    "sigmoid": lambda: Function(torch.sigmoid, (0.0,), (-1.3169578969248168, 1.3169578969248168), 0.125),
    "softplus": _softplus,
    "centred_softplus": lambda beta: _softplus(beta, centred=True),
    "log_sigmoid": lambda: Function(F.logsigmoid, turns=(0.0,), third=THIRD, steep=FROM_0_TO_1),
    "gelu": lambda: Function(F.gelu, (-math.sqrt(2), math.sqrt(2)), (-2.0, 0.0, 2.0), 0.77877, steep=FROM_0_TO_1),
    "gelu_tanh": lambda: Function(
        lambda z: F.gelu(z, approximate="tanh"),
        (-1.4185040087908283, 1.4185040087908283),
        (-2.013480724624258, 0.0, 2.013480724624258),
        0.77670,
        steep=FROM_0_TO_1,
    ),
    "silu": lambda: Function(
        F.silu,
        (-2.3993572805154675, 2.3993572805154675),
        (-3.435840993535111, 0.0, 3.435840993535111),
        0.30819,
        steep=FROM_0_TO_1,
    ),
    "mish": lambda: Function(
        lambda z: z * torch.tanh(-F.logsigmoid(-z)),
        (-2.256376396360793, 1.4905711794854284),
        (-3.2673378465204044, -0.08793443131491421, 2.114842563020877),
        0.58842,
        steep=FROM_0_TO_1,
    ),
    "atan": lambda: Function(torch.atan, (0.0,), (-math.sqrt(1 / 3), math.sqrt(1 / 3)), 2.0),
    "erf": lambda: Function(torch.erf, (0.0,), (-math.sqrt(0.5), math.sqrt(0.5)), 2.25676),
    "sin": lambda: Function(torch.sin, (0.0, math.pi), (-math.pi / 2, math.pi / 2), 1.0, everywhere=True),
    "softsign": lambda: Function(lambda z: z / (1 + z.abs()), (0.0,), (-SIDE, SIDE)),
    "elu": lambda alpha: _exponential(alpha, 1.0),
    "celu": lambda alpha: _exponential(alpha, alpha),
    "selu": lambda alpha, gamma: _exponential(alpha, 1.0, gamma),
    "relu": lambda: _clip(0.0, None),
    "leaky_relu": lambda negative_slope: Function(
        lambda z: torch.where(z > 0, z, negative_slope * z), smooth=False, steep=(negative_slope, 1.0), kinks=(0.0,)
    ),
    "clip": _clip,
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": lambda: Function(
        F.hardswish, turns=(0.0,), smooth=False, steep=(0.0, 1.0, -0.5, 1.5), kinks=(-3.0, 3.0)
    ),
}
"""By the name and the parameters that a network gives its activations."""
