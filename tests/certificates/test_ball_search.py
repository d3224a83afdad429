"""The search on a ladder of radii: what it ends with is proved, is the last rung, and does not depend on its start."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.affine_loss import AffineLoss
from certify_cli.bounds.on_ball.interval_ranges import interval_ranges
from certify_cli.certificates.ball_bounds import BallBound, linear_bound, lipschitz_bound
from certify_cli.certificates.ball_search import search_balls
from certify_cli.certificates.methods import METHODS, certify_batch, select
from certify_cli.certificates.rivals import Rivals
from certify_cli.efforts import EFFORTS, FAST
from certify_cli.network.evaluate import exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from tests.networks import PIECEWISE, SMOOTH, mlp, points

D = torch.float64
BOUNDS: dict[str, tuple[BallBound, ...]] = {
    "linear": (linear_bound,),
    "local-lipschitz": (lipschitz_bound,),
    "both": (linear_bound, lipschitz_bound),
}
NETWORKS = {
    "relu": PIECEWISE["relu"],
    "leaky relu, residual": PIECEWISE["leaky relu, residual"],
    "max min": PIECEWISE["max min"],
    "deep relu": mlp((6, 9, 9, 9, 9, 3), "relu", seed=2),
    "sigmoid": SMOOTH["four layers, sigmoid"],
}


def holds(bounds: tuple[BallBound, ...], model_bounds: ModelBounds, x: Tensor, radius: Tensor) -> Tensor:
    """Of which samples every margin is kept positive on the balls of `radius`, each by one of the bounds."""
    point = EvaluatedPoints(model_bounds.network, x)
    ranges = interval_ranges(point, model_bounds.weights, radius)
    every = Rivals.of(torch.ones_like(point.own))
    passed = point.own.clone()
    for bound in bounds:
        ranges, losses = bound(model_bounds, point, ranges)
        passed |= (point.margin_low - losses(every).on(radius)) > 0
    return passed.all(1)


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_search_ends_on_the_last_rung_wherever_it_began(name: str, kind: str) -> None:
    """At `fast` the bounds take no ascent, whose steps may part for as little as a rounding.

    Of `local-lipschitz` a larger ball may prove more than one of the radius found: see test_rivals.py for its proofs.
    """
    network, bounds = NETWORKS[name], BOUNDS[kind]
    x = points(network, 6)
    with exact_kernels():
        model_bounds, point = ModelBounds(network, EFFORTS["fast"]), EvaluatedPoints(network, x)
        found = search_balls(bounds, model_bounds, point, torch.zeros(6, dtype=D)).radius
        assert bool((found > 0).all())
        assert kind != "linear" or bool(holds(bounds, model_bounds, x, found).all())
        assert not bool(holds(bounds, model_bounds, x, found * (1 + FAST.ball_search.tolerance)).any())
        for part in (0.01, 0.7, 0.985):
            again = search_balls(bounds, model_bounds, point, part * found).radius
            assert torch.allclose(again, found, rtol=1e-12, atol=0.0)
        for known in (found, 3 * found):
            assert bool((search_balls(bounds, model_bounds, point, known).radius == 0).all())


@pytest.mark.parametrize(("effort", "slack"), [("fast", 1e-12), ("normal", 1e-2)])
@pytest.mark.parametrize("name", [*NETWORKS, "three layers, gelu"])
def test_auto_is_never_below_a_single_method(name: str, effort: str, slack: float) -> None:
    """But for what an ascent may lose, or win, by a rounding: on average nothing."""
    network = (NETWORKS | SMOOTH)[name]
    with exact_kernels():
        point, model_bounds = (
            EvaluatedPoints(network, points(network, 8, seed=3)),
            ModelBounds(network, EFFORTS[effort]),
        )
        best = certify_batch(select("auto", network), model_bounds, point, False).radius
        for method in METHODS.values():
            if method.applies(network) is None:
                alone = certify_batch((method,), model_bounds, EvaluatedPoints(network, point.x), False).radius
                assert bool((best >= alone * (1 - slack)).all()), method.name
                assert float(best.mean()) >= float(alone.mean()) * (1 - 0.1 * slack), method.name


def test_a_sample_ends_where_it_would_alone() -> None:
    """Also one whose ball is soon found, or none at all, among others."""
    network = NETWORKS["deep relu"]
    x = torch.cat([points(network, 4), 1e-3 * points(network, 2, seed=1), 100 * points(network, 2, seed=2)])
    with exact_kernels():
        model_bounds = ModelBounds(network, EFFORTS["fast"])
        together = search_balls(BOUNDS["both"], model_bounds, EvaluatedPoints(network, x), torch.zeros(8, dtype=D))
        for k in range(8):
            alone = search_balls(
                BOUNDS["both"], model_bounds, EvaluatedPoints(network, x[k : k + 1]), torch.zeros(1, dtype=D)
            )
            assert together.radius[k] == pytest.approx(float(alone.radius), rel=1e-12)
            assert (together.rival[k], together.bound[k]) == (alone.rival[0], alone.bound[0])


numbers = st.one_of(
    st.just(0.0), st.floats(min_value=5e-324, max_value=1e-300), st.floats(min_value=1e-300, max_value=1e300)
)


@given(rate=numbers, rest=numbers, margin=numbers, radius=numbers)
def test_below_the_largest_ball_the_fall_is_less_than_the_margin(
    rate: float, rest: float, margin: float, radius: float
) -> None:
    """In exact arithmetic; and what is said of a ball is no less than the fall there."""
    fall = AffineLoss(torch.tensor([[rate]], dtype=D), torch.tensor([[rest]], dtype=D))
    ball = torch.tensor([radius], dtype=D)
    largest = float(fall.largest(torch.tensor([[margin]], dtype=D), ball))
    assert 0 <= largest <= radius
    exact = Fraction(rate) * Fraction(radius) + Fraction(rest)
    if largest > 0:  # of every smaller ball the fall is less than at `largest`, or the rest alone, which is less
        assert Fraction(rate) * Fraction(largest) + Fraction(rest) <= Fraction(margin)
        assert rest < margin
    on = float(fall.on(ball))
    assert on == math.inf or Fraction(on) >= exact


def test_what_is_no_number_proves_nothing() -> None:
    nan, inf = torch.nan, torch.inf
    rate = torch.tensor([[nan, 1.0, inf, 0.0, 1.0]], dtype=D)
    rest = torch.tensor([[0.0, nan, 0.0, inf, inf]], dtype=D)
    fall, one = AffineLoss(rate, rest), torch.ones(1, dtype=D)
    assert bool((fall.largest(torch.ones(1, 5, dtype=D), one) == 0).all())
    assert bool(fall.on(one).isinf().all())
    assert bool((AffineLoss.of(torch.ones(1, 2, dtype=D), []).on(one) > 1).all())
