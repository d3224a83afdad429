"""Curvature local to the ball around a sample: the remainder identity's Jacobian tier (theory section 4).

    f(x+d) = f + <g,d> + sum over nonlinear l of <v_l, q_l(D_l)> ,    q_l(t) = phi(z_l+t) - phi(z_l) - s_l t       (1)
    D_l    = A_l d + sum over earlier k of B_lk q_k(D_k)                                                           (2)

Both hold for any slopes s, one a neuron, if A, B, g and the adjoints v_l are those of the network linearised with them;
(1) and (2) may have slopes of their own. In (2) a neuron has its tangent, or its chord where the range is wide: `ball`
bounds D_l by it, layer by layer. `lower_bound` bounds (1) from below by giving every neuron a quadratic minorant on its
range,

    v q(t) >= -|v| c - w t^2 / 2      with any slope s, any w >= 0, and c the least that makes it true,            (3)

and what is quadratic in D by a trust-region problem in d. So slopes and weights of (1) are free: they are chosen where
the sum is best (`bounds.remainder.optimise`), for each sample and rival. Tangents with c = 0 are theory's "quadratic
remainders", lines with w = 0 are linear relaxations; (3) contains both, neuron by neuron.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.jacobians import Jacobians, pulled_rows
from certify_cli.bounds.linear_maps.row_sparsity import Supports
from certify_cli.bounds.on_ball.interval_ranges import Ranges, Samples
from certify_cli.bounds.remainder.trust_region import Quadratic, trust_region_loss
from certify_cli.bounds.remainder.weighted_squares import Swing, together
from certify_cli.network.activations import Activation
from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.activations.quadratic_minorants import minorant_offsets
from certify_cli.network.propagate import Slope, Slopes, Vectors, head, nonlinear_nodes, pull, readers
from certify_cli.numerics.batched import vector_times_matrix
from certify_cli.numerics.choose import either
from certify_cli.numerics.rounding import UNDERFLOW, difference_down, positive_up, up, vector_norm_up

MIXED = 0.2
"""An interval or a line takes the place of a quadratic where it leaves less than this part of it."""
LEAST_WEIGHT = 1e-150
"""A smaller one is none: what is next to nothing makes the smallest numbers there are, which are slow."""
LARGEST_BEND = 1e9
"""Weights of more than this times |v| bend no function: the neuron's adjoint is as good as zero."""


class Linearised(Samples, Protocol):
    """Samples with the slopes phi'(z_l) there."""

    @property
    def slopes(self) -> Slopes: ...


@dataclass(frozen=True, eq=False)
class Frame:
    """What (2) is linearised at, and what follows from it whatever the ball.

    `slopes` of every nonlinear node that a pre-activation follows, `chorded` (batch, size) where it is no tangent, the
    Jacobians with these slopes, the squares of their Gram matrices by head (batch or 1, size, size), the supports of
    the inner Jacobians' rows, and for them the squared products of A_l and A_k (see `Supports.products`).
    """

    slopes: Mapping[int, Slope]
    chorded: Mapping[int, Tensor]
    jacobians: Jacobians
    squared: Mapping[int, Tensor]
    supports: Mapping[tuple[int, int], Supports]
    crossed: Mapping[tuple[int, int], tuple[Tensor, ...]]

    def at(self, index: Tensor) -> Frame:
        """Of the samples at `index`."""
        return Frame(
            {k: Slope(s.value[index]) for k, s in self.slopes.items()},  # type: ignore[index]
            {k: c[index] for k, c in self.chorded.items()},
            self.jacobians.at(index),
            {k: s if len(s) == 1 else s[index] for k, s in self.squared.items()},
            self.supports,
            {k: tuple(p if len(p) == 1 else p[index] for p in parts) for k, parts in self.crossed.items()},
        )


@dataclass(frozen=True, eq=False)
class Ball:
    """What (2) says of a ball: `ranges` of D_l, and `rest[head]` (batch, size), at least |D_l - A_l d| for all d there.

    A_l is the computed Jacobian: its error times the ball's radius is part of `rest`.
    """

    frame: Frame
    ranges: Ranges
    rest: Mapping[int, Tensor]

    @property
    def jacobians(self) -> Jacobians:
        return self.frame.jacobians

    @property
    def radius(self) -> Tensor:
        return self.ranges.radius

    def at(self, index: Tensor) -> Ball:
        """Of the samples at `index`."""
        if len(index) == len(self.radius) and bool((index == torch.arange(len(index), device=index.device)).all()):
            return self
        r = self.ranges

        def part(table: Mapping[int, Tensor]) -> dict[int, Tensor]:
            return {k: t[index] for k, t in table.items()}

        ranges = Ranges(r.radius[index], part(r.low), part(r.high), part(r.norm))
        return Ball(self.frame.at(index), ranges, part(self.rest))


