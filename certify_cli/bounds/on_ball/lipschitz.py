"""Local Lipschitz bounds: every neuron's slopes on its range of the ball (theory section 8), for every network.

On the ball, phi(z+D) - phi(z) = (s + r) D with a secant slope s + r in the range that the pre-activation allows: s its
middle, |r| <= spread. A unit that is constant there (a ReLU that stays off) has s = spread = 0 and is gone, one that is
linear (a ReLU that stays on) has spread 0 and is merged into its neighbours' linear maps. With A, B, v, g of the
network linearised at s, and r o D as sources,

    D_l  = A_l d + sum over earlier k of B_lk (r_k o D_k)            f(x+d) - f(x) = <g, d> + sum_k <v_k, r_k o D_k> ,

so that ||D_l|| <= ||A_l|| e + sum_k ||B_lk diag(spread_k)|| ||D_k||, likewise row by row, and the margin falls by at
most ||g|| e + sum_k ||v_k o spread_k|| ||D_k||: LipLT with slopes, norms and rows of this ball. Where the ranges of the
entries say more than their norm they count. Of group maps (max pooling, MaxMin) a group whose winner is decided on the
ball is that entry; the others are cut, and enter by the map's Lipschitz constant.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.jacobians import pulled_rows
from certify_cli.bounds.on_ball.affine_loss import AffineLoss
from certify_cli.bounds.on_ball.interval_ranges import Ranges, span
from certify_cli.bounds.on_ball.max_pooling import DecidedGroups, MaxPoolRelaxation
from certify_cli.network.activations import Activation
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.pooling import GroupMap
from certify_cli.network.propagate import (
    NodeVjp,
    Slope,
    Vectors,
    consumers,
    pre_activation,
    pre_activations,
    rows_cost,
    vjp,
)
from certify_cli.numerics.rounding import UNDERFLOW, gamma, powers_of_two, up, vector_norm_up

LARGEST_SIDE = 512
"""Norms of matrices with a longer shorter side are Frobenius norms: a proof would cost more than all the rest."""
SQUARINGS = 3


def lipschitz_loss(point: EvaluatedPoints, start: Ranges, cotangents: Tensor, budget: float = math.inf) -> AffineLoss:
    """How much <row, logits> falls on the balls of `start`, (batch, rows).

    cotangents (batch or 1, rows, classes); `start` are ranges on the balls, from any method, made narrower head by
    head where that takes no more than `budget` operations a sample.
    """
    network = point.network
    sources = _Sources(point, start)
    for target in pre_activations(network)[:-1]:
        if rows_cost(network, target) <= budget:
            sources.reach(target)
        for layer in consumers(network, target):
            sources.linearise(layer, target)
    adjoints = vjp(point.network, cotangents, sources.node_vjps)
    rate = up(adjoints[0].size + adjoints[0].error, 2)
    return AffineLoss.of(
        rate, [sources.leftover(layer, adjoints[layer]) for layer in sources.layers if layer in adjoints]
    )


class _Sources:
    """The nonlinear nodes linearised so far: their passages, and what they leave over on the balls."""

    def __init__(self, point: EvaluatedPoints, start: Ranges) -> None:
        self.point, self.radius = point, start.radius
        self.low, self.high, self.norm = dict(start.low), dict(start.high), dict(start.norm)
        self.node_vjps: dict[int, NodeVjp] = {}
        self.left: dict[int, tuple[Tensor, Tensor]] = {}
        """By node: entries (batch, size) of |r o D|, and of spread; for cut outputs of their whole change, and gain."""

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.left)

    def reach(self, target: int) -> None:
        """What the nodes linearised so far say of a head."""
        rows = pulled_rows(self.point.network, target, self.node_vjps)
        straight = rows.pop(0)
        e = self.radius.unsqueeze(1)
        entries = [up(up(straight.size + straight.error, 2) * e)]
        entries += [self.leftover(layer, block) for layer, block in rows.items()]
        reach = up(torch.stack([t.expand(len(e), -1) for t in entries]).sum(0), len(entries))
        self.low[target] = torch.fmax(self.low[target], -reach)
        self.high[target] = torch.fmin(self.high[target], reach)
        norms = [up(matrix_norms(straight) * self.radius)]
        norms += [up(matrix_norms(self._spread(k, block)) * self._length(k)) for k, block in rows.items()]
        whole = up(torch.stack([n.expand(len(e)) for n in norms]).sum(0), len(norms))
        box = vector_norm_up(torch.maximum(-self.low[target], self.high[target]))
        self.norm[target] = torch.fmin(torch.fmin(self.norm[target], whole), box)

    def linearise(self, layer: int, target: int) -> None:
        """Its centre slopes, and what they leave over on the range of its pre-activation."""
        network = self.point.network
        op = network.nodes[layer].op
        low, high = self.low[target], self.high[target]
        if isinstance(op, GroupMap):
            e, shape = self.point.evaluation, network.nodes[target].shape
            relaxation = MaxPoolRelaxation.of(op, shape, e.values[target], e.errors[target], low, high)
            reach = op.largest_change(torch.maximum(-low, high).reshape(-1, *shape)).flatten(1)
            self.node_vjps[layer] = DecidedGroups(relaxation)
            none = torch.zeros_like(reach)
            self.left[layer] = (
                torch.where(relaxation.open, reach, none),
                torch.where(relaxation.open, op.lipschitz_constant(shape), none),
            )
            return
        if not isinstance(op, Activation):
            raise TypeError(f"no local Lipschitz rule for {op.title}")
        here = Ranges(self.radius, self.low, self.high, self.norm)
        least, most = span(self.point, layer, here).secants()
        middle = (0.5 * (least + most)).nan_to_num(nan=0.0)
        spread = up(torch.maximum(most - middle, middle - least).clamp(min=0.0), 1)
        spread = spread.masked_fill(spread.isnan(), torch.inf).masked_fill(most == least, 0.0)
        self.node_vjps[layer] = Slope(middle.reshape(-1, *network.nodes[layer].shape))
        self.left[layer] = up(spread * torch.maximum(-low, high)), spread

    def _length(self, layer: int) -> Tensor:
        """At least ||D_k||, (batch,)."""
        return self.norm[pre_activation(self.point.network, layer)]

    def _spread(self, layer: int, block: Vectors) -> Vectors:
        """The block times diag(spread)."""
        spread = self.left[layer][1].unsqueeze(1)
        return Vectors(block.value.flatten(2) * spread, up(block.error * spread.amax(2), 2))

    def leftover(self, layer: int, rows: Vectors) -> Tensor:
        """Upper bounds (batch, rows) of |<row, what the node leaves over>|, entry by entry or by norms."""
        value, entries = rows.value.flatten(2), self.left[layer][0]
        scaled = self._spread(layer, rows)
        by_norm = up(up(scaled.size + scaled.error, 3) * self._length(layer).unsqueeze(1))
        apart = up((value.abs() @ entries.unsqueeze(2)).squeeze(2), value.shape[2] + 1)
        apart = apart + up(rows.error * vector_norm_up(entries).unsqueeze(1))
        return torch.fmin(by_norm, up(apart)) + UNDERFLOW


def matrix_norms(rows: Vectors) -> Tensor:
    """Upper bounds (batch or 1,) of the spectral norms of the exact matrices (batch or 1, m, n), rows with errors.

    By squaring the Gram matrix: ||S||^2 <= ||S^2||_F + (what rounding S^2 lost), for S = G, G^2, ... (Delattre et al.,
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
    lost = [up(gamma(max(m, n) + 4) * whole.square(), 4) + UNDERFLOW]
    scales = []
    for _ in range(SQUARINGS):
        scale = powers_of_two(s.flatten(1))
        s = s / scale.reshape(-1, 1, 1)
        frobenius = up(torch.linalg.matrix_norm(s), s.shape[1] ** 2 + 4)
        s = _symmetric(s @ s)
        scales.append(scale)
        lost.append(up(gamma(s.shape[1] + 4) * frobenius.square(), 4) + UNDERFLOW)
    bound = up(torch.linalg.matrix_norm(s), s.shape[1] ** 2 + 4)
    for scale in reversed(scales):
        bound = up(up(bound + lost.pop()).sqrt()) * scale
    bound = up(up(bound + lost.pop()).sqrt()) * unit
    return up(torch.fmin(bound, sizes) + error, 4)


def _symmetric(matrices: Tensor) -> Tensor:
    """Of products that are symmetric but for rounding: ||S||^2 = ||S^2|| needs it exactly."""
    return 0.5 * (matrices + matrices.mT)
