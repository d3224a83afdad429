"""Jacobians of the pre-activations at each sample, pulled back row by row, with bounds of their errors.

The rows of A_l and B_lk (theory section 4) come from pulling unit vectors back from pre-activation l, on the windows
that they see where l is the image of a convolution (`linear_forms`). Every row carries a bound of its Euclidean error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.row_matrices import Matrix, Whole, matrix_of, times, transposed
from certify_cli.bounds.linear_maps.row_products import InexactRows, few_squared_products
from certify_cli.network.affine import AffineOp
from certify_cli.network.graph import Concat, Network, Shape
from certify_cli.network.linear_forms import Forms, unit_forms
from certify_cli.network.propagate import NodeVjp, Slope, Vectors, affine_error, vjp
from certify_cli.network.walk import Backward, backward
from certify_cli.numerics.batched import estimate_dtype
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, power_of_two, up
from certify_cli.numerics.trees import Batched

SQUARED_ENTRIES = 2**23
"""Largest number of squared products of rows that are formed to bound all rivals at once (64 MiB a sample)."""


@dataclass(frozen=True, eq=False)
class Rows(Batched, shared=("blocks", "gram", "squares")):
    """The Jacobians A_l of several pre-activations, stacked into one matrix A of `count` rows.

    blocks: A_l, one per pre-activation; batch 1 where all samples share it.
    gram: A A^T as computed, (batch or 1, count, count); None where A has more rows than columns.
    estimates: A A^T / unit^2 where `gram` is given, else the blocks of A / unit. They may be in single precision, and
        serve estimates only, no bound.
    unit: a power of two near the largest entry of A.
    squares: upper bounds of (A A^T)^2, entry by entry, by pairs of blocks, the second one not behind the first; None
        where they have more than SQUARED_ENTRIES entries a sample.
    """

    blocks: tuple[InexactRows, ...]
    gram: Tensor | None
    estimates: tuple[Matrix, ...]
    unit: float
    squares: tuple[tuple[Matrix, ...], ...] | None

    @classmethod
    def of(cls, blocks: tuple[InexactRows, ...], known: Mapping[tuple[int, int], Matrix] | None = None) -> Rows:
        """known: squared products of pairs of blocks, by their positions, that have been computed already."""
        count, inputs = sum(block.matrix.shape[0] for block in blocks), blocks[0].matrix.shape[1]
        unit = max(power_of_two(block.matrix.values) for block in blocks)
        dtype, squares = estimate_dtype(min(count, inputs)), _squares(blocks, known or {})
        if count <= inputs:
            gram = _stacked_gram([block.matrix.dense for block in blocks])
            return cls(blocks, gram, (Whole(gram / unit).over(unit, dtype),), unit, squares)
        return cls(blocks, None, tuple(block.matrix.over(unit, dtype) for block in blocks), unit, squares)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of rows of each block."""
        return tuple(block.matrix.shape[0] for block in self.blocks)

    @property
    def count(self) -> int:
        return sum(self.sizes)

    @property
    def inputs(self) -> int:
        return self.blocks[0].matrix.shape[1]

    def apply(self, d: Tensor) -> Tensor:
        """A d: (batch, inputs) -> (batch, count)."""
        return times([block.matrix for block in self.blocks], d)

    def transpose(self, p: Tensor) -> Tensor:
        """A^T p: (batch, count) -> (batch, inputs)."""
        return transposed([block.matrix for block in self.blocks], p)

    def squared_form(self, w: Tensor) -> Tensor | None:
        """Upper bounds (batch, several) of w^T M w for w (batch, several, count) >= 0, M of `squares`; None without."""
        if self.squares is None:
            return None
        parts = w.split(self.sizes, dim=2)
        total = torch.zeros_like(w[..., 0])
        for i, row in enumerate(self.squares):
            for j, square in enumerate(row):
                form = (square.times(parts[j]) * parts[i]).sum(2)
                total = total + (form if i == j else 2 * form)
        # each term has two products, and passes two sums within its blocks, and that of all pairs
        return up(total, 2 * self.count + len(self.blocks) ** 2 + 8) + UNDERFLOW


