"""The ends of the number line: tiny and huge weights, ties, dead layers, what is not a number, and mixed batches."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from functools import cache

import pytest
import torch
from torch import Tensor

from certify_cli.attacks.ddn import nearest_attacks
from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.linear_maps.weighted_gram import weighted_gram_norms
from certify_cli.certificates.closed_form import curvature_radius, hybrid_radius, lipschitz_radius
from certify_cli.efforts import EFFORTS, Budget
from certify_cli.network.activations import from_name
from certify_cli.network.evaluate import deviation, exact_kernels
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.numerics.eigen import largest_eigenvalue
from certify_cli.numerics.norms import conv_symbol_norm, matrix_norm
from certify_cli.numerics.rounding import times, up
from tests.networks import mlp, points
from tests.soundness.common import certify, dense_stack, tensor

TANH = from_name("tanh")
POWERS = (-1000, -700, -540, -520, -500, -400, -300, -270, -200, -60, 60, 200, 300, 400, 480, 510, 530, 700, 1000)
"""Scales 2^k: exact, so that the scaled network is the same network in other units."""


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


FIRST, BIAS, LAST = _random(1, 7, 5), _random(2, 7), _random(3, 3, 7)
X = _random(4, 6, 5)


@cache
def attacks_of(activation: str) -> Tensor:
    """Distances of adversarial examples of X, in plain units."""
    with exact_kernels():
        point = EvaluatedPoints(dense_stack((FIRST, BIAS), from_name(activation), (LAST, None)), X)
        return nearest_attacks(point, X, torch.zeros(len(X), dtype=torch.float64), EFFORTS["normal"])[1].nan_to_num(
            nan=math.inf
        )


@cache
def plain_radius(activation: str, method: str, effort: str = "normal") -> Tensor:
    """Of X, in plain units."""
    return certify(dense_stack((FIRST, BIAS), from_name(activation), (LAST, None)), X, method, effort).radius


@pytest.mark.parametrize("method", ["dual", "local"])
@pytest.mark.parametrize("effort", ["fast", "max"])
@pytest.mark.parametrize("activation", ["tanh", "softplus"])
@pytest.mark.parametrize("power", POWERS)
def test_units_of_the_input_change_nothing(power: int, activation: str, effort: str, method: str) -> None:
    """x / c with first weights c W. Below c = 1e-81 the curvature of such a network once came out as 0."""
    phi = from_name(activation)
    if method == "local" and ((effort, activation) == ("fast", "tanh") or abs(power) not in (60, 200, 400, 700)):
        pytest.skip("some scales of a method that searches suffice")
    plain = plain_radius(activation, method, effort)
    c = 2.0**power
    scaled = certify(dense_stack((c * FIRST, BIAS), phi, (LAST, None)), X / c, method, effort)
    # never more than in plain units, whatever is lost at the ends of the range; beyond 2^400 other points of the dual's
    # balls overflow than in plain units, so that their search may stop 1e-4 (`tangent.GAIN`) away
    # where the fourth powers of `local` leave the range its search goes another way: proved, but not the same
    if method == "local" and abs(power) >= 400:
        assert bool((scaled.radius >= 0).all())
        assert bool((scaled.radius * c < attacks_of(activation)).all())
        return
    allowed = 1e-4 if abs(power) > 400 and effort == "max" else 1e-9
    assert bool((scaled.radius * c <= plain * (1 + allowed)).all())
    assert bool((scaled.radius >= 0).all())
    if abs(power) <= (200 if method == "local" else 400):  # the fourth powers of `local` leave the range earlier
        assert torch.allclose(scaled.radius * c, plain, rtol=1e-9, atol=0)


@pytest.mark.parametrize("power", POWERS)
def test_units_of_the_logits_change_nothing(power: int) -> None:
    c = 2.0**power
    for method in ("dual", "local"):
        plain = plain_radius("tanh", method)
        scaled = certify(dense_stack((FIRST, BIAS), TANH, (c * LAST, None)), X, method)
        if method == "local" and abs(power) > 200:  # as above
            assert bool((scaled.radius < attacks_of("tanh")).all())
            continue
        assert bool((scaled.radius <= plain * (1 + 1e-9)).all())
        if abs(power) <= 400:
            assert torch.allclose(scaled.radius, plain, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["dual", "local"])
@pytest.mark.parametrize("power", POWERS)
def test_a_factor_that_is_given_and_taken_back(power: int, method: str) -> None:
    """c I, then W / c: no product of norms may vanish on the way."""
    c = 2.0**power
    eye = c * torch.eye(5, dtype=torch.float64)
    plain = plain_radius("tanh", method)
    for parts in (((eye, None), (FIRST / c, BIAS)), ((eye / c / c, None), (FIRST * c, BIAS))):
        if abs(power) > 500 and parts[0][0].abs().max() in (0.0, math.inf):
            continue
        scaled = certify(dense_stack(*parts, TANH, (LAST, None)), X, method)
        assert bool((scaled.radius <= plain * (1 + 1e-9)).all())
        if abs(power) <= (200 if method == "local" else 300):
            assert torch.allclose(scaled.radius, plain, rtol=1e-9, atol=0)


@pytest.mark.parametrize("power", POWERS)
def test_norms_at_every_scale(power: int) -> None:
    c = 2.0**power
    a, w = _random(5, 6, 9), _random(6, 3, 2, 3, 3)
    for scaled, plain in (
        (matrix_norm(c * a), matrix_norm(a)),
        (
            conv_symbol_norm(c * w, (5, 5), (2, 1), (1, 1), (1, 1)),
            conv_symbol_norm(w, (5, 5), (2, 1), (1, 1), (1, 1)),
        ),
    ):
        # exact scaling: the same proof, but where entries become denormal
        assert Fraction(scaled) >= Fraction(plain) * Fraction(c) * (1 - Fraction(1, 10**8))
        assert scaled == pytest.approx(plain * c, rel=1e-8, abs=1e-300)
    gram = a @ a.T
    exact = float(torch.linalg.eigvalsh(gram)[-1])
    if abs(power) < 1000:
        together = torch.stack([gram, c * gram])  # two scales in one batch
        plain, scaled = largest_eigenvalue(together).tolist()
        assert exact <= plain <= exact * (1 + 1e-6)
        assert exact * c <= scaled <= exact * c * (1 + 1e-6)


@pytest.mark.parametrize("effort", ["fast", "normal"])
@pytest.mark.parametrize("power", [-500, -270, -100, 100, 270])
def test_weighted_grams_at_every_scale(power: int, effort: str) -> None:
    c, a, w = 2.0**power, _random(7, 8, 5), _random(8, 4, 8).abs()
    exact = torch.stack([torch.linalg.eigvalsh(a.T @ (row.unsqueeze(1) * a))[-1] for row in w])
    budget = EFFORTS[effort].budget
    for budget_ in (budget, Budget(norm=0.0, eigenvalues=0.0)):  # the second leaves only the Perron bound
        for value, scale in (
            (weighted_gram_norms(c * a, w / c / c, budget_), 1.0),
            (weighted_gram_norms(a, w * c, budget_), c),
            (weighted_gram_norms(c * a, w / c, budget_), c),
        ):
            assert bool((value >= exact * scale).all())
            assert bool((value <= 4 * exact * scale).all())


def test_weights_that_are_not_numbers_prove_nothing() -> None:
    a = _random(7, 8, 5)
    budget = EFFORTS["normal"].budget
    for bad in (math.nan, math.inf):
        w = torch.full((2, 8), bad, dtype=torch.float64)
        assert not bool((weighted_gram_norms(a, w, budget) < math.inf).any())
        assert not bool((weighted_gram_norms(torch.full_like(a, bad), torch.ones_like(w), budget) < math.inf).any())
        assert not matrix_norm(torch.full_like(a, bad)) < math.inf
        assert not conv_symbol_norm(torch.full((1, 1, 3), bad, dtype=torch.float64), (5,), (1,), (1,), (1,)) < math.inf


def test_a_product_never_vanishes_half_way() -> None:
    assert times(1e-200, 1e-200, 1e300) >= 1e-100
    assert float(times(tensor(1e-200), 1e-200, 1e300)) >= 1e-100
    assert up(0.0) > 0.0


def test_the_largest_numbers() -> None:
    most = sys.float_info.max
    assert matrix_norm(tensor([most, 0.0], [0.0, 1.0])) >= most
    # 2 f overflows for f beyond half the largest number: the claim is still f / ||g||
    f, g, zero = tensor(0.9 * most), tensor(1e10), tensor(0.0)
    for radius in (curvature_radius(f, g, zero), hybrid_radius(f, g, zero, g), lipschitz_radius(f, g)):
        assert Fraction(float(radius)) * Fraction(1e10) <= Fraction(0.9 * most)
    network = dense_stack((tensor([0.9e308], [-0.9e308]), None))
    for method in ("lipschitz", "curvature"):
        radius = float(certify(network, tensor([0.99]), method).radius)
        assert radius <= 0.99


@pytest.mark.parametrize("method", ["lipschitz", "curvature", "auto"])
def test_ties_certify_nothing(method: str) -> None:
    twins = torch.cat([LAST[:1], LAST[:1], LAST[1:]])  # classes 0 and 1 are one and the same
    network = dense_stack((FIRST, BIAS), TANH, (twins, None))
    found = certify(network, X, method)
    top = network(X).argmax(1)
    assert bool((top <= 1).any())
    assert bool((found.radius[top <= 1] == 0).all())
    assert bool((found.radius[top > 1] > 0).all())
    # a margin below the evaluation's own error is a tie as well
    shift = tensor(1e-17, 0.0, 0.0, 0.0)
    near = certify(dense_stack((FIRST, BIAS), TANH, (twins, shift)), X, method)
    assert bool((near.radius[top <= 1] == 0).all())


def test_all_logits_equal() -> None:
    network = dense_stack((torch.zeros(4, 5, dtype=torch.float64), torch.ones(4, dtype=torch.float64)))
    for method in ("lipschitz", "curvature"):
        found = certify(network, X, method)
        assert bool((found.radius == 0).all())
        assert bool(found.attack.isnan().all())


@pytest.mark.parametrize("method", ["lipschitz", "curvature", "auto"])
def test_classes_that_differ_by_a_constant_never_flip(method: str) -> None:
    """Two classes with one row and two biases: no perturbation flips them, whatever the third does."""
    twins = torch.cat([LAST[:1], LAST[:1]])
    network = dense_stack((FIRST, BIAS), TANH, (twins, tensor(2.0, 0.0)))
    found = certify(network, X, method)
    assert bool((found.radius > 1e12).all())  # two equal rows, subtracted after rounding
    assert bool(found.attack.isnan().all())
    three = dense_stack((FIRST, BIAS), TANH, (torch.cat([twins, LAST[1:2]]), tensor(2.0, 0.0, 0.0)))
    two = dense_stack((FIRST, BIAS), TANH, (torch.cat([twins[:1], LAST[1:2]]), tensor(2.0, 0.0)))
    with_twin, without = certify(three, X, method), certify(two, X, method)
    assert torch.allclose(with_twin.radius, without.radius, rtol=1e-9, atol=0)


@pytest.mark.parametrize("where", ["first", "last", "all"])
def test_dead_layers(where: str) -> None:
    zero_first, zero_last = torch.zeros_like(FIRST), torch.zeros_like(LAST)
    network = dense_stack(
        (zero_first if where != "last" else FIRST, BIAS),
        TANH,
        (zero_last if where != "first" else LAST, tensor(1.0, 0.0, 0.5)),
    )
    for method in ("lipschitz", "curvature", "auto"):
        found = certify(network, X, method)
        assert bool((found.radius > 1e100).all())  # a constant classifier
        assert bool(found.attack.isnan().all())


def test_denormal_weights_among_ordinary_ones() -> None:
    first = FIRST.clone()
    first[0, 0], first[1], first[:, 2] = 5e-324, 1e-310, -3e-320
    clean = first.masked_fill(first.abs() < 1e-300, 0.0)
    noisy = certify(dense_stack((first, BIAS), TANH, (LAST, None)), X)
    plain = certify(dense_stack((clean, BIAS), TANH, (LAST, None)), X)
    assert torch.allclose(noisy.radius, plain.radius, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["lipschitz", "curvature", "auto"])
def test_a_sample_that_is_not_finite_spoils_no_other(method: str) -> None:
    network = mlp((5, 8, 7, 3), "softplus", seed=3)
    bad = torch.cat([X, tensor([math.nan] * 5, [math.inf] * 5, [1e308] * 5)])
    mixed, alone = certify(network, bad, method), certify(network, X, method)
    assert torch.allclose(mixed.radius[:6], alone.radius, rtol=1e-12, atol=0)
    assert bool((mixed.radius[6:] == 0).all())
    assert bool(mixed.attack[6:].isnan().all())


@pytest.mark.parametrize("value", [1e160, 1e308])
def test_networks_beyond_every_bound(value: float) -> None:
    """Norms that overflow certify nothing or little; they do not raise, and they do not claim."""
    network = dense_stack(
        (value * FIRST, None), TANH, (value * _random(9, 6, 7), None), from_name("sigmoid"), (LAST[:, :6], None)
    )
    for effort in ("fast", "max"):
        found = certify(network, X, effort=effort)
        assert bool((found.radius >= 0).all())
        assert bool((found.radius * value <= 100).all())


def test_a_deep_network_whose_product_of_norms_leaves_the_range() -> None:
    """Twelve layers of norm 10^30: the product is 1e360, and Python's own ** would raise."""
    parts: list[object] = []
    for number in range(12):
        parts += [(1e30 * torch.eye(3, dtype=torch.float64), _random(number, 3)), TANH]
    network = dense_stack(*parts, (_random(0, 2, 3), tensor(0.3, 0.0)))
    found = certify(network, X[:, :3])
    assert bool((found.radius >= 0).all())
    assert not bool(found.radius.isnan().any())


