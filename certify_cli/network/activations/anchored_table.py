"""Anchored constants of an activation, tabulated: how far phi and phi' can stray from their values at z, at any offset.

`ActivationOnInterval` finds these constants by a search, too dear for every unit of every sample; but they depend on z alone. So each
activation is tabulated once, and looked up. Between tabulated places the constants move slowly: with y = z + t fixed,

    d/dz (phi(y) - phi(z)) / t                    = (secant - phi'(z)) / t      at most h/2     in size,
    d/dz (phi'(y) - phi'(z)) / t                  = (slope_lipschitz - phi''(z)) / t       at most h3/2,
    d/dz 2 (phi(y) - phi(z) - phi'(z) t) / t^2    = 2 (quadratic - phi''(z)) / t   at most 2 h3/3,

h = sup |phi''|, h3 = sup |phi'''|, and so do their extremes over y. Where phi'' jumps, h3 does not say this, and a
whole cell is handed to `ActivationOnInterval` as the uncertainty of z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.activations.table import ACTIVATIONS, Activation

CELLS = 8192
CORE = 0.05
"""Cells are uniform in asinh(z / CORE): of equal width close to 0, of equal ratio far from it."""
FARTHEST = 1e3
OVERLAP = 1 / 64
"""By how much of its width a cell's entry holds beyond the cell: room for the rounding of the lookup and of z."""


@dataclass(frozen=True, eq=False)
class AnchoredConstants:
    """AnchoredConstants at pre-activations z with every offset t allowed. Tensors of one shape, rounded outward.

    `secant_low`, `secant_high`: range of (phi(z+t) - phi(z)) / t. `slope_lipschitz`: at least |phi'(z+t) - phi'(z)| / |t|.
    `curvature_below`, `curvature_above` >= 0:  -curvature_below t^2/2 <= phi(z+t) - phi(z) - phi'(z) t <= curvature_above t^2/2.
    """

    secant_low: Tensor
    secant_high: Tensor
    slope_lipschitz: Tensor
    curvature_below: Tensor
    curvature_above: Tensor


class AnchoredTable:
    """The table of one activation that has a curvature (ValueError for another), on the CPU. See `anchored_table`."""

    def __init__(self, activation: Activation) -> None:
        curvature = activation.curvature_range
        if curvature is None:
            raise ValueError(f"{activation.title} has no curvature to tabulate")
        last = math.asinh(FARTHEST / CORE)
        self._scale = CELLS / (2 * last)
        edges = CORE * torch.sinh(torch.linspace(-last, last, CELLS + 1, dtype=torch.float64))
        widths = edges[1:] - edges[:-1]
        middle, half = 0.5 * (edges[1:] + edges[:-1]), (0.5 + 2 * OVERLAP) * widths
        self._precision = float(widths.min()) * OVERLAP
        secants, bends, quadratics = _constants(activation, middle, half)
        columns = (
            *secants,
            torch.maximum(bends[0].abs(), bends[1].abs()),
            (-quadratics[0]).clamp(min=0.0),
            quadratics[1].clamp(min=0.0),
        )
        anywhere = (*activation.slope_range, activation.curvature_sup, max(0.0, -curvature[0]), max(0.0, curvature[1]))
        self._columns = [
            torch.cat([column, column.new_tensor([whole])]) for column, whole in zip(columns, anywhere, strict=True)
        ]

    def __call__(self, z: Tensor, error: Tensor) -> AnchoredConstants:
        """Constants of units whose exact pre-activations lie within `error` of z (any shape, float64).

        Those of the whole line beyond the table, and where `error` is not small against a cell.
        """
        place = (torch.asinh(z / CORE) * self._scale + CELLS // 2).floor()
        known = (place >= 0) & (place < CELLS) & (error <= self._precision)
        index = torch.where(known, place, torch.full_like(place, CELLS)).long()
        return AnchoredConstants(*(column.to(z.device)[index] for column in self._columns))


def anchored_table(activation: Activation) -> AnchoredTable:
    """The activation's table, built once in a process: the rows of `activations` are told by name and parameters."""
    return _built(activation.name, tuple(activation.parameters.items()))


@lru_cache(maxsize=256)
def _built(name: str, parameters: tuple[tuple[str, float | None], ...]) -> AnchoredTable:
    return AnchoredTable(ACTIVATIONS[name](**dict(parameters)))


Ends = tuple[Tensor, Tensor]


def _constants(activation: Activation, middle: Tensor, half: Tensor) -> tuple[Ends, Ends, Ends]:
    """Secants, bends and quadratics that hold for every z within `half` of `middle`."""
    endless = torch.full_like(middle, math.inf)
    h, h3 = activation.curvature_sup, activation.third_sup
    jumps = activation.curvature is None or any(point.jump for point in activation.curvature.critical_points)
    if jumps or h3 is None:
        span = ActivationOnInterval(activation, middle, half, -endless, endless)
        return span.secants(), span.slope_secants(), span.quadratic_coefficients()
    span = ActivationOnInterval(activation, middle, 0.0, -endless, endless)
    slopes, curvatures = activation.slope_range, activation.curvature_range or (-math.inf, math.inf)
    return (
        _widened(span.secants(), half * (0.51 * h), slopes),
        _widened(span.slope_secants(), half * (0.51 * h3), curvatures),
        _widened(span.quadratic_coefficients(), half * (0.67 * h3), curvatures),
    )


def _widened(ends: Ends, by: Tensor, bounds: tuple[float, float]) -> Ends:
    """`by` is taken 0.5 % or more too large, which covers the rounding here."""
    return (ends[0] - by).clamp(*bounds), (ends[1] + by).clamp(*bounds)
