"""Linear relaxation over the ball: every nonlinear node between two lines, substituted backward (theory section 7).

The remainder identity (theory section 4) holds for slopes chosen row by row: with any slopes s, q(t) = phi(z+t) -
phi(z) - s t, and v, g the row's adjoints and gradient in the network linearised with them,

    <row, D> = <g, d> + sum over nonlinear nodes of <v, q> .

Where an entry of v is positive the slope is that of a line below phi, and q >= its constant; where it is negative, that
of a line above. So <row, D> falls by at most ||g|| e plus the constants. Lines below and above come from the range of
the pre-activation on the same ball: any slope will do, its constant being the proved extreme of q (`Span.remainders`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from certify_cli.bounds.ranges import Ranges, Samples
from certify_cli.network.activations import Activation
from certify_cli.network.graph import Network, Shape
from certify_cli.network.grids import Grid
from certify_cli.network.linearised import (
    Passage,
    Slope,
    Vectors,
    head,
    heads,
    is_nonlinear,
    nonlinear_nodes,
    pull,
    scaled,
)
from certify_cli.network.pooling import MaxPool
from certify_cli.network.spans import Span
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, gamma, up, vector_norm_up

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
        slopes = supporting(here)
        reach = torch.maximum(-here.lo, here.hi)
        steepest = torch.maximum(slopes[0].abs(), slopes[1].abs())
        far = vector_norm_up(up((here.activation.lipschitz + steepest) * reach, 3))
        (least, _), (_, most) = (here.remainders(slope) for slope in slopes)
        below, above = (slope.reshape(-1, *shape) for slope in slopes)
        return cls((below, -least), (above, most), far)

    def back(self, vectors: Vectors) -> Vectors:
        below, above = self.below[0].unsqueeze(1), self.above[0].unsqueeze(1)
        return scaled(vectors, Slope(torch.where(vectors.value < 0, above, below)))

    def loss(self, vectors: Vectors) -> Tensor:
        v = vectors.value.flatten(2)
        return _loss(v, self.below[1].unsqueeze(1), self.above[1].unsqueeze(1), vectors.error, self.far)


def _loss(v: Tensor, below: Tensor, above: Tensor, error: Tensor, far: Tensor) -> Tensor:
    """sum |v| constant, and what the vectors' own error adds; inf for NaN (0 times an infinite constant)."""
    apart = torch.where(v < 0, -v * above, v * below).sum(2)
    return (up(apart, v.shape[2] + 1) + up(error * far.unsqueeze(1)) + UNDERFLOW).nan_to_num(nan=torch.inf)


def supporting(here: Span) -> tuple[Tensor, Tensor]:
    """Slopes (batch, size) of a line below and of one above phi, each as near to phi(z) at t = 0 as its range allows.

    The tangent at the sample where it does not cross phi, else the chord where it does not, else what a grid says.
    """
    grid, phi = Grid.of(here), here.activation
    tangent = phi.slope(here.z)
    (first, last), (fall, rise) = grid.ends, grid.end_rises
    chord = ((rise - fall) / (last - first)).nan_to_num(nan=0.0)
    slopes = []
    for side in (1.0, -1.0):
        sign = torch.full_like(tangent, side)
        close = TIGHT * (grid.rises.amax(0) - grid.rises.amin(0))
        touches = grid.depth(sign, tangent) <= close
        at_ends = torch.minimum(side * (fall - chord * first), side * (rise - chord * last))
        crosses = -grid.depth(sign, chord) < at_ends - close
        slope = torch.where(touches, tangent, chord)
        rest = crosses & ~touches
        if bool(rest.any()):
            slope = torch.where(rest, grid.envelope(torch.zeros_like(sign), sign)[0], slope)
        slopes.append(torch.where(slope.isfinite(), slope, tangent))
    return slopes[0], slopes[1]