def span(point: Samples, layer: int, ranges: Ranges) -> ActivationOnInterval:
    """Nonlinear node `layer` on its range, (batch, size)."""
    op, target = point.network.nodes[layer].op, head(point.network, layer)
    assert isinstance(op, Activation)
    z, error = point.evaluation.values[target].flatten(1), point.evaluation.errors[target].flatten(1)
    return ActivationOnInterval(op, z, error, ranges.low[target], ranges.high[target])


@dataclass(frozen=True, eq=False)
class _Remainder:
    """q_k on its range, for the slopes s_k chosen: k t^2 / 2 with k in [bottom, top], plus something in [least, most].

    (batch, size) each. `beyond` (batch, size) is the rest of D_k and `squared` the square of its Gram matrix.
    """

    bottom: Tensor
    top: Tensor
    least: Tensor
    most: Tensor
    half_square: Tensor
    beyond: Tensor
    squared: Tensor

    @property
    def norm(self) -> Tensor:
        """At least ||q_k||, (batch,)."""
        curved = up(torch.maximum(-self.bottom, self.top) * self.half_square)
        return vector_norm_up(up(curved + torch.maximum(-self.least, self.most)))


def ball(point: Linearised, start: Ranges, frame: Frame | None = None, like: Frame | None = None) -> Ball:
    """The ball of `start`, whose ranges it never widens: layer by layer, as each needs only earlier ones.

    In a `frame` made for another ball of the same samples, or in one of its own: there a neuron's slope is phi'(z),
    with the quadratic remainder of theory section 4, or, where that would be much larger than what the chord leaves (a
    wide range, saturated ends), the chord's, with an interval. `like` is another frame of the network's, from which the
    Gram matrices are taken that no slope changes.
    """
    network, radius = point.network, start.radius
    low, high, rest = dict(start.low), dict(start.high), {}
    outer: dict[int, Vectors] = {}
    inner: dict[tuple[int, int], Vectors] = {}
    slopes: dict[int, Slope] = {}
    chorded: dict[int, Tensor] = {}
    squared: dict[int, Tensor] = {}
    supports: dict[tuple[int, int], Supports] = {}
    crossed: dict[tuple[int, int], tuple[Tensor, ...]] = {}
    known: dict[int, _Remainder] = {}
    last = nonlinear_nodes(network)[-1]
    for target in sorted({head(network, k) for k in nonlinear_nodes(network)}):
        if frame is None:
            rows = pulled_rows(network, target, slopes)
            outer[target] = rows.pop(0)
        else:
            outer[target] = frame.jacobians.outer[target]
            rows = {k: b for (t, k), b in frame.jacobians.inner.items() if t == target}
        inner.update({(target, k): b for k, b in rows.items()})
        swings = []
        for source, block in rows.items():
            pair = target, source
            supports[pair] = Supports.of(block.value) if frame is None else frame.supports[pair]
            if frame is None:
                crossed[pair] = supports[pair].products(outer[target], outer[head(network, source)])
            else:
                crossed[pair] = frame.crossed[pair]
            swings.append(_sums(block, known[source], supports[pair], crossed[pair]))
        size = up(outer[target].size + outer[target].error, 2)
        rise, fall = (together(size, radius, side) for side in ([s[0] for s in swings], [s[1] for s in swings]))
        apart = [torch.maximum(*(side.alone(radius) for side in sides)) for sides in swings]
        flaw = radius.unsqueeze(1) * outer[target].error
        rest[target] = up(torch.stack([*apart, flaw]).sum(0), len(apart) + 4) + UNDERFLOW
        norm = start.norm[target].unsqueeze(1)
        low[target] = torch.fmax(torch.fmax(low[target], -fall), -norm)
        high[target] = torch.fmin(torch.fmin(high[target], rise), norm)
        here = Ranges(radius, low, high, start.norm)
        for layer in (k for k in readers(network, target) if k < last):
            if target not in squared:
                same = frame if frame is not None or slopes else like
                own = outer[target]
                squared[target] = own.squared_products(own) if same is None else same.squared[target]
            on = span(point, layer, here)
            if frame is None:
                slopes[layer], chorded[layer] = _chosen(point, layer, on)
            else:
                slopes[layer], chorded[layer] = frame.slopes[layer], frame.chorded[layer]
            known[layer] = _remainder(point, layer, on, slopes[layer], chorded[layer], rest[target], squared[target])
    if frame is None:
        frame = Frame(slopes, chorded, Jacobians(outer, inner), squared, supports, crossed)
    return Ball(frame, Ranges(radius, low, high, start.norm), rest)


def _chosen(point: Linearised, layer: int, here: ActivationOnInterval) -> tuple[Slope, Tensor]:
    """A slope for every neuron, and where (batch, size) it is the chord's."""
    tangent = point.slopes[layer].value.flatten(1)  # type: ignore[union-attr]
    bottom, top = here.quadratic_coefficients()
    chord, least, most = chords(here, tangent)
    half_square = 0.5 * torch.maximum(-here.lo, here.hi).square()
    flat = torch.maximum(-least, most) < MIXED * torch.maximum(-bottom, top) * half_square
    slope = torch.where(flat, chord, tangent)
    return Slope(slope.reshape(-1, *point.network.nodes[layer].shape)), flat


