"""Bounds of every pre-activation's change on a ball around the sample: the Jacobian tier of theory section 4.

    D_l = z_l(x+d) - z_l(x) = A_l d + sum over earlier nonlinear k of B_lk q_k(D_k)                                (2)

holds for any slopes s, one per neuron, with A_l and B_lk of the network linearised with them, q_k(t) = phi(z_k+t) -
phi(z_k) - s_k t. The slope is the tangent's, or the chord's where the range is wide; `expand_on_ball` bounds D_l layer
by layer. `margin_bound` builds on these bounds, with other slopes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.jacobians import SQUARED_ENTRIES, Jacobians, Rows, jacobian_rows
from certify_cli.bounds.linear_maps.row_matrices import Matrix
from certify_cli.bounds.linear_maps.row_products import (
    InexactRows,
    few_squared_products,
    forms,
    squared_products_at,
    squares_for,
)
from certify_cli.bounds.on_ball.interval_ranges import Ranges, activation_on_range
from certify_cli.bounds.remainder.weighted_squares import RemainderSum, joint
from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.propagate import Slope, consumers, nonlinear_nodes, pre_activation
from certify_cli.numerics.rounding import UNDERFLOW, positive_up, up, vector_norm_up
from certify_cli.numerics.trees import Batched

MIXED = 0.2
"""A neuron's remainder is bounded by an interval, not a quadratic, where the interval is below this part of it."""


@dataclass(frozen=True, eq=False)
class Linearisation(Batched, shared=("products",)):
    """The slopes of (2), and all that depends on them but not on the ball.

    slopes: of every nonlinear node that a pre-activation follows.
    chorded: by the same nodes, (batch, size): where the slope is the chord's, not the tangent's.
    jacobians: A_l and B_lk with these slopes.
    products: by (pre-activation, nonlinear node), what B_lk's weighted sums of squares are bounded with.
    """

    slopes: Mapping[int, Slope]
    chorded: Mapping[int, Tensor]
    jacobians: Jacobians
    products: Mapping[tuple[int, int], SourceProducts]


@dataclass(frozen=True, eq=False)
class SourceProducts(Batched, shared=("squared", "crossed")):
    """Squared products of the rows of A_l and A_k, as B_lk needs them (`row_products`).

    squared: of the rows of A_k with each other, as `forms` takes them.
    crossed: of those of A_l and A_k, shaped as the values of B_lk.
    """

    squared: Matrix | Tensor
    crossed: Tensor

    @classmethod
    def of(
        cls, block: InexactRows, after: InexactRows, before: InexactRows, known: Matrix | None = None
    ) -> SourceProducts:
        """block: B_lk.   after, before: A_l and A_k.   known: all squared products of their rows, if they are few."""
        return cls(squares_for(block.matrix, before), squared_products_at(block.matrix, after, before, known))


@dataclass(frozen=True, eq=False)
class BallExpansion(Batched):
    """The expansion (2) on a ball: D_l as A_l d plus a bounded residual.

    ranges: of D_l.
    residual: by pre-activation, (batch, size): upper bounds of |D_l - A_l d| for all d of the ball. A_l is the computed
        Jacobian; its error times the radius is part of the residual.
    """

    linearisation: Linearisation
    ranges: Ranges
    residual: Mapping[int, Tensor]

    @property
    def jacobians(self) -> Jacobians:
        return self.linearisation.jacobians

    @property
    def radius(self) -> Tensor:
        return self.ranges.radius

    def at(self, index: Tensor) -> BallExpansion:
        """The samples at `index`; the object itself for all samples in order, which is the most frequent case."""
        if len(index) == len(self.radius) and bool((index == torch.arange(len(index), device=index.device)).all()):
            return self
        return super().at(index)


@dataclass(frozen=True, eq=False)
class RemainderRange:
    """Bounds of q_k(t) for t in the range of D_k: c t^2 / 2 with c in [bottom, top], plus a number in [lower, upper].

    bottom, top, lower, upper: (batch, size); bottom, lower <= 0 <= top, upper.
    half_square: (batch, size), t^2 / 2 at its largest, up.
    residual: (batch, size), upper bounds of |D_k - A_k d|.
    """

    bottom: Tensor
    top: Tensor
    lower: Tensor
    upper: Tensor
    half_square: Tensor
    residual: Tensor

    @property
    def norm(self) -> Tensor:
        """Upper bounds (batch,) of ||q_k||."""
        curved = up(torch.maximum(-self.bottom, self.top) * self.half_square)
        return vector_norm_up(up(curved + torch.maximum(-self.lower, self.upper)))


