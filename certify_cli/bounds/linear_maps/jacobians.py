"""Every pre-activation's Jacobian, and its derivative by every earlier activation, in a linearised network (theory 4).

    z_l(x+d) - z_l(x) = A_l d + sum over earlier nonlinear k of  B_lk q_k ,      q_k = phi(z_k+D_k) - phi(z_k) - s_k D_k

A_l = dz_l/dx and B_lk = dz_l/dh_k are total derivatives, h_k taken as a free variable. Both are computed by pulling
unit vectors back from pre-activation l. Every row carries a bound of its Euclidean error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.row_operators import Operator, Whole, operator, times, transposed
from certify_cli.bounds.linear_maps.row_sparsity import RowSparsity
from certify_cli.network.graph import Network
from certify_cli.network.propagate import NodeVjp, Vectors, vjp
from certify_cli.numerics.batched import estimate_dtype
from certify_cli.numerics.rounding import UNDERFLOW, gamma, power_of_two, up
from certify_cli.numerics.trees import Batched


@dataclass(frozen=True, eq=False)
class Rows(Batched, shared=("blocks", "errors", "gram"), constant=("sparsity",)):
    """The Jacobians A_l of several pre-activations, stacked into one matrix A of `count` rows.

    blocks: A_l, one per pre-activation, (batch or 1, size, inputs); batch 1 where all samples share it.
    errors: per block, (batch or 1, size): upper bounds of the Euclidean error of each row.
    sparsity: per block, which columns its rows use; dense where `gram` is given.
    operators: the blocks in the form in which they are multiplied.
    gram: A A^T as computed, (batch or 1, count, count); None where A has more rows than columns.
    estimates: A A^T / unit^2 where `gram` is given, else the blocks of A / unit. They may be in single precision, and
        serve estimates only, no bound.
    unit: a power of two near the largest entry of A.
    """

    blocks: tuple[Tensor, ...]
    errors: tuple[Tensor, ...]
    sparsity: tuple[RowSparsity, ...]
    operators: tuple[Operator, ...]
    gram: Tensor | None
    estimates: tuple[Operator, ...]
    unit: float

    @classmethod
    def of(cls, blocks: tuple[Tensor, ...], errors: tuple[Tensor, ...]) -> Rows:
        count, inputs = sum(block.shape[1] for block in blocks), blocks[0].shape[2]
        unit = max(power_of_two(block) for block in blocks)
        dtype = estimate_dtype(min(count, inputs))
        if count <= inputs:
            gram = _stacked_gram(blocks)
            dense = tuple(RowSparsity(None) for _ in blocks)
            whole = tuple(Whole(block) for block in blocks)
            return cls(blocks, errors, dense, whole, gram, (Whole(gram / unit).over(unit, dtype),), unit)
        sparsity = tuple(RowSparsity.of(block) for block in blocks)
        operators = tuple(operator(block, s) for block, s in zip(blocks, sparsity, strict=True))
        return cls(blocks, errors, sparsity, operators, None, tuple(o.over(unit, dtype) for o in operators), unit)

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

    def apply(self, d: Tensor) -> Tensor:
        """A d: (batch, inputs) -> (batch, count)."""
        return times(self.operators, d)

    def transpose(self, p: Tensor) -> Tensor:
        """A^T p: (batch, count) -> (batch, inputs)."""
        return transposed(self.operators, p)

    @cached_property
    def squared(self) -> Tensor:
        """Entrywise upper bounds (batch or 1, count, count) of (A A^T)^2, for the computed A."""
        gram = _stacked_gram(self.blocks) if self.gram is None else self.gram
        sizes = torch.cat([s.expand(len(gram), -1) for s in self.sizes], dim=1)
        # every entry of the Gram matrix is computed within gamma_n |A_i row| |A_j row|
        slack = gamma(self.inputs + 2) * sizes.unsqueeze(2) * sizes.unsqueeze(1)
        return up((gram.abs() + slack).square(), 8) + UNDERFLOW


def _stacked_gram(blocks: tuple[Tensor, ...]) -> Tensor:
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
    """The Jacobians of every pre-activation, as vectors (batch or 1, rows, size).

    outer: A_l by pre-activation, in topological order.
    inner: B_lk by (pre-activation, nonlinear node).
    rows: all A_l, stacked in the order of `outer`.
    """

    outer: Mapping[int, Vectors]
    inner: Mapping[tuple[int, int], Vectors]
    rows: Rows

    @classmethod
    def of(cls, outer: Mapping[int, Vectors], inner: Mapping[tuple[int, int], Vectors]) -> Jacobians:
        return cls(
            outer, inner, Rows.of(tuple(v.value for v in outer.values()), tuple(v.error for v in outer.values()))
        )

    @property
    def pre_activations(self) -> tuple[int, ...]:
        return tuple(self.outer)


def pulled_rows(network: Network, target: int, node_vjps: Mapping[int, NodeVjp]) -> dict[int, Vectors]:
    """The rows A_l (key 0) and B_lk (keyed by nonlinear node) of pre-activation `target`, (batch or 1, size, inputs).

    node_vjps: the linear map that stands for each nonlinear node; a node without one is cut.
    """
    node = network.nodes[target]
    units = torch.eye(node.size, dtype=torch.float64, device=network.device).reshape(1, node.size, *node.shape)
    adjoints = vjp(network, units, node_vjps, target)
    return {source: Vectors(rows.value.flatten(2), rows.error) for source, rows in adjoints.items()}
