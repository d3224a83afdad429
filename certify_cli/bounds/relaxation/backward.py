"""Linear relaxation on a ball, substituted backward: CROWN with the remainder identity (theory section 7).

The remainder identity (theory section 4) holds for slopes chosen row by row: with any slopes s, q(t) = phi(z+t) -
phi(z) - s t, and v, g the row's adjoints and gradient in the network linearised with them,

    <row, D> = <g, d> + sum over nonlinear nodes of <v, q> .

Where an entry of v is positive the slope is that of a line below phi, and q is at least its constant; where it is
negative, that of a line above. So <row, D> is at least -||g|| e less the constants. The lines come from the range of
the pre-activation on the same ball. Any slope will do: its constant is the proved extreme of q on the range
(`ActivationOnInterval.remainders`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from certify_cli.bounds.on_ball.affine_loss import AffineLoss
from certify_cli.bounds.on_ball.interval_ranges import Ranges, span
from certify_cli.bounds.on_ball.max_pooling import MaxPoolRelaxation, offset_loss
from certify_cli.network.activations import Activation
from certify_cli.network.activations.grid_estimates import Grid
from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network, Shape
from certify_cli.network.pooling import GroupMap
from certify_cli.network.propagate import (
    NodeVjp,
    Vectors,
    nonlinear_nodes,
    pre_activation,
    vjp,
)
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, up, vector_norm_up
from certify_cli.numerics.trees import Batched

TIGHT = 1e-9
"""A line that misses no more than this part of the rise over the range counts as touching."""


class Relaxation(NodeVjp, Protocol):
    """One nonlinear node between lines; `back` takes for every row the lines that bound it from below."""

    def loss(self, vectors: Vectors) -> Tensor:
        """Upper bounds (batch, rows) of -<v, q>, for the vectors v that arrive at the node's output."""


@dataclass(frozen=True, eq=False)
class LinearRelaxation(Batched):
    """An activation: below[0] t - below[1] <= phi(z+t) - phi(z) <= above[0] t + above[1] on its range.

    Slopes (batch, *shape) and constants (batch, size) >= 0. `far` (batch,): at least ||q|| for either line.
    """

    below: tuple[Tensor, Tensor]
    above: tuple[Tensor, Tensor]
    far: Tensor

    @classmethod
    def of(cls, here: ActivationOnInterval, shape: Shape) -> LinearRelaxation:
        """On a span (batch, size) of a node of the given shape."""
        slopes = supporting_slopes(here)
        reach = torch.maximum(-here.lo, here.hi)
        steepest = torch.maximum(slopes[0].abs(), slopes[1].abs())
        far = vector_norm_up(up((here.activation.lipschitz + steepest) * reach, 3))
        (least, _), (_, most) = (here.remainders(slope) for slope in slopes)
        below, above = (slope.reshape(-1, *shape) for slope in slopes)
        return cls((below, -least), (above, most), far)

    def back(self, vectors: Vectors) -> Vectors:
        return chosen(vectors, self.below[0], self.above[0])

    @property
    def shape(self) -> Shape:
        """Of the node."""
        return tuple(self.below[0].shape[1:])

    @property
    def slopes(self) -> Tensor:
        """(sides, batch, size): below, above."""
        return torch.stack([self.below[0], self.above[0]]).flatten(2)

    def loss(self, vectors: Vectors) -> Tensor:
        return offset_loss(vectors, self.below[1], self.above[1], self.far)


def chosen(vectors: Vectors, below: Tensor, above: Tensor) -> Vectors:
    """Entry by entry v below where v >= 0, else v above: v (below + above) / 2 + |v| (below - above) / 2.

    below, above (batch, *shape of the node): slopes, the same for all rows.
    """
    below, above = below.unsqueeze(1), above.unsqueeze(1)
    value = torch.addcmul(vectors.value * (0.5 * (below + above)), vectors.magnitudes, 0.5 * (below - above))
    largest = torch.maximum(below.abs(), above.abs()).flatten(1).amax(1, keepdim=True)
    return Vectors(value, up(largest * (vectors.error + 8 * UNIT * vectors.size), 4) + UNDERFLOW)


def supporting_slopes(here: ActivationOnInterval) -> tuple[Tensor, Tensor]:
    """Slopes (batch, size) of a line below and one above phi, each as near to phi as can be in the middle of its range.

    That leaves the least area between line and range. The tangent there where it does not cross phi, else the chord
    where it does not, else what a grid says.
    """
    grid, phi = Grid.of(here), here.activation
    middle = (0.5 * (here.lo + here.hi)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    tangent = phi.slope(here.z + middle)
    rise = phi.value(here.z + middle) - phi.value(here.z)
    (first, last), (start, end) = grid.ends, grid.end_increments
    chord = ((end - start) / (last - first)).nan_to_num(nan=0.0)
    close = TIGHT * (grid.increments.amax(0) - grid.increments.amin(0))
    close = close + 16 * UNIT * (phi.value(here.z).abs() + phi.lipschitz * here.z.abs())  # the rises' own rounding
    slopes = []
    for side in (1.0, -1.0):
        sign = torch.full_like(tangent, side)
        touches = (side * (grid.increments - rise - tangent * (grid.offsets - middle))).amin(0) >= -close
        at_ends = torch.minimum(side * (start - chord * first), side * (end - chord * last))
        crosses = -grid.line_offset(sign, chord) < at_ends - close
        slope = torch.where(touches, tangent, chord)
        rest = crosses & ~touches
        if bool(rest.any()):
            slope = torch.where(rest, grid.supporting_line(middle, sign)[0], slope)
        slopes.append(torch.where(slope.isfinite(), slope, phi.slope(here.z)))
    return slopes[0], slopes[1]


def relax(point: EvaluatedPoints, layer: int, ranges: Ranges) -> Relaxation:
    """Nonlinear node `layer` between lines on the ranges of its pre-activation."""
    node, target = point.network.nodes[layer], pre_activation(point.network, layer)
    if isinstance(node.op, Activation):
        return LinearRelaxation.of(span(point, layer, ranges), node.shape)
    if isinstance(node.op, GroupMap):
        z, error = point.evaluation.values[target], point.evaluation.errors[target]
        shape = point.network.nodes[target].shape
        return MaxPoolRelaxation.of(node.op, shape, z, error, ranges.low[target], ranges.high[target])
    raise TypeError(f"no linear relaxation of {node.op.title}")


def falls(
    network: Network, between: Mapping[int, Relaxation], cotangents: Tensor, start: int | None = None
) -> AffineLoss:
    """How much <row, value of node `start`> falls on the balls on which `between` holds, (batch, rows).

    cotangents (batch or 1, rows, *shape of the node, the logits unless given).
    """
    adjoints = vjp(network, cotangents, between, start)
    rate = up(adjoints[0].size + adjoints[0].error, 2)
    return AffineLoss.of(
        rate, [relaxation.loss(adjoints[layer]) for layer, relaxation in between.items() if layer in adjoints]
    )


def lines(point: EvaluatedPoints, ranges: Ranges) -> dict[int, Relaxation]:
    """Every nonlinear node between lines on the given ranges."""
    return {layer: relax(point, layer, ranges) for layer in nonlinear_nodes(point.network)}
