"""Which columns the rows of a matrix use, and products that skip the rest.

A row of a convolution uses the columns of one patch of its input, and the rows of one position share the patch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from certify_cli.network.propagate import Vectors

DENSE = 0.3
"""Matrices with more than this part of their entries non-zero are treated as dense."""
GROUPS = 1024
"""Matrices whose rows fall into more groups than this are treated as dense."""


@dataclass(frozen=True, eq=False)
class RowSparsity:
    """Rows grouped by the columns that they use.

    groups: (rows, columns) per group, index tensors both; None for a dense matrix.
    """

    groups: tuple[tuple[Tensor, Tensor], ...] | None

    @classmethod
    def of(cls, matrices: Tensor) -> RowSparsity:
        """The sparsity that a batch of matrices (batch or 1, m, n) has in common."""
        mask = (matrices != 0).any(0)
        if float(mask.double().mean()) > DENSE:
            return cls(None)
        patterns, which = mask.unique(dim=0, return_inverse=True)
        if len(patterns) > GROUPS:
            return cls(None)
        rows = [(which == number).nonzero()[:, 0] for number in range(len(patterns))]
        return cls(tuple((r, p.nonzero()[:, 0]) for r, p in zip(rows, patterns, strict=True)))

    def forms(self, u: Tensor, matrix: Tensor) -> Tensor:
        """u_i^T M u_i (batch, m), for u (batch, m, n) with this sparsity and M (batch or 1, n, n)."""
        if self.groups is None:
            return _forms(u, matrix)
        forms = u.new_zeros(u.shape[:2])
        for rows, columns in self.groups:
            if len(columns):
                part = u[:, rows.unsqueeze(1), columns.unsqueeze(0)]
                forms[:, rows] = _forms(part, matrix[:, columns.unsqueeze(1), columns.unsqueeze(0)])
        return forms

    def products(self, first: Vectors, second: Vectors) -> tuple[Tensor, ...]:
        """Squared products of rows (batch or 1, m, inputs) and (batch or 1, n, inputs), up, by group."""
        if self.groups is None:
            return (first.squared_products(second),)
        return tuple(_rows(first, rows).squared_products(_rows(second, columns)) for rows, columns in self.groups)

    def sums(self, u: Tensor, products: tuple[Tensor, ...]) -> Tensor:
        """sum over j of u_ij p_ij, (batch, m), for u (batch, m, n) with this sparsity, p from `products`."""
        if self.groups is None:
            return (u * products[0]).sum(2)
        sums = u.new_zeros(u.shape[:2])
        for (rows, columns), squares in zip(self.groups, products, strict=True):
            sums[:, rows] = (u[:, rows.unsqueeze(1), columns.unsqueeze(0)] * squares).sum(2)
        return sums

    def add_form(self, total: Tensor, matrix: Tensor, weights: Tensor) -> None:
        """Adds M^T diag(w) M to `total` (batch, n, n), for M (batch or 1, m, n) with this sparsity, w (batch, m)."""
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
