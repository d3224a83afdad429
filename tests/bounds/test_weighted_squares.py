"""A linear form plus a quadratic on a ball: never below the exact maximum, and equal to it where the rule is exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from certify_cli.bounds.remainder.weighted_squares import RemainderSum, joint

D = torch.float64
SIZE = 6


def largest(a: Tensor, q: Tensor, e: float) -> float:
    """sup of a . d + d^T q d / 2 over ||d|| <= e: the least of its dual, found by bisection."""
    values, vectors = torch.linalg.eigh(q)
    parts = (vectors.T @ a).square()
    top = max(float(values[-1]), 0.0)
    low, high = top * (1 + 1e-15), top + 2 * float(a.norm()) / e
    for _ in range(80):
        mu = 0.5 * (low + high)
        low, high = (mu, high) if float((parts / (mu - values).square()).sum()) > e**2 else (low, mu)
    return float(0.5 * (high * e**2 + (parts / (high - values)).sum()))


def remainder_sum(a: Tensor, q: Tensor, residual: float = 0.0) -> RemainderSum:
    """As `bounds.remainder.expansion` makes it, with the exact eigenvalue."""
    one = torch.ones(1, 1, dtype=D)
    return RemainderSum(
        eigenvalue=torch.linalg.eigvalsh(q)[-1] * one,
        row_form=(a @ q @ a) * one,
        residual=residual * one,
        square_sum=1e9 * one,
        constant=0 * one,
    )


def bound(a: Tensor, e: float, *sums: RemainderSum) -> float:
    return float(joint(a.norm().reshape(1, 1), torch.tensor([e], dtype=D), sums))


@pytest.mark.parametrize("e", [1e-3, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("lean", [0.0, 0.3, 1.0])
def test_never_below_the_exact_maximum(lean: float, e: float) -> None:
    """Gradients from anywhere to along the direction of most curvature."""
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        root = torch.randn(SIZE, 4, generator=g, dtype=D)
        q = root @ root.T
        top = torch.linalg.eigh(q)[1][:, -1]
        a = (1 - lean) * torch.randn(SIZE, generator=g, dtype=D) + lean * 5 * torch.rand(1, generator=g, dtype=D) * top
        exact, found = largest(a, q, e), bound(a, e, remainder_sum(a, q))
        assert found >= exact * (1 - 1e-9)
        assert found <= float(a.norm()) * e + 0.5 * float(torch.linalg.eigvalsh(q)[-1]) * e**2 + 1e-9 * exact
        halves = bound(a, e, remainder_sum(a, q / 2), remainder_sum(a, q / 2))
        assert halves >= exact * (1 - 1e-9)


def test_exact_where_the_gradient_is_an_eigenvector() -> None:
    """Along the direction of most curvature the two add up; across it the larger one decides."""
    q = torch.diag(torch.tensor([2.0, 0.0], dtype=D))
    along, across = torch.tensor([3.0, 0.0], dtype=D), torch.tensor([0.0, 3.0], dtype=D)
    assert bound(along, 1.0, remainder_sum(along, q)) == pytest.approx(4.0, rel=1e-6)
    assert bound(across, 1.0, remainder_sum(across, q)) == pytest.approx(3.0, rel=1e-6)
    assert bound(across, 5.0, remainder_sum(across, q)) == pytest.approx(largest(across, q, 5.0), rel=1e-2)
    assert bound(along, 1.0) == pytest.approx(3.0)


@pytest.mark.parametrize("residual", [1e-6, 0.1, 10.0])
def test_a_residual_is_paid_for(residual: float) -> None:
    """(A d + r)^2 / 2, |r|^2 = residual, along one axis: the exact maximum is (sqrt(2) e + sqrt(residual))^2 / 2."""
    q, e = torch.diag(torch.tensor([2.0, 0.0], dtype=D)), 0.7
    across = torch.tensor([0.0, 1e-6], dtype=D)
    exact = 0.5 * (2.0**0.5 * e + residual**0.5) ** 2
    assert exact <= bound(across, e, remainder_sum(across, q, residual)) <= exact * (1 + 1e-3)


@pytest.mark.parametrize("value", [0.0, 1e-200, 1e150, torch.inf, torch.nan])
def test_extremes_are_no_bound_that_is_too_small(value: float) -> None:
    a, q = torch.tensor([1.0, 0.0], dtype=D), torch.eye(2, dtype=D)
    for name in ("eigenvalue", "row_form", "residual"):
        parts = vars(remainder_sum(a, q)) | {name: torch.full((1, 1), value, dtype=D)}
        found = bound(a, 1.0, RemainderSum(**parts))
        floor = 1.0 + 0.5 * value if name == "residual" and value == value else 1.0
        assert not found < min(floor, 1e9) * (1 - 1e-9)
