"""Intermediate bounds: ranges of every pre-activation by linear relaxation (theory section 7).

Pre-activations are bounded in topological order, as each needs the relaxations of the nonlinear nodes before it, and
these need the earlier ranges. Every unit is a row of its own, pulled back twice: for its lower and its upper bound.
Columns (`on_ball.columns`) come before the rows of each pre-activation: rows are asked for units alone that bend on
what columns leave, and what rows narrow, columns behind them have the use of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.on_ball.columns import ColumnLimits, column_walk
from certify_cli.bounds.on_ball.interval_ranges import (
    Ranges,
    activation_on_range,
    change_norms,
    range_after_nonlinear,
)
from certify_cli.bounds.on_ball.max_pooling import MaxPoolRelaxation
from certify_cli.bounds.relaxation.backward import LinearRelaxation, Relaxation, RelaxedNetwork, relax, relax_all
from certify_cli.bounds.relaxation.optimise import COPIES, has_slopes, optimised_loss, slope_tables
from certify_cli.bounds.relaxation.supporting_lines import SlopeTable
from certify_cli.network.activations import Activation
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.linear_forms import unit_forms
from certify_cli.network.propagate import consumers, is_nonlinear, pre_activations, rows_cost, vjp_cost
from certify_cli.numerics.rounding import UNDERFLOW
from certify_cli.numerics.trees import joined

NEGLIGIBLE = 1e-9
"""Units whose range is narrower than this part of the widest one in their layer are not asked for."""
CACHE = 2**25
"""Bytes of the rows that are pulled back at once: few enough for the processor's cache."""
OPTIMISED_CACHE = 2**27
"""The same with optimised relaxations."""


@dataclass(frozen=True)
class RangeLimits:
    """What ranges may cost, in floating-point operations a sample.

    rows: for the units of one pre-activation that are not straight on their ranges; where they take more, none is
        pulled back.
    row: for one of them; where it takes more, none is, nor any where columns end early.
    columns: for the columns of units that bend; None for no columns.
    """

    rows: float = math.inf
    row: float = math.inf
    columns: ColumnLimits | None = None

    def affords(self, network: Network, target: int, count: int, ended: bool) -> bool:
        """Whether so many rows of a pre-activation are pulled back; ended: whether columns ended before it."""
        each = vjp_cost(network, target)
        return 2 * count * each <= self.rows and ((each <= self.row and not ended) or self.row == math.inf)


EVERY_ROW = RangeLimits()


def intermediate_bounds(
    point: EvaluatedPoints, start: Ranges, memory: int, limits: RangeLimits = EVERY_ROW, steps: int = 0
) -> tuple[Ranges, RelaxedNetwork]:
    """Ranges on the balls of `start`, never wider, and the network relaxed on them.

    start: ranges by any method.   memory: bytes that the rows treated at once may take.
    steps: of an ascent that optimises the relaxations for each row (`optimise`); 0 for none.

    A pre-activation without a nonlinear node before it keeps its range of `start`, where no relaxation would narrow it.
    """
    if limits.columns is not None and len(point.x) > 1:  # columns are a sample's own
        every = torch.arange(len(point.x), device=point.x.device)
        parts = (intermediate_bounds(point.at(i), start.at(i), memory, limits, steps)[0] for i in every.split(1))
        ranges = joined(parts)
        return ranges, relax_all(point, ranges)
    network = point.network
    low, high = dict(start.low), dict(start.high)
    ranges = Ranges(start.radius, low, high, start.norm)  # narrowed as the walk goes on
    columns = None if limits.columns is None else column_walk(point, ranges, limits.columns)
    relaxations: dict[int, Relaxation] = {}
    changes: dict[int, Tensor] = {}
    tables: dict[int, SlopeTable] = {}
    steps = steps if has_slopes(point) else 0
    *inner, last = pre_activations(network)
    for target in (*inner, last):
        found = None if columns is None else next(columns, None)
        if found is not None:
            bounded, least, most = found
            if bounded != target:  # both walks go through the pre-activations in order
                raise RuntimeError(f"columns bound node {bounded} where node {target} was asked for")
            low[target] = torch.fmax(low[target], least).clamp(max=0.0)
            high[target] = torch.fmin(high[target], most).clamp(min=0.0)
        low[target], high[target] = range_after_nonlinear(point, ranges, target)
        if target == last:
            break
        if follows_nonlinear(network, target):
            curved = torch.stack([is_curved(point, k, ranges) for k in consumers(network, target)]).any(0)
            width = high[target] - low[target]
            # a unit that hardly moves, such as one whose inputs are all dead, has next to nothing to gain
            curved = curved & ~(width <= NEGLIGIBLE * width.amax(1, keepdim=True))
            rows = curved.any(0).nonzero()[:, 0]
            if len(rows) and limits.affords(
                network, target, len(rows), ended=limits.columns is not None and found is None
            ):
                changes = change_norms(network, ranges, target, changes)
                relaxed = RelaxedNetwork(network, relaxations, changes)
                lower, upper = offset_bounds(relaxed, target, rows, memory)
                if steps:
                    optimised = optimised_offset_bounds(relaxed, tables, target, rows, steps, memory)
                    lower, upper = torch.fmin(lower, optimised[0]), torch.fmin(upper, optimised[1])
                # a unit that is not curved keeps its range, so that no result depends on the batch's other samples
                lower, upper = (torch.where(curved[:, rows], t, torch.inf) for t in (lower, upper))
                low[target] = low[target].index_copy(1, rows, torch.fmax(low[target][:, rows], -lower))
                high[target] = high[target].index_copy(1, rows, torch.fmin(high[target][:, rows], upper))
        added = {k: relax(point, k, ranges) for k in consumers(network, target)}
        relaxations |= added
        if steps:
            lines = {k: line for k, line in added.items() if isinstance(line, LinearRelaxation)}
            tables |= slope_tables(point, ranges, lines)
    return ranges, RelaxedNetwork(network, relaxations, change_norms(network, ranges, len(network.nodes), changes))


