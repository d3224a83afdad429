"""Linear relaxation over the ball: every nonlinear node between two lines, substituted backward (theory section 7).

The remainder identity (theory section 4) holds for slopes chosen row by row: with any slopes s, q(t) = phi(z+t) -
phi(z) - s t, and v, g the row's adjoints and gradient in the network linearised with them,

    <row, D> = <g, d> + sum over nonlinear nodes of <v, q> .

Where an entry of v is positive the slope is that of a line below phi, and q >= its constant; where it is negative, that
of a line above. So <row, D> falls by at most ||g|| e plus the constants. Lines below and above come from the range of
the pre-activation on the same ball: any slope will do, its constant being the proved extreme of q (`Span.remainders`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from certify_cli.bounds.falls import Fall
from certify_cli.bounds.local import span
from certify_cli.bounds.planes import Planes, spent
from certify_cli.bounds.ranges import Ranges, Samples
from certify_cli.network.activations import Activation
from certify_cli.network.graph import Network, Shape
from certify_cli.network.grids import Grid
from certify_cli.network.linearised import (
    Passage,
    Vectors,
    head,
    heads,
    is_nonlinear,
    nonlinear_nodes,
    pull,
    readers,
    rows_cost,
)
from certify_cli.network.pooling import GroupMap
from certify_cli.network.spans import Span
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, up, vector_norm_up

CACHE = 2**25
"""Bytes of what is treated at once: rows are many, and every pass over them is short."""
TIGHT = 1e-9
"""A line that misses no more than this part of the rise over the range counts as touching."""


class Relaxation(Passage, Protocol):
    """One nonlinear node between lines; `back` takes for every row the lines that bound it from below."""

    def loss(self, vectors: Vectors) -> Tensor:
        """Upper bounds (batch, rows) of -<v, q>, for the vectors v that arrive at the node's output."""


@dataclass(frozen=True, eq=False)
class Lines:
    """An activation: below[0] t - below[1] <= phi(z+t) - phi(z) <= above[0] t + above[1] on its range.

    Slopes (batch, *shape) and constants (batch, size) >= 0. `far` (batch,): at least ||q|| for either line.
    """

    below: tuple[Tensor, Tensor]
    above: tuple[Tensor, Tensor]
    far: Tensor

    @classmethod
    def of(cls, here: Span, shape: Shape) -> Lines:
        """On a span (batch, size) of a node of the given shape."""
        return cls.sloped(here, shape, *supporting(here))

    @classmethod
    def sloped(cls, here: Span, shape: Shape, *slopes: Tensor) -> Lines:
        """With these slopes (batch, size) below and above, and the constants that they need."""
        reach = torch.maximum(-here.lo, here.hi)
        steepest = torch.maximum(slopes[0].abs(), slopes[1].abs())
        far = vector_norm_up(up((here.activation.lipschitz + steepest) * reach, 3))
        (least, _), (_, most) = (here.remainders(slope) for slope in slopes)
        below, above = (slope.reshape(-1, *shape) for slope in slopes)
        return cls((below, -least), (above, most), far)

    def at(self, index: Tensor) -> Lines:
        """Of the samples at `index`."""
        below, above = (tuple(part[index] for part in pair) for pair in (self.below, self.above))
        return Lines((below[0], below[1]), (above[0], above[1]), self.far[index])

    def back(self, vectors: Vectors) -> Vectors:
        """Entry by entry v below where v >= 0, else v above: v (below + above) / 2 + |v| (below - above) / 2."""
        below, above = self.below[0].unsqueeze(1), self.above[0].unsqueeze(1)
        value = torch.addcmul(vectors.value * (0.5 * (below + above)), vectors.magnitudes, 0.5 * (below - above))
        largest = torch.maximum(below.abs(), above.abs()).flatten(1).amax(1, keepdim=True)
        return Vectors(value, up(largest * (vectors.error + 8 * UNIT * vectors.size), 4) + UNDERFLOW)

    def loss(self, vectors: Vectors) -> Tensor:
        return spent(vectors, self.below[1], self.above[1], self.far)


