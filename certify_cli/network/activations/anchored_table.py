"""Anchored constants of an activation, tabulated: how much phi and phi' differ from their values at z, at any offset.

`ActivationOnInterval` finds these constants by a search that is too expensive for every neuron of every sample; but
they depend on z alone. Each activation is therefore tabulated once. Between tabulated points the constants move slowly:
with y = z + t fixed, m the secant (phi(y) - phi(z)) / t, m1 that of phi' and q = 2 (phi(y) - phi(z) - phi'(z) t) / t^2,

    dm/dz  = (m - phi'(z)) / t         at most h/2      in size,
    dm1/dz = (m1 - phi''(z)) / t       at most h3/2,
    dq/dz  = 2 (q - phi''(z)) / t      at most 2 h3/3,

h = sup |phi''|, h3 = sup |phi'''|; their extremes over y move no faster. Where phi'' jumps, h3 does not say this, and
`ActivationOnInterval` is given a whole cell as the uncertainty of z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from certify_cli.network.activations.cells import Ends
from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.activations.table import ACTIVATIONS, Activation

CELLS = 8192
CORE = 0.05
"""Cells are uniform in asinh(z / CORE): of equal width close to 0, of equal ratio far from it."""
LAST = 1e3
"""Largest |z| of the table."""
OVERLAP = 1 / 64
"""Part of a cell's width by which its constants hold beyond the cell: room for the rounding of the lookup and of z."""


@dataclass(frozen=True, eq=False)
class AnchoredConstants:
    """Constants of neurons at pre-activations z, valid for every offset t. Tensors of one shape, rounded outward.

    secant_low, secant_high: range of (phi(z+t) - phi(z)) / t.
    slope_lipschitz: upper bound of |phi'(z+t) - phi'(z)| / |t|.
    curvature_below, curvature_above (>= 0):
        -curvature_below t^2/2 <= phi(z+t) - phi(z) - phi'(z) t <= curvature_above t^2/2.
    """

    secant_low: Tensor
    secant_high: Tensor
    slope_lipschitz: Tensor
    curvature_below: Tensor
    curvature_above: Tensor


class AnchoredTable:
    """The anchored constants of one activation, on the CPU; see `anchored_table`. ValueError where phi' jumps."""

    def __init__(self, activation: Activation) -> None:
        curvature = activation.curvature_range
        if curvature is None:
            raise ValueError(f"{activation.title} has no curvature to tabulate")
        last = math.asinh(LAST / CORE)
        self._scale = CELLS / (2 * last)
        edges = CORE * torch.sinh(torch.linspace(-last, last, CELLS + 1, dtype=torch.float64))
        widths = edges[1:] - edges[:-1]
        middle, half = 0.5 * (edges[1:] + edges[:-1]), (0.5 + 2 * OVERLAP) * widths
        self._precision = float(widths.min()) * OVERLAP
        secants, slope_secants, coefficients = _constants(activation, middle, half)
        columns = (
            *secants,
            torch.maximum(slope_secants[0].abs(), slope_secants[1].abs()),
            (-coefficients[0]).clamp(min=0.0),
            coefficients[1].clamp(min=0.0),
        )
        anywhere = (*activation.slope_range, activation.curvature_sup, max(0.0, -curvature[0]), max(0.0, curvature[1]))
        self._columns = [
            torch.cat([column, column.new_tensor([whole])]) for column, whole in zip(columns, anywhere, strict=True)
        ]

    def __call__(self, z: Tensor, error: Tensor) -> AnchoredConstants:
        """Constants of neurons whose exact pre-activations lie within `error` of z (any shape, float64).

        Beyond the table, and where `error` is not small against a cell, those of the real line.
        """
        cell = (torch.asinh(z / CORE) * self._scale + CELLS // 2).floor()
        tabulated = (cell >= 0) & (cell < CELLS) & (error <= self._precision)
        index = torch.where(tabulated, cell, torch.full_like(cell, CELLS)).long()
        return AnchoredConstants(*(column.to(z.device)[index] for column in self._columns))


def anchored_table(activation: Activation) -> AnchoredTable:
    """The activation's table, built once per process for each name and parameters."""
    return _built(activation.name, tuple(activation.parameters.items()))


@lru_cache(maxsize=256)
def _built(name: str, parameters: tuple[tuple[str, float | None], ...]) -> AnchoredTable:
    return AnchoredTable(ACTIVATIONS[name](**dict(parameters)))


def _constants(activation: Activation, middle: Tensor, half: Tensor) -> tuple[Ends, Ends, Ends]:
    """Secants of phi and phi', and quadratic coefficients, that hold for every z within `half` of `middle`."""
    infinity = torch.full_like(middle, math.inf)
    h, h3 = activation.curvature_sup, activation.third_sup
    jumps = activation.curvature is None or any(point.jump for point in activation.curvature.critical_points)
    if jumps or h3 is None:
        cell = ActivationOnInterval(activation, middle, half, -infinity, infinity)
        return cell.secants(), cell.slope_secants(), cell.quadratic_coefficients()
    at_middle = ActivationOnInterval(activation, middle, 0.0, -infinity, infinity)
    slopes, curvatures = activation.slope_range, activation.curvature_range or (-math.inf, math.inf)
    return (
        _widened(at_middle.secants(), half * (0.51 * h), slopes),
        _widened(at_middle.slope_secants(), half * (0.51 * h3), curvatures),
        _widened(at_middle.quadratic_coefficients(), half * (0.67 * h3), curvatures),
    )


def _widened(ends: Ends, by: Tensor, bounds: tuple[float, float]) -> Ends:
    """The ends moved outward, within `bounds`. `by` is 0.5 % or more too large, which covers the rounding here."""
    return (ends[0] - by).clamp(*bounds), (ends[1] + by).clamp(*bounds)