@dataclass(frozen=True, eq=False)
class Windows:
    """Max pooling: below it the sample's winner, above it a weighted mean of the window.

    members (windows, most): pixels of a channel, see `MaxPool.members`. winner (batch, channels, windows): a place in
    them. weights (batch, channels, windows, members) of the line above; its constant and that of the line below are
    (batch, channels * windows). For x in a box [l, u], any weights in [0, 1],

        max_j x_j <= sum_i lam_i x_i + max_j ( (1 - lam_j) u_j + lam_j l_j ) - sum_i lam_i l_i ,

    as x_j - sum lam_i x_i is largest at u_j and the other l_i.
    """

    shape: Shape
    gain: float
    members: Tensor
    winner: Tensor
    weights: Tensor
    below: Tensor
    above: Tensor
    far: Tensor

    @classmethod
    def of(cls, op: MaxPool, shape: Shape, z: Tensor, error: Tensor, low: Tensor, high: Tensor) -> Windows:
        """Pre-activations z (batch, *shape) within `error` of the exact ones, whose offsets are in [low, high]."""
        members = op.members(shape).to(z.device)
        padding = members < 0

        def gathered(t: Tensor, pad: float) -> Tensor:
            flat = t.reshape(len(t), shape[0], -1)[:, :, members.clamp(min=0)]
            return flat.masked_fill(padding, pad)

        values, off = gathered(z, -torch.inf), gathered(error, 0.0)
        lo, hi = gathered(low, 0.0), gathered(high, 0.0)
        off = up(off + 4 * UNIT * (values.abs().nan_to_num(posinf=0.0) + off - lo + hi), 4)  # the sums below as well
        best, winner = values.max(3)
        top, bottom = values + hi, values + lo
        level = bottom.amax(3, keepdim=True)
        if top.shape[3] > 2:  # two members at most are above the level
            level = torch.maximum(level, top.topk(3, dim=3).values[..., 2:])
        weights = ((top - level) / (top - bottom)).nan_to_num(nan=1.0).clamp(min=0.0, max=1.0)
        weights = torch.where(top > level, weights, torch.zeros_like(weights))
        own = torch.nn.functional.one_hot(winner, values.shape[3]).bool()
        alone = (top.masked_fill(own, -torch.inf).amax(3) <= bottom.gather(3, winner.unsqueeze(3))[..., 0]).unsqueeze(3)
        weights = torch.where(alone, own.to(weights.dtype), weights)
        slack = 4 * off.amax(3)
        peak = (values + ((1 - weights) * hi + weights * lo)).amax(3) - best
        above = peak - (weights * lo).sum(3)
        slack = slack + 4 * (values.shape[3] + 4) * UNIT * (weights * -lo).sum(3)
        reach = torch.maximum(-lo, hi).sum(3)
        far = vector_norm_up(up(2 * reach, values.shape[3] + 1).flatten(1))
        below, above = up(slack, 4).flatten(1), up(above.clamp(min=0.0) + slack, 4).flatten(1)
        return cls(shape, op.gain(shape), members, winner, weights, below, above, far)

    def back(self, vectors: Vectors) -> Vectors:
        batch, (channels, *space) = len(self.winner), self.shape
        v = vectors.value.flatten(3)  # (batch or 1, rows, channels, windows)
        rows, most = v.shape[1], self.members.shape[1]
        own = torch.nn.functional.one_hot(self.winner, most).to(v.dtype)
        passed = v.unsqueeze(4) * torch.where(v.unsqueeze(4) < 0, self.weights.unsqueeze(1), own.unsqueeze(1))
        image = v.new_zeros(batch, rows, channels, torch.Size(space).numel() + 1)  # the last one takes the padding
        place = self.members.reshape(-1) % image.shape[3]
        image.index_add_(3, place, passed.flatten(3))
        image = image[..., :-1].reshape(batch, rows, *self.shape)
        # weights of a window add up to at most `most`, those on a pixel to the windows that hold it, gain^2
        norm, terms = up(self.gain * most**0.5, 2), int(self.gain**2) + 3
        return Vectors(image, up(norm * (vectors.error + gamma(terms) * vectors.size), 4) + UNDERFLOW)

    def loss(self, vectors: Vectors) -> Tensor:
        v = vectors.value.flatten(2)
        return _loss(v, self.below.unsqueeze(1), self.above.unsqueeze(1), vectors.error, self.far)


