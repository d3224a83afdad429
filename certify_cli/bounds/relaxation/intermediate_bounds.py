"""Ranges of every pre-activation by linear relaxation, head by head, as each needs the earlier ones (theory section 7).

Every entry is a row of its own, pulled back twice: how far it can fall, and rise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from certify_cli.bounds.on_ball.interval_ranges import Ranges, span
from certify_cli.bounds.relaxation.backward import LinearRelaxation, Relaxation, falls, relax
from certify_cli.bounds.relaxation.optimise import has_slopes, optimised_loss, slope_tables
from certify_cli.bounds.relaxation.supporting_lines import SlopeTable
from certify_cli.network.activations import Activation
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.propagate import consumers, is_nonlinear, pre_activation, pre_activations, rows_cost
from certify_cli.numerics.rounding import UNDERFLOW

CACHE = 2**25
"""Bytes of what is treated at once: rows are many, and every pass over them is short."""
CLIMBING, COPIES = 2**27, 16
"""The same where lines are chosen for every row, and about how many numbers a neuron and row an ascent holds."""


def intermediate_bounds(
    point: EvaluatedPoints, known: Ranges, memory: int, budget: float = math.inf, steps: int = 0
) -> tuple[Ranges, dict[int, Relaxation]]:
    """Ranges on the balls of `known`, never wider, and every nonlinear node between lines on them.

    Head by head, as each needs the earlier ones only. A head that no nonlinear node precedes is known already, and one
    that takes more than `budget` operations a sample stays as it is. memory: bytes that a part of the rows may take.
    steps: of an ascent for lines of each row's own (`line_ascent`).
    """
    network = point.network
    low, high = dict(known.low), dict(known.high)
    between: dict[int, Relaxation] = {}
    choice: dict[int, SlopeTable] = {}
    steps = steps if has_slopes(point) else 0
    for target in pre_activations(network)[:-1]:
        here = Ranges(known.radius, low, high, known.norm)
        if reaches(network, target) and range_cost(network, target) <= budget:
            asked = torch.stack([bends(point, k, here) for k in consumers(network, target)]).any(0)
            rows = asked.any(0).nonzero()[:, 0]
            if len(rows):
                fall, rise = offset_bounds(point, between, known.radius, target, rows, memory)
                if steps:
                    better = optimised_offset_bounds(
                        point.network, between, choice, known.radius, target, rows, steps, memory
                    )
                    fall, rise = torch.fmin(fall, better[0]), torch.fmin(rise, better[1])
                # what nobody asked for stays as it is, whatever the other samples of the batch ask for
                fall, rise = (torch.where(asked[:, rows], t, torch.inf) for t in (fall, rise))
                low[target] = low[target].index_copy(1, rows, torch.fmax(low[target][:, rows], -fall))
                high[target] = high[target].index_copy(1, rows, torch.fmin(high[target][:, rows], rise))
        here = Ranges(known.radius, low, high, known.norm)
        found = {k: relax(point, k, here) for k in consumers(network, target)}
        between |= found
        if steps:
            choice |= slope_tables(
                point, here, {k: line for k, line in found.items() if isinstance(line, LinearRelaxation)}
            )
    return Ranges(known.radius, low, high, known.norm), between


def range_cost(network: Network, target: int) -> float:
    """About the floating-point operations that the ranges of a head take, a sample and ball."""
    return 2 * rows_cost(network, target)


def ball_cost(network: Network) -> float:
    """The same of all heads that `intermediate_bounds` treats."""
    return sum(range_cost(network, target) for target in pre_activations(network)[:-1] if reaches(network, target))


def optimised_cost(network: Network, steps: int) -> float:
    """The same with an ascent of so many steps for every range: forth and back, and a proof."""
    return 2 * (steps + 1) * ball_cost(network)


def bends(point: EvaluatedPoints, layer: int, ranges: Ranges) -> Tensor:
    """Which pre-activations' ranges matter, (batch, size): not those on which the activation is a straight line."""
    node, target = point.network.nodes[layer], pre_activation(point.network, layer)
    if not isinstance(node.op, Activation):
        return torch.ones_like(ranges.low[target], dtype=torch.bool)
    least, most = span(point, layer, ranges).slopes()
    return ~(most - least <= UNDERFLOW)


def offset_bounds(
    point: EvaluatedPoints, between: Mapping[int, Relaxation], radius: Tensor, target: int, rows: Tensor, memory: int
) -> tuple[Tensor, Tensor]:
    """How far the entries `rows` (count,) of node `target` can fall, and rise, on the balls: (batch, count) each."""
    node = point.network.nodes[target]
    widest = max(n.size for n in point.network.nodes[: target + 1])
    chunk = max(1, min(memory, CACHE) // (64 * len(radius) * widest))
    found = []
    for part in rows.split(chunk):
        units = torch.nn.functional.one_hot(part, node.size).to(radius.dtype)
        both = torch.cat([units, -units]).reshape(1, -1, *node.shape)
        found.append(falls(point.network, between, both, target).on(radius).reshape(len(radius), 2, -1))
    fall, rise = torch.cat(found, dim=2).unbind(1)
    return fall, rise


def optimised_offset_bounds(
    network: Network,
    between: Mapping[int, Relaxation],
    choice: Mapping[int, SlopeTable],
    radius: Tensor,
    target: int,
    rows: Tensor,
    steps: int,
    memory: int,
) -> Tensor:
    """As `offset_bounds`, with lines of each row's own: (2, batch, count)."""
    node, batch = network.nodes[target], len(radius)
    chosen = sum(network.nodes[k].size for k in choice)
    widest = max(n.size for n in network.nodes[: target + 1])
    chunk = max(1, min(memory, CLIMBING) // (2 * 8 * batch * (COPIES * chosen + 8 * widest)))
    begin = {k: line.slopes for k, line in between.items() if isinstance(line, LinearRelaxation)}
    found = []
    for part in rows.split(chunk):
        units = torch.nn.functional.one_hot(part, node.size).to(radius.dtype).reshape(-1, *node.shape)
        item = torch.arange(batch, device=radius.device).repeat_interleave(2 * len(part))
        fall = optimised_loss(
            network,
            radius[item],
            {k: e.at(item) for k, e in choice.items()},
            {k: s[:, item] for k, s in begin.items()},
            torch.cat([units, -units]).repeat(batch, *[1] * len(node.shape)),
            steps,
            target,
        )
        found.append(fall.on(radius[item]).reshape(batch, 2, -1).transpose(0, 1))
    return torch.cat(found, dim=2)


def reaches(network: Network, target: int) -> bool:
    """Whether a nonlinear node precedes node `target`."""
    return any(is_nonlinear(network.nodes[i]) or reaches(network, i) for i in network.nodes[target].inputs)
