"""Squared inner products of rows that are known up to an error: what weighted sums of squares are bounded with.

With A's rows a_i and weights u >= 0,  lambda_max(A^T diag(u) A)^2 <= u^T (G o G) u ,  G = A A^T: no eigenvalue is
computed. Rows that share no column have product 0, so that G of a convolution holds neighbours only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.row_matrices import Grouped, Matrix, Whole
from certify_cli.numerics.eigen import strips
from certify_cli.numerics.rounding import UNDERFLOW, gamma, up
from certify_cli.numerics.trees import Batched

CHUNK_ENTRIES = 2**22
"""Rows are multiplied with neighbours' products in chunks of at most so many entries (32 MiB)."""
GATHERED = 32
"""Products that take the time of gathering one entry, about."""
FEW = 0.5
"""Products of rows are kept by groups where they fill at most this part of the whole matrix."""


@dataclass(frozen=True, eq=False)
class InexactRows(Batched, shared=("matrix", "error")):
    """The rows of a matrix as computed.   error: (batch or 1, m), upper bounds of each row's Euclidean error."""

    matrix: Matrix
    error: Tensor

    @cached_property
    def size(self) -> Tensor:
        """Euclidean norms (batch or 1, m) of the computed rows, up."""
        return self.matrix.row_norms

    @property
    def length(self) -> Tensor:
        """Upper bounds (batch or 1, m) of the norms of the exact rows."""
        return up(self.size + self.error, 2)

    @cached_property
    def squares(self) -> Matrix:
        """A matrix M with u^T M u >= u^T (G o G) u for all u >= 0, G the exact rows' products with each other.

        By groups, each pair of them stands there once, doubled.
        """
        return squared_products(self, self)

    @cached_property
    def whole_squares(self) -> Whole:
        """`squares` as a whole matrix."""
        return self.squares if isinstance(self.squares, Whole) else Whole(self.squares.dense)


def squared_products(first: InexactRows, second: InexactRows) -> Matrix:
    """Upper bounds of <a_i, b_j>^2 as a matrix (batch or 1, rows, others); of rows with themselves see `squares`."""
    found = few_squared_products(first, second, math.inf)
    assert found is not None
    return found


def few_squared_products(first: InexactRows, second: InexactRows, most: float) -> Matrix | None:
    """`squared_products`; None where these have more than `most` entries for one item of the batch."""
    a, b = first.matrix, second.matrix
    others = _few_neighbours(a, b)
    size = a.shape[0] * b.shape[0] if others is None else a.values[0, ..., 0].numel() * others.shape[1]
    if size > most:
        return None
    if not isinstance(a, Grouped) or others is None:
        return Whole(_squared(_products(a, b), first.size, first.error, second.size, second.error, a.shape[1]))
    values = _at_groups(first, a.values, a.rows, second, b.within(others, a.columns), others)
    if a is b:
        group = a.group_of_row
        values *= 2.0 - (group[others].unsqueeze(1) == group[a.rows].unsqueeze(2)).to(values.dtype)
    outside = (a.rows == a.shape[0]).unsqueeze(2) | (others == b.shape[0]).unsqueeze(1)
    return Grouped(values.masked_fill(outside, 0.0), a.rows, others, (a.shape[0], b.shape[0]))


def _products(a: Matrix, b: Matrix) -> Tensor:
    """A B^T (batch or 1, m, k): by the groups of either matrix where gathering for them is less than multiplying."""
    for groups, other, turned in ((b, a, False), (a, b, True)):
        if isinstance(groups, Grouped) and GATHERED * groups.columns.numel() < groups.shape[0] * groups.shape[1]:
            found = groups.times(other.dense)
            return found.mT if turned else found
    return a.dense @ b.dense.mT


def squared_products_at(places: Matrix, first: InexactRows, second: InexactRows, known: Matrix | None = None) -> Tensor:
    """`squared_products` at the places of a matrix (rows, others), shaped as its values; known: where all are."""
    if isinstance(places, Whole):
        return (known or squared_products(first, second)).dense
    if known is not None:
        return known.within(places.rows, places.columns)
    a, b = first.matrix.dense, second.matrix.dense
    columns = places.columns.clamp(max=b.shape[1] - 1)  # what stands in the padding meets zeros
    found = []
    for rows, others in zip(places.rows.clamp(max=a.shape[1] - 1), columns, strict=True):
        size, error, length, off = (
            t[:, index]
            for t, index in (
                (first.size, rows), (first.error, rows), (second.size, others), (second.error, others)
            )
        )  # fmt: skip
        found.append(_squared(a[:, rows] @ b[:, others].mT, size, error, length, off, a.shape[2]))
    return torch.stack(found, dim=1)


def squares_for(places: Matrix, rows: InexactRows) -> Matrix | Tensor:
    """`rows.squares` for `forms` of matrices at these places (any, rows).

    By groups: of the rows that each group uses, (batch or 1, groups, c, c), or whole where that is less.
    """
    if isinstance(places, Whole):
        return rows.squares
    if places.columns.numel() * places.columns.shape[1] > rows.matrix.shape[0] ** 2:
        return rows.whole_squares
    return rows.squares.within(places.columns, places.columns)


