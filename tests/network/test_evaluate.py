"""Rounding error bounds against exact arithmetic: mpmath at 60 digits on the same network, entry by entry."""

from __future__ import annotations

from collections.abc import Iterator

import mpmath
import pytest
import torch
from torch import Tensor

from certify_cli.network.affine import Dense
from certify_cli.network.evaluate import deviation, evaluate, margins
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from tests.networks import PIECEWISE, SMOOTH, mlp, points

EXACT = {
    "tanh": mpmath.tanh,
    "sigmoid": lambda z: 1 / (1 + mpmath.exp(-z)),
    "softplus": lambda z: mpmath.log(1 + mpmath.exp(z)),
    "relu": lambda z: max(z, mpmath.mpf(0)),
}
SLOPES = {
    "tanh": lambda z: 1 - mpmath.tanh(z) ** 2,
    "sigmoid": lambda z: mpmath.exp(-z) / (1 + mpmath.exp(-z)) ** 2,
    "softplus": lambda z: 1 / (1 + mpmath.exp(-z)),
}


@pytest.fixture(autouse=True)
def _digits() -> Iterator[None]:
    with mpmath.workdps(60):
        yield


def _matrix(weight: Tensor) -> mpmath.matrix:
    return mpmath.matrix([[mpmath.mpf(v) for v in row] for row in weight.tolist()])


def _exact(network: Network, x: Tensor, kind: str) -> tuple[list[mpmath.matrix], list[mpmath.matrix]]:
    """Exact values and pre-activations of an MLP."""
    h = mpmath.matrix([mpmath.mpf(v) for v in x.tolist()])
    values, before = [h], []
    for node in network.nodes[1:]:
        if isinstance(node.op, Dense):
            h = _matrix(node.op.weight) * h + mpmath.matrix([mpmath.mpf(v) for v in node.op.offset.tolist()])
        else:
            before.append(h)
            h = h.apply(EXACT[kind])
        values.append(h)
    return values, before


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("gain", [1.5, 30.0])
def test_error_bounds_hold_and_are_not_absurd(kind: str, gain: float) -> None:
    network = mlp((12, 40, 30, 5), kind, seed=3, gain=gain)
    x = points(network, 3)
    found = evaluate(network, x)
    worst = 0.0
    for row in range(len(x)):
        values, _ = _exact(network, x[row], kind)
        for node, exact in enumerate(values):
            computed, bound = found.values[node][row].tolist(), found.errors[node][row].tolist()
            for i, (c, e) in enumerate(zip(computed, bound, strict=True)):
                error = abs(mpmath.mpf(c) - exact[i])
                assert error <= e
                worst = max(worst, float(error / e)) if node else worst
    assert worst > 1e-3  # the bound is of the error's order, not a formality


@pytest.mark.parametrize("kind", SLOPES)
def test_gradient_norm_bounds_enclose_the_exact_norm(kind: str) -> None:
    network = mlp((10, 25, 20, 4), kind, seed=1, gain=4.0)
    x = points(network, 3, 5)
    point = EvaluatedPoints(network, x)
    for row in range(len(x)):
        _, before = _exact(network, x[row], kind)
        jacobian = _matrix(network.nodes[1].op.weight)
        for layer, z in zip((3, 5), before, strict=True):
            diagonal = mpmath.diag([SLOPES[kind](v) for v in z])
            jacobian = _matrix(network.nodes[layer].op.weight) * diagonal * jacobian
        y = int(point.prediction[row])
        for i in range(4):
            exact = mpmath.norm((jacobian[y, :] - jacobian[i, :]).T)
            low, high = float(point.gradient_norm_low[row, i]), float(point.gradient_norm[row, i])
            assert low <= exact <= high
            assert i == y or high <= low * (1 + 1e-9)


def test_margins_carry_both_errors() -> None:
    logits = torch.tensor([[1.0, 0.25, 3.0]], dtype=torch.float64)
    errors = torch.tensor([[0.1, 0.2, 0.4]], dtype=torch.float64)
    value, error = margins(logits, errors, torch.tensor([2]))
    assert value.tolist() == [[2.0, 2.75, 0.0]]
    assert error[0, 0] >= 0.5
    assert error[0, 1] >= 0.6


def test_a_thresholded_softplus_is_carried_out_of_the_margin() -> None:
    """torch returns z above the threshold; the margin loses what that can change, at x and anywhere else."""
    network = mlp((4, 6, 3), "softplus:1,20", seed=2)
    plain = mlp((4, 6, 3), "softplus:1", seed=2)
    assert float(deviation(plain).max()) == 0.0
    apart = deviation(network)
    last = network.nodes[-1].op.weight
    unit = torch.log1p(torch.exp(torch.tensor(-20.0, dtype=torch.float64)))
    assert (apart >= last.abs().sum(1) * unit).all()
    assert (apart <= last.abs().sum(1) * unit * 1.01).all()
    x = points(network, 5)
    lost = EvaluatedPoints(plain, x).margin_low - EvaluatedPoints(network, x).margin_low
    assert (lost[~EvaluatedPoints(network, x).own] > 0).all()


@pytest.mark.parametrize("name", SMOOTH | PIECEWISE)
def test_every_topology_has_finite_small_errors(name: str) -> None:
    network = (SMOOTH | PIECEWISE)[name]
    found = evaluate(network, points(network, 20))
    assert (found.logit_errors < 1e-11).all()
    assert (found.logit_errors >= 0).all()
