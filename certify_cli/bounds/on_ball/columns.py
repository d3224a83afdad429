"""Ranges from columns of the linearised network, pushed forward: for deep networks with more units than inputs.

With slopes s at the sample, and q_k(t) = phi(z_k+t) - phi(z_k) - s_k t (theory section 4),

    D_l = A_l d + sum over earlier k of B_lk q_k(D_k) .

Backward, A_l takes a pass for each of its rows; forward, a pass for each input serves all layers, and the norms of its
rows do not depend on the ball. On a ball the remainders of the few units that are not straight there are columns of
their own: q_k lies within a half-width h of a centre, and unit i of layer l moves by at most

    e ||A_l,i|| + |centre| + sum over these units of h |B_lk,i| .

What is left out (rounding, and negligible remainders) is carried by its norm. Group maps select the
entry that wins at the sample; the rest of their change is such a remainder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.on_ball.interval_ranges import Ranges, activation_on_range
from certify_cli.network.activations import Activation
from certify_cli.network.affine import AffineOp
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Concat, Network, Shape
from certify_cli.network.pooling import GroupMap
from certify_cli.network.propagate import (
    Slope,
    Vectors,
    Winners,
    nonlinear_nodes,
    pre_activation,
    pre_activations,
    through_affine,
    vjp_cost,
)
from certify_cli.network.walk import Forward, forward
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, times, up, vector_norm_up

NEGLIGIBLE = 1e-9
"""Remainders below this part of the unit's range get no column."""
LIVE = 4
"""An estimate of the number of nodes whose columns are held at once."""


@dataclass(frozen=True)
class ColumnLimits:
    """What the columns of the units that bend on a ball may take.

    operations: floating-point operations.   memory: bytes.
    """

    operations: float
    memory: int


@dataclass(frozen=True, eq=False)
class _Spread:
    """Bounds of one node's change, less A_l d: columns (1 + units, *shape), the first one their centre.

    Column j is that of the same unit at every node; those behind the last one given are zero.
    noise: (), upper bound of the norm of what is in no column.
    """

    columns: Vectors
    noise: Tensor

    def extended(self, count: int) -> Vectors:
        """The columns, zeros behind them up to `count`."""
        missing = count - len(self.columns.error)
        if not missing:
            return self.columns
        value, error = self.columns.value, self.columns.error
        return Vectors(
            torch.cat([value, value.new_zeros(missing, *value.shape[1:])]), torch.cat([error, error.new_zeros(missing)])
        )


def column_cost(network: Network, target: int) -> float:
    """About the floating-point operations for the column of a unit of pre-activation `target`."""
    return vjp_cost(network, len(network.nodes) - 1) - vjp_cost(network, target)


def bending_radius(point: EvaluatedPoints, operations: float) -> Tensor:
    """Estimates (batch,) of the radius at which the columns of the units that reach a kink take so many operations.

    To first order; inf where they never do, and 0 where those of units at a kink do.
    """
    network, found = point.network, []
    for sample in range(len(point.x)):
        rows, distances, costs = point.row_norms(sample).rows, [], []
        for k in nonlinear_nodes(network):
            op, target = network.nodes[k].op, pre_activation(network, k)
            if isinstance(op, Activation) and op.kinks and target in rows:
                z = point.evaluation.values[target][sample].flatten()
                nearest = torch.stack([(z - kink).abs() for kink in op.kinks]).amin(0)
                moves = rows[target] > NEGLIGIBLE * rows[target].max()
                distances.append(nearest[moves] / rows[target][moves])
                costs.append(torch.full_like(distances[-1], column_cost(network, target)))
        none = point.x.new_zeros(0)
        every, order = torch.cat([none, *distances]).sort()
        beyond = (torch.cat([none, *costs])[order].cumsum(0) > operations).nonzero()[:, 0]
        found.append(every[beyond[0]] if len(beyond) else point.x.new_tensor(torch.inf))
    return torch.stack(found)