def test_two_classes_and_one_input_and_one_sample() -> None:
    network = dense_stack((tensor([1.0]), None), TANH, (tensor([1.0], [0.0]), None))
    for x in (0.7, -0.7, 1e-3, 1e-200, 25.0):
        for method in ("lipschitz", "curvature", "auto"):
            radius = float(certify(network, tensor([x]), method).radius)
            assert Fraction(radius) <= abs(Fraction(x))  # tanh changes its sign at 0, exactly
            assert radius > 0 or abs(x) < 1e-100


def test_the_deployed_softplus_is_allowed_for() -> None:
    """torch returns z beyond the threshold: margins smaller than the sum of the errors are ties."""
    exact, deployed = from_name("softplus:1"), from_name("softplus:1,20")
    wide = 1000
    first = torch.ones(wide, 1, dtype=torch.float64)
    last = torch.cat([torch.ones(1, wide), torch.zeros(1, wide)]).double()
    x = tensor([20.5])
    level = float(torch.nn.functional.softplus(x, threshold=1e9)[0, 0]) * wide
    step = 1e-7  # more than rounding, less than the 1000 * 2.1e-9 of the deployed operator
    shift = tensor(0.0, level - step)
    assert float(certify(dense_stack((first, None), exact, (last, shift)), x).radius) > 0
    network = dense_stack((first, None), deployed, (last, shift))
    assert float(deviation(network)[0]) >= wide * math.log1p(math.exp(-20.0))
    assert float(certify(network, x).radius) == 0
    torchs = torch.nn.functional.softplus(x @ first.T) @ last.T + shift
    assert int(torchs.argmax()) == 1  # and indeed torch's own operator predicts the other class
    wider = tensor(0.0, level - 1e-5)
    assert float(certify(dense_stack((first, None), deployed, (last, wider)), x).radius) > 0


def test_no_bound_of_a_pair_is_nan_where_the_network_is_finite() -> None:
    for name in ("tanh", "softplus", "sin"):
        for gain in (1e-120, 1e-3, 1e3, 1e120):
            network = mlp((4, 6, 5, 3), name, seed=1, gain=gain)
            with exact_kernels():
                model_bounds, point = ModelBounds(network), EvaluatedPoints(network, points(network, 2))
                for table in (model_bounds.lipschitz_pairs, model_bounds.curvature_pairs):
                    assert not bool(table.rows(point.prediction).isnan().any())
                    assert not bool(table.columns(point.prediction).isnan().any())
