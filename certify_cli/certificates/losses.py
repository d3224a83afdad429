"""Where the local bound loses: a sample's margin, spent term by term on its ball (`curvcert bounds --sample`).

The whole is proved by `bounds.local.lower_bound`; how it is shared out is an account at the point where the bound is
least, so the parts are estimates that add up to it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from certify_cli.bounds.analysis import MEMORY, Analysis
from certify_cli.bounds.curvature import why_no_curvature
from certify_cli.bounds.local import ball, lower_bound
from certify_cli.bounds.ranges import fast_ranges
from certify_cli.certificates.ascent import Problem, ascend
from certify_cli.certificates.local import Items, fits
from certify_cli.certificates.methods import METHODS
from certify_cli.certificates.point import Point
from certify_cli.errors import MethodError
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.graph import Network
from certify_cli.network.linearised import head, nonlinear_nodes
from certify_cli.numerics.rounding import TINY

STEPS = 60
"""Of the ascent: one sample can have them."""


@dataclass(frozen=True)
class LossRow:
    """What one nonlinear layer takes from the margin, and why; parts of the margin's loss, estimates.

    `range`: half the mean width of the pre-activation's range on the ball; `bent`: which part of that is not the
    linearisation's. `constant`: how deep the minorants lie below the activation; `curved`: their quadratic parts, at
    the linearised offsets; `beyond`: what the rest of the offsets adds to these.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    range: float
    bent: float
    constant: float
    curved: float
    beyond: float

    @property
    def total(self) -> float:
        return self.constant + self.curved + self.beyond

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Losses:
    """A margin on a ball: `margin` at the sample (down), `left` of it on the ball (a proved lower bound), and the loss
    between them: the gradient's part, the layers' parts, and `gap`, what the proof rounds up (all estimates)."""

    prediction: int
    rival: int
    radius: float
    margin: float
    left: float
    gradient: float
    layers: tuple[LossRow, ...]
    gap: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layers": [row.to_dict() for row in self.layers]}


def of_sample(network: Network, x: Tensor, memory: int | None = None) -> Losses:
    """Of the one sample x (1, *input shape), on the ball that `local` certifies; MethodError if it says nothing."""
    reason = why_no_curvature(network)
    if reason is not None:
        raise MethodError(f"--sample shows the local curvature bound, which cannot apply to this model: {reason}")
    with exact_kernels():
        analysis, point = Analysis(network, "normal", memory or MEMORY), Point(network, x)
        found = METHODS["local"].certify(analysis, point, False, None)
        radius, rival = float(found.radius), int(found.rival)
        if not 0 < radius < math.inf:
            raise MethodError(
                "--sample shows the local curvature bound, which says nothing here: the sample "
                + ("is not certified at all (a tie, or no number)" if radius == 0 else "cannot change its class")
            )
        result = losses(analysis, point, radius, rival)
    if result is None:
        raise MethodError("--sample needs the sample's Jacobians, which do not fit in --memory; give it more")
    return result


def losses(analysis: Analysis, point: Point, radius: float, rival: int) -> Losses | None:
    """Of the one sample of `point`, towards `rival`, on the ball of `radius`. None without memory for its Jacobians."""
    if not fits(analysis):
        return None
    network = point.network
    index = torch.zeros(1, dtype=torch.long, device=point.x.device)
    items = Items.of(point, index, index + rival)
    known = ball(point, fast_ranges(point, analysis.weights, torch.full_like(items.margin, radius)))
    problem = Problem(point, known, items.margin, items.cotangents)
    best = ascend(point, known, items.margin, items.cotangents, None, STEPS).choice
    state = problem.at(best, None)
    choice = state.ascended.choice
    left = float(lower_bound(point, known, items.margin, items.cotangents, choice))
    offset = -state.solution.y
    offset = offset * (radius / offset.norm(dim=1, keepdim=True).clamp(min=TINY))
    straight = problem.straight(offset)
    tau = float(choice.tau)
    rows = []
    for k in nonlinear_nodes(network):
        node, target = network.nodes[k], head(network, k)
        width = 0.5 * (known.ranges.high[target] - known.ranges.low[target])
        weights = choice.weights[k]
        rows.append(
            LossRow(
                node.name,
                node.op.title,
                node.shape,
                range=float(width.mean()),
                bent=float(known.rest[target].mean() / width.mean().clamp(min=TINY)),
                constant=-float(state.touch[k].value.sum()),
                curved=0.5 * (1 + tau) * float((weights * straight[target].square()).sum()),
                beyond=0.5 * (1 + 1 / max(tau, 1e-12)) * float((weights * known.rest[target].square()).sum()),
            )
        )
    gradient = -float((problem.gradient_of(choice) * offset).sum())
    margin = float(items.margin)
    gap = margin - left - gradient - sum(row.total for row in rows)
    return Losses(int(point.prediction), rival, radius, margin, left, gradient, tuple(rows), gap)