def column_walk(point: EvaluatedPoints, ranges: Ranges, limits: ColumnLimits) -> Iterator[tuple[int, Tensor, Tensor]]:
    """A single sample's pre-activations, in their order, and bounds of their offsets, (1, size) each, outward.

    ranges: on the ball. They are read as late as can be: what is narrowed before the next pre-activation is asked for
        serves all behind it.
    limits: where the units that bend take more, the walk ends early.
    """
    network, radius, norms = point.network, ranges.radius, point.row_norms(0)
    taken, spent, over = 1, 0.0, False
    targets = set(pre_activations(network))

    def bounds(target: int, spread: _Spread) -> tuple[Tensor, Tensor]:
        value, error = spread.columns.value.flatten(1), spread.columns.error
        centre = value[0]
        reach = value[1:].abs().sum(0) + error.sum() + spread.noise + radius * norms.rows.get(target, 0.0)
        reach = up(reach + 4 * UNIT * centre.abs(), len(value) + 6)
        return (centre - reach).unsqueeze(0), (centre + reach).unsqueeze(0)

    def affine(op: AffineOp, spread: _Spread, shape: Shape) -> _Spread:
        columns = through_affine(op, spread.columns, shape, op.linear(spread.columns.value))
        return _Spread(columns, times(spread.noise, op.norm(shape)))

    def total(parts: Sequence[_Spread]) -> _Spread:
        count = max(len(part.columns.error) for part in parts)
        columns = parts[0].extended(count)
        for part in parts[1:]:
            columns = columns + part.extended(count)
        return _Spread(columns, up(torch.stack([part.noise for part in parts]).sum(), len(parts)))

    def concat(op: Concat, parts: list[_Spread | None], shapes: list[Shape]) -> _Spread:
        present = [part for part in parts if part is not None]
        count = max(len(part.columns.error) for part in present)
        filled = [
            Vectors(radius.new_zeros(count, *shape), radius.new_zeros(count)) if part is None else part.extended(count)
            for part, shape in zip(parts, shapes, strict=True)
        ]
        error = up(torch.stack([vectors.error for vectors in filled]).sum(0), len(filled))
        noise = up(torch.stack([part.noise for part in present]).sum(), len(present))
        return _Spread(Vectors(op.apply(*(vectors.value for vectors in filled)), error), noise)

    def nonlinear(index: int, spread: _Spread) -> _Spread | None:
        target, op = pre_activation(network, index), network.nodes[index].op
        nonlocal taken, spent, over
        node = norms.nodes[index]
        # a column belongs to one unit of the whole network: branches that meet again must not share one
        pushed = node.push(spread.extended(taken))
        if isinstance(op, Activation):
            assert isinstance(node, Slope)
            slope = node.value.flatten(1)  # type: ignore[union-attr]
            lower, upper = (t[0] for t in activation_on_range(point, index, ranges).remainders(slope))
            steepest = up(node.largest)
        else:
            assert isinstance(op, GroupMap)
            lower, upper = _group_remainder(point, op, target, ranges)
            assert isinstance(node, Winners)
            steepest = node.norm
        centre, half = 0.5 * (lower + upper), up(0.5 * (upper - lower), 2)
        half = half + 2 * UNIT * centre.abs()
        width = (ranges.high[target] - ranges.low[target]).amax()
        own = half.flatten() > NEGLIGIBLE * width
        units = own.nonzero()[:, 0]
        taken += len(units)
        spent += len(units) * column_cost(network, target)
        widest = max(behind.size for behind in network.nodes[index:])
        over = spent > limits.operations or 8 * LIVE * taken * widest > limits.memory
        if over:
            return None
        left = torch.maximum(-lower, upper).masked_fill(own, 0.0)
        noise = up(times(spread.noise, steepest) + vector_norm_up(left), 2) + UNDERFLOW
        value = pushed.value.clone()
        shift = torch.zeros_like(centre).index_copy(0, units, centre[units])
        moved = value[0].flatten() + shift
        value[0] = moved.reshape(value.shape[1:])
        error = pushed.error.clone()
        error[0] = up(error[0] + UNIT * vector_norm_up(moved), 2)
        fresh = torch.nn.functional.one_hot(units, len(half)).to(half.dtype) * half[units].unsqueeze(1)
        return _Spread(
            Vectors(
                torch.cat([value, fresh.reshape(-1, *value.shape[1:])]), torch.cat([error, error.new_zeros(len(units))])
            ),
            noise,
        )

    zero = _Spread(Vectors(radius.new_zeros(1, *network.input_shape), radius.new_zeros(1)), radius.new_zeros(()))
    for index, spread in forward(network, 0, zero, Forward(affine, total, concat, nonlinear)):
        if over:
            return
        if index in targets:
            yield index, *bounds(index, spread)


def _group_remainder(point: EvaluatedPoints, op: GroupMap, target: int, ranges: Ranges) -> tuple[Tensor, Tensor]:
    """Bounds (lower, upper), (size,) each, of a group map's change less that of the entry that wins at the sample.

    The maximum of z + t exceeds its winner's by at most the largest excess of another member over it.
    """
    shape = point.network.nodes[target].shape
    groups = op.groups(shape)
    members = groups.members.to(ranges.radius.device)
    padding = members < 0
    lanes, off, low, high = (
        t.reshape(groups.channels, -1)
        for t in (
            point.evaluation.values[target],
            point.evaluation.errors[target],
            ranges.low[target],
            ranges.high[target],
        )
    )
    bounds = []
    for sign in groups.signs:
        bottom, top = (low, high) if sign > 0 else (-high, -low)
        values, errors, down_, up_ = (t[:, members.clamp(min=0)] for t in (sign * lanes, off, bottom, top))
        values = values.masked_fill(padding, -torch.inf)
        winner = values.argmax(2, keepdim=True)
        mask = torch.nn.functional.one_hot(winner[..., 0], values.shape[2]).bool()
        slack = up(errors + 4 * UNIT * (values.abs().nan_to_num(posinf=0.0) - down_ + up_), 2)
        others = (values + up_ + slack).masked_fill(mask | padding, -torch.inf).amax(2)
        own = (values + down_ - slack).gather(2, winner)[..., 0]
        excess = up((others - own).clamp(min=0.0), 1)
        # the winner as computed may be below the exact maximum, unless it is ahead by more than rounding
        second = (values + slack).masked_fill(mask | padding, -torch.inf).amax(2)
        sure = second < (values - slack).gather(2, winner)[..., 0]
        short = (4 * slack.amax(2)).masked_fill(sure, 0.0)
        bounds.append((-short, excess) if sign > 0 else (-excess, short))
    lower, upper = (torch.stack(side).flatten() for side in zip(*bounds, strict=True))
    return lower, upper
