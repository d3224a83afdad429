"""Local Lipschitz bounds: every neuron's slopes on its range of the ball (theory section 8), for every network.

On the ball, phi(z+D) - phi(z) = (s + r) D with a secant slope s + r in the range that the pre-activation allows: s its
middle, |r| <= spread. A unit that is constant there (a ReLU that stays off) has s = spread = 0 and is gone, one that is
linear (a ReLU that stays on) has spread 0 and is merged into its neighbours' linear maps. With A, B, v, g of the
network linearised at s, and r o D as sources,

    D_l  = A_l d + sum over earlier k of B_lk (r_k o D_k)            f(x+d) - f(x) = <g, d> + sum_k <v_k, r_k o D_k> ,

so that ||D_l|| <= ||A_l|| e + sum_k ||B_lk diag(spread_k)|| ||D_k||, likewise row by row, and the margin falls by at
most ||g|| e + sum_k ||v_k o spread_k|| ||D_k||: LipLT with slopes, norms and rows of this ball. Where the ranges of the
entries say more than their norm they count. Max pooling is cut, and enters by its Lipschitz constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from certify_cli.bounds.jacobians import pulled_rows
from certify_cli.bounds.ranges import Ranges, Samples
from certify_cli.network.activations import Activation
from certify_cli.network.graph import Nonlinear
from certify_cli.network.linearised import Passage, Slope, Vectors, head, heads, nonlinear_nodes, pull
from certify_cli.network.pooling import MaxPool
from certify_cli.network.spans import Span
from certify_cli.numerics.eigen import largest_eigenvalue
from certify_cli.numerics.rounding import UNDERFLOW, gamma, up, vector_norm_up

LARGEST_SIDE = 512
"""Norms of matrices with a longer shorter side are Frobenius norms: a proof would cost more than all the rest."""


def lipschitz_losses(point: Samples, start: Ranges, cotangents: Tensor, jacobians: bool = True) -> Tensor:
    """Upper bounds (batch, rows) of how much <row, logits> falls on the balls of `start`.

    cotangents (batch or 1, rows, classes); `start` are ranges on the balls, from any method, made narrower head by
    head where `jacobians` may be written out.
    """
    network = point.network
    sources = _Sources(point, start)
    for target in heads(network)[:-1]:
        if jacobians:
            sources.reach(target)
        for layer in (k for k in nonlinear_nodes(network) if head(network, k) == target):
            sources.linearise(layer, target)
    pulled = pull(point.network, cotangents, sources.passages)
    reach = up(up(pulled[0].size + pulled[0].error, 2) * start.radius.unsqueeze(1))
    parts = [reach, *(sources.swing(layer, pulled[layer]) for layer in sources.layers if layer in pulled)]
    return up(torch.stack(parts).sum(0), len(parts)).nan_to_num(nan=torch.inf)


class _Sources:
    """The nonlinear nodes linearised so far: their passages, and what they leave over on the balls."""

    def __init__(self, point: Samples, start: Ranges) -> None:
        self.point, self.radius = point, start.radius
        self.low, self.high, self.norm = dict(start.low), dict(start.high), dict(start.norm)
        self.passages: dict[int, Passage] = {}
        self.left: dict[int, tuple[Tensor, Tensor]] = {}
        """By node: entries (batch, size) of |r o D|, and of spread; for a cut node of its whole change, and gain."""

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.left)

    def reach(self, target: int) -> None:
        """What the nodes linearised so far say of a head."""
        rows = pulled_rows(self.point.network, target, self.passages)
        straight = rows.pop(0)
        e = self.radius.unsqueeze(1)
        entries = [up(up(straight.size + straight.error, 2) * e)]
        entries += [self.swing(layer, block) for layer, block in rows.items()]
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
        if not isinstance(op, Activation):
            assert isinstance(op, Nonlinear)
            gain = op.gain(network.nodes[target].shape)
            norm = up(gain * self.norm[target]).unsqueeze(1).expand(-1, network.nodes[layer].size)
            if isinstance(op, MaxPool):  # no further than the farthest in its window
                reach = torch.maximum(-low, high).reshape(-1, *network.nodes[target].shape)
                norm = torch.fmin(norm, op.apply(reach).flatten(1))
            self.left[layer] = norm, torch.full_like(norm, gain)
            return
        e = self.point.evaluation
        span = Span(op, e.values[target].flatten(1), e.errors[target].flatten(1), low, high)
        least, most = span.secants()
        middle = (0.5 * (least + most)).nan_to_num(nan=0.0)
        spread = up(torch.maximum(most - middle, middle - least).clamp(min=0.0), 1)
        spread = torch.where(most == least, torch.zeros_like(spread), spread).nan_to_num(nan=torch.inf)
        self.passages[layer] = Slope(middle.reshape(-1, *network.nodes[layer].shape))
        self.left[layer] = up(spread * torch.maximum(-low, high)), spread

    def _length(self, layer: int) -> Tensor:
        """At least ||D_k||, (batch,)."""
        return self.norm[head(self.point.network, layer)]

    def _spread(self, layer: int, block: Vectors) -> Vectors:
        """The block times diag(spread)."""
        spread = self.left[layer][1].unsqueeze(1)
        return Vectors(block.value.flatten(2) * spread, up(block.error * spread.amax(2), 2))

    def swing(self, layer: int, rows: Vectors) -> Tensor:
        """Upper bounds (batch, rows) of |<row, what the node leaves over>|, entry by entry or by norms."""
        value, entries = rows.value.flatten(2), self.left[layer][0]
        scaled = self._spread(layer, rows)
        by_norm = up(up(scaled.size + scaled.error, 3) * self._length(layer).unsqueeze(1))
        apart = up((value.abs() @ entries.unsqueeze(2)).squeeze(2), value.shape[2] + 1)
        apart = apart + up(rows.error * vector_norm_up(entries).unsqueeze(1))
        return torch.fmin(by_norm, up(apart)) + UNDERFLOW


def matrix_norms(rows: Vectors) -> Tensor:
    """Upper bounds (batch or 1,) of the spectral norms of the exact matrices (batch or 1, m, n), rows with errors."""
    sizes = up(vector_norm_up(rows.size), 1)
    error = vector_norm_up(rows.error)
    _, m, n = rows.value.shape
    best = sizes
    if min(m, n) <= LARGEST_SIDE:
        gram = rows.value @ rows.value.mT if m <= n else rows.value.mT @ rows.value
        slack = up(gamma(max(m, n) + 2) * sizes.square(), 4) + UNDERFLOW
        best = torch.fmin(best, up(largest_eigenvalue(gram, slack).sqrt(), 1))
    return up(best + error, 2)