def expand_on_ball(
    point: EvaluatedPoints, start: Ranges, given: Linearisation | None = None, like: Linearisation | None = None
) -> BallExpansion:
    """The expansion on the balls of `start`, with ranges that are never wider.

    given: a linearisation made for other balls of the same samples. By default one is made for these balls.
    like: another linearisation of the same samples, to take from what does not depend on slopes.

    In a new linearisation a neuron's slope is phi'(z), with the quadratic remainder of theory section 4, or the
    chord's, with an interval, where the quadratic would be much larger (a wide range, saturated ends). Pre-activations
    are treated in topological order, as each needs the earlier remainders.
    """
    network, radius = point.network, start.radius
    low, high, residual = dict(start.low), dict(start.high), {}
    parts = _Parts(like) if given is None else _Parts.of(given)
    remainders: dict[int, RemainderRange] = {}
    last = nonlinear_nodes(network)[-1]
    for target in sorted({pre_activation(network, k) for k in nonlinear_nodes(network)}):
        if target not in parts.outer:
            parts.pull(network, target)
        linear = parts.outer[target]
        sums = [
            remainder_sums(block, remainders[source], parts.products[target, source])
            for (to, source), block in parts.inner.items()
            if to == target
        ]
        upper, lower = (joint(linear.length, radius, side) for side in ([s[0] for s in sums], [s[1] for s in sums]))
        separate = [torch.maximum(*(side.separate(radius) for side in sides)) for sides in sums]
        error_term = radius.unsqueeze(1) * linear.error
        residual[target] = up(torch.stack([*separate, error_term]).sum(0), len(separate) + 4) + UNDERFLOW
        norm = start.norm[target].unsqueeze(1)
        low[target] = torch.fmax(torch.fmax(low[target], -lower), -norm)
        high[target] = torch.fmin(torch.fmin(high[target], upper), norm)
        ranges = Ranges(radius, low, high, start.norm)
        for layer in (k for k in consumers(network, target) if k < last):
            on = activation_on_range(point, layer, ranges)
            if layer not in parts.slopes:
                parts.slopes[layer], parts.chorded[layer] = chosen_slopes(point, layer, on)
            slope, chorded = parts.slopes[layer], parts.chorded[layer]
            remainders[layer] = range_of_remainder(point, layer, on, slope, chorded, residual[target])
    return BallExpansion(given or parts.linearisation(), Ranges(radius, low, high, start.norm), residual)


@dataclass(frozen=True, eq=False)
class _Parts:
    """A linearisation as it grows, node by node; its fields.   like: see `expand_on_ball`.

    squared: squared products of the rows of two pre-activations, where all of them are computed.
    """

    like: Linearisation | None = None
    slopes: dict[int, Slope] = field(default_factory=dict)
    chorded: dict[int, Tensor] = field(default_factory=dict)
    outer: dict[int, InexactRows] = field(default_factory=dict)
    inner: dict[tuple[int, int], InexactRows] = field(default_factory=dict)
    products: dict[tuple[int, int], SourceProducts] = field(default_factory=dict)
    squared: dict[tuple[int, int], Matrix] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Linearisation) -> _Parts:
        """All parts of a finished one."""
        return cls(
            slopes=dict(given.slopes),
            chorded=dict(given.chorded),
            outer=dict(given.jacobians.outer),
            inner=dict(given.jacobians.inner),
            products=dict(given.products),
        )

    def pull(self, network: Network, target: int) -> None:
        """Add the Jacobians of one pre-activation node, and the products of their rows."""
        if self.like is not None and all(to != target for to, _ in self.like.jacobians.inner):
            self.outer[target] = self.like.jacobians.outer[target]  # it depends on no slope
            return
        rows = jacobian_rows(network, target, self.slopes)
        self.outer[target] = rows.pop(0)
        for source, block in rows.items():
            pair, origin = (target, source), pre_activation(network, source)
            after, before = self.outer[target], self.outer[origin]
            if (target, origin) not in self.squared:
                found = few_squared_products(after, before, SQUARED_ENTRIES)
                if found is not None:
                    self.squared[target, origin] = found
            self.inner[pair] = block
            self.products[pair] = SourceProducts.of(block, after, before, self.squared.get((target, origin)))
            self.squared[origin, origin] = before.squares

    def linearisation(self) -> Linearisation:
        place = {target: number for number, target in enumerate(self.outer)}
        known = {(place[one], place[other]): matrix for (one, other), matrix in self.squared.items()}
        jacobians = Jacobians(self.outer, self.inner, Rows.of(tuple(self.outer.values()), known))
        return Linearisation(self.slopes, self.chorded, jacobians, self.products)