def relaxed(point: Samples, layer: int, ranges: Ranges) -> Relaxation:
    """Nonlinear node `layer` between lines on the ranges of its pre-activation."""
    node, target = point.network.nodes[layer], head(point.network, layer)
    z, error = point.evaluation.values[target], point.evaluation.errors[target]
    low, high = ranges.low[target], ranges.high[target]
    if isinstance(node.op, Activation):
        return Lines.of(Span(node.op, z.flatten(1), error.flatten(1), low, high), node.shape)
    if isinstance(node.op, MaxPool):
        shape = point.network.nodes[target].shape
        return Windows.of(node.op, shape, z, error, low.reshape(z.shape), high.reshape(z.shape))
    raise TypeError(f"no linear relaxation of {node.op.title}")


def losses(
    point: Samples, between: Mapping[int, Relaxation], radius: Tensor, cotangents: Tensor, start: int | None = None
) -> Tensor:
    """Upper bounds (batch, rows) of how much <row, value of node `start`> falls on the balls of `radius` (batch,).

    cotangents (batch or 1, rows, *shape of the node, the logits unless given).
    """
    pulled = pull(point.network, cotangents, between, start)
    reach = up(pulled[0].size + pulled[0].error, 2) * radius.unsqueeze(1)
    parts = [relaxation.loss(pulled[layer]) for layer, relaxation in between.items() if layer in pulled]
    total = reach if not parts else reach + torch.stack(parts).sum(0)
    return up(total, len(parts) + 2).nan_to_num(nan=torch.inf)


def lines(point: Samples, ranges: Ranges) -> dict[int, Relaxation]:
    """Every nonlinear node between lines on the given ranges."""
    return {layer: relaxed(point, layer, ranges) for layer in nonlinear_nodes(point.network)}


def relaxed_ranges(point: Samples, known: Ranges, memory: int) -> tuple[Ranges, dict[int, Relaxation]]:
    """Ranges on the balls of `known`, never wider, and every nonlinear node between lines on them.

    Head by head, as each needs the earlier ones only. A head that no nonlinear node precedes is known already.
    """
    network = point.network
    low, high = dict(known.low), dict(known.high)
    between: dict[int, Relaxation] = {}
    for target in heads(network)[:-1]:
        if reaches(network, target):
            fall, rise = swings(point, between, known.radius, target, memory)
            low[target], high[target] = torch.fmax(low[target], -fall), torch.fmin(high[target], rise)
        here = Ranges(known.radius, low, high, known.norm)
        for layer in (k for k in nonlinear_nodes(network) if head(network, k) == target):
            between[layer] = relaxed(point, layer, here)
    return Ranges(known.radius, low, high, known.norm), between


def swings(
    point: Samples, between: Mapping[int, Relaxation], radius: Tensor, target: int, memory: int
) -> tuple[Tensor, Tensor]:
    """How far every entry of node `target` can fall, and rise, on the balls: (batch, size) each."""
    node = point.network.nodes[target]
    widest = max(n.size for n in point.network.nodes[: target + 1])
    rows = max(1, memory // (64 * len(radius) * widest))
    found = []
    for units in torch.eye(node.size, dtype=radius.dtype, device=radius.device).split(rows):
        both = torch.cat([units, -units]).reshape(1, -1, *node.shape)
        found.append(losses(point, between, radius, both, target).reshape(len(radius), 2, -1))
    fall, rise = torch.cat(found, dim=2).unbind(1)
    return fall, rise


def reaches(network: Network, target: int) -> bool:
    """Whether a nonlinear node precedes node `target`."""
    return any(is_nonlinear(network.nodes[i]) or reaches(network, i) for i in network.nodes[target].inputs)
