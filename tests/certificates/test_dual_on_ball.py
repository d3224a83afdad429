"""Claims from a bound on a ball never leave the ball, never pass an attack, and never fall below what was known."""

from __future__ import annotations

import pytest
import torch

from certify_cli.attacks.ddn import searched
from certify_cli.attacks.replay import replayed
from certify_cli.bounds.global_bounds.model_bounds import Analysis
from certify_cli.certificates import dual_on_ball
from certify_cli.certificates.closed_form import attack_radius, curvature_radius
from certify_cli.certificates.dual import Sharpened, tangent
from certify_cli.certificates.dual_on_ball import grown, promised_on_ball
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import Point
from tests.networks import SMOOTH, mlp, points

CURVED = {name: network for name, network in SMOOTH.items() if name != "linear"}


def closed_form(analysis: Analysis, point: Point) -> Sharpened:
    lower = analysis.curvature_pairs.rows(point.prediction)
    radius = curvature_radius(point.margin_low, point.gradient_norm, lower).masked_fill(point.own, torch.inf)
    return Sharpened(radius, point.x.clone())


def grow(analysis: Analysis, point: Point, sharp: Sharpened, steps: int = 8) -> Sharpened:
    lower, upper = analysis.curvature_pairs.rows(point.prediction), analysis.curvature_pairs.columns(point.prediction)
    return grown(analysis, point, sharp, lower, upper, steps)


@pytest.mark.parametrize("effort", ["normal", "max"])
@pytest.mark.parametrize("name", CURVED)
def test_grown_radii_are_inside_every_attack(name: str, effort: str) -> None:
    network = CURVED[name]
    analysis = Analysis(network, effort)
    with exact_kernels():
        point = Point(network, points(network, 25))
        before = closed_form(analysis, point)
        after = grow(analysis, point, before)
        assert (after.radius >= before.radius).all()
        radius = after.radius.amin(1)
        _, norm = searched(point, after.ends, radius, "normal")
    assert norm.isfinite().any()
    assert (norm[norm.isfinite()] > radius[norm.isfinite()]).all()


def test_balls_gain_where_units_saturate() -> None:
    """At the sample most units are saturated, and the global bound takes each at its worst."""
    network = mlp((8, 40, 4), "tanh", gain=4.0)
    analysis = Analysis(network, "max")
    with exact_kernels():
        point = Point(network, points(network, 40))
        before = closed_form(analysis, point)
        after = grow(analysis, point, before)
        without_descent = grow(analysis, point, before, steps=0)
    gain = after.radius.amin(1) / before.radius.amin(1)
    assert gain.mean() > 1.2
    assert (after.radius.amin(1) >= without_descent.radius.amin(1) * (1 - 1e-2)).all()


def test_a_claim_stays_in_its_ball(monkeypatch: pytest.MonkeyPatch) -> None:
    """One ball of 1.5 times the radius: no claim beyond its edge, however small the curvature on it."""
    monkeypatch.setitem(dual_on_ball.ROUNDS, "max", 1)
    network = mlp((8, 40, 4), "tanh", gain=4.0)
    analysis = Analysis(network, "max")
    with exact_kernels():
        point = Point(network, points(network, 40))
        start = closed_form(analysis, point)
        tiny = Sharpened(start.radius * 1e-3, start.ends)
        after = grow(analysis, point, tiny)
    edge = tiny.radius.amin(1) * dual_on_ball.STRETCH
    assert (after.radius.amin(1) <= edge).all()
    assert torch.allclose(after.radius.amin(1), edge, rtol=1e-12)


def test_a_tangent_outside_the_ball_claims_nothing() -> None:
    network = CURVED["two layers, tanh"]
    with exact_kernels():
        point = Point(network, points(network, 10))
        rival = (point.prediction + 1) % network.classes
        m = Analysis(network).curvature_pairs.rows(point.prediction).gather(1, rival.unsqueeze(1)).squeeze(1)
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
    analysis = Analysis(network, "max")
    x = points(network, 5)
    x[1], x[3] = torch.nan, 1e308
    with exact_kernels():
        point = Point(network, x)
        after = grow(analysis, point, closed_form(analysis, point))
        alone = Point(network, x[[0, 2, 4]])
        beside = grow(analysis, alone, closed_form(analysis, alone))
    assert (after.radius[1].masked_fill(point.own[1], 0.0) == 0).all()
    assert not after.radius.isnan().any()
    assert torch.allclose(after.radius[[0, 2, 4]], beside.radius, rtol=1e-2)


@pytest.mark.parametrize("name", ["two layers, tanh", "three layers, softplus", "concatenating", "residual"])
def test_attacks_promised_on_a_ball_are_kept(name: str) -> None:
    network = CURVED[name]
    analysis = Analysis(network, "max")
    with exact_kernels():
        point = Point(network, points(network, 60, spread=0.7))
        upper = analysis.curvature_pairs.columns(point.prediction)
        everywhere = attack_radius(point.margin_high, point.gradient_norm_low, upper)
        nearest, target = everywhere.masked_fill(point.own, torch.inf).min(1)
        promised, rival = promised_on_ball(analysis, point, nearest, target)
        direction = -point.gradients.value[torch.arange(60), rival]
        _, norm = replayed(point, direction, promised)
    assert (promised <= nearest).all()
    assert (promised < nearest).any()
    kept = promised.isfinite()
    assert torch.allclose(norm[kept], promised[kept], rtol=1e-6)
