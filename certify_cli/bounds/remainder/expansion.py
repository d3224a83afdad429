"""How a ball around the sample moves every pre-activation: the Jacobian tier of theory section 4.

    D_l = z_l(x+d) - z_l(x) = A_l d + sum over earlier nonlinear k of B_lk q_k(D_k)                                (2)

holds for any slopes s, one a neuron, with A_l and B_lk of the network linearised with them, q_k(t) = phi(z_k+t) -
phi(z_k) - s_k t. A neuron has its tangent, or its chord where the range is wide; `expand_on_ball` bounds D_l layer by
layer. The margin is bounded on top of it, with slopes of its own, in `margin_bound`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.jacobians import Jacobians, pulled_rows
from certify_cli.bounds.linear_maps.row_sparsity import RowSparsity
from certify_cli.bounds.on_ball.interval_ranges import Ranges, span
from certify_cli.bounds.remainder.weighted_squares import RemainderSum, together
from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.propagate import Slope, Vectors, consumers, nonlinear_nodes, pre_activation
from certify_cli.numerics.batched import vector_times_matrix
from certify_cli.numerics.rounding import UNDERFLOW, positive_up, up, vector_norm_up
from certify_cli.numerics.trees import Batched

MIXED = 0.2
"""An interval or a line takes the place of a quadratic where it leaves less than this part of it."""


@dataclass(frozen=True, eq=False)
class Linearisation(Batched, shared=("squared", "crossed"), constant=("sparsity",)):
    """What (2) is linearised at, and what follows from it whatever the ball.

    `slopes` of every nonlinear node that a pre-activation follows, `chorded` (batch, size) where it is no tangent, the
    Jacobians with these slopes, the squares of their Gram matrices by head (batch or 1, size, size), the supports of
    the inner Jacobians' rows, and for them the squared products of A_l and A_k (see `RowSparsity.products`).
    """

    slopes: Mapping[int, Slope]
    chorded: Mapping[int, Tensor]
    jacobians: Jacobians
    squared: Mapping[int, Tensor]
    sparsity: Mapping[tuple[int, int], RowSparsity]
    crossed: Mapping[tuple[int, int], tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class BallExpansion(Batched):
    """The expansion (2) on a ball: A_l d, and how far D_l can be from it.

    ranges: of D_l.   residual: by pre-activation, (batch, size): at least |D_l - A_l d| for all d of the ball. A_l is
    the computed Jacobian; its error times the radius is part of the residual.
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
        """The samples at `index`; itself where these are all of them in order, as most often they are."""
        if len(index) == len(self.radius) and bool((index == torch.arange(len(index), device=index.device)).all()):
            return self
        return super().at(index)


@dataclass(frozen=True, eq=False)
class RemainderRange:
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


def expand_on_ball(
    point: EvaluatedPoints, start: Ranges, given: Linearisation | None = None, like: Linearisation | None = None
) -> BallExpansion:
    """The expansion on the balls of `start`, whose ranges it never widens: layer by layer, as each needs earlier ones.

    given: a linearisation made for other balls of the same samples; without it one is made for these. There a neuron's
    slope is phi'(z), with the quadratic remainder of theory section 4, or, where that would be much larger than the
    remainder of the chord (a wide range, saturated ends), the chord's, with an interval. like: another linearisation of
    the network, from which the Gram matrices are taken that no slope changes.
    """
    network, radius = point.network, start.radius
    low, high, residual = dict(start.low), dict(start.high), {}
    outer: dict[int, Vectors] = {}
    inner: dict[tuple[int, int], Vectors] = {}
    slopes: dict[int, Slope] = {}
    chorded: dict[int, Tensor] = {}
    squared: dict[int, Tensor] = {}
    sparsity: dict[tuple[int, int], RowSparsity] = {}
    crossed: dict[tuple[int, int], tuple[Tensor, ...]] = {}
    known: dict[int, RemainderRange] = {}
    last = nonlinear_nodes(network)[-1]
    for target in sorted({pre_activation(network, k) for k in nonlinear_nodes(network)}):
        if given is None:
            rows = pulled_rows(network, target, slopes)
            outer[target] = rows.pop(0)
        else:
            outer[target] = given.jacobians.outer[target]
            rows = {k: b for (t, k), b in given.jacobians.inner.items() if t == target}
        inner.update({(target, k): b for k, b in rows.items()})
        sums = []
        for source, block in rows.items():
            pair = target, source
            sparsity[pair] = RowSparsity.of(block.value) if given is None else given.sparsity[pair]
            if given is None:
                crossed[pair] = sparsity[pair].products(outer[target], outer[pre_activation(network, source)])
            else:
                crossed[pair] = given.crossed[pair]
            sums.append(remainder_sums(block, known[source], sparsity[pair], crossed[pair]))
        size = up(outer[target].size + outer[target].error, 2)
        rise, fall = (together(size, radius, side) for side in ([s[0] for s in sums], [s[1] for s in sums]))
        apart = [torch.maximum(*(side.alone(radius) for side in sides)) for sides in sums]
        error_term = radius.unsqueeze(1) * outer[target].error
        residual[target] = up(torch.stack([*apart, error_term]).sum(0), len(apart) + 4) + UNDERFLOW
        norm = start.norm[target].unsqueeze(1)
        low[target] = torch.fmax(torch.fmax(low[target], -fall), -norm)
        high[target] = torch.fmin(torch.fmin(high[target], rise), norm)
        here = Ranges(radius, low, high, start.norm)
        for layer in (k for k in consumers(network, target) if k < last):
            if target not in squared:
                same = given if given is not None or slopes else like
                own = outer[target]
                squared[target] = own.squared_products(own) if same is None else same.squared[target]
            on = span(point, layer, here)
            if given is None:
                slopes[layer], chorded[layer] = chosen_slopes(point, layer, on)
            else:
                slopes[layer], chorded[layer] = given.slopes[layer], given.chorded[layer]
            known[layer] = range_of_remainder(
                point, layer, on, slopes[layer], chorded[layer], residual[target], squared[target]
            )
    if given is None:
        given = Linearisation(slopes, chorded, Jacobians.of(outer, inner), squared, sparsity, crossed)
    return BallExpansion(given, Ranges(radius, low, high, start.norm), residual)


