"""The closed forms: against exact rational arithmetic, at their edges, and on functions of known radius."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from certify_cli.certificates.closed_form import attack_radius, curvature_radius, hybrid_radius, lipschitz_radius

numbers = st.floats(min_value=1e-12, max_value=1e12)


def _t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.smoke
@given(f=numbers, g=st.floats(0, 1e12), m=st.floats(0, 1e12))
def test_the_certified_radius_never_reaches_the_root(f: float, g: float, m: float) -> None:
    """f - g r - M r^2/2 > 0 in exact arithmetic at the printed r (>= 0 is what the proof needs)."""
    r = float(curvature_radius(_t(f), _t(g), _t(m)))
    if math.isinf(r):
        assert g == 0.0
        assert m == 0.0
        return
    exact = Fraction(f) - Fraction(g) * Fraction(r) - Fraction(m) * Fraction(r) ** 2 / 2
    assert exact >= 0
    if 0 < g < 1e-100:
        return  # so flat that the guard against underflow decides
    # and it is sharp: a relative 1e-12 further the bound is gone
    further = Fraction(r) * (1 + Fraction(1, 10**12))
    assert Fraction(f) - Fraction(g) * further - Fraction(m) * further**2 / 2 < 0


@given(f=numbers, g=st.floats(1e-6, 1e6), m=st.floats(0, 1e6))
def test_the_attack_radius_reaches_the_root(f: float, g: float, m: float) -> None:
    r = float(attack_radius(_t(f), _t(g), _t(m)))
    exact = Fraction(g) ** 2 - 2 * Fraction(m) * Fraction(f)
    if math.isinf(r):
        assert exact <= Fraction(g) ** 2 / 10**12
        return
    assert exact >= 0
    if r < float(g) / m if m else True:
        assert Fraction(f) - Fraction(g) * Fraction(r) + Fraction(m) * Fraction(r) ** 2 / 2 <= 0


@given(f=numbers, g=st.floats(0, 1e6), m=st.floats(0, 1e6), lip=st.floats(1e-6, 1e6))
def test_the_hybrid_radius_is_proved_by_some_split(f: float, g: float, m: float, lip: float) -> None:
    """f - int_0^r min(g + M t, L) dt >= 0 exactly, and never less than either part alone."""
    r = float(hybrid_radius(_t(f), _t(g), _t(m), _t(lip)))
    parts = float(curvature_radius(_t(f), _t(g), _t(m))), float(lipschitz_radius(_t(f), _t(lip)))
    assert r >= max(parts) * (1 - 1e-12)
    if math.isinf(r):
        return
    big_f, big_g, big_m, big_l, big_r = map(Fraction, (f, g, m, lip, r))
    split = min(big_r, max(Fraction(0), (big_l - big_g) / big_m) if m else (big_r if lip >= g else Fraction(0)))
    offset_loss = big_g * split + big_m * split**2 / 2 + big_l * (big_r - split)
    assert big_f - offset_loss >= 0


def test_the_textbook_form_over_claims_where_ours_does_not() -> None:
    """(sqrt(g^2 + 2 M f) - g)/M cancels as M f/g^2 approaches u."""
    f, g = 1.0, 1e8
    worst = 0.0
    for exponent in range(-12, 12):
        m = 3.3 * 10.0**exponent
        textbook = (math.sqrt(g * g + 2 * m * f) - g) / m
        exact = 2 * f / (g + math.sqrt(g * g + 2 * m * f))
        worst = max(worst, textbook / exact)
        ours = float(curvature_radius(_t(f), _t(g), _t(m)))
        assert Fraction(f) - Fraction(g) * Fraction(ours) - Fraction(m) * Fraction(ours) ** 2 / 2 >= 0
    assert worst > 1.0


@pytest.mark.parametrize("margin", [0.0, -1.0, -math.inf, math.nan])
def test_no_positive_margin_no_certificate(margin: float) -> None:
    one = _t(1.0)
    for radius in (
        lipschitz_radius(_t(margin), one),
        curvature_radius(_t(margin), one, one),
        hybrid_radius(_t(margin), one, one, one),
        curvature_radius(_t(margin), _t(0.0), _t(0.0)),
    ):
        assert float(radius) == 0.0
    assert math.isinf(float(attack_radius(_t(margin), one, one)))


def test_nan_in_a_bound_certifies_nothing() -> None:
    one, nan = _t(1.0), _t(math.nan)
    assert float(curvature_radius(one, nan, one)) == 0.0
    assert float(curvature_radius(one, one, nan)) == 0.0
    assert float(lipschitz_radius(one, nan)) == 0.0
    assert math.isinf(float(attack_radius(one, nan, one)))
    assert math.isinf(float(attack_radius(one, one, nan)))


def test_edges() -> None:
    one, zero, inf = _t(1.0), _t(0.0), _t(math.inf)
    assert math.isinf(float(curvature_radius(one, zero, zero)))  # this rival cannot flip
    assert math.isinf(float(lipschitz_radius(one, zero)))
    assert math.isinf(float(attack_radius(one, zero, zero)))  # no direction to go
    assert float(curvature_radius(one, one, zero)) == pytest.approx(1.0)
    assert float(curvature_radius(one, one, inf)) == 0.0
    assert float(hybrid_radius(one, one, inf, _t(2.0))) == pytest.approx(0.5)
    assert float(hybrid_radius(one, one, zero, _t(2.0))) == pytest.approx(1.0)
    assert float(hybrid_radius(one, _t(3.0), zero, _t(2.0))) == pytest.approx(0.5)
    assert math.isinf(float(attack_radius(_t(1.0), one, _t(0.5 + 1e-9))))  # negative discriminant
    assert float(attack_radius(_t(1.0), one, _t(0.4))) >= 2 / (1 + math.sqrt(0.2))
    # M+ = 0 gives the linear root
    assert float(attack_radius(one, _t(4.0), zero)) == pytest.approx(0.25)


def test_an_anchored_lipschitz_constant_may_not_enter_the_integral() -> None:
    """f(t) = 1 - t^2/2: g = 0, M = 1, root at 1.4142; anchored at 0 its secant slope on [-1.4142, 1.4142] is .7071.

    With that constant in the integral the radius passes the root; with the slope on the ball, 1.4142, it does not.
    """
    root = math.sqrt(2.0)
    anchored = float(hybrid_radius(_t(1.0), _t(0.0), _t(1.0), _t(root / 2)))
    on_the_ball = float(hybrid_radius(_t(1.0), _t(0.0), _t(1.0), _t(math.nextafter(root, 2.0))))
    assert anchored > root
    assert on_the_ball <= root
    assert on_the_ball == pytest.approx(root, rel=1e-9)
