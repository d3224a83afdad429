"""Matrices whose rows use few columns: whole, or by groups of rows that use the same ones.

A row of a convolution's Jacobian uses the columns of one window of the input, and the rows of one position share the
window. Products with such a matrix skip the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from certify_cli.network.linear_forms import Forms, WindowForms
from certify_cli.numerics.batched import vector_times_matrix
from certify_cli.numerics.rounding import vector_norm_up
from certify_cli.numerics.trees import Batched

DENSE = 0.3
"""Matrices with more than this part of their entries non-zero are kept whole."""
GROUPS = 1024
"""Matrices whose rows fall into more groups than this are kept whole."""


@dataclass(frozen=True, eq=False)
class Whole(Batched, shared=("values",)):
    """A matrix A as it is: values (batch or 1, m, n)."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def dense(self) -> Tensor:
        """(batch or 1, m, n)."""
        return self.values

    @property
    def row_norms(self) -> Tensor:
        """Euclidean norms (batch or 1, m) of the rows, up."""
        return vector_norm_up(self.values)

    def put_values(self, values: Tensor) -> Whole:
        """Other values at the same places."""
        return Whole(values)

    def at_columns(self, t: Tensor) -> Tensor:
        """t (batch, n) at the places of the values, so that it can be multiplied with them."""
        return t.unsqueeze(1)

    def row_sums(self, values: Tensor) -> Tensor:
        """Sums (batch, m) over each row of `values`, which are shaped as the matrix' own."""
        return values.sum(2)

    def times(self, d: Tensor) -> Tensor:
        """A d: (batch, n) -> (batch, m), or (batch or 1, count, n) -> (batch, count, m)."""
        if d.dim() == 2:
            return vector_times_matrix(d, self.values.mT)
        return d @ (self.values[0] if len(self.values) == 1 else self.values).mT

    def transposed(self, p: Tensor) -> Tensor:
        """A^T p: (batch, m) -> (batch, n)."""
        return vector_times_matrix(p, self.values)

    def within(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Parts (batch or 1, g, r, c) of A: rows (g, r) and columns (g, c), where m and n stand for zeros."""
        return pad(self.values, (0, 1, 0, 1))[:, rows.unsqueeze(2), columns.unsqueeze(1)]

    def add_form(self, total: Tensor, weights: Tensor) -> None:
        """Adds A^T diag(w) A to `total` (batch, n, n), contiguous; weights: w (batch, m)."""
        total += (self.values * weights.unsqueeze(2)).mT @ self.values

    def over(self, unit: float, dtype: torch.dtype) -> Whole:
        """A / unit, in another precision."""
        return Whole((self.values / unit).to(dtype))


@dataclass(frozen=True, eq=False)
class Grouped(Batched, shared=("values",), constant=("rows", "columns", "shape", "structural")):
    """A matrix A by groups of rows that use the same columns. It is zero outside of them.

    values: (batch or 1, groups, r, c), the groups padded with zeros to one size.
    rows: (groups, r), indices of each group's rows; m in the padding. Every row is in one group.
    columns: (groups, c), indices of each group's columns, each once; n in the padding.
    shape: (m, n).
    structural: whether the entries outside are 0 by the network's structure, so that they carry no error either.

    The methods are those of `Whole`.
    """

    values: Tensor
    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]
    structural: bool = False

    @classmethod
    def of(cls, matrix: Tensor, groups: Sequence[tuple[Tensor, Tensor]]) -> Grouped:
        """The groups, (rows, columns) each, of a matrix (batch or 1, m, n) that is zero outside of them."""
        m, n = matrix.shape[1:]
        rows = matrix.new_full((len(groups), max(len(r) for r, _ in groups)), m, dtype=torch.long)
        columns = matrix.new_full((len(groups), max(1, *(len(c) for _, c in groups))), n, dtype=torch.long)
        for number, (r, c) in enumerate(groups):
            rows[number, : len(r)], columns[number, : len(c)] = r, c
        return cls(Whole(matrix).within(rows, columns), rows, columns, (m, n))

    @cached_property
    def _place(self) -> Tensor:
        """(m + 1,): where each row stands in the flattened groups; behind them for row m, the padding."""
        place = torch.full((self.shape[0] + 1,), self.rows.numel(), dtype=torch.long, device=self.rows.device)
        place[self.rows.flatten()] = torch.arange(self.rows.numel(), device=self.rows.device)
        place[-1] = self.rows.numel()
        return place

    @property
    def group_of_row(self) -> Tensor:
        """(m + 1,): the group of each row; the number of groups for row m, the padding."""
        return self._place // self.rows.shape[1]

    def _to_rows(self, values: Tensor) -> Tensor:
        """(..., groups, r) -> (..., m)."""
        return values.flatten(-2)[..., self._place[:-1]]

    @property
    def dense(self) -> Tensor:
        m, n = self.shape
        index = self.rows.unsqueeze(2) * (n + 1) + self.columns.unsqueeze(1)
        whole = self.values.new_zeros(len(self.values), (m + 1) * (n + 1))
        whole[:, index.flatten()] = self.values.flatten(1)
        return whole.reshape(-1, m + 1, n + 1)[:, :m, :n].contiguous()

    @property
    def row_norms(self) -> Tensor:
        return self._to_rows(vector_norm_up(self.values))

    def put_values(self, values: Tensor) -> Grouped:
        return replace(self, values=values)

    def at_columns(self, t: Tensor) -> Tensor:
        return pad(t, (0, 1))[:, self.columns].unsqueeze(2)

    def row_sums(self, values: Tensor) -> Tensor:
        return self._to_rows(values.sum(3))

    def times(self, d: Tensor) -> Tensor:
        several = d if d.dim() == 3 else d.unsqueeze(1)
        entries = pad(several, (0, 1))[..., self.columns].transpose(1, 2)  # (batch, groups, count, c)
        if len(self.values) == 1:  # not copied for each item of the batch
            batch, groups, count, c = entries.shape
            products = entries.transpose(0, 1).reshape(groups, batch * count, c) @ self.values[0].mT
            products = products.reshape(groups, batch, count, -1).permute(1, 2, 0, 3)
        else:
            products = (entries @ self.values.mT).transpose(1, 2)
        images = self._to_rows(products)
        return images if d.dim() == 3 else images.squeeze(1)

    def transposed(self, p: Tensor) -> Tensor:
        entries = pad(p, (0, 1))[:, self.rows]
        if len(self.values) == 1:
            products = torch.einsum("grc,bgr->bgc", self.values[0], entries)
        else:
            products = (entries.unsqueeze(2) @ self.values).squeeze(2)
        total = p.new_zeros(len(p), self.shape[1] + 1)
        return total.index_add_(1, self.columns.flatten(), products.flatten(1))[:, :-1]

    def within(self, rows: Tensor, columns: Tensor) -> Tensor:
        groups, r = rows.shape
        c, width, n = self.columns.shape[1], columns.shape[1], self.shape[1]
        place = self._place[rows].flatten()
        values = pad(self.values.flatten(1, 2), (0, 0, 0, 1))[:, place]  # (batch, groups * r, c)
        own = pad(self.columns.repeat_interleave(self.rows.shape[1], 0), (0, 0, 0, 1), value=n)[place]
        position = torch.full((groups, n + 1), width, dtype=torch.long, device=rows.device)
        position.scatter_(1, columns, torch.arange(width, device=rows.device).expand(groups, -1))
        position[:, n] = width
        target = position.gather(1, own.reshape(groups, r * c)).reshape(1, groups * r, c)
        found = values.new_zeros(len(values), groups * r, width + 1)
        found.scatter_(2, target.expand(len(values), -1, -1), values)
        return found[..., :-1].reshape(-1, groups, r, width)

    def add_form(self, total: Tensor, weights: Tensor) -> None:
        weighted = self.values * pad(weights, (0, 1))[:, self.rows].unsqueeze(3)
        squares = (weighted.mT @ self.values).flatten(1)
        columns = self.columns.clamp(max=self.shape[1] - 1)  # in the padding zeros are added to the last column
        places = (columns.unsqueeze(2) * self.shape[1] + columns.unsqueeze(1)).flatten()
        total.view(len(total), -1).scatter_add_(1, places.expand(len(squares), -1), squares)

    def over(self, unit: float, dtype: torch.dtype) -> Grouped:
        return self.put_values((self.values / unit).to(dtype))


Matrix = Whole | Grouped


def matrix_of(forms: Forms) -> Matrix:
    """Forms as the rows of a matrix: by groups of the rows that see one window, or that use the same columns."""
    if isinstance(forms, WindowForms):
        found = _by_windows(forms)
        if found is not None:
            return found
    return by_columns(forms.whole().values.flatten(2))


def by_columns(matrices: Tensor) -> Matrix:
    """Matrices (batch or 1, m, n), by the columns that their rows use; whole where these are many."""
    mask = (matrices != 0).any(0)
    if float(mask.double().mean()) > DENSE:
        return Whole(matrices)
    patterns, which = mask.unique(dim=0, return_inverse=True)
    if len(patterns) > GROUPS:
        return Whole(matrices)
    rows = [(which == number).nonzero()[:, 0] for number in range(len(patterns))]
    return Grouped.of(matrices, [(r, p.nonzero()[:, 0]) for r, p in zip(rows, patterns, strict=True)])


def _by_windows(forms: WindowForms) -> Grouped | None:
    """Forms on windows as a matrix; None where the windows hold too much of the image, or groups differ in size."""
    values, index = forms.values, forms.columns
    corners, which = forms.corner.unique(dim=0, return_inverse=True)
    sizes = which.bincount()
    n = forms.values.shape[2] * forms.pixels
    if values[0, 0].numel() > DENSE * n or len(corners) > GROUPS or bool((sizes != sizes[0]).any()):
        return None
    rows = which.argsort(stable=True).reshape(len(corners), -1)
    return Grouped(values.flatten(2)[:, rows], rows, index[rows[:, 0]], (values.shape[1], n), structural=True)


def times(stack: Sequence[Matrix], d: Tensor) -> Tensor:
    """A d, the matrices stacked on top of each other: (batch, n) -> (batch, all rows)."""
    return torch.cat([part.times(d) for part in stack], dim=1)


def transposed(stack: Sequence[Matrix], p: Tensor) -> Tensor:
    """A^T p, the matrices stacked on top of each other: (batch, all rows) -> (batch, n)."""
    pieces = p.split([part.shape[0] for part in stack], dim=1)
    return torch.stack([part.transposed(piece) for part, piece in zip(stack, pieces, strict=True)]).sum(0)
