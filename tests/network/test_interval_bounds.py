"""Spans against dense samples, 50-digit arithmetic, symmetry and constants that are known."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import Tensor

from certify_cli.network.activations import ACTIVATIONS, Activation
from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from tests.oracles import EVERY_CASE, EXACT, Exact, chords, double, hard_places, length, random_spans

D = torch.float64
SMALL = 1e-4
"""Below this offset samples in float64 are worth nothing: 50 digits look there."""

BELOW, ABOVE = ((1.0, 0.0), (0.5, -0.2), (-1.0, 0.1)), ((0.9, 0.05), (1.0, 0.0), (0.0, 3.0))
"""Slopes of lines, as (factor of the chord's, added)."""


def answers(span: ActivationOnInterval, slope: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    found = {"slopes": span.slopes(), "secants": span.secants(), "remainders": span.remainders(slope)}
    if span.activation.curvature is not None:
        found |= {
            "curvatures": span.curvatures(),
            "bends": span.slope_secants(),
            "quadratics": span.quadratic_coefficients(),
        }
    return found


def sampled(span: ActivationOnInterval, slope: Tensor, count: int = 600) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (samples, bound of their error), (samples, entries); nothing where SMALL hides it."""
    activation, z = span.activation, span.z
    fractions = torch.linspace(0, 1, count + 1, dtype=D)[1:].square().unsqueeze(1)
    t = torch.cat((span.hi * fractions, span.lo * fractions))
    t = torch.where(t.abs() < SMALL, torch.where(t < 0, span.lo, span.hi), t)
    t = torch.where(t.abs() < SMALL, math.nan, t)
    x = z + t
    moved = 4e-16 * (x.abs() + z.abs())  # the argument's rounding
    phi, phi1 = activation.value, activation.slope
    step = phi(x) - phi(z)
    error = phi.error(x) + phi.error(z) + activation.lipschitz * moved + 4e-16 * step.abs()
    found = {
        "secants": (step / t, error / t.abs()),
        "remainders": (step - slope * t, error + 4e-16 * (slope * t).abs()),
    }
    if activation.curvature is not None:
        bend = phi1(x) - phi1(z)
        bend_error = phi1.error(x) + phi1.error(z) + activation.curvature_sup * moved
        q_error = error + (phi1.error(z) + 4e-16) * t.abs()
        found["bends"] = bend / t, bend_error / t.abs()
        found["quadratics"] = 2 * (step - phi1(z) * t) / t.square(), 2 * q_error / t.square()
    return found


@pytest.mark.parametrize("longest", [0.03, 1.0, 6.0, 100.0])
@EVERY_CASE
def test_samples_stay_inside_and_come_near(name: str, numbers: tuple[float, ...], longest: float) -> None:
    """Ends are within 2 % of the range's width and 2 % of the scale (hard swish: 5 %, its pieces have fewer cells)."""
    activation = ACTIVATIONS[name](*numbers)
    span = random_spans(activation, 400, longest)
    slope = chords(span)
    at_zero = {"secants": activation.slope(span.z), "remainders": torch.zeros_like(span.z)}
    unit = min(longest, 6.0) * length(activation)
    scale = {"secants": activation.lipschitz, "remainders": activation.lipschitz * unit}
    if activation.curvature is not None:
        at_zero |= dict.fromkeys(("bends", "quadratics"), activation.curvature(span.z))
        scale |= dict.fromkeys(("bends", "quadratics"), activation.curvature_sup)
    found = answers(span, slope)
    for key, (samples, error) in sampled(span, slope).items():
        least, most = found[key]
        assert not bool((samples + error < least).any()), key
        assert not bool((samples - error > most).any()), key
        assert bool((least <= at_zero[key]).all())
        assert bool((at_zero[key] <= most).all())
        if name == "sin" and longest > 6:
            continue  # cells are wider than its periods
        known = torch.cat((samples, at_zero[key][None]))
        low, high = known.nan_to_num(math.inf).amin(0), known.nan_to_num(-math.inf).amax(0)
        gap = torch.maximum(low - least, most - high) - 0.02 * (high - low)
        worst = int(gap.argmax())
        allowed = (0.05 if name == "hard_swish" else 0.02) * scale[key]
        assert float(gap[worst]) <= allowed, f"{key}: z={span.z[worst]}, [{span.lo[worst]}, {span.hi[worst]}]"


@EVERY_CASE
def test_hard_spans_against_fifty_digits(name: str, numbers: tuple[float, ...]) -> None:
    """Offsets from 1e-12 to 1e12, the ends themselves, true pre-activations within the stated error."""
    exact, jumps = EXACT[name, numbers]
    activation = ACTIVATIONS[name](*numbers)
    ends = [(0.0, 0.0), (-1e-12, 1e-12), (0.0, 1e-6), (-2e-3, 0.0), (-0.4, 1.3), (-7.0, 30.0), (-1e6, 0.5)]
    ends += [(-1.0, 3e7), (-2e12, 0.1), (-math.inf, math.inf), (-0.1, math.inf)]
    places_in_turn = {0.0: 0, 1e-13: 1, 1e-4: 2}
    for error in places_in_turn:
        places = [(z, lo, hi) for z in hard_places(activation) for lo, hi in ends]
        z, lo, hi = double([list(place) for place in places]).T
        span = ActivationOnInterval(activation, z, error, lo, hi)
        slope = activation.slope(z) * 0.9 + 0.01
        found = {key: [end.tolist() for end in ends_] for key, ends_ in answers(span, slope).items()}
        generator = torch.Generator().manual_seed(3)
        picks = torch.rand(len(places), 2, generator=generator, dtype=D).tolist()
        for i, (place, least, most) in enumerate(places):
            if i % 3 != places_in_turn[error]:
                continue
            true = mpf(place) + mpf(error) * mpf(2 * picks[i][0] - 1)
            if any(abs(true - mpf(jump)) == 0 for jump in jumps):
                continue  # the derivative at z is one-sided there
            low, high = max(least, -50.0), min(most, 50.0)
            far = {end for end in (least, most) if math.isfinite(end)}
            for t in {low, high, low * picks[i][1] ** 3, high * picks[i][1] ** 3, *far} - {0.0}:
                for key, truth in exactly_at(exact, true, mpf(t), mpf(slope[i].item()), activation):
                    bounds = [ends_[i] for ends_ in found[key]]
                    close = abs(truth) * mpf(10) ** -30 + mpf(10) ** -60  # what numerical differentiation leaves
                    assert mpf(bounds[0]) - close <= truth <= mpf(bounds[1]) + close, (
                        key,
                        place,
                        least,
                        most,
                        t,
                        error,
                    )


@mpmath.workdps(100)
def exactly_at(exact: Exact, z: mpf, t: mpf, slope: mpf, activation: Activation) -> list[tuple[str, mpf]]:
    step = exact(z + t) - exact(z)
    truths = [("secants", step / t), ("remainders", step - slope * t)]
    if activation.curvature is not None:
        at_z = mpmath.diff(exact, z)
        truths.append(("quadratics", 2 * (step - at_z * t) / t**2))
        truths.append(("bends", (mpmath.diff(exact, z + t) - at_z) / t))
    return truths


@EVERY_CASE
def test_nothing_exceeds_the_derivatives_ranges(name: str, numbers: tuple[float, ...]) -> None:
    span = random_spans(ACTIVATIONS[name](*numbers), 3000, 40.0)
    found = answers(span, chords(span))
    pairs = {"secants": "slopes"}
    if span.activation.curvature is not None:
        pairs |= {"bends": "curvatures", "quadratics": "curvatures"}
    for inner, outer in pairs.items():
        assert bool((found[inner][0] >= found[outer][0]).all())
        assert bool((found[inner][1] <= found[outer][1]).all())
        assert bool((found[inner][0] <= found[inner][1]).all())
    assert bool((found["remainders"][0] <= 0).all())
    assert bool((found["remainders"][1] >= 0).all())


@pytest.mark.parametrize("name", ["tanh", "atan", "erf", "sin", "softsign"])
def test_odd_activations_give_mirrored_answers(name: str) -> None:
    span = random_spans(ACTIVATIONS[name](), 500, 10.0)
    mirror = ActivationOnInterval(span.activation, -span.z, 1e-12, -span.hi, -span.lo)
    span = ActivationOnInterval(span.activation, span.z, 1e-12, span.lo, span.hi)
    slope = chords(span)
    here, there = answers(span, slope), answers(mirror, slope)
    for key in ("slopes", "secants"):
        for one, other in zip(here[key], there[key], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    for key in ("curvatures", "bends", "quadratics", "remainders"):
        torch.testing.assert_close(here[key][0], -there[key][1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(here[key][1], -there[key][0], rtol=1e-9, atol=1e-9)


def whole(activation: Activation, places: list[float]) -> ActivationOnInterval:
    z = double(places)
    return ActivationOnInterval(activation, z, 0.0, torch.full_like(z, -math.inf), torch.full_like(z, math.inf))


@EVERY_CASE
def test_anchored_constants_never_exceed_the_global_ones(name: str, numbers: tuple[float, ...]) -> None:
    activation = ACTIVATIONS[name](*numbers)
    span = whole(activation, [-40.0, -3.0, -0.7, 0.0, 0.2, 1.1, 8.0])
    assert bool((torch.stack(span.secants()).abs() <= activation.lipschitz).all())
    if activation.curvature is not None:
        assert bool((torch.stack(span.slope_secants()).abs() <= activation.curvature_sup).all())
        assert bool((torch.stack(span.quadratic_coefficients()).abs() <= activation.curvature_sup).all())
    else:
        with pytest.raises(ValueError, match="no curvature"):
            span.quadratic_coefficients()


def test_anchored_constants_that_are_known() -> None:
    tanh = ACTIVATIONS["tanh"]()
    assert [float(end) for end in whole(tanh, [0.0]).secants()] == pytest.approx([0.0, 1.0], abs=1e-12)
    # |tanh'(t) - 1| / t = tanh(t)^2 / t is largest where 2 t sech(t)^2 = tanh(t)
    place = mpmath.findroot(lambda t: 2 * t * mpmath.sech(t) ** 2 - mpmath.tanh(t), 1)
    known = float(mpmath.tanh(place) ** 2 / place)
    least, most = (float(end) for end in whole(tanh, [0.0]).slope_secants())
    assert known <= most <= known * 1.001
    assert -known * 1.001 <= least <= -known
    # the tangent from z = 2 to tanh on the left: tanh'(s) = (tanh(2) - tanh(s)) / (2 - s)
    touch = mpmath.findroot(lambda s: mpmath.sech(s) ** 2 * (2 - s) - mpmath.tanh(2) + mpmath.tanh(s), -0.5)
    known = float(mpmath.sech(touch) ** 2)
    assert known <= float(whole(tanh, [2.0]).secants()[1]) <= known * 1.001
    softplus = whole(ACTIVATIONS["softplus"](2.0), [0.0])
    assert [float(end) for end in softplus.secants()] == pytest.approx([0.0, 1.0], abs=1e-12)
    assert [float(end) for end in softplus.slope_secants()] == pytest.approx([0.0, 0.5], abs=1e-12)
    relu = whole(ACTIVATIONS["relu"](), [-1.0, 1.0])
    torch.testing.assert_close(torch.stack(relu.secants()), double([[0.0, 0.0], [1.0, 1.0]]), rtol=0, atol=1e-12)


def test_piecewise_linear_rows_are_exact() -> None:
    clip = ActivationOnInterval(
        ACTIVATIONS["clip"](0.0, 6.0), double([1.0, -2.0, 7.0]), 0.0, double([-5, -1, -9]), double([1000, 10, 3])
    )
    least, most = clip.secants()
    torch.testing.assert_close(least, double([5 / 1000, 0.0, 0.0]), atol=1e-12, rtol=0)
    torch.testing.assert_close(most, double([1.0, 6 / 8, 6 / 7]), atol=1e-12, rtol=0)
    least, most = clip.remainders(double([0.5, 0.25, 0.5]))
    torch.testing.assert_close(least, double([5 - 500, -0.5, -2.5]), atol=3e-11, rtol=0)
    torch.testing.assert_close(most, double([2.5, 4.0, 0.5]), atol=3e-11, rtol=0)


@EVERY_CASE
def test_many_lines_are_proved_as_one_by_one(name: str, numbers: tuple[float, ...]) -> None:
    """Lines below and above have slopes of their own, and each keeps its place; no sample is beyond a constant."""
    span = random_spans(ACTIVATIONS[name](*numbers), 300, 6.0)
    chord = chords(span)
    below, above = (torch.stack([chord * factor + shift for factor, shift in pairs]) for pairs in (BELOW, ABOVE))
    least, most = span.remainders_of_lines(below, above)
    for number, slope in enumerate(below):
        assert torch.equal(least[number], span.remainders(slope)[0])
        samples, error = sampled(span, slope, 200)["remainders"]
        assert not bool((samples + error < least[number]).any())
    for number, slope in enumerate(above):
        assert torch.equal(most[number], span.remainders(slope)[1])
        samples, error = sampled(span, slope, 200)["remainders"]
        assert not bool((samples - error > most[number]).any())


@EVERY_CASE
def test_a_stated_error_covers_every_place_within_it(name: str, numbers: tuple[float, ...]) -> None:
    activation = ACTIVATIONS[name](*numbers)
    span = random_spans(activation, 300, 3.0)
    slope, error = chords(span), 10 ** torch.linspace(-9, -1, 300, dtype=D)
    wide = answers(ActivationOnInterval(activation, span.z, error, span.lo, span.hi), slope)
    for shift in (-0.99, -0.3, 0.6, 0.99):
        moved = ActivationOnInterval(activation, span.z + shift * error, 0.0, span.lo, span.hi)
        for key, (samples, doubt) in sampled(moved, slope, 60).items():
            assert not bool((samples + doubt < wide[key][0]).any()), key
            assert not bool((samples - doubt > wide[key][1]).any()), key


@EVERY_CASE
def test_shapes_points_and_nan(name: str, numbers: tuple[float, ...]) -> None:
    activation = ACTIVATIONS[name](*numbers)
    z = torch.linspace(-2, 2, 6, dtype=D).reshape(2, 3) + 0.01
    nothing = torch.zeros_like(z)
    for least, most in answers(ActivationOnInterval(activation, z, 0.0, nothing, nothing), nothing).values():
        assert least.shape == most.shape == (2, 3)
        assert float((most - least).abs().max()) < 1e-12
    empty = ActivationOnInterval(activation, z[:0], 0.0, z[:0], z[:0])
    assert all(least.shape == (0, 3) for least, _ in answers(empty, z[:0]).values())
    unknown = double([math.nan, 0.0, 0.0]), double([-1.0, math.nan, -1.0]), double([1.0, 1.0, math.nan])
    span = ActivationOnInterval(activation, unknown[0], 0.0, *unknown[1:])
    for least, most in answers(span, nothing.reshape(-1)[:3]).values():
        assert bool((least.isnan() | most.isnan()).all()), "NaN must not pass for a bound"
