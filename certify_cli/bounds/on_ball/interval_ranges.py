"""Intervals of every pre-activation on a ball around the sample: the fast tier of theory section 4.

With z_l = U_l x + sum over sources k of W_lk h_k + b, a perturbation d of norm at most e moves pre-activation l by

    D_l = U_l d + sum_k W_lk Dh_k ,     Dh_k = phi(z_k + D_k) - phi(z_k) .

Every Dh_k is bounded in two ways: entry by entry by an interval, carried through W_lk by its midpoint and radius, and
by its norm, which moves unit i by at most ||W_lk,i|| times as much. The tighter bound counts, source by source and unit
by unit. This takes a few forward passes and no Jacobian, and holds for every network: a node without slopes enters by
its Lipschitz constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.weight_blocks import Block
from certify_cli.network.activations import Activation
from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.affine import AffineOp
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Concat, Network, Nonlinear
from certify_cli.network.pooling import GroupMap
from certify_cli.network.propagate import (
    interval_jvp,
    is_nonlinear,
    nonlinear_nodes,
    pre_activation,
    pre_activations,
)
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, gamma, times, up, vector_norm_up
from certify_cli.numerics.trees import Batched


@dataclass(frozen=True, eq=False)
class Ranges(Batched):
    """Bounds of the offsets D_l = z_l(x+d) - z_l(x) of exact pre-activations for all ||d|| <= radius, rounded outward.

    radius: (batch,), of the ball around each sample, in the network's input units.
    low, high: by node, (batch, size), low <= 0 <= high: bounds of the entries of D_l.
    norm: by node, (batch,): upper bounds of ||D_l||.

    The nodes are all pre-activations and the logits. Bounds are infinite where a value overflows.
    """

    radius: Tensor
    low: Mapping[int, Tensor]
    high: Mapping[int, Tensor]
    norm: Mapping[int, Tensor]


@dataclass(frozen=True, eq=False)
class Change:
    """Bounds of the change of one node's value.

    low, high: (batch, size), low <= 0 <= high, of its entries.   norm: (batch,), of its norm, up.
    """

    low: Tensor
    high: Tensor
    norm: Tensor

    @classmethod
    def of(cls, low: Tensor, high: Tensor, norm: Tensor) -> Change:
        """The change with interval and norm intersected; NaN (an overflow) becomes infinite."""
        norm = norm.masked_fill(norm.isnan(), torch.inf)
        low, high = low.masked_fill(low.isnan(), -torch.inf), high.masked_fill(high.isnan(), torch.inf)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        norm = torch.minimum(norm, vector_norm_up(torch.maximum(-low, high)))
        cap = norm.unsqueeze(1)
        return cls(torch.maximum(low, -cap), torch.minimum(high, cap), norm)


def interval_ranges(
    point: EvaluatedPoints,
    weights: Mapping[tuple[int, int], Block],
    radius: Tensor,
    narrowed: Callable[[int, Change], Change] = lambda target, change: change,
) -> Ranges:
    """Ranges on the balls around the samples.

    weights: the network's blocks W_lk.   radius: (batch,).
    narrowed: makes the change of a pre-activation narrower by other means, before any later one follows from it.

    Where a value overflows or is NaN, the ranges of that sample are infinite.
    """
    network = point.network
    radius = radius.clamp(min=0.0)
    parts: dict[int, list[Change]] = {target: [] for target in pre_activations(network)}
    totals: dict[int, Change] = {}

    def at(target: int) -> Change:
        if target not in totals:
            total = _total(parts[target], len(radius), network.nodes[target].size, radius)
            totals[target] = narrowed(target, total)
        return totals[target]

    for source in (0, *nonlinear_nodes(network)):
        if source == 0:
            box = radius.unsqueeze(1).expand(-1, network.nodes[0].size)
            change = Change(-box, box, radius)
        else:
            change = _through_nonlinear(point, source, at(pre_activation(network, source)))
        for target, part in _contributions(network, source, change, weights).items():
            parts[target].append(part)
    changes = {target: at(target) for target in parts}
    return Ranges(
        radius,
        {t: c.low for t, c in changes.items()},
        {t: c.high for t, c in changes.items()},
        {t: c.norm for t, c in changes.items()},
    )


def _total(parts: list[Change], batch: int, size: int, like: Tensor) -> Change:
    """The sum of the sources' contributions to one pre-activation."""
    low, high, norm = like.new_zeros(batch, size), like.new_zeros(batch, size), like.new_zeros(batch)
    for part in parts:
        low, high, norm = low + part.low, high + part.high, norm + part.norm
    return Change.of(-up(-low, len(parts)), up(high, len(parts)), up(norm, len(parts)))