def supporting(here: Span) -> tuple[Tensor, Tensor]:
    """Slopes (batch, size) of a line below and one above phi, each as near to phi as can be in the middle of its range.

    That leaves the least area between line and range. The tangent there where it does not cross phi, else the chord
    where it does not, else what a grid says.
    """
    grid, phi = Grid.of(here), here.activation
    middle = (0.5 * (here.lo + here.hi)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    tangent = phi.slope(here.z + middle)
    rise = phi.value(here.z + middle) - phi.value(here.z)
    (first, last), (start, end) = grid.ends, grid.end_rises
    chord = ((end - start) / (last - first)).nan_to_num(nan=0.0)
    close = TIGHT * (grid.rises.amax(0) - grid.rises.amin(0))
    close = close + 16 * UNIT * (phi.value(here.z).abs() + phi.lipschitz * here.z.abs())  # the rises' own rounding
    slopes = []
    for side in (1.0, -1.0):
        sign = torch.full_like(tangent, side)
        touches = (side * (grid.rises - rise - tangent * (grid.places - middle))).amin(0) >= -close
        at_ends = torch.minimum(side * (start - chord * first), side * (end - chord * last))
        crosses = -grid.depth(sign, chord) < at_ends - close
        slope = torch.where(touches, tangent, chord)
        rest = crosses & ~touches
        if bool(rest.any()):
            slope = torch.where(rest, grid.envelope(middle, sign)[0], slope)
        slopes.append(torch.where(slope.isfinite(), slope, phi.slope(here.z)))
    return slopes[0], slopes[1]


def relaxed(point: Samples, layer: int, ranges: Ranges) -> Relaxation:
    """Nonlinear node `layer` between lines on the ranges of its pre-activation."""
    node, target = point.network.nodes[layer], head(point.network, layer)
    if isinstance(node.op, Activation):
        return Lines.of(span(point, layer, ranges), node.shape)
    if isinstance(node.op, GroupMap):
        z, error = point.evaluation.values[target], point.evaluation.errors[target]
        shape = point.network.nodes[target].shape
        return Planes.of(node.op, shape, z, error, ranges.low[target], ranges.high[target])
    raise TypeError(f"no linear relaxation of {node.op.title}")


def falls(point: Samples, between: Mapping[int, Relaxation], cotangents: Tensor, start: int | None = None) -> Fall:
    """How much <row, value of node `start`> falls on the balls on which `between` holds, (batch, rows).

    cotangents (batch or 1, rows, *shape of the node, the logits unless given).
    """
    pulled = pull(point.network, cotangents, between, start)
    rate = up(pulled[0].size + pulled[0].error, 2)
    return Fall.of(rate, [relaxation.loss(pulled[layer]) for layer, relaxation in between.items() if layer in pulled])


def lines(point: Samples, ranges: Ranges) -> dict[int, Relaxation]:
    """Every nonlinear node between lines on the given ranges."""
    return {layer: relaxed(point, layer, ranges) for layer in nonlinear_nodes(point.network)}


def relaxed_ranges(
    point: Samples, known: Ranges, memory: int, budget: float = math.inf
) -> tuple[Ranges, dict[int, Relaxation]]:
    """Ranges on the balls of `known`, never wider, and every nonlinear node between lines on them.

    Head by head, as each needs the earlier ones only. A head that no nonlinear node precedes is known already, and one
    that takes more than `budget` operations a sample stays as it is. memory: bytes that a part of the rows may take.
    """
    network = point.network
    low, high = dict(known.low), dict(known.high)
    between: dict[int, Relaxation] = {}
    for target in heads(network)[:-1]:
        here = Ranges(known.radius, low, high, known.norm)
        if reaches(network, target) and range_cost(network, target) <= budget:
            asked = torch.stack([bends(point, k, here) for k in readers(network, target)]).any(0)
            rows = asked.any(0).nonzero()[:, 0]
            if len(rows):
                fall, rise = falls_and_rises(point, between, known.radius, target, rows, memory)
                # what nobody asked for stays as it is, whatever the other samples of the batch ask for
                fall, rise = (torch.where(asked[:, rows], t, torch.inf) for t in (fall, rise))
                low[target] = low[target].index_copy(1, rows, torch.fmax(low[target][:, rows], -fall))
                high[target] = high[target].index_copy(1, rows, torch.fmin(high[target][:, rows], rise))
        here = Ranges(known.radius, low, high, known.norm)
        between |= {k: relaxed(point, k, here) for k in readers(network, target)}
    return Ranges(known.radius, low, high, known.norm), between


def range_cost(network: Network, target: int) -> float:
    """About the floating-point operations that the ranges of a head take, a sample and ball."""
    return 2 * rows_cost(network, target)


def ball_cost(network: Network) -> float:
    """The same of all heads that `relaxed_ranges` treats."""
    return sum(range_cost(network, target) for target in heads(network)[:-1] if reaches(network, target))


def bends(point: Samples, layer: int, ranges: Ranges) -> Tensor:
    """Which pre-activations' ranges matter, (batch, size): not those on which the activation is a straight line."""
    node, target = point.network.nodes[layer], head(point.network, layer)
    if not isinstance(node.op, Activation):
        return torch.ones_like(ranges.low[target], dtype=torch.bool)
    least, most = span(point, layer, ranges).slopes()
    return ~(most - least <= UNDERFLOW)


def falls_and_rises(
    point: Samples, between: Mapping[int, Relaxation], radius: Tensor, target: int, rows: Tensor, memory: int
) -> tuple[Tensor, Tensor]:
    """How far the entries `rows` (count,) of node `target` can fall, and rise, on the balls: (batch, count) each."""
    node = point.network.nodes[target]
    widest = max(n.size for n in point.network.nodes[: target + 1])
    chunk = max(1, min(memory, CACHE) // (64 * len(radius) * widest))
    found = []
    for part in rows.split(chunk):
        units = torch.nn.functional.one_hot(part, node.size).to(radius.dtype)
        both = torch.cat([units, -units]).reshape(1, -1, *node.shape)
        found.append(falls(point, between, both, target).on(radius).reshape(len(radius), 2, -1))
    fall, rise = torch.cat(found, dim=2).unbind(1)
    return fall, rise


def reaches(network: Network, target: int) -> bool:
    """Whether a nonlinear node precedes node `target`."""
    return any(is_nonlinear(network.nodes[i]) or reaches(network, i) for i in network.nodes[target].inputs)