def range_cost(network: Network, target: int) -> float:
    """Estimate of the floating-point operations for the range of one pre-activation, per sample and ball."""
    return 2 * rows_cost(network, target)


def ball_cost(network: Network) -> float:
    """Estimate of the floating-point operations for all ranges of `intermediate_bounds`, per sample and ball."""
    return sum(
        range_cost(network, target) for target in pre_activations(network)[:-1] if follows_nonlinear(network, target)
    )


def optimised_cost(network: Network, steps: int) -> float:
    """`ball_cost` with an ascent of `steps` steps for every range: two passes per step, and a proof."""
    return 2 * (steps + 1) * ball_cost(network)


def is_curved(point: EvaluatedPoints, layer: int, ranges: Ranges) -> Tensor:
    """(batch, size): where a narrower range can help: the node is not a straight line there, or the maximum is open."""
    if not isinstance(point.network.nodes[layer].op, Activation):
        relaxed = relax(point, layer, ranges)
        assert isinstance(relaxed, MaxPoolRelaxation)
        return relaxed.contending
    flattest, steepest = activation_on_range(point, layer, ranges).slopes()
    return ~(steepest - flattest <= UNDERFLOW)


def offset_bounds(relaxed: RelaxedNetwork, target: int, rows: Tensor, memory: int) -> tuple[Tensor, Tensor]:
    """Upper bounds (batch, count) of the decrease and of the increase of units of node `target` on the balls.

    rows: (count,), indices of the units.   memory: bytes that the rows treated at once may take.
    """
    network, radius = relaxed.network, relaxed.radius
    widest = max(n.size for n in network.nodes[: target + 1])
    chunk = max(1, min(memory, CACHE) // (64 * len(radius) * widest))
    parts = []
    for part in rows.split(chunk):
        sign = torch.ones(len(part), dtype=radius.dtype, device=radius.device)
        forms = unit_forms(network.nodes[target].shape, torch.cat([part, part]), torch.cat([sign, -sign]))
        parts.append(relaxed.loss(forms, target).on(radius).reshape(len(radius), 2, -1))
    lower, upper = torch.cat(parts, dim=2).unbind(1)
    return lower, upper


def optimised_offset_bounds(
    relaxed: RelaxedNetwork,
    tables: Mapping[int, SlopeTable],
    target: int,
    rows: Tensor,
    steps: int,
    memory: int,
) -> Tensor:
    """The bounds of `offset_bounds` with relaxations optimised for each row, stacked: (2, batch, count).

    tables: of every node before `target`.   steps: of each ascent.
    """
    network, radius = relaxed.network, relaxed.radius
    node, batch = network.nodes[target], len(radius)
    neurons = sum(network.nodes[k].size for k in tables)
    widest = max(n.size for n in network.nodes[: target + 1])
    chunk = max(1, min(memory, OPTIMISED_CACHE) // (2 * 8 * batch * (COPIES * neurons + 8 * widest)))
    slopes = {k: line.slopes for k, line in relaxed.lines.items()}
    parts = []
    for part in rows.split(chunk):
        units = torch.nn.functional.one_hot(part, node.size).to(radius.dtype).reshape(-1, *node.shape)
        item = torch.arange(batch, device=radius.device).repeat_interleave(2 * len(part))
        loss = optimised_loss(
            network,
            {k: norm[item] for k, norm in relaxed.changes.items()},
            {k: e.at(item) for k, e in tables.items()},
            {k: s[:, item] for k, s in slopes.items()},
            torch.cat([units, -units]).repeat(batch, *[1] * len(node.shape)),
            steps,
            target,
        )
        parts.append(loss.on(radius[item]).reshape(batch, 2, -1).transpose(0, 1))
    return torch.cat(parts, dim=2)


def narrows(network: Network) -> bool:
    """Whether linear relaxation can narrow the range of some pre-activation.

    Not that of one without a nonlinear node before it, nor of one that is a nonlinear node itself: what its own
    pre-activation says of it is as good.
    """
    return any(
        follows_nonlinear(network, target) and not is_nonlinear(network.nodes[target])
        for target in pre_activations(network)[:-1]
    )


def follows_nonlinear(network: Network, target: int) -> bool:
    """Whether a nonlinear node precedes node `target`."""
    return any(is_nonlinear(network.nodes[i]) or follows_nonlinear(network, i) for i in network.nodes[target].inputs)