def _squares(
    blocks: Sequence[InexactRows], known: Mapping[tuple[int, int], Matrix]
) -> tuple[tuple[Matrix, ...], ...] | None:
    """`Rows.squares`."""
    left, rows = SQUARED_ENTRIES, []
    for i, block in enumerate(blocks):
        row = []
        for j, other in enumerate(blocks[: i + 1]):
            found = known[i, j] if (i, j) in known else few_squared_products(block, other, left)
            left -= 0 if found is None else found.values[0].numel()
            if found is None or left < 0:
                return None
            row.append(found)
        rows.append(tuple(row))
    return tuple(rows)


def _stacked_gram(blocks: Sequence[Tensor]) -> Tensor:
    """A A^T as computed, (batch or 1, count, count). Each pair of blocks is multiplied once."""
    number = range(len(blocks))
    products = {(i, j): blocks[i] @ blocks[j].mT for i in number for j in range(i + 1)}
    batch = max(len(product) for product in products.values())
    spread = {pair: product.expand(batch, -1, -1) for pair, product in products.items()}
    return torch.cat(
        [torch.cat([spread[i, j] if i >= j else spread[j, i].mT for j in number], dim=2) for i in number], dim=1
    )


@dataclass(frozen=True, eq=False)
class Jacobians(Batched, shared=("outer", "inner")):
    """The Jacobians of every pre-activation.

    outer: A_l by pre-activation, in topological order.
    inner: B_lk by (pre-activation, nonlinear node).
    rows: all A_l, stacked in the order of `outer`.
    """

    outer: Mapping[int, InexactRows]
    inner: Mapping[tuple[int, int], InexactRows]
    rows: Rows

    @property
    def pre_activations(self) -> tuple[int, ...]:
        return tuple(self.outer)


@dataclass(frozen=True, eq=False)
class _Pulled:
    """Forms as computed, and upper bounds (batch or 1, rows) of their Euclidean errors."""

    forms: Forms
    error: Tensor


def jacobian_rows(network: Network, target: int, slopes: Mapping[int, Slope]) -> dict[int, InexactRows]:
    """The rows A_l (key 0) and B_lk (keyed by nonlinear node) of pre-activation `target`.

    slopes: of the nonlinear nodes; a node without is cut.
    """

    def affine(index: int, op: AffineOp, rows: _Pulled, shape: Shape) -> _Pulled:
        return _Pulled(rows.forms.back(op, shape), affine_error(op, rows.forms.size, rows.error, shape))

    def split(op: Concat, rows: _Pulled, shapes: list[Shape]) -> list[_Pulled]:
        return [_Pulled(part, rows.error) for part in rows.forms.split(op, shapes)]

    found: dict[int, _Pulled] = {}

    def nonlinear(index: int, rows: _Pulled) -> _Pulled | None:
        found[index] = rows
        if index not in slopes:
            return None
        slope, forms = slopes[index], rows.forms
        assert isinstance(slope.value, Tensor)
        scaled = forms.at(forms.values * forms.entries(slope.value))
        return _Pulled(scaled, slope.row_error(forms.size, rows.error))

    def merge(index: int, total: _Pulled, rows: _Pulled) -> _Pulled:
        forms = total.forms.plus(rows.forms)
        return _Pulled(forms, up(total.error + rows.error + UNIT * forms.size, 4))

    units = unit_forms(network.nodes[target].shape, torch.arange(network.nodes[target].size, device=network.device))
    none = torch.zeros(units.values.shape[:2], dtype=torch.float64, device=network.device)
    at_input = backward(network, target, _Pulled(units, none), Backward(affine, split, nonlinear, merge))
    if at_input is not None:
        found[0] = at_input
    rows = {source: InexactRows(matrix_of(pulled.forms), pulled.error) for source, pulled in found.items()}
    if 0 not in rows:
        zeros = torch.zeros(1, network.nodes[target].size, network.nodes[0].size, dtype=torch.float64)
        rows[0] = InexactRows(Whole(zeros.to(none.device)), none)
    return rows


def pulled_rows(network: Network, target: int, node_vjps: Mapping[int, NodeVjp]) -> dict[int, Vectors]:
    """The same rows as whole vectors (batch or 1, size, inputs), for any linear maps that stand for nonlinear nodes."""
    node = network.nodes[target]
    units = torch.eye(node.size, dtype=torch.float64, device=network.device).reshape(1, node.size, *node.shape)
    adjoints = vjp(network, units, node_vjps, target)
    return {source: Vectors(rows.value.flatten(2), rows.error) for source, rows in adjoints.items()}
