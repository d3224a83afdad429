"""Jacobians on windows are those of whole rows, and their products hold every exact row, on every topology."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache

import pytest
import torch
from torch import Tensor

from certify_cli.bounds.linear_maps import jacobians
from certify_cli.bounds.linear_maps.jacobians import Rows, jacobian_rows, pulled_rows
from certify_cli.bounds.linear_maps.row_matrices import Grouped, Matrix, Whole, by_columns
from certify_cli.bounds.linear_maps.row_products import (
    InexactRows,
    few_squared_products,
    forms,
    squared_products,
    squared_products_at,
    squares_for,
)
from certify_cli.network.graph import Network
from certify_cli.network.propagate import Slope, nonlinear_nodes, pre_activation, pre_activations
from tests.windows import TOPOLOGIES

D = torch.float64
BATCH = 2
LARGEST = 10**6
"""Products of two layers' rows are compared with dense ones up to this number."""

topologies = pytest.mark.parametrize("topology", TOPOLOGIES)


def slopes_of(network: Network) -> dict[int, Slope]:
    g = torch.Generator().manual_seed(1)
    shapes = {k: network.nodes[k].shape for k in nonlinear_nodes(network)}
    return {k: Slope(torch.rand(BATCH, *shape, generator=g, dtype=D)) for k, shape in shapes.items()}


@cache
def drawn(topology: Callable[[], Network]) -> Network:
    return topology()


@cache
def all_rows(network: Network) -> dict[int, dict[int, InexactRows]]:
    return {t: jacobian_rows(network, t, slopes_of(network)) for t in pre_activations(network)[:-1]}


@topologies
def test_rows_on_windows_are_whole_rows(topology: Callable[[], Network]) -> None:
    network = drawn(topology)
    for target, found in all_rows(network).items():
        whole = pulled_rows(network, target, slopes_of(network))
        assert set(found) == set(whole)
        for source, rows in found.items():
            expected = whole[source].value
            off = torch.linalg.vector_norm(rows.matrix.dense - expected, dim=2)
            assert bool((off <= rows.error + whole[source].error).all())
            assert torch.allclose(rows.size, whole[source].size, rtol=1e-12)
            assert torch.allclose(rows.error, whole[source].error, rtol=1e-9)


def test_windows_are_used() -> None:
    kept = [
        rows.matrix
        for topology in TOPOLOGIES
        for found in all_rows(drawn(topology)).values()
        for rows in found.values()
    ]
    assert sum(isinstance(matrix, Grouped) and matrix.structural for matrix in kept) >= len(kept) // 3


@cache
def computed_rows(network: Network) -> dict[int, dict[int, InexactRows]]:
    """All rows, taken as exact."""
    return {
        target: {k: InexactRows(rows.matrix, torch.zeros_like(rows.error)) for k, rows in found.items()}
        for target, found in all_rows(network).items()
    }


def exact_squares(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.mT).square()


def exact_forms(u: Tensor, squares: Tensor) -> Tensor:
    return ((u @ squares) * u).sum(2)


@topologies
def test_products_are_those_of_whole_rows(topology: Callable[[], Network]) -> None:
    """Of two layers' rows, everywhere, at the places of B, and of the rows that a group of B uses."""
    network = drawn(topology)
    found = computed_rows(network)
    for rows in found.values():
        for source, block in rows.items():
            if source == 0:
                continue
            after, before = rows[0], found[pre_activation(network, source)][0]
            if after.matrix.shape[0] * before.matrix.shape[0] > LARGEST:
                continue
            exact = exact_squares(after.matrix.dense, before.matrix.dense).expand(BATCH, -1, -1)
            scale = 1e-9 * float(exact.max())
            assert torch.allclose(squared_products(after, before).dense.expand(BATCH, -1, -1), exact, atol=scale)
            at = block.matrix.put_values(squared_products_at(block.matrix, after, before))
            used = (block.matrix.dense != 0).any(0)
            close = (at.dense - exact).abs() <= scale
            assert bool((close | ~used).all())


@topologies
def test_forms_are_those_of_whole_matrices(topology: Callable[[], Network]) -> None:
    """u^T (G o G) u, from products of neighbours that stand once, or of the rows that a group uses."""
    network = drawn(topology)
    found = computed_rows(network)
    g = torch.Generator().manual_seed(3)
    for target, rows in found.items():
        before = rows[0]
        if before.matrix.shape[0] ** 2 > 2 * LARGEST:
            continue
        exact = exact_squares(before.matrix.dense, before.matrix.dense)
        u = torch.rand(BATCH, 5, before.matrix.shape[0], generator=g, dtype=D)
        for given, squares in [(Whole(u), before.squares), *inner_forms(network, found, target)]:
            expected = exact_forms(given.dense, exact)
            value = forms(given, squares)
            assert torch.allclose(value, expected, rtol=1e-9)
            assert bool((value >= expected * (1 - 1e-12)).all())


def test_neighbours_are_used() -> None:
    kept = [rows[0].squares for topology in TOPOLOGIES for rows in computed_rows(drawn(topology)).values()]
    assert sum(isinstance(squares, Grouped) for squares in kept) >= 3


