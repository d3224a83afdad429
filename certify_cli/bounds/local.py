"""Curvature local to the ball around a sample: the remainder identity's Jacobian tier (theory section 4).

    f(x+d) = f + <g,d> + sum over nonlinear l of  <v_l, q_l(D_l)> ,    q_l(t) = phi(z_l+t) - phi(z_l) - s_l t        (1)
    D_l    = A_l d + sum over earlier k of  B_lk q0_k(D_k)                                                            (2)

(1) holds for any slopes s, one a neuron, if g and the adjoints v_l are those of the network linearised with them; (2)
with the slopes phi'(z), where q0 is the remainder of the tangent. `Offsets` bounds D_l on the ball by (2), layer by
layer. `lower_bound` bounds (1) from below by giving every neuron a quadratic minorant on its range,

    v q(t) >= -|v| c - w t^2 / 2      with any slope s and any w >= 0, and c the least that makes it true,             (3)

and what is quadratic in D by a trust-region problem in d. So the slopes and weights are free: they are chosen where the
sum is best (`certificates.ascent`), for each sample and rival. Slopes phi'(z) with c = 0 are theory's "quadratic
remainders", chords with w = 0 are linear relaxations; (3) contains both, neuron by neuron.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from certify_cli.bounds.jacobians import Jacobians, Rows
from certify_cli.bounds.ranges import Ranges, Samples
from certify_cli.bounds.trust_region import Quadratic, trust_region_loss
from certify_cli.network.activations import Activation
from certify_cli.network.graph import Network
from certify_cli.network.linearised import Slope, Slopes, head, nonlinear_nodes, pull
from certify_cli.network.minorants import depths
from certify_cli.network.spans import Span
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, down, gamma, up, vector_norm_up

LARGEST_BEND = 1e9
"""Weights of more than this times |v| bend no function: the neuron's adjoint is as good as zero."""


class Linearised(Samples, Protocol):
    """Samples with the slopes phi'(z_l) there."""

    @property
    def slopes(self) -> Slopes: ...


@dataclass(frozen=True, eq=False)
class Offsets:
    """Where D_l can be on the ball: `ranges`, and `rest[head]` (batch, size) with |D_l - A_l d| <= rest for all d there.

    A_l is the computed Jacobian: its error times the ball's radius is part of `rest`.
    """

    ranges: Ranges
    rest: Mapping[int, Tensor]

    def at(self, index: Tensor) -> Offsets:
        """Of the samples at `index`."""
        r = self.ranges

        def part(table: Mapping[int, Tensor]) -> dict[int, Tensor]:
            return {k: t[index] for k, t in table.items()}

        return Offsets(Ranges(r.radius[index], part(r.low), part(r.high), part(r.norm)), part(self.rest))


def span(point: Samples, layer: int, ranges: Ranges) -> Span:
    """Nonlinear node `layer` on its range, (batch, size)."""
    op, target = point.network.nodes[layer].op, head(point.network, layer)
    assert isinstance(op, Activation)
    z, error = point.evaluation.values[target].flatten(1), point.evaluation.errors[target].flatten(1)
    return Span(op, z, error, ranges.low[target], ranges.high[target])


def offsets(point: Samples, jacobians: Jacobians, start: Ranges) -> Offsets:
    """Offsets on the ball of `start`, never wider than it: rows of A_l, and what (2) adds from earlier layers.

    A row's sum of B_ij q0_j(D_j) is at most the least of its sum of extremes and, with kappa the range of 2 q0/t^2,
    u_j = max(0, B_ij kappa_lo, B_ij kappa_hi) and G = A A^T (theory section 4, (a) and (c)),
    1/2 (e (u^T (G o G) u)^(1/4) + ||sqrt(u) o rest||)^2.
    """
    network, radius = point.network, start.radius
    low, high, rest = dict(start.low), dict(start.high), {}
    known: dict[int, tuple[Tensor, ...]] = {}
    for target in jacobians.heads:
        outer = jacobians.outer[target]
        reach = up(radius.unsqueeze(1) * jacobians.row_norms[target])
        above = torch.zeros_like(low[target])
        below = torch.zeros_like(above)
        parts = 2
        for source in (k for k in nonlinear_nodes(network) if (target, k) in jacobians.inner):
            if source not in known:
                known[source] = _remainders(point, jacobians, source, radius, low, high, rest)
            up_, down_ = _sums(jacobians, target, source, radius, known[source], rest)
            above, below, parts = above + up_, below + down_, parts + 1
        above, below = up(above, parts), up(below, parts)
        rest[target] = up(torch.maximum(above, below) + radius.unsqueeze(1) * outer.error, 4) + UNDERFLOW
        low[target] = torch.fmax(low[target], -up(reach + below))
        high[target] = torch.fmin(high[target], up(reach + above))
        norm = start.norm[target].unsqueeze(1)
        low[target], high[target] = torch.fmax(low[target], -norm), torch.fmin(high[target], norm)
    return Offsets(Ranges(radius, low, high, start.norm), rest)


