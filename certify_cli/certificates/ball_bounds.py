"""Bounds of the rivals' losses on balls, for all rivals that are asked for at once, and the ranges that they use.

A bound first narrows the ranges on its balls, which serve every rival; then it is asked for the losses of those rivals
that these ranges do not settle (`rivals`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.affine_loss import AffineLoss
from certify_cli.bounds.on_ball.interval_ranges import Ranges
from certify_cli.bounds.on_ball.lipschitz import linearised_on_balls
from certify_cli.bounds.relaxation.backward import RelaxedNetwork, relax_all
from certify_cli.bounds.relaxation.intermediate_bounds import intermediate_bounds
from certify_cli.bounds.relaxation.optimise import has_slopes, items_at_once, optimised_loss, slope_tables
from certify_cli.certificates.column_plan import range_limits
from certify_cli.certificates.local import footprint
from certify_cli.certificates.rivals import Losses, Rivals
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.linear_forms import WholeForms

HOPELESS, AT_MOST = 0.25, 1.0
"""An ascent is not tried where more than this part of the margin is missing, for each nonlinear node whose slopes it
can choose; and no more than that in all."""
NARROW = 0.1
"""Where a bound leaves less than this part of a margin, an ascent and the next bound are tried as well."""

BallBound = Callable[[ModelBounds, EvaluatedPoints, Ranges], tuple[Ranges, Losses]]
"""(model bounds, samples, ranges on their balls) -> ranges that are at least as narrow, and the rivals' losses."""


def linear_bound(
    model_bounds: ModelBounds, point: EvaluatedPoints, ranges: Ranges, range_steps: int = 0
) -> tuple[Ranges, Losses]:
    """Linear relaxation on ranges narrowed by linear relaxation, with slopes optimised for narrow margins.

    range_steps: ascent steps for slopes optimised for each range.
    """
    limits = model_bounds.effort.ball_search
    ranges, relaxed = intermediate_bounds(
        point, ranges, model_bounds.memory, range_limits(model_bounds, point, ranges.radius), range_steps
    )

    def losses(rivals: Rivals) -> AffineLoss:
        loss = relaxed.loss(WholeForms(rivals.cotangents(point)))
        if limits.slope_steps and has_slopes(point):
            loss = _with_optimised_slopes(model_bounds, point, ranges, relaxed, rivals, loss)
        return loss

    return ranges, losses


def _with_optimised_slopes(
    model_bounds: ModelBounds,
    point: EvaluatedPoints,
    ranges: Ranges,
    relaxed: RelaxedNetwork,
    rivals: Rivals,
    loss: AffineLoss,
) -> AffineLoss:
    """`loss` (batch, count), replaced by that of optimised slopes where the margin left is narrow and this helps."""
    margin = rivals.of_table(point.margin_low)
    remaining = (margin - loss.on(ranges.radius)) / margin
    missing = min(HOPELESS * len(relaxed.relaxations), AT_MOST)
    decides = (remaining <= 0) | (remaining == remaining.amin(1, keepdim=True))
    wanted = (remaining <= NARROW) & (remaining > -missing) & decides & ~rivals.repeated
    sample, rival = wanted.nonzero().unbind(1)
    if not len(sample):
        return loss
    cotangents, steps = rivals.cotangents(point), model_bounds.effort.ball_search.slope_steps
    rate, constant = loss.rate.clone(), loss.constant.clone()
    for part in torch.arange(len(sample), device=sample.device).split(
        items_at_once(point.network, model_bounds.memory)
    ):
        entries = items, column = sample[part], rival[part]
        narrow, position = items.unique(return_inverse=True)
        linear = relaxed.lines
        tables = slope_tables(point.at(narrow), ranges.at(narrow), {k: line.at(narrow) for k, line in linear.items()})
        optimised = optimised_loss(
            point.network,
            {k: norm[items] for k, norm in relaxed.changes.items()},
            {k: table.at(position) for k, table in tables.items()},
            {k: line.slopes[:, items] for k, line in linear.items()},
            cotangents[items, column],
            steps,
        )
        pairs = AffineLoss(loss.rate[entries].unsqueeze(1), loss.constant[entries].unsqueeze(1))
        smaller = pairs.minimum(optimised, ranges.radius[items])
        rate[entries], constant[entries] = smaller.rate[:, 0], smaller.constant[:, 0]
    return AffineLoss(rate, constant)


def optimised_linear_bound(model_bounds: ModelBounds, point: EvaluatedPoints, ranges: Ranges) -> tuple[Ranges, Losses]:
    """`linear_bound` with slopes optimised for each range as well."""
    return linear_bound(model_bounds, point, ranges, model_bounds.effort.ball_search.range_slope_steps)


def linear_bound_on_ranges(model_bounds: ModelBounds, point: EvaluatedPoints, ranges: Ranges) -> tuple[Ranges, Losses]:
    """Linear relaxation on the given ranges."""
    relaxed = relax_all(point, ranges)
    return ranges, lambda rivals: relaxed.loss(WholeForms(rivals.cotangents(point)))


def lipschitz_bound(model_bounds: ModelBounds, point: EvaluatedPoints, ranges: Ranges) -> tuple[Ranges, Losses]:
    """Lipschitz constants on the balls, for as many samples at once as fit the memory."""
    fitting = model_bounds.memory // footprint(point.network)
    every = torch.arange(len(point.x), device=point.x.device)
    chunks = every.split(max(1, fitting))
    budget = model_bounds.effort.ball_search.range_operations if fitting else 0.0
    linearised = [linearised_on_balls(point.at(i), ranges.at(i), budget) for i in chunks]

    def losses(rivals: Rivals) -> AffineLoss:
        cotangents = rivals.cotangents(point)
        found = [sources.loss(cotangents[i]) for sources, i in zip(linearised, chunks, strict=True)]
        return AffineLoss(torch.cat([loss.rate for loss in found]), torch.cat([loss.constant for loss in found]))

    return ranges, losses