def _contributions(
    network: Network, source: int, change: Change, weights: Mapping[tuple[int, int], Block]
) -> dict[int, Change]:
    """The contributions of a source's change to those of all pre-activations and logits that it leads to."""
    blocks = {t: weights[t, source] for t in pre_activations(network) if (t, source) in weights}
    # the box around the input's ball is never tighter than the rows' norms, which a matrix has for every row
    boxed = {t: block for t, block in blocks.items() if source or block.matrix is None}
    intervals = _intervals(network, source, change, boxed)
    contributions = {}
    for t, block in blocks.items():
        by_norm = (up(change.norm.unsqueeze(1) * block.rows) + UNDERFLOW).expand(-1, network.nodes[t].size)
        low, high = intervals.get(t, (-by_norm, by_norm))
        norm = up(block.norm * change.norm) + UNDERFLOW
        contributions[t] = Change.of(torch.fmax(low, -by_norm), torch.fmin(high, by_norm), norm)
    return contributions


def _intervals(
    network: Network, source: int, change: Change, blocks: Mapping[int, Block]
) -> dict[int, tuple[Tensor, Tensor]]:
    """A source's interval carried through each block, keyed by target: low and high, (batch, size), outward.

    By the block's matrix or, where that is not written out, operator by operator.
    """
    intervals = {t: _times_matrix(block, change) for t, block in blocks.items() if block.matrix is not None}
    by_operators = [t for t in blocks if t not in intervals]
    if by_operators:
        shape = network.nodes[source].shape
        low, high = change.low.reshape(-1, *shape), change.high.reshape(-1, *shape)
        for t, ends in interval_jvp(network, source, low, high, by_operators).items():
            intervals[t] = ends[0].flatten(1), ends[1].flatten(1)
    return intervals


def _times_matrix(block: Block, change: Change) -> tuple[Tensor, Tensor]:
    """The interval through a block's matrix, outward; the matrix' error enters by norms."""
    rounding = gamma(block.magnitudes.shape[1] + 2)
    middle = 0.5 * (change.low + change.high)
    radius = up(torch.maximum(change.high - middle, middle - change.low) + rounding * middle.abs(), 3)
    image = middle @ block.matrix.T  # type: ignore[union-attr]
    spread = radius @ block.magnitudes.T * (1 + rounding) + (block.matrix_error * change.norm).unsqueeze(1)
    spread = up(spread + UNIT * image.abs(), 8) + UNDERFLOW
    return image - spread, image + spread


def _through_nonlinear(point: EvaluatedPoints, index: int, before: Change) -> Change:
    """The change of nonlinear node `index`; before: the change of its pre-activation."""
    op = point.network.nodes[index].op
    if isinstance(op, Activation):
        return _activated(point, index, op, before)
    if isinstance(op, GroupMap):
        return _pooled(point, index, op, before)
    if not isinstance(op, Nonlinear):
        raise TypeError(f"{op.title} is affine")
    norm = _norm_after(point, index, before)
    box = norm.unsqueeze(1).expand(-1, point.network.nodes[index].size)
    return Change.of(-box, box, norm)


def range_after_nonlinear(point: EvaluatedPoints, ranges: Ranges, target: int) -> tuple[Tensor, Tensor]:
    """The range (low, high) of a node, narrowed by those of the pre-activations behind which it stands.

    For a nonlinear node or a concatenation of such, as max pooling often has them; other nodes keep their range.
    """
    network = point.network
    node = network.nodes[target]
    sources = node.inputs if isinstance(node.op, Concat) else (target,)
    low, high = ranges.low[target], ranges.high[target]
    if not all(is_nonlinear(network.nodes[k]) for k in sources):
        return low, high
    befores = [pre_activation(network, k) for k in sources]
    changes = [
        _through_nonlinear(point, k, Change(ranges.low[before], ranges.high[before], ranges.norm[before]))
        for k, before in zip(sources, befores, strict=True)
    ]
    ends = [[change.low for change in changes], [change.high for change in changes]]
    if isinstance(node.op, Concat):
        shapes = [(-1, *network.nodes[k].shape) for k in sources]
        ends = [[node.op.apply(*(map(torch.Tensor.reshape, parts, shapes))).flatten(1)] for parts in ends]
    return torch.fmax(low, ends[0][0]), torch.fmin(high, ends[1][0])


def _norm_after(point: EvaluatedPoints, index: int, before: Change) -> Tensor:
    """The norm (batch,) of a nonlinear node's change, up, by its Lipschitz constant."""
    op = point.network.nodes[index].op
    assert isinstance(op, Nonlinear)
    return (
        up(op.lipschitz_constant(point.network.nodes[pre_activation(point.network, index)].shape) * before.norm)
        + UNDERFLOW
    )


