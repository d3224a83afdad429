"""Claims from a bound on a ball never leave the ball, never pass an attack, and never fall below what was known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from certify_cli.attacks.ddn import nearest_attacks
from certify_cli.attacks.replay import replayed_along
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.certificates import dual_on_ball
from certify_cli.certificates.closed_form import attack_radius, curvature_radius
from certify_cli.certificates.dual import Refined, tangent
from certify_cli.certificates.dual_on_ball import certified_attack_on_ball, extended_on_balls
from certify_cli.efforts import EFFORTS
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from tests.networks import SMOOTH, mlp, points

CURVED = {name: network for name, network in SMOOTH.items() if name != "linear"}


def closed_form(model_bounds: ModelBounds, point: EvaluatedPoints) -> Refined:
    lower = model_bounds.curvature_pairs.rows(point.prediction)
    radius = curvature_radius(point.margin_low, point.gradient_norm, lower).masked_fill(point.own, torch.inf)
    return Refined(radius, point.x.clone())


def grow(model_bounds: ModelBounds, point: EvaluatedPoints, sharp: Refined, steps: int = 8) -> Refined:
    lower, upper = (
        model_bounds.curvature_pairs.rows(point.prediction),
        model_bounds.curvature_pairs.columns(point.prediction),
    )
    return extended_on_balls(model_bounds, point, sharp, lower, upper, steps)


@pytest.mark.parametrize("effort", ["normal", "max"])
@pytest.mark.parametrize("name", CURVED)
def test_grown_radii_are_inside_every_attack(name: str, effort: str) -> None:
    network = CURVED[name]
    model_bounds = ModelBounds(network, EFFORTS[effort])
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 25))
        before = closed_form(model_bounds, point)
        after = grow(model_bounds, point, before)
        assert (after.radius >= before.radius).all()
        radius = after.radius.amin(1)
        _, norm = nearest_attacks(point, after.ends, radius, EFFORTS["normal"])
    assert norm.isfinite().any()
    assert (norm[norm.isfinite()] > radius[norm.isfinite()]).all()


def test_balls_gain_where_units_saturate() -> None:
    """At the sample most units are saturated, and the global bound takes each at its worst."""
    network = mlp((8, 40, 4), "tanh", gain=4.0)
    model_bounds = ModelBounds(network, EFFORTS["max"])
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 40))
        before = closed_form(model_bounds, point)
        after = grow(model_bounds, point, before)
        without_descent = grow(model_bounds, point, before, steps=0)
    gain = after.radius.amin(1) / before.radius.amin(1)
    assert gain.mean() > 1.2
    assert (after.radius.amin(1) >= without_descent.radius.amin(1) * (1 - 1e-2)).all()


def test_a_claim_stays_in_its_ball() -> None:
    """One ball of 1.5 times the radius: no claim beyond its edge, however small the curvature on it."""
    network = mlp((8, 40, 4), "tanh", gain=4.0)
    model_bounds = ModelBounds(network, replace(EFFORTS["max"], dual_balls=1))
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 40))
        start = closed_form(model_bounds, point)
        tiny = Refined(start.radius * 1e-3, start.ends)
        after = grow(model_bounds, point, tiny)
    edge = tiny.radius.amin(1) * dual_on_ball.STRETCH
    assert (after.radius.amin(1) <= edge).all()
    assert torch.allclose(after.radius.amin(1), edge, rtol=1e-12)


def test_a_tangent_outside_the_ball_claims_nothing() -> None:
    network = CURVED["two layers, tanh"]
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 10))
        rival = (point.prediction + 1) % network.classes
        m = ModelBounds(network).curvature_pairs.rows(point.prediction).gather(1, rival.unsqueeze(1)).squeeze(1)
        moved = point.x + 0.01 * points(network, 10, 3, 1.0)
        distance = (moved - point.x).norm(dim=1)
        free, _ = tangent(point, rival, moved, m)
        inside, _ = tangent(point, rival, moved, m, distance * 1.001)
        outside, _ = tangent(point, rival, moved, m, distance * 0.999)
    assert (free > 0).any()
    assert torch.equal(inside, torch.minimum(free, distance * 1.001))
    assert (outside == 0).all()


def test_uncertifiable_samples_stay_as_they_are() -> None:
    """NaN, ties and overflow: nothing to grow from, and no harm to the neighbours."""
    network = CURVED["two layers, tanh"]
    model_bounds = ModelBounds(network, EFFORTS["max"])
    x = points(network, 5)
    x[1], x[3] = torch.nan, 1e308
    with exact_kernels():
        point = EvaluatedPoints(network, x)
        after = grow(model_bounds, point, closed_form(model_bounds, point))
        alone = EvaluatedPoints(network, x[[0, 2, 4]])
        beside = grow(model_bounds, alone, closed_form(model_bounds, alone))
    assert (after.radius[1].masked_fill(point.own[1], 0.0) == 0).all()
    assert not after.radius.isnan().any()
    assert torch.allclose(after.radius[[0, 2, 4]], beside.radius, rtol=1e-2)


@pytest.mark.parametrize("name", ["two layers, tanh", "three layers, softplus", "concatenating", "residual"])
def test_attacks_promised_on_a_ball_are_kept(name: str) -> None:
    network = CURVED[name]
    model_bounds = ModelBounds(network, EFFORTS["max"])
    with exact_kernels():
        point = EvaluatedPoints(network, points(network, 60, spread=0.7))
        upper = model_bounds.curvature_pairs.columns(point.prediction)
        everywhere = attack_radius(point.margin_high, point.gradient_norm_low, upper)
        nearest, target = everywhere.masked_fill(point.own, torch.inf).min(1)
        promised, rival = certified_attack_on_ball(model_bounds, point, nearest, target)
        direction = -point.gradients.value[torch.arange(60), rival]
        _, norm = replayed_along(point, direction, promised)
    assert (promised <= nearest).all()
    assert (promised < nearest).any()
    kept = promised.isfinite()
    assert torch.allclose(norm[kept], promised[kept], rtol=1e-6)
