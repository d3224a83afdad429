"""Networks whose radius is known by construction: a certificate may reach it, and may not pass it by one ulp."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from certify_cli.certificates.methods import METHODS as METHODS_BY_NAME
from certify_cli.network.activations import from_name
from certify_cli.network.affine import Dense, Scale, Shift, materialise
from certify_cli.network.convolution import Conv
from certify_cli.network.graph import Add, Builder, Concat, Network
from certify_cli.network.movement import Reshape, Select
from tests.networks import points
from tests.soundness.common import certify, dense_stack, tensor

METHODS = ("lipschitz", "curvature", "auto")


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _exact_squares(weight: Tensor, bias: Tensor, x: Tensor) -> Fraction:
    """The squared radius of z = W x + b at x in rational arithmetic: min over rivals of margin^2 / ||w_y - w_i||^2."""
    rows = [[Fraction(float(v)) for v in row] for row in weight]
    point = [Fraction(float(v)) for v in x]
    logits = [
        sum((w * p for w, p in zip(row, point, strict=True)), Fraction(float(b)))
        for row, b in zip(rows, bias, strict=True)
    ]
    top = max(range(len(logits)), key=logits.__getitem__)
    return min(
        (logits[top] - logits[i]) ** 2 / sum((a - b) ** 2 for a, b in zip(rows[top], rows[i], strict=True))
        for i in range(len(logits))
        if i != top
    )


@pytest.mark.smoke
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("inputs", "classes"), [(1, 2), (5, 2), (7, 4), (40, 10)])
def test_linear_classifiers_in_rational_arithmetic(inputs: int, classes: int, method: str) -> None:
    weight, bias = _random(inputs, classes, inputs), _random(1, classes)
    x = _random(2, 6, inputs)
    found = certify(dense_stack((weight, bias)), x, method)
    for row in range(6):
        exact = _exact_squares(weight, bias, x[row])
        claimed = Fraction(float(found.radius[row]))
        assert 0 < claimed**2 <= exact
        assert float(claimed**2 / exact) > 1 - 1e-8
        if not math.isnan(float(found.attack[row])):
            assert Fraction(float(found.attack[row])) ** 2 >= exact


def _affine_maze(seed: int) -> Network:
    """Nothing but affine nodes, in every topology: convolution, padding, residual sum, concatenation, scale, shift."""
    b = Builder((2, 5, 5))
    last = b.add("shift", Shift(_random(seed, 2, 1, 1)), 0)
    last = b.add("scale", Scale(_random(seed + 1, 2, 1, 1)), last)
    pad = Select.of(lambda t: torch.nn.functional.pad(t, (1, 1, 1, 1), mode="reflect"), (2, 5, 5))
    padded = b.add("pad", pad, last)
    conv = b.add("conv", Conv(_random(seed + 2, 2, 2, 3, 3), _random(seed + 3, 2), (1, 1), (0, 0), (1, 1)), padded)
    total = b.add("sum", Add(), last, conv, last)
    down = b.add("down", Conv(_random(seed + 4, 4, 1, 3, 3), None, (2, 2), (2, 2), (2, 2), 2), total)
    parts = [b.add(f"flat{i}", Reshape((math.prod(b.shape(i)),)), i) for i in (total, down)]
    joined = b.add("join", Concat(0), *parts)
    return b.build(b.add("fc", Dense(_random(seed + 5, 3, b.shape(joined)[0]), _random(seed + 6, 3)), joined))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_any_affine_network_is_as_linear_as_its_matrix(seed: int, method: str) -> None:
    """The blocks are multiplied out before their norm is taken: nothing is lost, nothing claimed in excess."""
    network = _affine_maze(10 * seed)
    x = points(network, 5)
    basis = torch.eye(50, dtype=torch.float64).reshape(50, 2, 5, 5)
    zero = network(torch.zeros(1, 2, 5, 5, dtype=torch.float64))
    matrix = (network(basis) - zero).T
    logits = network(x)
    found = certify(network, x, method)
    for row in range(5):
        top = int(logits[row].argmax())
        exact = min(
            float(logits[row, top] - logits[row, i]) / float((matrix[top] - matrix[i]).norm())
            for i in range(3)
            if i != top
        )
        assert float(found.radius[row]) == pytest.approx(exact, rel=1e-8)
        assert float(found.radius[row]) <= exact * (1 + 1e-12)


RISING = ("tanh", "sigmoid", "softplus:3", "log_sigmoid", "atan", "erf", "softsign", "elu", "celu:0.5", "relu", "selu")


@pytest.mark.parametrize("method", ["lipschitz", "auto"])
@pytest.mark.parametrize("name", RISING)
def test_one_rising_activation_flips_where_its_argument_does(name: str, method: str) -> None:
    """Logits (phi(<w, x>), phi(t)): the distance is |<w, x> - t| / ||w|| whatever phi is."""
    phi, w = from_name(name), _random(3, 4)
    size = float(w.norm())
    for t in (-1.3, 0.2, 0.9):
        level = float(phi.value(tensor(t))[0])
        if name in ("relu", "selu") and t < 0:
            continue  # flat (or nearly) there: the level is not where the argument crosses t
        network = dense_stack((w.unsqueeze(0), None), phi, (tensor([1.0], [0.0]), tensor(0.0, level)))
        gaps = tensor(-3.0, -0.5, -1e-3, 1e-3, 0.5, 3.0, 30.0)
        x = (t + gaps).unsqueeze(1) * w / size**2
        found = certify(network, x, method)
        exact = gaps.abs() / size
        assert bool((found.radius <= exact * (1 + 1e-9)).all())
        assert bool((found.attack[~found.attack.isnan()] >= exact[~found.attack.isnan()] * (1 - 1e-9)).all())
        if method == "auto" and name not in ("relu", "selu"):
            # next to the boundary the curve is its tangent
            assert float((found.radius / exact)[2:4].min()) > 0.99


@pytest.mark.parametrize("effort", ["fast", "normal", "max"])
@pytest.mark.parametrize("units", [1, 3, 6])
def test_a_bowl_at_its_bottom(units: int, effort: str) -> None:
    """f = C - sum_i (s(x_i) + s(-x_i)), s = softplus: at 0 the gradient vanishes and Hess f = -I/2.

    By concavity of t -> s(sqrt t) + s(-sqrt t) the nearest zero lies on the diagonal: log(2 + 2 cosh(r/sqrt n)) = C/n.
    """
    eye = torch.eye(units, dtype=torch.float64)
    for excess in (1e-4, 1e-2, 1.0):
        level = units * (2 * math.log(2.0) + excess)
        ones = -torch.ones(1, 2 * units, dtype=torch.float64)
        out = torch.cat([ones, torch.zeros_like(ones)])
        network = dense_stack((torch.cat([eye, -eye]), None), from_name("softplus"), (out, tensor(level, 0.0)))
        exact = math.sqrt(units) * math.acosh((math.exp(2 * math.log(2.0) + excess) - 2) / 2)
        radius = float(certify(network, torch.zeros(1, units, dtype=torch.float64), "curvature", effort).radius)
        assert radius <= exact * (1 + 1e-9)
        if excess < 1e-3:
            assert radius > 0.999 * exact


@pytest.mark.parametrize("seed", range(4))
def test_a_rotated_copy_has_the_same_radius(seed: int) -> None:
    """x -> Q x in front (a Dense of its own, or folded) moves the samples, not the distances."""
    q, _ = torch.linalg.qr(_random(seed, 6, 6))
    first, last = _random(seed + 1, 8, 6), _random(seed + 2, 3, 8)
    bias = _random(seed + 3, 8)
    x = _random(seed + 4, 4, 6)
    plain = certify(dense_stack((first, bias), from_name("tanh"), (last, None)), x)
    in_front = certify(dense_stack((q, None), (first, bias), from_name("tanh"), (last, None)), x @ q)
    folded = certify(dense_stack((first @ q, bias), from_name("tanh"), (last, None)), x @ q)
    for other in (in_front, folded):
        assert torch.allclose(plain.radius, other.radius, rtol=1e-9, atol=0)
        assert bool((plain.rival == other.rival).all())


def test_average_pooling_and_strides_in_closed_form() -> None:
    """Mean of all pixels against a constant: f = mean(x) - c, radius |f| * sqrt(n)."""
    b = Builder((1, 6, 6))
    pool = b.add("pool", Conv(torch.full((1, 1, 2, 2), 0.25, dtype=torch.float64), None, (2, 2), (0, 0), (1, 1)), 0)
    flat = b.add("flat", Reshape((9,)), pool)
    network = b.build(b.add("fc", Dense(tensor([1 / 9] * 9, [0.0] * 9), tensor(0.0, 0.25)), flat))
    x = torch.full((1, 1, 6, 6), 0.75, dtype=torch.float64)
    for method in METHODS:
        assert float(certify(network, x, method).radius) == pytest.approx(3.0, rel=1e-8)
        assert float(certify(network, x, method).radius) <= 3.0 * (1 + 1e-15)
    assert materialise(network.nodes[1].op, (1, 6, 6)).shape == (9, 36)  # type: ignore[arg-type]


FAR = [
    (name, gain)
    for name in ("relu", "leaky_relu", "hard_swish", "elu", "softplus", "silu", "gelu", "mish", "log_sigmoid", "clip")
    for gain in (1.0, 1e4, 1e7, 1e12)
]


@pytest.mark.parametrize("method", ["lipschitz", "local", "linear", "local-lipschitz", "auto"])
@pytest.mark.parametrize(("name", "gain"), FAR)
def test_a_unit_that_is_driven_far(name: str, gain: float, method: str) -> None:
    """z = gain x + 0.3 must rise by 2e6: ranges far beyond those on which an activation bends, as raw features have."""
    phi = from_name({"clip": "clip:-1,1e9"}.get(name, name))
    sign = -1.0 if name == "log_sigmoid" else 1.0  # mirrored
    logits = (torch.tensor([[0.0], [sign * 1e-6]], dtype=torch.float64), tensor(2.0, 0.0))
    network = dense_stack((tensor([sign * gain]), tensor(0.3)), phi, logits)
    if method != "auto" and METHODS_BY_NAME[method].applies(network) is not None:
        pytest.skip("does not apply to this activation")
    # phi(z) is z there, up to 1e-9 of it: the logits meet where z is 2e6
    true = (2e6 - sign * 0.3) / gain
    found = float(certify(network, tensor([0.0]), method).radius[0])
    assert found <= true * (1 + 1e-6)
    assert method != "linear" or found > 0.4 * true