def pre_activation_bounds(point: EvaluatedPoints, ranges: Ranges, index: int) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds (batch, *shape) of the pre-activation of nonlinear node `index` on the ball, outward."""
    target = pre_activation(point.network, index)
    return _around(point, target, ranges.low[target], ranges.high[target])


def _around(point: EvaluatedPoints, target: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """z - error + low and z + error + high, outward; infinite where they are NaN."""
    z, error = point.evaluation.values[target].flatten(1), point.evaluation.errors[target].flatten(1)
    slack = error + 4 * UNIT * (z.abs() + error) + UNDERFLOW
    bottom, top = z + (low - up(slack - UNIT * 4 * low)), z + (high + up(slack + UNIT * 4 * high))
    shape = (-1, *point.network.nodes[target].shape)
    return (
        bottom.masked_fill(bottom.isnan(), -torch.inf).reshape(shape),
        top.masked_fill(top.isnan(), torch.inf).reshape(shape),
    )


def _activated(point: EvaluatedPoints, index: int, op: Activation, before: Change) -> Change:
    """The change of an activation by its slopes on the range, intersected with its values there less the sample's.

    The values are tighter where a unit is near saturation.
    """
    bottom, top = _around(point, pre_activation(point.network, index), before.low, before.high)
    slope_low, slope_high = (part.flatten(1) for part in op.slope_on(bottom, top))
    lipschitz = torch.maximum(-slope_low, slope_high)
    high = torch.maximum(slope_high * before.high, slope_low * before.low)
    low = torch.minimum(slope_high * before.low, slope_low * before.high)
    low, high = -up((-low).clamp(min=0.0)) - UNDERFLOW, up(high.clamp(min=0.0)) + UNDERFLOW
    value, error = point.evaluation.values[index].flatten(1), point.evaluation.errors[index].flatten(1)
    floor, ceiling = (part.flatten(1) for part in op.value_on(bottom, top))
    slack = up(error + 4 * UNIT * (value.abs() + error), 3)
    high = torch.fmin(high, ceiling - value + slack + 4 * UNIT * ceiling.abs())
    low = torch.fmax(low, floor - value - slack - 4 * UNIT * floor.abs())
    return Change.of(low, high, up(lipschitz.amax(1) * before.norm) + UNDERFLOW)


def _pooled(point: EvaluatedPoints, index: int, op: GroupMap, before: Change) -> Change:
    """The change of a group map: each output changes by at most the largest change in its group, up or down."""
    shape = (-1, *point.network.nodes[pre_activation(point.network, index)].shape)
    low, high = before.low.reshape(shape), before.high.reshape(shape)
    # groups are padded with -inf, so the smallest change is taken as the largest negated one
    return Change.of(
        -op.largest_change(-low).flatten(1), op.largest_change(high).flatten(1), _norm_after(point, index, before)
    )


def activation_on_range(point: EvaluatedPoints, layer: int, ranges: Ranges) -> ActivationOnInterval:
    """The activation of nonlinear node `layer` on the range of its pre-activation, (batch, size)."""
    op, target = point.network.nodes[layer].op, pre_activation(point.network, layer)
    assert isinstance(op, Activation)
    z, error = point.evaluation.values[target].flatten(1), point.evaluation.errors[target].flatten(1)
    return ActivationOnInterval(op, z, error, ranges.low[target], ranges.high[target])


def change_norms(network: Network, ranges: Ranges, last: int, known: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Upper bounds (batch,) of the norm of each node's change on the balls, of all nodes before `last`.

    known: those of the first nodes, from an earlier call. Ranges may have been narrowed since, but not of these nodes.
    """
    norms = dict(known)
    for index in range(len(known), last):
        node = network.nodes[index]
        parts = [norms[i] for i in node.inputs]
        if index == 0:
            norm = ranges.radius
        elif isinstance(node.op, AffineOp):
            norm = times(parts[0], node.op.norm(network.nodes[node.inputs[0]].shape))
        elif isinstance(node.op, Nonlinear):
            norm = times(parts[0], node.op.lipschitz_constant(network.nodes[node.inputs[0]].shape))
        else:  # a sum; of a concatenation at least the root of the sum of squares
            norm = up(torch.stack(parts).sum(0), len(parts))
        if index in ranges.low:
            box = vector_norm_up(torch.maximum(-ranges.low[index], ranges.high[index]))
            norm = torch.fmin(torch.fmin(norm, ranges.norm[index]), box)
        norms[index] = norm
    return norms
