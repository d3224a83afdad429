"""Norm and eigenvalue bounds against LAPACK oracles: never below, hardly above."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from certify_cli.numerics.eigen import (
    factor_residual,
    largest_eigenvalue,
    largest_of_all,
    ritz_estimate,
    starting_vectors,
    symmetric_product,
)
from certify_cli.numerics.norms import conv_symbol_norm, frobenius_norm, matrix_norm
from certify_cli.numerics.rounding import UNIT, down, gamma, up, vector_norm_up


def _clustered(n: int) -> Tensor:
    """Symmetric with its two largest eigenvalues a relative 1e-10 apart: hard for any power iteration."""
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    values = torch.linspace(0.0, 1.0, n, dtype=torch.float64)
    values[-2] = 1.0 - 1e-10
    return (q * values) @ q.T


def _tiny_top(n: int) -> Tensor:
    """The top eigenvector is orthogonal to nearly everything a few power steps would find."""
    values = torch.full((n,), 0.999, dtype=torch.float64)
    values[0] = 1.0
    return torch.diag(values)


MATRICES = {
    "random": lambda: torch.randn(60, 60, dtype=torch.float64),
    "clustered": lambda: _clustered(50),
    "tiny gap": lambda: _tiny_top(80),
    "rank one": lambda: torch.outer(torch.randn(30, dtype=torch.float64), torch.randn(30, dtype=torch.float64)),
    "zero": lambda: torch.zeros(7, 7, dtype=torch.float64),
    "one by one": lambda: torch.tensor([[-3.0]], dtype=torch.float64),
    "huge": lambda: 1e200 * torch.randn(8, 8, dtype=torch.float64),
    "small": lambda: 1e-200 * torch.randn(8, 8, dtype=torch.float64),
    "tall": lambda: torch.randn(90, 4, dtype=torch.float64),
    "wide": lambda: torch.randn(3, 200, dtype=torch.float64),
    "row": lambda: torch.randn(1, 200, dtype=torch.float64),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", MATRICES)
def test_matrix_norm_is_an_upper_bound_and_sharp(name: str) -> None:
    matrix = MATRICES[name]()
    oracle = float(torch.linalg.svdvals(matrix)[0])
    bound = matrix_norm(matrix)
    assert bound >= oracle * (1 - 1e-14)
    assert bound <= oracle * (1 + 1e-3) + 1e-300


def test_a_norm_that_is_not_finite_is_infinite() -> None:
    assert matrix_norm(torch.tensor([[1.0, math.nan], [0.0, 1.0]], dtype=torch.float64)) == math.inf
    assert matrix_norm(torch.tensor([[1.0, math.inf], [0.0, 1.0]], dtype=torch.float64)) == math.inf


@pytest.mark.parametrize("n", [1, 2, 17, 120])
def test_largest_eigenvalues_of_a_batch(n: int) -> None:
    roots = torch.randn(5, n, n, dtype=torch.float64)
    matrices = roots @ roots.mT
    matrices[3] = 0.0
    oracle = torch.linalg.eigvalsh(matrices)[:, -1]
    bound = largest_eigenvalue(matrices)
    assert (bound >= oracle * (1 - 1e-14)).all()
    assert (bound <= oracle * (1 + 1e-3) + 1e-12).all()


def test_the_slack_is_added() -> None:
    matrices = torch.eye(4, dtype=torch.float64).unsqueeze(0)
    assert float(largest_eigenvalue(matrices, 0.25)) >= 1.25


def test_an_estimate_alone_would_under_estimate() -> None:
    """Why no power iteration is ever printed: a few steps stay below, the proved bound does not."""
    matrix = torch.diag(torch.linspace(0.0, 1.0, 400, dtype=torch.float64)).unsqueeze(0)
    few, _ = ritz_estimate(lambda q: q @ matrix[0], starting_vectors(1, 400, matrix), steps=8)
    vector = torch.ones(400, dtype=torch.float64) / 20
    for _ in range(50):
        vector = matrix[0] @ vector
        vector = vector / vector.norm()
    power = float(vector @ matrix[0] @ vector)
    assert float(few) < 1.0
    assert power < 1.0
    assert float(largest_eigenvalue(matrix)) >= 1.0


CONVOLUTIONS = [
    # channels in, out, kernel, size, stride, padding, dilation, groups
    (1, 4, 5, 12, 1, 0, 1, 1),
    (3, 5, 4, 11, 2, 1, 1, 1),
    (4, 6, 3, 9, 2, 1, 2, 1),
    (4, 8, 3, 8, 1, 1, 1, 2),
    (4, 4, 3, 8, 2, 1, 1, 4),
    (2, 3, 5, 7, 3, 2, 1, 1),
    (2, 2, 3, 5, 1, 3, 1, 1),
    (2, 2, 2, 9, 3, 0, 1, 1),
    (3, 2, 1, 6, 2, 0, 1, 1),
    (1, 1, 5, 5, 5, 0, 1, 1),
    (2, 3, 3, 10, 2, 4, 3, 1),
]


@pytest.mark.smoke
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_symbol_bound_of_convolutions(case: tuple[int, ...]) -> None:
    cin, cout, k, n, s, p, d, g = case
    weight = torch.randn(cout, cin // g, k, k, dtype=torch.float64)
    basis = torch.eye(cin * n * n, dtype=torch.float64).reshape(-1, cin, n, n)
    matrix = torch.nn.functional.conv2d(basis, weight, None, s, p, d, g).flatten(1)
    oracle = float(torch.linalg.svdvals(matrix)[0])
    bound = conv_symbol_norm(weight, (n, n), (s, s), (p, p), (d, d), g)
    assert bound >= oracle * (1 - 1e-13)
    assert bound <= 1.6 * oracle


@pytest.mark.parametrize("dimensions", [1, 3])
def test_symbol_bound_in_other_dimensions(dimensions: int) -> None:
    weight = torch.randn(3, 2, *[3] * dimensions, dtype=torch.float64)
    sizes = (9, 4, 5)[:dimensions]
    count = 2 * math.prod(sizes)
    function = torch.nn.functional.conv1d if dimensions == 1 else torch.nn.functional.conv3d
    basis = torch.eye(count, dtype=torch.float64).reshape(count, 2, *sizes)
    oracle = float(torch.linalg.svdvals(function(basis, weight, stride=2, padding=1).flatten(1))[0])
    bound = conv_symbol_norm(weight, sizes, (2,) * dimensions, (1,) * dimensions, (1,) * dimensions)
    assert oracle * (1 - 1e-13) <= bound <= 2.5 * oracle


def test_symbol_is_exact_where_nothing_is_cut_off() -> None:
    """A 1x1 convolution is its own symbol."""
    weight = torch.randn(5, 4, 1, 1, dtype=torch.float64)
    oracle = float(torch.linalg.svdvals(weight[:, :, 0, 0])[0])
    assert conv_symbol_norm(weight, (6, 6), (1, 1), (0, 0), (1, 1)) == pytest.approx(oracle, rel=1e-8)


def test_directed_rounding() -> None:
    third = 1.0 / 3.0
    assert down(third) < third < up(third)
    assert up(0.0) > 0.0
    assert down(0.0) == 0.0
    assert gamma(0) == 0.0
    assert gamma(10) > 10 * UNIT
    values = torch.tensor([third, 1e-300, 1e300], dtype=torch.float64)
    assert (down(values, 3) < values).all()
    assert (up(values, 3) > values).all()
    with pytest.raises(ValueError, match="too many"):
        gamma(2**52)


def test_vector_norms_survive_overflow_and_underflow() -> None:
    rows = torch.tensor([[3e200, 4e200], [3e-200, 4e-200], [0.0, 0.0]], dtype=torch.float64)
    norms = vector_norm_up(rows)
    assert norms[0] >= 5e200
    assert norms[1] >= 5e-200
    assert float(norms[0] / 5e200) < 1 + 1e-12
    assert float(norms[2]) < 1e-300
    assert frobenius_norm(rows) >= 5e200


@pytest.mark.parametrize("n", [5, 512, 700])
def test_the_distance_of_a_matrix_from_its_factor(n: int) -> None:
    """By strips of the lower half: what lies above the blocks on the diagonal is not looked at."""
    generator = torch.Generator().manual_seed(n)
    root = torch.randn(2, n, n, dtype=torch.float64, generator=generator).tril()
    apart = 1e-3 * torch.randn(2, n, n, dtype=torch.float64, generator=generator)
    apart = apart + apart.mT
    matrix = root @ root.mT + apart
    if n > 100:
        matrix[:, : n // 2, 3 * n // 4 :] = math.nan
    assert torch.allclose(factor_residual(matrix, root), torch.linalg.matrix_norm(apart), rtol=1e-9)


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("n", [3, 64, 200])
def test_a_product_by_strips_is_exactly_hermitian(n: int, complex_: bool) -> None:
    dtype = torch.complex128 if complex_ else torch.float64
    rows = torch.randn(2, n, 30, dtype=dtype, generator=torch.Generator().manual_seed(n))
    product = symmetric_product(rows)
    assert torch.equal(product, product.mH)
    assert torch.allclose(product, rows @ rows.mH, rtol=1e-13, atol=1e-13)


def test_one_candidate_for_a_batch_bounds_its_largest_eigenvalue() -> None:
    """Also where the power iteration is misled: the largest one is alone in a direction that it does not find."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 20, 30, dtype=torch.complex128, generator=generator)
    several = symmetric_product(rows)
    hidden = torch.stack([torch.eye(60, dtype=torch.float64)] * 5 + [_tiny_top(60)])
    for matrices in (several, hidden, torch.cat([several * 1e-9, several]), 0 * several, several * 1e60):
        true = float(torch.linalg.eigvalsh(matrices).max())
        bound = largest_of_all(matrices, torch.zeros(len(matrices), dtype=torch.float64))
        assert true * (1 - 1e-14) <= bound <= true * (1 + 1e-7) + 1e-300
    slack = torch.linspace(0.0, 1.0, len(several), dtype=torch.float64)
    exact = torch.linalg.eigvalsh(several)[:, -1] + slack
    assert float(exact.max()) <= largest_of_all(several, slack) <= float(exact.max()) + 1.0