def forms(u: Matrix, squares: Matrix | Tensor) -> Tensor:
    """u_i^T M u_i (batch, m) for each row u_i of a matrix, (batch, m, n); squares: M (n, n), from `squares_for`."""
    if isinstance(u, Whole):
        assert not isinstance(squares, Tensor)
        if isinstance(squares, Whole):
            return _symmetric_forms(u.values, squares.values)
        chunk = max(1, CHUNK_ENTRIES // (len(u.values) * squares.columns.numel()))
        return torch.cat([_neighbour_forms(part, squares) for part in u.values.split(chunk, 1)], dim=1)
    if isinstance(squares, Tensor):
        return u.row_sums((u.values @ squares) * u.values)
    assert isinstance(squares, Whole)
    columns = u.columns.clamp(max=squares.shape[1] - 1)  # u is zero in the padding
    parts = (squares.values[:, index.unsqueeze(1), index.unsqueeze(0)] for index in columns)
    images = [part @ square for part, square in zip(u.values.unbind(1), parts, strict=True)]
    return u.row_sums(torch.stack(images, 1) * u.values)


def _neighbour_forms(u: Tensor, squares: Grouped) -> Tensor:
    """The forms of u (batch, m, n): columns of u, which are contiguous, are what is gathered."""
    batch, count = u.shape[:2]
    columns = u.permute(2, 0, 1).reshape(1, -1, batch * count) if len(squares.values) == 1 else u.mT
    columns = torch.nn.functional.pad(columns, (0, 0, 0, 1))
    image = squares.values @ columns[:, squares.columns]
    return (image * columns[:, squares.rows]).sum((1, 2)).reshape(batch, count)


def _symmetric_forms(u: Tensor, squares: Tensor) -> Tensor:
    """The forms of u (batch, m, n) with a symmetric M (batch or 1, n, n), by strips of rows up to the diagonal."""
    total = torch.zeros_like(u[..., 0])
    for first, last in strips(u.shape[2]):
        part = u[..., first:last]
        image = part @ (squares[0] if len(squares) == 1 else squares)[..., first:last, :last]
        total = total + 2 * (image[..., :first] * u[..., :first]).sum(2) + (image[..., first:] * part).sum(2)
    return total


def _few_neighbours(a: Matrix, b: Matrix) -> Tensor | None:
    """For each group of a the rows (groups, count) of b that share a column with it, b's number of rows as padding.

    None where they are not few (FEW), or where rows that share no column may have products by their errors. If the
    matrices are one and the same, each pair of groups stands once.
    """
    if isinstance(a, Whole) or isinstance(b, Whole) or not (a.structural and b.structural):
        return None
    n = a.shape[1]
    masks = []
    for matrix in (a, b):
        mask = torch.zeros(len(matrix.columns), n + 1, dtype=torch.float64, device=a.columns.device)
        masks.append(mask.scatter_(1, matrix.columns, 1.0)[:, :-1])
    near = masks[0] @ masks[1].T > 0  # sums of ones: exact
    if a is b:
        near = near.tril()
    rows = torch.zeros(len(a.columns), b.shape[0] + 1, dtype=torch.bool, device=near.device)
    shared = near.repeat_interleave(b.rows.shape[1], 1)
    rows.scatter_(1, b.rows.flatten().expand(len(near), -1), shared)
    others = _indices(rows[:, :-1])
    return others if a.rows.numel() * others.shape[1] <= FEW * a.shape[0] * b.shape[0] else None


def _indices(mask: Tensor) -> Tensor:
    """The places (groups, most) that are true in each row of a mask (groups, n); n in the padding."""
    counts = mask.sum(1)
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : max(1, int(counts.max()))]
    behind = torch.arange(order.shape[1], device=mask.device) >= counts.unsqueeze(1)
    return order.masked_fill(behind, mask.shape[1])


def _at_groups(first: InexactRows, a: Tensor, rows: Tensor, second: InexactRows, b: Tensor, others: Tensor) -> Tensor:
    """Squared products, up, of rows a (batch or 1, g, r, c) and b (batch or 1, g, s, c): (batch or 1, g, r, s).

    rows, others: their indices; zeros in the padding.
    """
    padded = (torch.nn.functional.pad(t, (0, 1)) for t in (first.size, first.error, second.size, second.error))
    size, error, length, off = (t[:, index] for t, index in zip(padded, (rows, rows, others, others), strict=True))
    return _squared(a @ b.mT, size, error, length, off, first.matrix.shape[1])


def _squared(products: Tensor, size: Tensor, error: Tensor, length: Tensor, off: Tensor, terms: int) -> Tensor:
    """Upper bounds of the squares of all inner products of the exact rows.

    products: (..., m, k), as computed, of `terms` terms or fewer.
    size, error: (..., m), of the first rows: norms as computed, up, and errors.   length, off: (..., k), of the others.
    """
    size, error, length, off = size.unsqueeze(-1), error.unsqueeze(-1), length.unsqueeze(-2), off.unsqueeze(-2)
    # |a.b - (a+p).(b+q)| <= |a||q| + |p||b| + |p||q|, and the product's own rounding
    slack = gamma(terms + 2) * size * length + size * off + error * (length + off)
    return up((products.abs() + slack).square(), 8) + UNDERFLOW
