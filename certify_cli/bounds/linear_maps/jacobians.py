"""Every pre-activation's Jacobian, and its derivative by every earlier activation, in a linearised network (theory 4).

    z_l(x+d) - z_l(x) = A_l d + sum over earlier nonlinear k of  B_lk q_k ,      q_k = phi(z_k+D_k) - phi(z_k) - s_k D_k

A_l = dz_l/dx and B_lk = dz_l/dh_k (total derivatives with h_k cut free) are pulled back from unit vectors at head l.
Each row carries a bound of its Euclidean error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.row_operators import Operator, Whole, operator, times, transposed
from certify_cli.bounds.linear_maps.row_sparsity import Supports
from certify_cli.network.graph import Network
from certify_cli.network.propagate import Passage, Vectors, pull
from certify_cli.numerics.batched import estimate_dtype
from certify_cli.numerics.rounding import UNDERFLOW, gamma, power_of_two, up


@dataclass(frozen=True, eq=False)
class Rows:
    """A_l of several heads, stacked: `blocks[i]` is (batch or 1, size, inputs), batch 1 where all samples share it.

    `errors[i]` (batch or 1, size) bounds the Euclidean error of each row.
    """

    blocks: tuple[Tensor, ...]
    errors: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        return sum(block.shape[1] for block in self.blocks)

    @property
    def inputs(self) -> int:
        return self.blocks[0].shape[2]

    @cached_property
    def sizes(self) -> tuple[Tensor, ...]:
        """Upper bounds (batch or 1, size) of the norms of the computed rows."""
        return tuple(Vectors(b, e).size for b, e in zip(self.blocks, self.errors, strict=True))

    @cached_property
    def supports(self) -> tuple[Supports, ...]:
        """Of each block's rows."""
        return tuple(Supports.of(block) for block in self.blocks)

    @cached_property
    def operators(self) -> tuple[Operator, ...]:
        """The blocks to multiply with; where the Gram matrix is the smaller side, whole."""
        if self.count <= self.inputs:
            return tuple(Whole(block) for block in self.blocks)
        return tuple(operator(block, s) for block, s in zip(self.blocks, self.supports, strict=True))

    def at(self, index: Tensor) -> Rows:
        """Of the samples at `index`."""

        def part(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t if len(t) == 1 else t[index] for t in tensors)

        rows = Rows(part(self.blocks), part(self.errors))
        if "_stacked" in self.__dict__:
            (rows.__dict__["_stacked"],) = part((self._stacked,))
        if self.count > self.inputs:  # wanted for every product: looked for once
            rows.__dict__["supports"] = self.supports
            rows.__dict__["operators"] = tuple(o.at(index) for o in self.operators)
        if "short" in self.__dict__:
            rows.__dict__["short"] = tuple(o.at(index) for o in self.short[0]), self.short[1]
        return rows

    def apply(self, d: Tensor) -> Tensor:
        """A d: (batch, inputs) -> (batch, count)."""
        return times(self.operators, d)

    def transpose(self, p: Tensor) -> Tensor:
        """A^T p: (batch, count) -> (batch, inputs)."""
        return transposed(self.operators, p)

    @cached_property
    def grams(self) -> dict[tuple[int, int], Tensor]:
        """A_i A_j^T (batch or 1, size_i, size_j) as computed, i >= j: entrywise within gamma_n |A_i row| |A_j row|."""
        return {(i, j): self.blocks[i] @ self.blocks[j].mT for i in range(len(self.blocks)) for j in range(i + 1)}

    @cached_property
    def _stacked(self) -> Tensor:
        """A A^T, (batch or 1, count, count)."""
        batch = max(len(g) for g in self.grams.values())
        spread = {pair: g.expand(batch, -1, -1) for pair, g in self.grams.items()}
        number = range(len(self.blocks))
        return torch.cat(
            [torch.cat([spread[i, j] if i >= j else spread[j, i].mT for j in number], dim=2) for i in number], dim=1
        )

    def gram(self, batch: int) -> Tensor:
        """A A^T as computed, (batch, count, count), not to be written to."""
        return self._stacked.expand(batch, -1, -1)

    @cached_property
    def squared(self) -> Tensor:
        """Entrywise upper bounds (batch or 1, count, count) of (A A^T)^2, for the computed A."""
        sizes = torch.cat([s.expand(len(self._stacked), -1) for s in self.sizes], dim=1)
        slack = gamma(self.inputs + 2) * sizes.unsqueeze(2) * sizes.unsqueeze(1)
        return up((self._stacked.abs() + slack).square(), 8) + UNDERFLOW

    @cached_property
    def short(self) -> tuple[tuple[Operator, ...], float]:
        """A A^T / unit^2, or where rows are more than inputs the blocks of A / unit, a power of two: for estimates."""
        unit = max(power_of_two(block) for block in self.blocks)
        dtype = estimate_dtype(min(self.count, self.inputs))
        if self.count <= self.inputs:
            return (Whole(self._stacked / unit).over(unit, dtype),), unit
        return tuple(o.over(unit, dtype) for o in self.operators), unit


@dataclass(frozen=True, eq=False)
class Jacobians:
    """A_l by head, in topological order, and B_lk by (head, nonlinear node): Vectors (batch or 1, rows, size)."""

    outer: Mapping[int, Vectors]
    inner: Mapping[tuple[int, int], Vectors]

    @property
    def heads(self) -> tuple[int, ...]:
        return tuple(self.outer)

    @cached_property
    def rows(self) -> Rows:
        """All A_l, stacked in the order of `heads`."""
        return Rows(tuple(v.value for v in self.outer.values()), tuple(v.error for v in self.outer.values()))

    def at(self, index: Tensor) -> Jacobians:
        """Of the samples at `index`."""

        def part(vectors: Vectors) -> Vectors:
            return vectors if len(vectors.value) == 1 else vectors.at(index)

        jacobians = Jacobians({k: part(v) for k, v in self.outer.items()}, {k: part(v) for k, v in self.inner.items()})
        jacobians.__dict__["rows"] = self.rows.at(index)
        return jacobians


def pulled_rows(network: Network, target: int, passages: Mapping[int, Passage]) -> dict[int, Vectors]:
    """A (key 0) and B (keyed by nonlinear node) of one head, in the network made linear by `passages`."""
    node = network.nodes[target]
    units = torch.eye(node.size, dtype=torch.float64, device=network.device).reshape(1, node.size, *node.shape)
    found = pull(network, units, passages, target)
    return {source: Vectors(rows.value.flatten(2), rows.error) for source, rows in found.items()}
