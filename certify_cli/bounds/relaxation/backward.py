"""Linear relaxation on a ball, substituted backward: CROWN with the remainder identity (theory section 7).

The remainder identity (theory section 4) holds for slopes chosen row by row: with any slopes s, q(t) = phi(z+t) -
phi(z) - s t, and v, g the row's adjoints and gradient in the network linearised with them,

    <row, D> = <g, d> + sum over nonlinear nodes of <v, q> .

Where an entry of v is positive, s is the slope of a line below phi; where it is negative, of a line above. The
constant of the line bounds v q from below, so <row, D> is at least -||g|| e less the sum of |v| times these constants.
The lines hold on the range of the pre-activation on the same ball. Every slope gives a valid line: its constant is the
proved extreme of q on the range (`ActivationOnInterval.remainders`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from certify_cli.bounds.on_ball.affine_loss import AffineLoss
from certify_cli.bounds.on_ball.interval_ranges import Ranges, activation_on_range
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
"""A line that crosses phi by at most this part of phi's variation over the range counts as a supporting line."""


class Relaxation(NodeVjp, Protocol):
    """A nonlinear node bounded by lines from below and above; `back` selects, row by row, those that bound the row."""

    def loss(self, vectors: Vectors) -> Tensor:
        """Upper bounds (batch, rows) of -<v, q>; vectors: v, the adjoints at the node's output."""


@dataclass(frozen=True, eq=False)
class LinearRelaxation(Batched):
    """A linear relaxation of an activation: a line below and one above it on its range.

    below, above: (slopes, constants), slopes (batch, *shape), constants (batch, size) >= 0, rounded up:
        below[0] t - below[1] <= phi(z+t) - phi(z) <= above[0] t + above[1].
    q_norm: (batch,), upper bounds of ||q|| for either line.
    """

    below: tuple[Tensor, Tensor]
    above: tuple[Tensor, Tensor]
    q_norm: Tensor

    @classmethod
    def of(cls, on: ActivationOnInterval, shape: Shape) -> LinearRelaxation:
        """On the range of a node's pre-activation, (batch, size); shape: of the node."""
        slopes = supporting_slopes(on)
        magnitude = torch.maximum(-on.lo, on.hi)
        steepest = torch.maximum(slopes[0].abs(), slopes[1].abs())
        q_norm = vector_norm_up(up((on.activation.lipschitz + steepest) * magnitude, 3))
        (lower, _), (_, upper) = (on.remainders(slope) for slope in slopes)
        below, above = (slope.reshape(-1, *shape) for slope in slopes)
        return cls((below, -lower), (above, upper), q_norm)

    def back(self, vectors: Vectors) -> Vectors:
        return select_by_sign(vectors, self.below[0], self.above[0])

    @property
    def shape(self) -> Shape:
        """The shape of the node."""
        return tuple(self.below[0].shape[1:])

    @property
    def slopes(self) -> Tensor:
        """(2, batch, size): of the lines below, and above."""
        return torch.stack([self.below[0], self.above[0]]).flatten(2)

    def loss(self, vectors: Vectors) -> Tensor:
        return offset_loss(vectors, self.below[1], self.above[1], self.q_norm)


def select_by_sign(vectors: Vectors, below: Tensor, above: Tensor) -> Vectors:
    """Vectors v times slopes selected by sign: v below where v >= 0, v above elsewhere.

    below, above: slopes (batch, *shape of the node), the same for all rows.

    Computed as v (below + above) / 2 + |v| (below - above) / 2.
    """
    below, above = below.unsqueeze(1), above.unsqueeze(1)
    value = torch.addcmul(vectors.value * (0.5 * (below + above)), vectors.magnitudes, 0.5 * (below - above))
    largest = torch.maximum(below.abs(), above.abs()).flatten(1).amax(1, keepdim=True)
    return Vectors(value, up(largest * (vectors.error + 8 * UNIT * vectors.size), 4) + UNDERFLOW)


def supporting_slopes(on: ActivationOnInterval) -> tuple[Tensor, Tensor]:
    """Slopes (batch, size) of a line below and one above phi, each as close to phi as possible in the range's middle.

    Such a line leaves the smallest area between itself and phi. The slope is that of the tangent in the middle if this
    does not cross phi, else of the chord if this does not, else of the best line on a grid. None of these is proved:
    the constants are (`LinearRelaxation.of`).
    """
    grid, phi = Grid.of(on), on.activation
    middle = (0.5 * (on.lo + on.hi)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    tangent = phi.slope(on.z + middle)
    increment = phi.value(on.z + middle) - phi.value(on.z)
    (first, last), (start, end) = grid.ends, grid.end_increments
    chord = ((end - start) / (last - first)).nan_to_num(nan=0.0)
    close = TIGHT * (grid.increments.amax(0) - grid.increments.amin(0))
    close = close + 16 * UNIT * (phi.value(on.z).abs() + phi.lipschitz * on.z.abs())  # the increments' own rounding
    slopes = []
    for side in (1.0, -1.0):
        sign = torch.full_like(tangent, side)
        touches = (side * (grid.increments - increment - tangent * (grid.offsets - middle))).amin(0) >= -close
        at_ends = torch.minimum(side * (start - chord * first), side * (end - chord * last))
        crosses = -grid.line_offset(sign, chord) < at_ends - close
        slope = torch.where(touches, tangent, chord)
        neither = crosses & ~touches
        if bool(neither.any()):
            slope = torch.where(neither, grid.supporting_line(middle, sign)[0], slope)
        slopes.append(torch.where(slope.isfinite(), slope, phi.slope(on.z)))
    return slopes[0], slopes[1]


def relax(point: EvaluatedPoints, layer: int, ranges: Ranges) -> Relaxation:
    """The linear relaxation of nonlinear node `layer` on the ranges of its pre-activation."""
    node, target = point.network.nodes[layer], pre_activation(point.network, layer)
    if isinstance(node.op, Activation):
        return LinearRelaxation.of(activation_on_range(point, layer, ranges), node.shape)
    if isinstance(node.op, GroupMap):
        z, error = point.evaluation.values[target], point.evaluation.errors[target]
        shape = point.network.nodes[target].shape
        return MaxPoolRelaxation.of(node.op, shape, z, error, ranges.low[target], ranges.high[target])
    raise TypeError(f"no linear relaxation of {node.op.title}")


def relaxation_loss(
    network: Network, relaxations: Mapping[int, Relaxation], cotangents: Tensor, start: int | None = None
) -> AffineLoss:
    """Upper bounds (batch, rows) of the drop of <row, value of node `start`> on the balls on which `relaxations` hold.

    relaxations: of every nonlinear node before `start`.
    cotangents: the rows, (batch or 1, rows, *shape of the node).
    start: the node, the logits by default.
    """
    adjoints = vjp(network, cotangents, relaxations, start)
    rate = up(adjoints[0].size + adjoints[0].error, 2)
    return AffineLoss.of(
        rate, [relaxation.loss(adjoints[layer]) for layer, relaxation in relaxations.items() if layer in adjoints]
    )


def relax_all(point: EvaluatedPoints, ranges: Ranges) -> dict[int, Relaxation]:
    """Linear relaxations of every nonlinear node on the given ranges."""
    return {layer: relax(point, layer, ranges) for layer in nonlinear_nodes(point.network)}
