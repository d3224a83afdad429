"""Local Lipschitz bounds from every neuron's slopes on the ball (theory section 8), for every network.

On the ball, phi(z+D) - phi(z) = (s + r) D with a secant slope s + r in the range that the pre-activation allows; s is
the range's middle, and |r| <= spread. A unit that is constant there (a ReLU that stays off) has s = spread = 0 and adds
nothing; one that is linear (a ReLU that stays on) has spread 0 and becomes part of its neighbours' linear maps. With A,
B, v, g of the network linearised at s, and r o D as sources,

    D_l  = A_l d + sum over earlier k of B_lk (r_k o D_k)            f(x+d) - f(x) = <g, d> + sum_k <v_k, r_k o D_k> ,

so that ||D_l|| <= ||A_l|| e + sum_k ||B_lk diag(spread_k)|| ||D_k||, likewise row by row, and the margin drops by at
most ||g|| e + sum_k ||v_k o spread_k|| ||D_k||: LipLT with the slopes, norms and rows of this ball. Where the entries'
ranges give a tighter bound than their norm, they are used. In group maps (max pooling, MaxMin) a group whose winner is
decided on the ball is that entry; the others are cut, and enter by the map's Lipschitz constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.jacobians import pulled_rows
from certify_cli.bounds.linear_maps.weight_blocks import Block
from certify_cli.bounds.on_ball.affine_loss import AffineLoss
from certify_cli.bounds.on_ball.interval_ranges import Change, Ranges, activation_on_range, interval_ranges
from certify_cli.bounds.on_ball.max_pooling import DecidedGroups, MaxPoolRelaxation
from certify_cli.network.activations import Activation
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.pooling import GroupMap
from certify_cli.network.propagate import (
    Slope,
    Vectors,
    ancestors,
    consumers,
    jvp,
    pre_activation,
    pre_activations,
    rows_cost,
    vjp,
)
from certify_cli.numerics.estimates import operator_norm_estimates
from certify_cli.numerics.rounding import UNDERFLOW, carries_gradient, gamma, powers_of_two, up, vector_norm_up

LARGEST_SIDE = 512
"""Matrices whose shorter side is longer than this get their Frobenius norm: squaring would dominate the cost."""
SQUARINGS = 3
"""Number of squarings of the Gram matrix in `matrix_norms`."""


def linearised_on_balls(point: EvaluatedPoints, start: Ranges, budget: float = math.inf) -> LinearisedOnBalls:
    """The network linearised on the balls of `start`.

    start: ranges on the balls, by any method.
    budget: floating-point operations per sample up to which the ranges of a pre-activation are narrowed first.
    """
    network = point.network
    sources = LinearisedOnBalls(point, start)
    for target in pre_activations(network)[:-1]:
        if rows_cost(network, target) <= budget:
            sources.narrow(target)
        for layer in consumers(network, target):
            sources.linearise(layer, target)
    return sources


def linearised_by_norms(
    point: EvaluatedPoints, weights: Mapping[tuple[int, int], Block], radius: Tensor
) -> LinearisedOnBalls:
    """The network linearised on the balls of `radius` (batch,), without a row that is pulled back.

    weights: the network's blocks W_lk. Ranges are those of `interval_ranges`, in which the norm of every pre-activation
    is narrowed by the nodes before it as they are on the ball (`LinearisedOnBalls.norm_by_maps`). Of weights that carry
    a gradient, all norms are estimates: this is what training differentiates, at the cost of a few passes a node.
    """
    network = point.network
    sources = LinearisedOnBalls(point, Ranges(radius, {}, {}, {}))
    logits = len(network.nodes) - 1

    def narrowed(target: int, change: Change) -> Change:
        if sources.layers and target != logits:
            change = Change.of(change.low, change.high, torch.fmin(change.norm, sources.norm_by_maps(target)))
        sources.low[target], sources.high[target], sources.norm[target] = change.low, change.high, change.norm
        for layer in consumers(network, target):
            sources.linearise(layer, target)
        return change

    interval_ranges(point, weights, radius, narrowed)
    return sources


class LinearisedOnBalls:
    """The nonlinear nodes linearised so far: their linear maps, and their deviations r o D from these on the balls."""

    def __init__(self, point: EvaluatedPoints, start: Ranges) -> None:
        self.point, self.radius = point, start.radius
        self.low, self.high, self.norm = dict(start.low), dict(start.high), dict(start.norm)
        self.linear: dict[int, Slope | DecidedGroups] = {}
        self.deviations: dict[int, tuple[Tensor, Tensor]] = {}
        """By node, upper bounds (batch, size) of |r o D|, and the spread; of cut outputs, the change and its slope."""

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.deviations)

    def loss(self, cotangents: Tensor) -> AffineLoss:
        """Upper bounds (batch, rows) of the drop of <row, logits>; cotangents (batch or 1, rows, classes): the rows."""
        adjoints = vjp(self.point.network, cotangents, self.linear)
        rate = up(adjoints[0].size + adjoints[0].error, 2)
        return AffineLoss.of(
            rate, [self.deviation(layer, adjoints[layer]) for layer in self.layers if layer in adjoints]
        )

    def narrow(self, target: int) -> None:
        """Intersects the ranges of pre-activation `target` with the bound by the nodes linearised so far."""
        rows = pulled_rows(self.point.network, target, self.linear)
        straight = rows.pop(0)
        e = self.radius.unsqueeze(1)
        entries = [up(up(straight.size + straight.error, 2) * e)]
        entries += [self.deviation(layer, block) for layer, block in rows.items()]
        bound = up(torch.stack([t.expand(len(e), -1) for t in entries]).sum(0), len(entries))
        self.low[target] = torch.fmax(self.low[target], -bound)
        self.high[target] = torch.fmin(self.high[target], bound)
        whole = self._whole({0: matrix_norms(straight)} | {k: self._spread_norms(k, rows[k]) for k in rows})
        box = vector_norm_up(torch.maximum(-self.low[target], self.high[target]))
        self.norm[target] = torch.fmin(torch.fmin(self.norm[target], whole), box)

    def norm_by_maps(self, target: int) -> Tensor:
        """Upper bounds (batch,) of the norm of the change of `target`, by the nodes linearised so far."""
        network = self.point.network
        if not carries_gradient(self.point.evaluation.logits):
            rows = pulled_rows(network, target, self.linear)
            return self._whole({k: self._spread_norms(k, rows[k]) if k else matrix_norms(rows[k]) for k in rows})
        before = ancestors(network, target)
        return self._whole({k: self._estimates(k, target) for k in (0, *self.layers) if k in before})

    def _whole(self, norms: Mapping[int, Tensor]) -> Tensor:
        """Upper bounds (batch,) of ||D||: the sum of norms (batch or 1,) of its maps from the input and from nodes."""
        parts = [up(norm * (self._offset_norm(k) if k else self.radius)) for k, norm in norms.items()]
        return up(torch.stack([part.expand(len(self.radius)) for part in parts]).sum(0), len(parts))

    def _spread_norms(self, layer: int, block: Vectors) -> Tensor:
        return matrix_norms(self._times_spread(layer, block))

    def _estimates(self, source: int, target: int) -> Tensor:
        """Estimates (batch,) of the norms that are taken of rows elsewhere, by the products of their maps."""
        network, batch = self.point.network, len(self.radius)
        shape = network.nodes[source].shape
        spread = self.deviations[source][1].reshape(-1, *shape) if source else self.radius.new_ones(1)
        between = {k: part for k, part in self.linear.items() if k > source}

        def linear(v: Tensor) -> Tensor:
            return jvp(network, source, v * spread, between, target)[target].value

        def transpose(u: Tensor) -> Tensor:
            return vjp(network, u.unsqueeze(1), between, target)[source].value.squeeze(1) * spread

        return operator_norm_estimates(linear, transpose, shape, self.radius.new_ones(batch))

    def linearise(self, layer: int, target: int) -> None:
        """Adds nonlinear node `layer`, linearised at the middle slopes on the range of its pre-activation `target`."""
        network = self.point.network
        op = network.nodes[layer].op
        low, high = self.low[target], self.high[target]
        if isinstance(op, GroupMap):
            e, shape = self.point.evaluation, network.nodes[target].shape
            relaxation = MaxPoolRelaxation.of(op, shape, e.values[target], e.errors[target], low, high)
            change = op.largest_change(torch.maximum(-low, high).reshape(-1, *shape)).flatten(1)
            self.linear[layer] = DecidedGroups(relaxation, network.nodes[layer].shape)
            none = torch.zeros_like(change)
            self.deviations[layer] = (
                torch.where(relaxation.undecided, change, none),
                torch.where(relaxation.undecided, op.lipschitz_constant(shape), none),
            )
            return
        if not isinstance(op, Activation):
            raise TypeError(f"no local Lipschitz rule for {op.title}")
        ranges = Ranges(self.radius, self.low, self.high, self.norm)
        lower, upper = activation_on_range(self.point, layer, ranges).secants()
        middle = (0.5 * (lower + upper)).nan_to_num(nan=0.0)
        spread = up(torch.maximum(upper - middle, middle - lower).clamp(min=0.0), 1)
        spread = spread.masked_fill(spread.isnan(), torch.inf).masked_fill(upper == lower, 0.0)
        self.linear[layer] = Slope(middle.reshape(-1, *network.nodes[layer].shape))
        self.deviations[layer] = up(spread * torch.maximum(-low, high)), spread

    def _offset_norm(self, layer: int) -> Tensor:
        """Upper bounds (batch,) of ||D_k||."""
        return self.norm[pre_activation(self.point.network, layer)]

    def _times_spread(self, layer: int, block: Vectors) -> Vectors:
        """The block times diag(spread)."""
        spread = self.deviations[layer][1].unsqueeze(1)
        return Vectors(block.value.flatten(2) * spread, up(block.error * spread.amax(2), 2))

    def deviation(self, layer: int, rows: Vectors) -> Tensor:
        """Upper bounds (batch, rows) of |<row, r o D>| at one node: the smaller of two, by entries and by norms."""
        value, entries = rows.value.flatten(2), self.deviations[layer][0]
        scaled = self._times_spread(layer, rows)
        by_norm = up(up(scaled.size + scaled.error, 3) * self._offset_norm(layer).unsqueeze(1))
        by_entries = up((value.abs() @ entries.unsqueeze(2)).squeeze(2), value.shape[2] + 1)
        by_entries = by_entries + up(rows.error * vector_norm_up(entries).unsqueeze(1))
        return torch.fmin(by_norm, up(by_entries)) + UNDERFLOW


def matrix_norms(rows: Vectors) -> Tensor:
    """Upper bounds (batch or 1,) of the spectral norms of the exact matrices.

    rows: (batch or 1, m, n), within their errors of the exact rows.

    By squaring the Gram matrix: ||S||^2 <= ||S^2||_F + (the rounding of S^2), for S = G, G^2, ... (Delattre et al.,
    2023). After SQUARINGS of them the bound is at most m^(1/2^(SQUARINGS + 2)) times the norm, and mostly much closer.
    """
    sizes, error = vector_norm_up(rows.size), vector_norm_up(rows.error)
    _, m, n = rows.value.shape
    if min(m, n) > LARGEST_SIDE:
        return up(sizes + error, 2)
    unit = powers_of_two(rows.value.flatten(1))
    value = rows.value / unit.reshape(-1, 1, 1)
    whole = up(sizes / unit)
    s = _symmetric(value @ value.mT if m <= n else value.mT @ value)
    rounding = [up(gamma(max(m, n) + 4) * whole.square(), 4) + UNDERFLOW]
    scales = []
    for _ in range(SQUARINGS):
        scale = powers_of_two(s.flatten(1))
        s = s / scale.reshape(-1, 1, 1)
        frobenius = up(torch.linalg.matrix_norm(s), s.shape[1] ** 2 + 4)
        s = _symmetric(s @ s)
        scales.append(scale)
        rounding.append(up(gamma(s.shape[1] + 4) * frobenius.square(), 4) + UNDERFLOW)
    bound = up(torch.linalg.matrix_norm(s), s.shape[1] ** 2 + 4)
    for scale in reversed(scales):
        bound = up(up(bound + rounding.pop()).sqrt()) * scale
    bound = up(up(bound + rounding.pop()).sqrt()) * unit
    return up(torch.fmin(bound, sizes) + error, 4)


def _symmetric(matrices: Tensor) -> Tensor:
    """Products, made exactly symmetric, as ||S||^2 = ||S^2|| requires; they are so already but for rounding."""
    return 0.5 * (matrices + matrices.mT)
