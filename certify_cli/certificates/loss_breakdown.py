"""How the local bound loses margin on one sample's ball, term by term (`curvcert bounds --sample`).

`margin_bound.lower_bound` proves how much of the margin is left. The loss is split into terms at the point where the
bound is smallest. The terms are estimates; with the gap between proof and estimate as one of them, they add up to the
proved loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.curvature import why_no_curvature
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.remainder.expansion import BallExpansion
from certify_cli.bounds.remainder.margin_bound import Choice, lower_bound
from certify_cli.bounds.remainder.optimise import Problem, optimise
from certify_cli.certificates.local import LocalSearch, RivalPairs, first_balls, fits, searchable
from certify_cli.certificates.methods import METHODS
from certify_cli.efforts import MEMORY, NORMAL
from certify_cli.errors import MethodError
from certify_cli.network.activations.grid_estimates import SoftMinimiser
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.propagate import nonlinear_nodes, pre_activation
from certify_cli.numerics.rounding import TINY

ASCENTS, MOST_ASCENTS, STEPS = 8, 50, 16
"""Ascents, at least and at most, and the steps of each. Every ascent begins again with long steps, which gains more
than further short steps of one ascent."""
ENOUGH = 5e-3
"""More than ASCENTS are made while the estimate leaves less than this part of the margin, where the proof may fail."""


@dataclass(frozen=True)
class LossRow:
    """The loss of margin at one nonlinear layer; estimates.

    name, kind, shape: of the layer.
    half_width: half the mean width of its pre-activation ranges on the ball.
    nonlinear: the part of half_width that the linearisation does not explain.
    intercept: how far below the activation its quadratic minorants begin, summed over the layer.
    quadratic: their quadratic terms at the linearised pre-activation offsets.
    residual: the increase of these by the residuals, which the linearisation leaves out.

    The last three are in units of the margin.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    half_width: float
    nonlinear: float
    intercept: float
    quadratic: float
    residual: float

    @property
    def total(self) -> float:
        return self.intercept + self.quadratic + self.residual

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Losses:
    """A sample's margin, its lower bound on a ball, and the terms of the loss between the two.

    prediction, rival: classes of the margin.
    radius: of the ball, certified by the better of `curvature` and `local`.
    margin: lower bound at the sample.
    left: proved lower bound on the ball; not positive where `curvature` certifies the ball and `local` does not.
    gradient, layers: estimates of the loss by the gradient and by each nonlinear layer.
    gap: the rest of the loss, by which the proof is weaker than the estimates.
    """

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
    """The losses of one sample x (1, *input shape) on the ball that `local` certifies.

    memory: bytes, or None for the default. Raises MethodError where the local bound says nothing.
    """
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
    search = LocalSearch(model_bounds, point)
    radius, rival = _certified_ball(search)
    if not 0 < float(radius) < math.inf:
        raise MethodError(
            "--sample shows the local curvature bound, which says nothing here: the sample "
            + ("is not certified at all (a tie, or no number)" if float(radius) == 0 else "cannot change its class")
        )
    index = torch.zeros(1, dtype=torch.long, device=point.x.device)
    pair = RivalPairs.of(point, index, rival)
    expansion = search.expansions.at(index, radius)
    problem = Problem(point, expansion, pair.margin, pair.cotangents)
    state = problem.at(_best_choice(point, expansion, pair), None)
    choice = state.optimised.choice
    left = float(lower_bound(point, expansion, pair.margin, pair.cotangents, choice))
    offset = -state.solution.y
    offset = offset * (radius / offset.norm(dim=1, keepdim=True).clamp(min=TINY))
    rows = _rows(point.network, expansion, choice, state.touch, problem.straight(offset))
    gradient = -float((problem.gradient_of(choice) * offset).sum())
    margin = float(pair.margin)
    gap = margin - left - gradient - sum(row.total for row in rows)
    return Losses(int(point.prediction), int(rival), float(radius), margin, left, gradient, rows, gap)


def _certified_ball(search: LocalSearch) -> tuple[Tensor, Tensor]:
    """The larger of the radii (1,) that `curvature` and `local` certify, and the rival (1,) that decides it."""
    point = search.point
    closed = METHODS["curvature"].certify(search.model_bounds, point, False, None)
    if not bool(searchable(point, closed.radius)):
        return closed.radius, closed.rival
    radius, rival = search.radii(first_balls(point))
    return torch.maximum(radius, closed.radius), torch.where(radius > closed.radius, rival, closed.rival)


def _best_choice(point: EvaluatedPoints, expansion: BallExpansion, pair: RivalPairs) -> Choice:
    """The parameters of the margin bound on the ball, optimised by repeated ascents."""
    best: Choice | None = None
    for count in range(MOST_ASCENTS):
        optimised = optimise(point, expansion, pair.margin, pair.cotangents, best, STEPS)
        best = optimised.choice
        if count + 1 >= ASCENTS and bool(optimised.estimate > ENOUGH * pair.margin):
            break
    assert best is not None
    return best


def _rows(
    network: Network,
    expansion: BallExpansion,
    choice: Choice,
    touch: Mapping[int, SoftMinimiser],
    straight: Mapping[int, Tensor],
) -> tuple[LossRow, ...]:
    """The rows of all nonlinear layers.

    touch: by nonlinear node, where its minorants touch.   straight: by pre-activation node, its linearised offsets
    (1, size). Both belong to the perturbation at which the bound is smallest.
    """
    tau = float(choice.tau)
    rows = []
    for k in nonlinear_nodes(network):
        node, target = network.nodes[k], pre_activation(network, k)
        width = 0.5 * (expansion.ranges.high[target] - expansion.ranges.low[target])
        weights, residual = choice.weights[k], expansion.residual[target]
        rows.append(
            LossRow(
                node.name,
                node.op.title,
                node.shape,
                half_width=float(width.mean()),
                nonlinear=float(residual.mean() / width.mean().clamp(min=TINY)),
                intercept=-float(touch[k].value.sum()),
                quadratic=0.5 * (1 + tau) * float((weights * straight[target].square()).sum()),
                residual=0.5 * (1 + 1 / max(tau, 1e-12)) * float((weights * residual.square()).sum()),
            )
        )
    return tuple(rows)
