"""Where the rows of a matrix are not zero.

A convolution's rows see a patch each, and rows of one place the same patch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from certify_cli.network.propagate import Vectors

DENSE = 0.3
"""Where a row's support is more than this part of the columns, on average, it is not worth looking for."""
GROUPS = 1024


@dataclass(frozen=True, eq=False)
class RowSparsity:
    """Rows grouped by common support: (rows, columns), index tensors each; None for one group of everything."""

    groups: tuple[tuple[Tensor, Tensor], ...] | None

    @classmethod
    def of(cls, matrices: Tensor) -> RowSparsity:
        """Of matrices (batch or 1, m, n): what is outside of a row's columns is zero in all of them."""
        mask = (matrices != 0).any(0)
        if float(mask.double().mean()) > DENSE:
            return cls(None)
        patterns, which = mask.unique(dim=0, return_inverse=True)
        if len(patterns) > GROUPS:
            return cls(None)
        rows = [(which == number).nonzero()[:, 0] for number in range(len(patterns))]
        return cls(tuple((r, p.nonzero()[:, 0]) for r, p in zip(rows, patterns, strict=True)))

    def forms(self, u: Tensor, matrix: Tensor) -> Tensor:
        """u_i^T M u_i (batch, m), for u (batch, m, n) with these supports and M (batch or 1, n, n)."""
        if self.groups is None:
            return _forms(u, matrix)
        found = u.new_zeros(u.shape[:2])
        for rows, columns in self.groups:
            if len(columns):
                part = u[:, rows.unsqueeze(1), columns.unsqueeze(0)]
                found[:, rows] = _forms(part, matrix[:, columns.unsqueeze(1), columns.unsqueeze(0)])
        return found

    def products(self, first: Vectors, second: Vectors) -> tuple[Tensor, ...]:
        """Squared products of rows (batch or 1, m, inputs) and (batch or 1, n, inputs), group by group."""
        if self.groups is None:
            return (first.squared_products(second),)
        return tuple(_rows(first, rows).squared_products(_rows(second, columns)) for rows, columns in self.groups)

    def sums(self, u: Tensor, products: tuple[Tensor, ...]) -> Tensor:
        """sum over j of u_ij p_ij, (batch, m), for u (batch, m, n) with these supports and products as above."""
        if self.groups is None:
            return (u * products[0]).sum(2)
        found = u.new_zeros(u.shape[:2])
        for (rows, columns), squares in zip(self.groups, products, strict=True):
            found[:, rows] = (u[:, rows.unsqueeze(1), columns.unsqueeze(0)] * squares).sum(2)
        return found

    def add_form(self, total: Tensor, matrix: Tensor, weights: Tensor) -> None:
        """Adds M^T diag(w) M to `total` (batch, n, n), for M (batch or 1, m, n) with these supports, w (batch, m)."""
        if self.groups is None:
            total += (matrix * weights.unsqueeze(2)).mT @ matrix
            return
        for rows, columns in self.groups:
            if len(columns):
                part = matrix[:, rows.unsqueeze(1), columns.unsqueeze(0)]
                square = (part * weights[:, rows].unsqueeze(2)).mT @ part
                total[:, columns.unsqueeze(1), columns.unsqueeze(0)] += square


def _rows(vectors: Vectors, index: Tensor) -> Vectors:
    return Vectors(vectors.value[:, index], vectors.error[:, index])


def _forms(u: Tensor, matrix: Tensor) -> Tensor:
    return ((u @ matrix[0] if len(matrix) == 1 else u @ matrix) * u).sum(2)
