"""The trust-region bound holds for every perturbation and whatever the hints; with good ones it is the exact value."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.jacobians import Rows
from certify_cli.bounds.linear_maps.row_matrices import Whole
from certify_cli.bounds.linear_maps.row_products import InexactRows
from certify_cli.bounds.remainder import trust_region
from certify_cli.bounds.remainder.trust_region import Quadratic, trust_region_loss

D = torch.float64
BATCH = 6
SHAPES = {
    "fewer rows": (12, ((3, True), (4, False))),
    "more rows": (4, ((5, True), (6, False), (3, False))),
    "all shared": (5, ((4, True), (3, True))),
    "one row": (7, ((1, False),)),
    "one input": (1, ((2, False), (3, True))),
}
"""Inputs, then (size, whether all samples share it) of each block."""


def problem(shape: str, seed: int, rest: float = 0.3, size: float = 1.0) -> tuple[Quadratic, Tensor, Tensor]:
    """Rows, weights (a third of them 0) and rest; gradients and radii of very different sizes."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=D)

    inputs, blocks = SHAPES[shape]
    made = tuple(size * random(1 if shared else BATCH, rows, inputs) for rows, shared in blocks)
    rows = stack(made, [torch.zeros(b.shape[:2], dtype=D) for b in made])
    weights = random(BATCH, rows.count).abs() * torch.randint(0, 3, (BATCH, rows.count), generator=g).clamp(max=1)
    beyond = rest * random(BATCH, rows.count).abs()
    gradient = random(BATCH, inputs) * 10 ** (2 * random(BATCH, 1))
    return Quadratic(rows, weights, beyond), gradient, 10 ** (0.5 * random(BATCH))


def stack(blocks: Sequence[Tensor], errors: Sequence[Tensor]) -> Rows:
    return Rows.of(tuple(InexactRows(Whole(b), e) for b, e in zip(blocks, errors, strict=True)))


def stacked(rows: Rows) -> Tensor:
    return torch.cat([b.matrix.dense.expand(BATCH, -1, -1) for b in rows.blocks], dim=1)


def loss(quadratic: Quadratic, gradient: Tensor, d: Tensor) -> Tensor:
    """The largest value over all D within `rest` of A d: the rest pushes every D away from 0. d (count, batch, n)."""
    moved = (stacked(quadratic.rows) @ d.unsqueeze(3)).squeeze(3).abs() + quadratic.residual
    return -(gradient * d).sum(2) + 0.5 * (quadratic.weights * moved.square()).sum(2)


def worst(quadratic: Quadratic, gradient: Tensor, radius: Tensor, seed: int = 0) -> Tensor:
    """The largest value met: random d, eigenvectors, minus the gradient, and 25 steps of ascent on the ball."""
    g = torch.Generator().manual_seed(seed)
    n = gradient.shape[1]
    a = stacked(quadratic.rows)
    _, vectors = torch.linalg.eigh(a.mT @ (quadratic.weights.unsqueeze(2) * a))
    starts = [torch.randn(40, BATCH, n, generator=g, dtype=D), vectors.permute(2, 0, 1), -gradient.unsqueeze(0)]
    d = torch.cat([*starts, -vectors.permute(2, 0, 1)])
    best = loss(quadratic, gradient, torch.zeros(1, BATCH, n, dtype=D)).amax(0)
    for step in range(25):
        if step:
            moved = (a @ d.unsqueeze(3)).squeeze(3)
            vjp = quadratic.weights * (moved + moved.sign() * quadratic.residual)
            d = (a.mT @ vjp.unsqueeze(3)).squeeze(3) - gradient  # the uphill direction: a Frank-Wolfe step
        d = d / d.norm(dim=2, keepdim=True).clamp(min=1e-300) * radius.unsqueeze(1) * (1 - 1e-15)
        best = torch.maximum(best, loss(quadratic, gradient, d).amax(0))
    return best