def _remainder(
    point: Linearised,
    layer: int,
    here: ActivationOnInterval,
    slope: Slope,
    flat: Tensor,
    beyond: Tensor,
    squared: Tensor,
) -> _Remainder:
    """Tangents leave quadratics, and what their own error makes of the offset; `flat` neurons leave an interval."""
    error = point.slopes[layer].error.flatten(1)  # type: ignore[union-attr]
    reach = torch.maximum(-here.lo, here.hi)
    linear = up(error * reach)  # the computed slope is not phi'(z)
    bottom, top, least, most = torch.zeros_like(reach), torch.zeros_like(reach), -linear, linear
    if bool(flat.any()):
        least[flat], most[flat] = here.at(flat).remainders(slope.value.flatten(1)[flat])  # type: ignore[union-attr]
    if not bool(flat.all()):
        low, high = here.at(~flat).quadratic_coefficients()
        bottom[~flat], top[~flat] = low.clamp(max=0.0), high.clamp(min=0.0)
    return _Remainder(bottom, top, least, most, up(0.5 * reach.square(), 2), beyond, squared)


def chords(here: ActivationOnInterval, otherwise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes of the chords over the spans, and the range of what they leave; slope `otherwise` on an empty span."""
    phi = here.activation.value
    slope = (phi(here.z + here.hi) - phi(here.z + here.lo)) / (here.hi - here.lo)
    slope = torch.where(slope.isfinite(), slope, otherwise)
    return slope, *here.remainders(slope)


def _sums(block: Vectors, q: _Remainder, supports: Supports, crossed: tuple[Tensor, ...]) -> tuple[Swing, Swing]:
    """Of sum_j B_ij q_j over the ball, and of its negative; crossed: squared products of A_i and A_j."""
    terms = block.value.shape[2] + 6
    slack = up(block.error * q.norm.unsqueeze(1)) + UNDERFLOW
    positive, negative = block.value.clamp(min=0.0), (-block.value).clamp(min=0.0)

    def swing(plus: Tensor, minus: Tensor) -> Swing:
        u = plus * q.top.unsqueeze(1) + minus * (-q.bottom).unsqueeze(1)
        return Swing(
            largest=up((up(supports.forms(u, q.squared), 2 * terms) + UNDERFLOW).sqrt(), 2),
            along=up(supports.sums(u, crossed), terms) + UNDERFLOW,
            rest=up(vector_times_matrix(positive_up(q.beyond.square()), u.mT), terms) + UNDERFLOW,
            whole=up(vector_times_matrix(q.half_square, u.mT), terms),
            flat=up(up(vector_times_matrix(q.most, plus.mT) + vector_times_matrix(-q.least, minus.mT), terms) + slack),
        )

    return swing(positive, negative), swing(negative, positive)


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

    def put(self, index: Tensor, part: Choice) -> Choice:
        """With the items at `index` replaced."""
        return Choice(
            {k: s.index_copy(0, index, part.slopes[k]) for k, s in self.slopes.items()},
            {k: w.index_copy(0, index, part.weights[k]) for k, w in self.weights.items()},
            self.mu.index_copy(0, index, part.mu),
            self.tau.index_copy(0, index, part.tau),
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


def lower_bound(point: Samples, ball: Ball, margin: Tensor, cotangents: Tensor, choice: Choice) -> Tensor:
    """Lower bounds (batch,) of the margins' least values on the ball; -inf where nothing can be said.

    margin (batch,): lower bounds of the margins at the samples. cotangents (batch, classes): the margins' directions.
    """
    network, ranges, jacobians = point.network, ball.ranges, ball.jacobians
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
        bend = (weight / v.abs()).nan_to_num(nan=0.0).clamp(min=0.0, max=LARGEST_BEND)
        bend = torch.where(bend * v.abs() > LEAST_WEIGHT, bend, torch.zeros_like(bend))
        depth = minorant_offsets(here, either(v < 0, -1.0, 1.0), slope, bend)
        reach = torch.maximum(-here.lo, here.hi)
        far = vector_norm_up(up((here.activation.lipschitz + slope.abs()) * reach, 3))
        loss = up(loss + up((v.abs() * depth).sum(1), v.shape[1] + 1) + error * far, 4) + UNDERFLOW
        target = head(network, layer)
        weights[target] = positive_up(weights[target] + bend * v.abs(), 2)
    gradient, flaw = pulled[0].value[:, 0].flatten(1), pulled[0].error[:, 0]
    quadratic = Quadratic(
        jacobians.rows,
        torch.cat([weights[t] for t in jacobians.heads], dim=1),
        torch.cat([ball.rest[t] for t in jacobians.heads], dim=1),
    )
    bent = trust_region_loss(quadratic, gradient, flaw, ranges.radius, choice.mu, choice.tau)
    total = up(loss + bent, 2)
    return torch.where(total.isfinite() & margin.isfinite(), difference_down(margin, total), -torch.inf)