def inner_forms(
    network: Network, found: dict[int, dict[int, InexactRows]], source: int
) -> list[tuple[Matrix, Matrix | Tensor]]:
    """B >= 0 of every later layer that uses pre-activation `source`, and what `forms` needs for it."""
    before, given = found[source][0], []
    for rows in found.values():
        for k, block in rows.items():
            if k and pre_activation(network, k) == source:
                matrix = block.matrix.put_values(block.matrix.values.abs())
                given.append((matrix, squares_for(matrix, before)))
    return given


@topologies
def test_all_layers_together(topology: Callable[[], Network], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jacobians, "SQUARED_ENTRIES", 10**9)
    rows = [found[0] for found in computed_rows(drawn(topology)).values()]
    rows = sorted(rows, key=lambda block: block.matrix.shape[0])[:2]
    stacked = Rows.of(tuple(rows))
    a = torch.cat([block.matrix.dense.expand(BATCH, -1, -1) for block in rows], dim=1)
    w = torch.rand(BATCH, 3, a.shape[1], generator=torch.Generator().manual_seed(4), dtype=D)
    form, expected = stacked.squared_form(w), exact_forms(w, exact_squares(a, a))
    assert form is not None
    assert torch.allclose(form, expected, rtol=1e-9)
    assert bool((form >= expected * (1 - 1e-12)).all())
    total = torch.zeros(BATCH, a.shape[2], a.shape[2], dtype=D)
    for block, part in zip(rows, w[:, 0].split(stacked.sizes, dim=1), strict=True):
        block.matrix.add_form(total, part)
    monkeypatch.setattr(jacobians, "SQUARED_ENTRIES", 1)
    assert Rows.of(tuple(rows)).squared_form(w) is None
    assert torch.allclose(total, (a * w[:, 0].unsqueeze(2)).mT @ a, rtol=1e-9, atol=1e-9 * float(total.max()))


@topologies
def test_products_hold_rows_within_their_errors(topology: Callable[[], Network]) -> None:
    """Exact rows differ from computed ones by up to their error, within their windows."""
    found = all_rows(drawn(topology))
    g = torch.Generator().manual_seed(5)
    for rows in found.values():
        computed, (count, _) = rows[0].matrix, rows[0].matrix.shape
        if count**2 > 2 * LARGEST:
            continue
        wide = InexactRows(computed, 0.1 * torch.rand(len(computed.values), count, generator=g, dtype=D))
        u = torch.rand(BATCH, 2, count, generator=g, dtype=D)
        bound = forms(Whole(u), wide.squares)
        for along in (True, False):
            off = computed.values.clone() if along else torch.randn(computed.values.shape, generator=g, dtype=D)
            off = off if isinstance(computed, Whole) else off * (computed.columns < computed.shape[1]).unsqueeze(1)
            moved = computed.put_values(off)
            length = moved.row_norms.clamp(min=1e-300)
            exact = computed.dense + moved.dense * (wide.error / length).unsqueeze(2)
            squares = exact_squares(exact, exact).expand(BATCH, -1, -1)
            assert bool((bound >= exact_forms(u, squares) * (1 - 1e-12)).all())


def test_rows_whose_zeros_are_only_computed_have_products_by_their_errors() -> None:
    """Two rows on different columns, as computed; exactly, each has a little of the other's."""
    matrix = torch.zeros(1, 40, 40, dtype=D)
    matrix[0, torch.arange(40), torch.arange(40)] = 1.0
    rows = InexactRows(by_columns(matrix), torch.full((1, 40), 0.1, dtype=D))
    assert isinstance(rows.matrix, Grouped)
    exact = matrix + 0.1 / 40**0.5
    u = torch.ones(1, 1, 40, dtype=D)
    squares = exact_squares(exact, exact)
    assert float(forms(Whole(u), rows.squares)) >= float(squares.sum())
    assert few_squared_products(rows, rows, 1600) is not None
    assert few_squared_products(rows, rows, 1599) is None


def test_sums_over_many_layers_are_rounded_up_for_all_of_them() -> None:
    """60 blocks of two rows, in fractions: the number of roundings grows with the pairs of blocks."""
    g = torch.Generator().manual_seed(6)
    blocks = [torch.rand(1, 2, 1, generator=g, dtype=D) for _ in range(60)]
    stacked = Rows.of(tuple(InexactRows(Whole(b), torch.zeros(1, 2, dtype=D)) for b in blocks))
    for _ in range(20):
        w = torch.rand(1, 1, 120, generator=g, dtype=D)
        rows = [Fraction(value) for value in torch.cat(blocks, 1).flatten().tolist()]
        weights = [Fraction(value) for value in w.flatten().tolist()]
        # one column: the products are those of numbers, and the form is the square of a sum
        exact = sum(weight * row**2 for weight, row in zip(weights, rows, strict=True)) ** 2
        form = stacked.squared_form(w)
        assert form is not None
        assert Fraction(float(form)) >= exact
        assert float(form) <= float(exact) * (1 + 1e-11)
