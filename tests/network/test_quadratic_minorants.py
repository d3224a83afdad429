"""Quadratic minorants: no sample and no 50-digit value lies below them, and they are as deep as they must be."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mpmath
import pytest
import torch
from mpmath import mpf
from torch import Tensor

from certify_cli.network.activations import ACTIVATIONS, Activation, quadratic_minorants
from certify_cli.network.activations.interval_bounds import ActivationOnInterval
from certify_cli.network.activations.quadratic_minorants import minorant_offsets
from tests.oracles import EVERY_CASE, EXACT, chords, double, hard_places, length, random_spans

D = torch.float64


def bounded(activation: Activation) -> float:
    """sup |phi''|, or 1 in units of the activation where its slope jumps."""
    sup = activation.curvature_sup
    return activation.lipschitz / length(activation) if math.isinf(sup) else sup


def minorant_choices(span: ActivationOnInterval, seed: int = 5) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(sign, slope, bend): tangents, chords, slopes beside them and wild ones; no bend, little, and far too much."""
    g = torch.Generator().manual_seed(seed)
    shape, phi = span.z.shape, span.activation
    tangent = phi.slope(span.z)
    chord = chords(span)
    chord = torch.where(chord.isfinite(), chord, tangent)
    wild = phi.lipschitz * 3 * torch.randn(shape, generator=g, dtype=D)
    for slope in (tangent, chord, 0.5 * (tangent + chord), chord + 0.1 * wild, wild, torch.zeros_like(chord)):
        sign = torch.randint(0, 2, shape, generator=g).to(D) * 2 - 1
        bend = bounded(phi) * 10 ** (6 * torch.rand(shape, generator=g, dtype=D) - 3)
        bend = bend * torch.randint(0, 4, shape, generator=g).clamp(max=1)
        yield sign, slope, bend
        yield -sign, slope, bend


