"""Matrices in the form in which they are multiplied: whole, or by groups of rows that use the same few columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from certify_cli.bounds.linear_maps.row_sparsity import RowSparsity
from certify_cli.numerics.batched import vector_times_matrix
from certify_cli.numerics.trees import Batched


@dataclass(frozen=True, eq=False)
class Whole(Batched, shared=("values",)):
    """A matrix A as it is: values (batch or 1, m, n)."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.values.shape[1], self.values.shape[2]

    def times(self, d: Tensor) -> Tensor:
        """A d: (batch, n) -> (batch, m)."""
        return vector_times_matrix(d, self.values.mT)

    def transposed(self, p: Tensor) -> Tensor:
        """A^T p: (batch, m) -> (batch, n)."""
        return vector_times_matrix(p, self.values)

    def over(self, unit: float, dtype: torch.dtype) -> Whole:
        """A / unit, in another precision."""
        return Whole((self.values / unit).to(dtype))


@dataclass(frozen=True, eq=False)
class Grouped(Batched, shared=("values",), constant=("rows", "columns", "shape")):
    """A matrix A in groups of rows that use the same columns. It is zero outside of them.

    values: (batch or 1, groups, r, c), the groups padded with zeros to one size.
    rows: (groups, r), indices of each group's rows; m in the padding.
    columns: (groups, c), indices of each group's columns; n in the padding.
    shape: (m, n).
    """

    values: Tensor
    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, matrix: Tensor, groups: tuple[tuple[Tensor, Tensor], ...]) -> Grouped:
        """The groups, (rows, columns) each, of a matrix (batch or 1, m, n) that is zero outside of them.

        Every row is in one group.
        """
        m, n = matrix.shape[1:]
        rows = matrix.new_full((len(groups), max(len(r) for r, _ in groups)), m, dtype=torch.long)
        columns = matrix.new_full((len(groups), max(1, *(len(c) for _, c in groups))), n, dtype=torch.long)
        values = matrix.new_zeros(len(matrix), *rows.shape, columns.shape[1])
        for number, (r, c) in enumerate(groups):
            rows[number, : len(r)], columns[number, : len(c)] = r, c
            values[:, number, : len(r), : len(c)] = matrix[:, r.unsqueeze(1), c.unsqueeze(0)]
        return cls(values, rows, columns, (m, n))

    def times(self, d: Tensor) -> Tensor:
        """A d: (batch, n) -> (batch, m)."""
        entries = pad(d, (0, 1))[:, self.columns]
        if len(self.values) == 1:
            products = torch.einsum("grc,bgc->bgr", self.values[0], entries)
        else:
            products = (self.values @ entries.unsqueeze(3)).squeeze(3)
        total = d.new_zeros(len(d), self.shape[0] + 1)
        total[:, self.rows.flatten()] = products.flatten(1)
        return total[:, :-1]

    def transposed(self, p: Tensor) -> Tensor:
        """A^T p: (batch, m) -> (batch, n)."""
        entries = pad(p, (0, 1))[:, self.rows]
        if len(self.values) == 1:
            products = torch.einsum("grc,bgr->bgc", self.values[0], entries)
        else:
            products = (entries.unsqueeze(2) @ self.values).squeeze(2)
        total = p.new_zeros(len(p), self.shape[1] + 1)
        return total.index_add_(1, self.columns.flatten(), products.flatten(1))[:, :-1]

    def over(self, unit: float, dtype: torch.dtype) -> Grouped:
        """A / unit, in another precision."""
        return Grouped((self.values / unit).to(dtype), self.rows, self.columns, self.shape)


Operator = Whole | Grouped


def operator(matrix: Tensor, sparsity: RowSparsity) -> Operator:
    """The operator of a matrix (batch or 1, m, n): grouped where its sparsity has groups."""
    return Whole(matrix) if sparsity.groups is None else Grouped.of(matrix, sparsity.groups)


def times(stack: Sequence[Operator], d: Tensor) -> Tensor:
    """A d, the matrices stacked on top of each other: (batch, n) -> (batch, all rows)."""
    return torch.cat([part.times(d) for part in stack], dim=1)


def transposed(stack: Sequence[Operator], p: Tensor) -> Tensor:
    """A^T p, the matrices stacked on top of each other: (batch, all rows) -> (batch, n)."""
    pieces = p.split([part.shape[0] for part in stack], dim=1)
    return torch.stack([part.transposed(piece) for part, piece in zip(stack, pieces, strict=True)]).sum(0)
