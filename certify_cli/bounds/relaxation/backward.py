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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from certify_cli.bounds.on_ball.affine_loss import AffineLoss
from certify_cli.bounds.on_ball.interval_ranges import Ranges, activation_on_range, change_norms
from certify_cli.bounds.on_ball.max_pooling import MaxPoolRelaxation, offset_loss
from certify_cli.network.activations import Activation
from certify_cli.network.activations.grid_estimates import Grid
from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.affine import AffineOp
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network, Shape
from certify_cli.network.linear_forms import Forms
from certify_cli.network.pooling import GroupMap
from certify_cli.network.propagate import nonlinear_nodes, pre_activation
from certify_cli.network.walk import Backward, backward
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, gamma, times, up
from certify_cli.numerics.trees import Batched

TIGHT = 1e-9
"""A line that crosses phi by at most this part of phi's variation over the range counts as a supporting line."""


class Relaxation(Protocol):
    """A nonlinear node bounded by lines from below and above, of which each entry of a row selects one by its sign."""

    def back(self, forms: Forms) -> Forms:
        """Forms at the node's output times the slopes of the lines, as computed."""

    def rounding(self, size: Tensor) -> Tensor:
        """Upper bounds (batch, rows) of the Euclidean rounding errors of `back`; size: norms of the forms, up."""

    def loss(self, forms: Forms) -> Tensor:
        """Upper bounds (batch, rows) of -<v, q>; forms: v, the adjoints at the node's output."""


@dataclass(frozen=True, eq=False)
class LinearRelaxation(Batched):
    """A linear relaxation of an activation: a line below and one above it on its range.

    below, above: (slopes, constants), slopes (batch, *shape), constants (batch, size) >= 0, rounded up:
        below[0] t - below[1] <= phi(z+t) - phi(z) <= above[0] t + above[1].
    """

    below: tuple[Tensor, Tensor]
    above: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, on: ActivationOnInterval, shape: Shape) -> LinearRelaxation:
        """On the range of a node's pre-activation, (batch, size); shape: of the node."""
        flattest, steepest = on.slopes()
        curved = ~(flattest == steepest)  # where phi is a straight line, that line is both bounds
        slopes, constants = (flattest.clone(), flattest.clone()), (torch.zeros_like(on.z), torch.zeros_like(on.z))
        part = on.at(curved)
        found = [slope.unsqueeze(0) for slope in supporting_slopes(part)]
        lower, upper = part.remainders_of_lines(*found)
        for side, constant in enumerate((-lower, upper)):
            slopes[side][curved], constants[side][curved] = found[side][0], constant[0]
        below, above = (slope.reshape(-1, *shape) for slope in slopes)
        return cls((below, constants[0]), (above, constants[1]))

    def back(self, forms: Forms) -> Forms:
        return select_by_sign(forms, self.below[0], self.above[0])

    def rounding(self, size: Tensor) -> Tensor:
        return selection_rounding(size, self.slopes)

    @property
    def shape(self) -> Shape:
        """The shape of the node."""
        return tuple(self.below[0].shape[1:])

    @property
    def slopes(self) -> Tensor:
        """(2, batch, size): of the lines below, and above."""
        return torch.stack([self.below[0], self.above[0]]).flatten(2)

    def loss(self, forms: Forms) -> Tensor:
        below, above = (constant.reshape(-1, *self.shape) for _, constant in (self.below, self.above))
        return offset_loss(forms, below, above)


def select_by_sign(forms: Forms, below: Tensor, above: Tensor) -> Forms:
    """Forms v times slopes selected by sign: v below where v >= 0, v above elsewhere.

    below, above: slopes (batch, *shape of the node), the same for all rows.

    Computed as v (below + above) / 2 + |v| (below - above) / 2.
    """
    even, odd = forms.entries(0.5 * (below + above)), forms.entries(0.5 * (below - above))
    return forms.at(torch.addcmul(forms.values * even, forms.magnitudes, odd))