def psi(span: ActivationOnInterval, sign: Tensor, slope: Tensor, bend: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What the minorant's constant bounds from below, at `count` offsets, and the samples' own rounding."""
    phi, z = span.activation, span.z
    t = span.lo + (span.hi - span.lo) * torch.linspace(0, 1, count, dtype=D).reshape(-1, *[1] * z.dim())
    x = z + t
    value = sign * (phi.value(x) - phi.value(z) - slope * t) + 0.5 * bend * t.square()
    moved = 4e-16 * (x.abs() + z.abs()) * (phi.lipschitz + slope.abs() + bend * t.abs())
    rounding = 1e-15 * ((slope * t).abs() + phi.value(x).abs() + phi.value(z).abs() + bend * t.square())
    return value, phi.value.error(x) + phi.value.error(z) + moved + rounding


def one_sided(span: ActivationOnInterval) -> ActivationOnInterval:
    """Every third span looks right only, every third left only, the rest both ways."""
    kind = torch.arange(span.z.numel()).reshape(span.z.shape) % 3
    lo, hi = torch.where(kind == 0, 0.0, span.lo), torch.where(kind == 1, 0.0, span.hi)
    return ActivationOnInterval(span.activation, span.z, span.error, lo, hi)


@pytest.mark.parametrize("longest", [0.03, 1.0, 6.0, 100.0])
@EVERY_CASE
def test_no_sample_lies_below(name: str, numbers: tuple[float, ...], longest: float) -> None:
    span = one_sided(random_spans(ACTIVATIONS[name](*numbers), 60, longest))
    for sign, slope, bend in minorant_choices(span):
        depth = minorant_offsets(span, sign, slope, bend)
        value, rounding = psi(span, sign, slope, bend, 160)
        assert bool((depth >= 0).all())
        assert not bool((value + rounding < -depth).any())


@pytest.mark.parametrize("longest", [0.1, 1.0, 6.0])
@EVERY_CASE
def test_what_is_lost_is_of_third_order(name: str, numbers: tuple[float, ...], longest: float) -> None:
    """On half a cell of width w the parabola is off by the change of phi'' over the cell, third w, times w^2/8."""
    activation = ACTIVATIONS[name](*numbers)
    if activation.curvature is None or any(point.jump for point in activation.curvature.critical_points):
        pytest.skip("phi'' jumps or is none: no third order")
    assert activation.third_sup is not None
    span, count = random_spans(activation, 50, longest), 600
    width = span.hi - span.lo
    for sign, slope, bend in minorant_choices(span):
        value, rounding = psi(span, sign, slope, bend, count)
        needed = (-value).amax(0).clamp(min=0.0)
        between = (activation.curvature_sup + bend) * (width / (count - 1)).square() / 8  # the samples may miss it
        lost = activation.third_sup * (width / quadratic_minorants.CELLS) ** 3 / 8
        numeric = 8 * rounding.amax(0) + 1e-13 * (activation.lipschitz + slope.abs() + bend * width) * width
        assert bool((minorant_offsets(span, sign, slope, bend) <= needed + 1.01 * lost + between + numeric).all())


@EVERY_CASE
def test_where_nothing_is_needed_nothing_is_taken(name: str, numbers: tuple[float, ...]) -> None:
    """The tangent with the bend of the curvature's extreme touches at 0: the constant is rounding."""
    activation = ACTIVATIONS[name](*numbers)
    if activation.curvature is None:
        pytest.skip("no curvature")
    span = random_spans(activation, 200, 1.0)
    least, most = span.curvatures()
    tangent = activation.slope(span.z)
    for sign, bend in ((1.0, (-least).clamp(min=0.0)), (-1.0, most.clamp(min=0.0))):
        depth = minorant_offsets(span, torch.full_like(bend, sign), tangent, bend)
        lost = (activation.third_sup or 0.0) * ((span.hi - span.lo) / quadratic_minorants.CELLS) ** 3 / 8
        jumps = any(turn.jump for turn in activation.curvature.critical_points)
        cell = (
            activation.curvature_sup * ((span.hi - span.lo) / quadratic_minorants.CELLS).square() / 4 if jumps else 0.0
        )
        assert bool((depth <= 1.01 * lost + cell + 1e-12 * (1 + span.z.abs())).all())


@EVERY_CASE
def test_hard_places_against_fifty_digits(name: str, numbers: tuple[float, ...]) -> None:
    """At turns and jumps, saturated and far, offsets from 1e-12 to 1e6, true pre-activations within the error."""
    exact, _ = EXACT[name, numbers]
    activation = ACTIVATIONS[name](*numbers)
    ends = [(0.0, 0.0), (-1e-12, 1e-12), (0.0, 1e-6), (-2e-3, 0.0), (-0.4, 1.3), (-7.0, 30.0), (-1e6, 0.5)]
    places = [(z, lo, hi) for z in hard_places(activation) for lo, hi in ends]
    z, lo, hi = double([list(place) for place in places]).T
    errors = (0.0, 1e-13, 1e-4)
    for point, error in enumerate(errors):
        span = ActivationOnInterval(activation, z, torch.full_like(z, error), lo, hi)
        g = torch.Generator().manual_seed(point)
        for number, (sign, slope, bend) in enumerate(minorant_choices(span, 11)):
            if number % 4 != point:
                continue
            depth = minorant_offsets(span, sign, slope, bend).tolist()
            picks = torch.rand(len(places), 3, generator=g, dtype=D).tolist()
            for i, (place, least, most) in enumerate(places):
                if i % 5 != number % 5:
                    continue
                true = mpf(place) + mpf(error) * mpf(2 * picks[i][0] - 1)
                s, a, k = (mpf(part[i].item()) for part in (sign, slope, bend))
                for t in {least, most, least * picks[i][1] ** 3, most * picks[i][2] ** 3}:
                    with mpmath.workdps(60):
                        fall = s * (exact(true + mpf(t)) - exact(true) - a * mpf(t)) + k * mpf(t) ** 2 / 2
                        # ReLU and its kin are given no bend: their constant is without it
                        assert fall >= -mpf(depth[i]) - mpf(10) ** -50, (place, least, most, t, error)


@EVERY_CASE
def test_a_stated_error_covers_every_place_within_it(name: str, numbers: tuple[float, ...]) -> None:
    activation = ACTIVATIONS[name](*numbers)
    span = random_spans(activation, 60, 3.0)
    error = 10 ** torch.linspace(-9, -1, 60, dtype=D)
    wide = ActivationOnInterval(activation, span.z, error, span.lo, span.hi)
    for sign, slope, bend in minorant_choices(span):
        depth = minorant_offsets(wide, sign, slope, bend)
        for shift in (-0.99, -0.4, 0.7, 0.99):
            moved = ActivationOnInterval(activation, span.z + shift * error, 0.0, span.lo, span.hi)
            value, rounding = psi(moved, sign, slope, bend, 60)
            assert not bool((value + rounding < -depth).any())


@pytest.mark.parametrize("name", ["tanh", "gelu", "elu", "softsign", "sin", "relu"])
def test_shapes_errors_as_numbers_nan_and_no_end(name: str) -> None:
    activation = ACTIVATIONS[name]()
    z = torch.linspace(-2, 2, 6, dtype=D).reshape(2, 3) + 0.01
    one, reach = torch.ones_like(z), torch.full_like(z, 0.7)
    slope = activation.slope(z)
    plain = minorant_offsets(ActivationOnInterval(activation, z, 1e-9, -reach, reach), one, slope, one)
    assert plain.shape == (2, 3)
    assert torch.equal(
        plain,
        minorant_offsets(ActivationOnInterval(activation, z, torch.full_like(z, 1e-9), -reach, reach), one, slope, one),
    )
    assert torch.equal(
        plain[1:],
        minorant_offsets(
            ActivationOnInterval(activation, z[1:], 1e-9, -reach[1:], reach[1:]), one[1:], slope[1:], one[1:]
        ),
    )
    empty = minorant_offsets(ActivationOnInterval(activation, z[:0], 0.0, z[:0], z[:0]), z[:0], z[:0], z[:0])
    assert empty.shape == (0, 3)
    point = minorant_offsets(ActivationOnInterval(activation, z, 0.0, 0 * z, 0 * z), one, slope, one)
    assert bool((point < 1e-13).all())
    endless = minorant_offsets(
        ActivationOnInterval(activation, z, 0.0, -reach, torch.full_like(z, math.inf)), one, slope + 1, one
    )
    assert bool(endless.isinf().all())
    for spoilt in range(5):
        parts = [z.clone(), -reach, reach.clone(), slope.clone(), one.clone()]
        parts[spoilt][0, 1] = math.nan
        if spoilt == 4 and activation.curvature is None:
            continue  # no bend is given there
        found = minorant_offsets(
            ActivationOnInterval(activation, parts[0], 0.0, parts[1], parts[2]), one, parts[3], parts[4]
        )
        assert bool(found[0, 1].isnan()), "NaN must not pass for a constant"
        assert not bool(found[1].isnan().any())


def test_an_error_given_as_a_number_is_not_rounded_down() -> None:
    """A Python float of 1e-50 is 0 in single precision, and 1e-3 is less than itself."""
    activation = ACTIVATIONS["softplus"](2.0)
    z = double([0.3])
    for error in (1e-3, 1e-50, 3e-7):
        ends = double([-1.0]), double([2.0])
        as_number = minorant_offsets(
            ActivationOnInterval(activation, z, error, *ends), double([-1.0]), double([0.9]), double([0.1])
        )
        as_tensor = minorant_offsets(
            ActivationOnInterval(activation, z, double([error]), *ends), double([-1.0]), double([0.9]), double([0.1])
        )
        assert torch.equal(as_number, as_tensor)


def test_chunks_do_not_matter() -> None:
    span = random_spans(ACTIVATIONS["gelu"](), quadratic_minorants.CHUNK + 17, 4.0)
    sign, slope, bend = next(minorant_choices(span))
    whole = minorant_offsets(span, sign, slope, bend)
    part = slice(quadratic_minorants.CHUNK - 3, None)
    tail = ActivationOnInterval(span.activation, span.z[part], 0.0, span.lo[part], span.hi[part])
    assert torch.equal(whole[part], minorant_offsets(tail, sign[part], slope[part], bend[part]))


def test_constants_that_are_known() -> None:
    """The chord of softplus over [-a, a] is touched from below at 0: the depth is softplus(a)'s mean less log 2."""
    a = 2.0
    span = ActivationOnInterval(ACTIVATIONS["softplus"](), double([0.0]), 0.0, double([-a]), double([a]))
    phi = span.activation.value
    chord = chords(span)
    # phi - phi(0) - t/2 is even, convex and least at 0, where it is 0; mirrored it is deepest at the ends
    ends = float(phi(double([a])) - phi(double([0.0]))) - a / 2
    assert float(minorant_offsets(span, double([1.0]), chord, double([0.0]))) == pytest.approx(0.0, abs=1e-4)
    assert float(minorant_offsets(span, double([-1.0]), chord, double([0.0]))) == pytest.approx(ends, rel=1e-12)
    # and with a bend k < 1/4 at the ends it is k a^2/2 less
    assert float(minorant_offsets(span, double([-1.0]), chord, double([0.1]))) == pytest.approx(ends - 0.2, rel=1e-12)