def optimum(quadratic: Quadratic, gradient: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """The exact value without a rest, and its mu, by the secular equation in the eigenvectors' basis (no hard case)."""
    a = stacked(quadratic.rows)
    values, vectors = torch.linalg.eigh(a.mT @ (quadratic.weights.unsqueeze(2) * a))
    part = (vectors.mT @ gradient.unsqueeze(2)).squeeze(2).square()
    low, high = values[:, -1].clone(), values[:, -1] + gradient.norm(dim=1) / radius
    for _ in range(200):
        middle = 0.5 * (low + high)
        long = (part / (middle.unsqueeze(1) - values).square()).sum(1).sqrt() > radius
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    form = (part / (high.unsqueeze(1) - values)).sum(1)
    return 0.5 * (high * radius.square() + form), high


def bound(quadratic: Quadratic, gradient: Tensor, radius: Tensor, mu: Tensor | float, tau: Tensor | float) -> Tensor:
    none = torch.zeros(BATCH, dtype=D)
    return trust_region_loss(quadratic, gradient, none, radius, none + mu, none + tau)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rest", [1e-9, 0.3, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_perturbation_exceeds_the_bound_whatever_the_hints(shape: str, rest: float, seed: int) -> None:
    quadratic, gradient, radius = problem(shape, seed, rest)
    found = worst(quadratic, gradient, radius)
    _, mu = optimum(quadratic, gradient, radius)
    g = torch.Generator().manual_seed(seed)
    wild = 10 ** (4 * torch.randn(2, BATCH, generator=g, dtype=D))
    hints = [(0.0, 0.0), (1e300, 1.0), (mu, 0.1), (wild[0], wild[1]), (math.nan, math.nan), (math.inf, math.inf)]
    hints += [(mu, math.nan), (mu, -1.0), (-5.0, 0.3), (mu * (1 + 1e-12), 1e-30), (5e-324, math.inf)]
    for first, second in hints:
        value = bound(quadratic, gradient, radius, first, second)
        assert not bool(value.isnan().any())
        assert bool((value >= found * (1 - 1e-12)).all()), (first, second)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_good_hints_give_the_exact_value(shape: str, seed: int) -> None:
    quadratic, gradient, radius = problem(shape, seed, rest=0.0)
    exact, mu = optimum(quadratic, gradient, radius)
    value = bound(quadratic, gradient, radius, mu, 0.0)
    assert bool((value >= exact * (1 - 1e-12)).all())
    # the exact mu may lie closer to the largest eigenvalue than a proof of that can: then mu is pushed away a little
    assert bool((value <= exact * (1 + 1e-4)).all())
    assert torch.allclose(worst(quadratic, gradient, radius), exact, rtol=2e-2)  # the attack is a good one


@pytest.mark.parametrize("shape", SHAPES)
def test_any_answer_of_the_solver_will_do(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the solution, twice, its opposite, nothing, noise: the residual pays for it."""
    quadratic, gradient, radius = problem(shape, 6, rest=0.0)
    found = worst(quadratic, gradient, radius)
    exact, mu = optimum(quadratic, gradient, radius)
    solve, g = trust_region.conjugate_gradients, torch.Generator().manual_seed(0)
    for factor, noise in ((0.5, 0.0), (2.0, 0.0), (-1.0, 0.0), (0.0, 0.0), (0.9, 0.1), (1.0, 1e-3), (1.0, 3.0)):

        def wrong(*parts: object, factor: float = factor, noise: float = noise) -> Tensor:
            y = solve(*parts)  # type: ignore[arg-type]
            return factor * y + noise * y.norm(dim=1, keepdim=True) * torch.randn(y.shape, generator=g, dtype=D)

        monkeypatch.setattr(trust_region, "conjugate_gradients", wrong)
        for further in (1.01, 1.5):
            value = bound(quadratic, gradient, radius, mu * further, 0.0)
            # not only above what is met, but above what this mu gives at best
            a = stacked(quadratic.rows)
            hessian = mu.reshape(-1, 1, 1) * further * torch.eye(gradient.shape[1], dtype=D)
            hessian = hessian - a.mT @ (quadratic.weights.unsqueeze(2) * a)
            form = (gradient * torch.linalg.solve(hessian, gradient)).sum(1)
            least = 0.5 * (mu * further * radius.square() + form)
            assert bool((value >= torch.maximum(found, torch.maximum(exact, least)) * (1 - 1e-9)).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_with_a_rest_the_best_tau_is_worth_having(shape: str) -> None:
    quadratic, gradient, radius = problem(shape, 3, rest=0.3)
    found = worst(quadratic, gradient, radius)
    best = torch.full_like(found, math.inf)
    for tau in 10 ** torch.linspace(-4, 4, 21, dtype=D):
        scaled = Quadratic(quadratic.rows, quadratic.weights * (1 + tau), quadratic.residual)
        best = torch.minimum(best, bound(quadratic, gradient, radius, optimum(scaled, gradient, radius)[1], tau))
    assert bool((best >= found * (1 - 1e-12)).all())
    assert bool((best <= 2.5 * found + 1e-9).all())  # (a + b)^2 <= 2 (a^2 + b^2), neuron by neuron


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_gradients_within_their_errors(shape: str, seed: int) -> None:
    """The exact rows are off by their errors, which the rest covers on the ball; the gradient by its own."""
    quadratic, gradient, radius = problem(shape, seed, rest=0.05)
    g = torch.Generator().manual_seed(seed)
    blocks = [b.matrix.dense for b in quadratic.rows.blocks]
    off = [0.1 * torch.randn(b.shape, generator=g, dtype=D) for b in blocks]
    rows = stack([b + o for b, o in zip(blocks, off, strict=True)], [o.norm(dim=2) for o in off])
    reach = torch.cat([b.error.expand(BATCH, -1) for b in rows.blocks], dim=1) * radius.unsqueeze(1)
    given = Quadratic(rows, quadratic.weights, quadratic.residual + reach)
    away = torch.randn(gradient.shape, generator=g, dtype=D)
    value = trust_region_loss(
        given,
        gradient + away,
        away.norm(dim=1),
        radius,
        optimum(given, gradient, radius)[1],
        torch.ones(BATCH, dtype=D),
    )
    assert bool((value >= worst(quadratic, gradient, radius) * (1 - 1e-12)).all())


@pytest.mark.parametrize("scale", [1e-120, 1e-70, 1e-30, 1e30, 1e70])
@pytest.mark.parametrize("shape", ["fewer rows", "more rows"])
def test_rows_of_any_size(shape: str, scale: float) -> None:
    """Scaled rows with a ball scaled the other way are the same problem."""
    plain, gradient, radius = problem(shape, 1)
    found = worst(plain, gradient, radius)
    _, mu = optimum(plain, gradient, radius)
    rows = stack([b.matrix.dense * scale for b in plain.rows.blocks], [b.error for b in plain.rows.blocks])
    scaled = Quadratic(rows, plain.weights, plain.residual)
    value = bound(scaled, gradient * scale, radius / scale, mu * scale**2, 0.3)
    assert bool((value >= found * (1 - 1e-12)).all())
    if scale > 1e-100:  # beyond, squares are lost, and the bound says so
        assert bool((value <= bound(plain, gradient, radius, mu, 0.3) * (1 + 1e-4)).all())


@pytest.mark.parametrize("shape", ["fewer rows", "more rows"])
@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_what_is_no_number_claims_nothing(shape: str, spoilt: float) -> None:
    """An unknown rest, weight, gradient, row or radius is no rest of 0, and it spoils its own sample only."""
    plain, gradient, radius = problem(shape, 2)
    _, mu = optimum(plain, gradient, radius)
    clean = bound(plain, gradient, radius, mu, 0.3)
    used = int(plain.weights[1].argmax())
    unused = int(plain.weights[1].argmin())
    assert plain.weights[1, unused] == 0
    for part in ("rest", "rest of no weight", "weight", "gradient", "row", "radius"):
        rest, weights, g, e = plain.residual.clone(), plain.weights.clone(), gradient.clone(), radius.clone()
        blocks = [b.matrix.dense.clone() for b in plain.rows.blocks]
        errors = [b.error for b in plain.rows.blocks]
        if part == "rest":
            rest[1, used] = spoilt
        elif part == "rest of no weight":
            rest[1, unused] = spoilt
        elif part == "weight":
            weights[1, used] = spoilt
        elif part == "gradient":
            g[1, 0] = spoilt
        elif part == "row":
            blocks[1][1, 0, 0] = spoilt
        else:
            e[1] = spoilt
        value = bound(Quadratic(stack(blocks, errors), weights, rest), g, e, mu, 0.3)
        # no weight times an infinite rest may be read as nothing, or as unknown: never as if there were no rest at all
        assert bool(value[1].isinf()) or (part == "rest of no weight" and float(value[1]) >= float(clean[1])), part
        assert torch.allclose(value[[0, 2, 3, 4, 5]], clean[[0, 2, 3, 4, 5]], rtol=1e-9)


def test_nothing_to_lose() -> None:
    """No weights: the gradient alone; no gradient either: nothing; a ball of radius 0: the rest alone."""
    quadratic, gradient, radius = problem("fewer rows", 4)
    none = Quadratic(quadratic.rows, torch.zeros_like(quadratic.weights), quadratic.residual)
    length = gradient.norm(dim=1)
    assert torch.allclose(bound(none, gradient, radius, length / radius, 0.0), length * radius, rtol=1e-9)
    assert bool((bound(none, gradient, radius, length / radius, 0.0) >= length * radius * (1 - 1e-15)).all())
    assert bool((bound(none, 0 * gradient, radius, 0.0, 0.0) < 1e-250).all())
    alone = 0.5 * (quadratic.weights * quadratic.residual.square()).sum(1)
    value = bound(quadratic, gradient, 0 * radius, 1e12, 1e9)
    assert bool((value >= alone * (1 - 1e-15)).all())
    assert bool((value <= alone * (1 + 1e-6) + 1e-3).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_know_their_gram_matrix(shape: str) -> None:
    quadratic, gradient, _ = problem(shape, 5)
    rows, a = quadratic.rows, stacked(quadratic.rows)
    assert (rows.gram is None) == (rows.count > rows.inputs)
    w = torch.rand(BATCH, 3, rows.count, generator=torch.Generator().manual_seed(6), dtype=D)
    form = rows.squared_form(w)
    assert form is not None
    exact_form = torch.einsum("bri,bij,brj->br", w, (a @ a.mT).square(), w)
    assert bool((form >= exact_form * (1 - 1e-12)).all())
    assert torch.allclose(form, exact_form, rtol=1e-9)
    assert torch.allclose(rows.apply(gradient), (a @ gradient.unsqueeze(2)).squeeze(2))
    p = quadratic.weights
    assert torch.allclose(rows.transpose(p), (a.mT @ p.unsqueeze(2)).squeeze(2))
    index = torch.tensor([4, 4, 0])
    part = rows.at(index)  # with what was computed before, and without
    fresh = Rows.of(rows.blocks).at(index)
    if rows.gram is not None:
        assert torch.allclose(rows.gram, a @ a.mT, rtol=0, atol=1e-13)
        assert torch.equal(part.gram, rows.gram.expand(BATCH, -1, -1)[index])
        assert torch.allclose(fresh.gram, part.gram, rtol=0, atol=1e-13)
    again = part.squared_form(w[index])
    assert again is not None
    assert torch.allclose(again, form[index], rtol=1e-12)
    matrix, slack = quadratic.matrix()
    exact = torch.linalg.eigvalsh(a.mT @ (p.unsqueeze(2) * a))[:, -1]
    assert torch.allclose(torch.linalg.eigvalsh(matrix)[:, -1], exact, rtol=1e-9)
    assert bool((slack < 1e-10).all())


def test_squared_gram_covers_rows_within_their_errors() -> None:
    g = torch.Generator().manual_seed(0)
    value, error = torch.randn(3, 5, 8, generator=g, dtype=D), 0.3 * torch.rand(3, 5, generator=g, dtype=D)
    squared = InexactRows(Whole(value), error).squares.dense
    for _ in range(200):
        off = torch.randn(3, 5, 8, generator=g, dtype=D)
        # the same direction for all rows is the worst
        off = off[:, :1] if torch.rand(1, generator=g) < 0.5 else off
        moved = value + off / off.norm(dim=2, keepdim=True) * error.unsqueeze(2)
        assert bool((squared >= (moved @ moved.mT).square() * (1 - 1e-14)).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_far_above_the_curvature_no_matrix_is_needed(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The squared products of the rows bound the largest eigenvalue, and the value is that with a factor."""
    quadratic, gradient, radius = problem(shape, 1)
    a = stacked(quadratic.rows)
    largest = torch.linalg.eigvalsh(a.mT @ (quadratic.weights.unsqueeze(2) * a))[:, -1]
    assert bool((quadratic.norm_bound >= largest * (1 - 1e-12)).all())
    tiny = Quadratic(quadratic.rows, 1e-200 * quadratic.weights, quadratic.residual)  # squares would underflow
    some = (quadratic.weights > 0).any(1)
    assert torch.allclose(1e200 * tiny.norm_bound[some], quadratic.norm_bound[some], rtol=1e-12)
    mu = 1.3 * trust_region.CLEAR * quadratic.norm_bound
    with monkeypatch.context() as patch:
        patch.setattr(Quadratic, "matrix", None)  # whoever asked for one would fail
        value = bound(quadratic, gradient, radius, mu, 0.01)
    assert bool((value >= worst(quadratic, gradient, radius) * (1 - 1e-12)).all())
    monkeypatch.setattr(trust_region, "CLEAR", math.inf)
    assert torch.allclose(value, bound(quadratic, gradient, radius, mu, 0.01), rtol=1e-7)