def chosen_slopes(point: EvaluatedPoints, layer: int, here: ActivationOnInterval) -> tuple[Slope, Tensor]:
    """A slope for every neuron, and where (batch, size) it is the chord's."""
    tangent = point.slopes[layer].value.flatten(1)  # type: ignore[union-attr]
    bottom, top = here.quadratic_coefficients()
    chord, least, most = chords(here, tangent)
    half_square = 0.5 * torch.maximum(-here.lo, here.hi).square()
    flat = torch.maximum(-least, most) < MIXED * torch.maximum(-bottom, top) * half_square
    slope = torch.where(flat, chord, tangent)
    return Slope(slope.reshape(-1, *point.network.nodes[layer].shape)), flat


def range_of_remainder(
    point: EvaluatedPoints,
    layer: int,
    here: ActivationOnInterval,
    slope: Slope,
    flat: Tensor,
    beyond: Tensor,
    squared: Tensor,
) -> RemainderRange:
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
    return RemainderRange(bottom, top, least, most, up(0.5 * reach.square(), 2), beyond, squared)


def chords(here: ActivationOnInterval, otherwise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes of the chords over the spans, and the range of what they leave; slope `otherwise` on an empty span."""
    phi = here.activation.value
    slope = (phi(here.z + here.hi) - phi(here.z + here.lo)) / (here.hi - here.lo)
    slope = torch.where(slope.isfinite(), slope, otherwise)
    return slope, *here.remainders(slope)


def remainder_sums(
    block: Vectors, q: RemainderRange, sparsity: RowSparsity, crossed: tuple[Tensor, ...]
) -> tuple[RemainderSum, RemainderSum]:
    """Of sum_j B_ij q_j over the ball, and of its negative; crossed: squared products of A_i and A_j."""
    terms = block.value.shape[2] + 6
    slack = up(block.error * q.norm.unsqueeze(1)) + UNDERFLOW
    positive, negative = block.value.clamp(min=0.0), (-block.value).clamp(min=0.0)

    def swing(plus: Tensor, minus: Tensor) -> RemainderSum:
        u = plus * q.top.unsqueeze(1) + minus * (-q.bottom).unsqueeze(1)
        return RemainderSum(
            largest=up((up(sparsity.forms(u, q.squared), 2 * terms) + UNDERFLOW).sqrt(), 2),
            along=up(sparsity.sums(u, crossed), terms) + UNDERFLOW,
            rest=up(vector_times_matrix(positive_up(q.beyond.square()), u.mT), terms) + UNDERFLOW,
            whole=up(vector_times_matrix(q.half_square, u.mT), terms),
            flat=up(up(vector_times_matrix(q.most, plus.mT) + vector_times_matrix(-q.least, minus.mT), terms) + slack),
        )

    return swing(positive, negative), swing(negative, positive)
