"""Where the local bound loses: a sample's margin, spent term by term on its ball (`curvcert bounds --sample`).

The whole is proved by `expansion.lower_bound`; how it is shared out is an account at the point where the bound is
least, so the parts are estimates that add up to it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.curvature import why_no_curvature
from certify_cli.bounds.global_bounds.model_bounds import MEMORY, ModelBounds
from certify_cli.bounds.remainder.margin_bound import lower_bound
from certify_cli.bounds.remainder.optimise import Problem, optimise
from certify_cli.certificates.local import LocalSearch, RivalPairs, first_balls, fits, searchable
from certify_cli.certificates.methods import METHODS
from certify_cli.efforts import NORMAL
from certify_cli.errors import MethodError
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.propagate import nonlinear_nodes, pre_activation
from certify_cli.numerics.rounding import TINY

ASCENTS, MOST_ASCENTS, STEPS = 8, 50, 16
"""One sample can have them. A fresh start, with long steps again, helps more than further short steps."""
ENOUGH = 5e-3
"""With less than this part of the margin left by the estimate the proof may fail."""


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
    """A margin on a ball: `margin` at the sample (down), `left` of it on the ball (a proved lower bound; not
    positive where `curvature` certifies the ball and `local` does not), and the loss between them: the gradient's part,
    the layers' parts, and `gap`, what the proof rounds up (all estimates)."""

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
    if reason is None and not nonlinear_nodes(network):
        reason = "it is affine, and nothing is lost to curvature"
    if reason is not None:
        raise MethodError(f"--sample shows the local curvature bound, which cannot apply to this model: {reason}")
    with exact_kernels():
        model_bounds, point = ModelBounds(network, NORMAL, memory or MEMORY), EvaluatedPoints(network, x)
        if not fits(model_bounds):
            raise MethodError("--sample needs the sample's Jacobians, which do not fit in --memory; give it more")
        result = _losses(model_bounds, point)
    if not math.isfinite(result.left):
        raise MethodError(
            "--sample shows the local curvature bound, which overflows on the ball that a closed form certifies here"
        )
    return result


def _losses(model_bounds: ModelBounds, point: EvaluatedPoints) -> Losses:
    network = point.network
    closed = METHODS["curvature"].certify(model_bounds, point, False, None)
    known, rival = closed.radius, closed.rival
    search = LocalSearch(model_bounds, point)
    if bool(searchable(point, known)):
        radius, decides = search.radii(first_balls(point))
        rival = torch.where(radius > known, decides, rival)
        known = torch.maximum(radius, known)
    if not 0 < float(known) < math.inf:
        raise MethodError(
            "--sample shows the local curvature bound, which says nothing here: the sample "
            + ("is not certified at all (a tie, or no number)" if float(known) == 0 else "cannot change its class")
        )
    index = torch.zeros(1, dtype=torch.long, device=point.x.device)
    items = RivalPairs.of(point, index, rival)
    ball = search.expand(index, known)
    problem = Problem(point, ball, items.margin, items.cotangents)
    best = None
    for count in range(MOST_ASCENTS):
        found = optimise(point, ball, items.margin, items.cotangents, best, STEPS)
        best = found.choice
        if count + 1 >= ASCENTS and bool(found.estimate > ENOUGH * items.margin):
            break
    assert best is not None
    state = problem.at(best, None)
    choice = state.optimised.choice
    left = float(lower_bound(point, ball, items.margin, items.cotangents, choice))
    offset = -state.solution.y
    offset = offset * (known / offset.norm(dim=1, keepdim=True).clamp(min=TINY))
    straight = problem.straight(offset)
    tau = float(choice.tau)
    rows = []
    for k in nonlinear_nodes(network):
        node, target = network.nodes[k], pre_activation(network, k)
        width = 0.5 * (ball.ranges.high[target] - ball.ranges.low[target])
        weights = choice.weights[k]
        rows.append(
            LossRow(
                node.name,
                node.op.title,
                node.shape,
                range=float(width.mean()),
                bent=float(ball.residual[target].mean() / width.mean().clamp(min=TINY)),
                constant=-float(state.touch[k].value.sum()),
                curved=0.5 * (1 + tau) * float((weights * straight[target].square()).sum()),
                beyond=0.5 * (1 + 1 / max(tau, 1e-12)) * float((weights * ball.residual[target].square()).sum()),
            )
        )
    gradient = -float((problem.gradient_of(choice) * offset).sum())
    margin = float(items.margin)
    gap = margin - left - gradient - sum(row.total for row in rows)
    return Losses(int(point.prediction), int(rival), float(known), margin, left, gradient, tuple(rows), gap)