def _remainders(
    point: Samples,
    jacobians: Jacobians,
    layer: int,
    radius: Tensor,
    low: Mapping[int, Tensor],
    high: Mapping[int, Tensor],
    rest: Mapping[int, Tensor],
) -> tuple[Tensor, ...]:
    """Of q0 at one layer: range (two), range of 2 q0/t^2 (two), and a bound (batch,) of its Euclidean norm."""
    target = head(point.network, layer)
    here = span(point, layer, Ranges(radius, {target: low[target]}, {target: high[target]}, {}))
    bottom, top = here.quadratics()
    least, most = half_squares(bottom, top, low[target], high[target])
    return least, most, bottom, top, vector_norm_up(torch.maximum(-least, most))


def half_squares(bottom: Tensor, top: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Range of k t^2 / 2 for k in [bottom, top] and t in [low, high] around 0, outward."""
    square = up(0.5 * torch.maximum(-low, high).square(), 2)
    return -up((-bottom).clamp(min=0.0) * square) - UNDERFLOW, up(top.clamp(min=0.0) * square) + UNDERFLOW


def _sums(
    jacobians: Jacobians, target: int, source: int, radius: Tensor, known: tuple[Tensor, ...], rest: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Upper bounds (batch, size) of sum_j B_ij q0_j and of its negative, over the ball."""
    least, most, bottom, top, norm = known
    block = jacobians.inner[target, source]
    before = head(jacobians.network, source)
    squared, beyond = jacobians.squared_grams[before], rest[before]
    terms = block.value.shape[2] + 6
    positive, negative = block.value.clamp(min=0.0), (-block.value).clamp(min=0.0)
    slack = up(block.error * norm.unsqueeze(1)) + UNDERFLOW

    def by_extremes(plus: Tensor, minus: Tensor) -> Tensor:
        total = _rows_times(plus, most) + _rows_times(minus, -least)
        return up(total, terms)

    def by_squares(plus: Tensor, minus: Tensor) -> Tensor:
        u = plus * top.clamp(min=0.0).unsqueeze(1) + minus * (-bottom).clamp(min=0.0).unsqueeze(1)
        image = u @ squared[0] if len(squared) == 1 else u @ squared
        form = up((image * u).sum(2), 2 * terms).sqrt().sqrt()
        own = _rows_times(u, beyond.square()).sqrt()
        return up(0.5 * (radius.unsqueeze(1) * form + own).square(), terms)

    return (
        up(torch.fmin(by_extremes(positive, negative), by_squares(positive, negative)) + slack, 2),
        up(torch.fmin(by_extremes(negative, positive), by_squares(negative, positive)) + slack, 2),
    )


def _rows_times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """(batch or 1, m, n) and (batch, n) -> (batch, m)."""
    if len(matrix) == 1:
        return vectors @ matrix[0].T
    return (matrix @ vectors.unsqueeze(2)).squeeze(2)


@dataclass(frozen=True, eq=False)
class Choice:
    """What is free in the bound, by nonlinear node: slopes s (batch, size), weights w >= 0 (batch, size); and hints."""

    slopes: Mapping[int, Tensor]
    weights: Mapping[int, Tensor]
    mu: Tensor
    tau: Tensor

    def at(self, index: Tensor) -> Choice:
        """Of the items at `index`."""
        return Choice(
            {k: s[index] for k, s in self.slopes.items()},
            {k: w[index] for k, w in self.weights.items()},
            self.mu[index],
            self.tau[index],
        )

    def where(self, take: Tensor, other: Choice) -> Choice:
        """The other one's items where `take` (batch,) is true."""
        wide = take.unsqueeze(1)
        return Choice(
            {k: torch.where(wide, other.slopes[k], s) for k, s in self.slopes.items()},
            {k: torch.where(wide, other.weights[k], w) for k, w in self.weights.items()},
            torch.where(take, other.mu, self.mu),
            torch.where(take, other.tau, self.tau),
        )


def starts(point: Linearised, offsets: Offsets, cotangents: Tensor) -> list[Choice]:
    """Choices to begin with: the slopes at the samples with theory's quadratic remainders, and chords with none."""
    network = point.network
    radius = offsets.ranges.radius
    none = torch.zeros_like(radius)
    tangents, chords, bends, flat = {}, {}, {}, {}
    pulled = pull(network, cotangents.unsqueeze(1), point.slopes)
    for layer in nonlinear_nodes(network):
        here = span(point, layer, offsets.ranges)
        least, most = here.quadratics()
        v = pulled[layer].value[:, 0].flatten(1)
        tangents[layer] = point.slopes[layer].value.flatten(1)  # type: ignore[union-attr]
        bends[layer] = torch.maximum(-v * least, -v * most).clamp(min=0.0)
        rise = here.activation.value(here.z + here.hi) - here.activation.value(here.z + here.lo)
        chord = rise / (here.hi - here.lo)
        chords[layer] = torch.where(chord.isfinite(), chord, tangents[layer])
        flat[layer] = torch.zeros_like(v)
    return [Choice(tangents, bends, none, none), Choice(chords, flat, none, none)]


def lower_bound(
    point: Samples, jacobians: Jacobians, offsets: Offsets, margin: Tensor, cotangents: Tensor, choice: Choice
) -> Tensor:
    """Lower bounds (batch,) of the margins' least values on the ball; -inf where nothing can be said.

    margin (batch,): lower bounds of the margins at the samples. cotangents (batch, classes): the margins' directions.
    """
    network, ranges = point.network, offsets.ranges
    shaped = {k: Slope(s.reshape(-1, *network.nodes[k].shape)) for k, s in choice.slopes.items()}
    pulled = pull(network, cotangents.unsqueeze(1), shaped)
    loss = torch.zeros_like(margin)
    weights = {target: torch.zeros_like(ranges.low[target]) for target in jacobians.heads}
    for layer in nonlinear_nodes(network):
        if layer not in pulled:
            continue
        here, slope = span(point, layer, ranges), choice.slopes[layer]
        v, error = pulled[layer].value[:, 0].flatten(1), pulled[layer].error[:, 0]
        weight = choice.weights[layer]
        bend = (weight / v.abs()).nan_to_num(nan=0.0).clamp(max=LARGEST_BEND)
        depth = depths(here, torch.where(v < 0, -1.0, 1.0).to(v.dtype), slope, bend)
        reach = torch.maximum(-here.lo, here.hi)
        far = vector_norm_up(up((here.activation.lipschitz + slope.abs()) * reach, 3))
        loss = up(loss + up((v.abs() * depth).sum(1), v.shape[1] + 1) + error * far, 4)
        target = head(network, layer)
        weights[target] = up(weights[target] + up(bend * v.abs()), 1)
    gradient, flaw = pulled[0].value[:, 0].flatten(1), pulled[0].error[:, 0]
    quadratic = Quadratic(
        jacobians.rows,
        torch.cat([weights[t] for t in jacobians.heads], dim=1),
        torch.cat([offsets.rest[t] for t in jacobians.heads], dim=1),
    )
    bent = trust_region_loss(quadratic, gradient, flaw, ranges.radius, choice.mu, choice.tau)
    total = up(loss + bent, 2)
    value = margin - total
    value = value - 2 * UNIT * value.abs() - UNDERFLOW
    return torch.where(total.isfinite() & margin.isfinite(), value, torch.full_like(value, -torch.inf))