def selection_rounding(size: Tensor, slopes: Tensor) -> Tensor:
    """Upper bounds (batch, rows) of the rounding errors of `select_by_sign`; slopes: (2, batch, size)."""
    return up(8 * UNIT * slopes.abs().amax((0, 2)).unsqueeze(1) * size, 4) + UNDERFLOW


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
    deviations = [torch.addcmul(grid.increments, grid.offsets, line, value=-1) for line in (tangent, chord)]
    touched, at_first, at_last = increment - tangent * middle, start - chord * first, end - chord * last
    slopes = []
    for side, lowest, lower in ((1.0, torch.amin, torch.minimum), (-1.0, torch.amax, torch.maximum)):
        touches = side * (lowest(deviations[0], 0) - touched) >= -close
        crosses = side * (lowest(deviations[1], 0) - lower(at_first, at_last)) < -close
        slope, neither = torch.where(touches, tangent, chord), crosses & ~touches
        slope[neither] = grid.at(neither).supporting_line(middle[neither], torch.full_like(middle[neither], side))[0]
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


def pulled_back(
    network: Network,
    relaxations: Mapping[int, Relaxation],
    forms: Forms,
    start: int,
    arrived: Callable[[int, Forms], None],
    rounded: Callable[[int, Tensor], None],
) -> Forms | None:
    """Forms in node `start` as computed forms in the input; None where the node does not depend on it.

    arrived: called with every nonlinear node and the forms at its output.
    rounded: called with a node whenever forms in its value were rounded, and upper bounds (batch or 1, rows) of the
        Euclidean norm of what was rounded away.
    """

    def affine(index: int, op: AffineOp, value: Forms, shape: Shape) -> Forms:
        if op.terms:
            longest = times(up(value.count**0.5), op.row_norm(shape))  # >= the Frobenius norm of the rows of W in use
            rounded(network.nodes[index].inputs[0], up(gamma(op.terms) * longest * value.size, 2) + UNDERFLOW)
        return value.back(op, shape)

    def nonlinear(index: int, value: Forms) -> Forms:
        arrived(index, value)
        rounded(pre_activation(network, index), relaxations[index].rounding(value.size))
        return relaxations[index].back(value)

    def merge(index: int, total: Forms, value: Forms) -> Forms:
        merged = total.plus(value)
        rounded(index, up(UNIT * merged.size, 2))
        return merged

    rules = Backward(affine, lambda op, value, shapes: value.split(op, shapes), nonlinear, merge)
    return backward(network, start, forms, rules)


@dataclass(frozen=True, eq=False)
class RelaxedNetwork:
    """A network on balls around samples, its nonlinear nodes relaxed.

    relaxations: of the first nonlinear nodes, or of all.
    changes: by node, of the first nodes, (batch,): upper bounds of the norm of its change; of the input, the radius.
    """

    network: Network
    relaxations: Mapping[int, Relaxation]
    changes: Mapping[int, Tensor]

    @property
    def radius(self) -> Tensor:
        return self.changes[0]

    @property
    def lines(self) -> dict[int, LinearRelaxation]:
        """The relaxations of activations."""
        return {k: line for k, line in self.relaxations.items() if isinstance(line, LinearRelaxation)}

    def loss(self, forms: Forms, start: int | None = None) -> AffineLoss:
        """Upper bounds (batch, rows) of the drop of forms in the value of node `start` on the balls.

        start: the logits by default; all nodes before it must be relaxed.

        Computed forms are any forms: after each step they are taken as exact, and what was rounded away is paid for at
        once, by its norm times that of the node's change on the ball. So errors are added, and not multiplied, through
        the layers (theory section 16).
        """
        losses: list[Tensor] = []

        def arrived(index: int, value: Forms) -> None:
            losses.append(self.relaxations[index].loss(value))

        def rounded(index: int, size: Tensor) -> None:
            losses.append(up(size * self.changes[index].unsqueeze(1), 1))

        last = len(self.network.nodes) - 1 if start is None else start
        at_input = pulled_back(self.network, self.relaxations, forms, last, arrived, rounded)
        rate = torch.zeros_like(self.radius).unsqueeze(1)
        if at_input is not None:
            rate = at_input.size + rate
        return AffineLoss.of(rate, [loss + torch.zeros_like(rate) for loss in losses])


def relax_all(point: EvaluatedPoints, ranges: Ranges) -> RelaxedNetwork:
    """Linear relaxations of every nonlinear node on the given ranges."""
    network = point.network
    relaxations = {layer: relax(point, layer, ranges) for layer in nonlinear_nodes(network)}
    return RelaxedNetwork(network, relaxations, change_norms(network, ranges, len(network.nodes), {}))