def chosen_slopes(point: EvaluatedPoints, layer: int, on: ActivationOnInterval) -> tuple[Slope, Tensor]:
    """A slope for every neuron, and the mask (batch, size) of the neurons where it is the chord's."""
    tangent = point.slopes[layer].value.flatten(1)  # type: ignore[union-attr]
    bottom, top = on.quadratic_coefficients()
    chord, lower, upper = chords(on, tangent)
    half_square = 0.5 * torch.maximum(-on.lo, on.hi).square()
    chorded = torch.maximum(-lower, upper) < MIXED * torch.maximum(-bottom, top) * half_square
    slope = torch.where(chorded, chord, tangent)
    return Slope(slope.reshape(-1, *point.network.nodes[layer].shape)), chorded


def range_of_remainder(
    point: EvaluatedPoints,
    layer: int,
    on: ActivationOnInterval,
    slope: Slope,
    chorded: Tensor,
    residual: Tensor,
) -> RemainderRange:
    """Bounds of a node's remainders: an interval where the slope is the chord's (`chorded`), else a quadratic.

    With the quadratic there is an interval for the error of the computed tangent. residual: see `RemainderRange`.
    """
    error = point.slopes[layer].error.flatten(1)  # type: ignore[union-attr]
    magnitude = torch.maximum(-on.lo, on.hi)
    linear = up(error * magnitude)  # the computed slope is not exactly phi'(z)
    bottom, top, lower, upper = torch.zeros_like(magnitude), torch.zeros_like(magnitude), -linear, linear
    if bool(chorded.any()):
        lower[chorded], upper[chorded] = on.at(chorded).remainders(slope.value.flatten(1)[chorded])  # type: ignore[union-attr]
    if not bool(chorded.all()):
        low, high = on.at(~chorded).quadratic_coefficients()
        bottom[~chorded], top[~chorded] = low.clamp(max=0.0), high.clamp(min=0.0)
    return RemainderRange(bottom, top, lower, upper, up(0.5 * magnitude.square(), 2), residual)


def chords(on: ActivationOnInterval, otherwise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes of the chords over the ranges, and bounds (lower, upper) of their remainders.

    otherwise: the slope where a range is a single point.
    """
    phi = on.activation.value
    slope = (phi(on.z + on.hi) - phi(on.z + on.lo)) / (on.hi - on.lo)
    slope = torch.where(slope.isfinite(), slope, otherwise)
    return slope, *on.remainders(slope)


def remainder_sums(
    block: InexactRows, q: RemainderRange, products: SourceProducts
) -> tuple[RemainderSum, RemainderSum]:
    """Bounds of sum_j B_ij q_j on the ball, and of its negative.   block: B.   q: of the source."""
    matrix, terms = block.matrix, block.matrix.shape[1] + 6
    slack = up(block.error * q.norm.unsqueeze(1)) + UNDERFLOW
    top, bottom = (matrix.at_columns(t) for t in (q.top, -q.bottom))
    residual_square = positive_up(q.residual.square())
    positive, negative = matrix.values.clamp(min=0.0), (-matrix.values).clamp(min=0.0)

    def remainder_sum(plus: Tensor, minus: Tensor) -> RemainderSum:
        u = matrix.put_values(plus * top + minus * bottom)
        above, below = matrix.put_values(plus), matrix.put_values(minus)
        return RemainderSum(
            eigenvalue=up((up(forms(u, products.squared), 2 * terms) + UNDERFLOW).sqrt(), 2),
            row_form=up(u.row_sums(u.values * products.crossed), terms) + UNDERFLOW,
            residual=up(u.times(residual_square), terms) + UNDERFLOW,
            square_sum=up(u.times(q.half_square), terms),
            constant=up(up(above.times(q.upper) + below.times(-q.lower), terms) + slack),
        )

    return remainder_sum(positive, negative), remainder_sum(negative, positive)
