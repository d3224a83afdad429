"""Linear blocks between nodes: norms of W_lk, A_l and B_lk (theory sections 2 to 4).

A block is the linear map from a source (the input, or a nonlinear node's output) to a later target (a pre-activation,
or the logits) in the network in which every nonlinear node is replaced by a centre slope, or cut. With all of them cut
the blocks are the network's own weights W_lk; with centre slopes they are A_l (from the input) and B_lk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.efforts import Budget
from certify_cli.network.affine import AffineOp
from certify_cli.network.graph import Concat, Network, Shape
from certify_cli.network.propagate import Slopes, Vectors, jvp, nonlinear_nodes, pre_activations, rows_cost, vjp
from certify_cli.network.walk import Forward, forward
from certify_cli.numerics.norms import matrix_norm
from certify_cli.numerics.rounding import up, vector_norm_up

MATRIX_ENTRIES = 2**24
"""Number of entries up to which a block is written out as a matrix (128 MiB)."""
CHUNK_ENTRIES = 2**20
"""Unit vectors pass through the network in chunks whose widest value has about this many entries (8 MiB)."""


@dataclass(frozen=True, eq=False)
class Block:
    """The linear map from one source to one target. Norms and errors are upper bounds.

    norm: the spectral norm.
    rows, columns: Euclidean norms of the rows and columns, one entry each, or a single entry that holds for all.
    matrix: (target size, source size), or None where it is not written out.
    matrix_error: Frobenius norm of the difference between `matrix` and the exact block.
    """

    norm: float
    rows: Tensor
    columns: Tensor
    matrix: Tensor | None = None
    matrix_error: float = 0.0

    @cached_property
    def magnitudes(self) -> Tensor:
        """|matrix|, entry by entry; cached, since every interval pass needs it."""
        if self.matrix is None:
            raise ValueError("this block is not written out as a matrix")
        return self.matrix.abs()


@dataclass(frozen=True)
class _Composed:
    """Norms of one block, multiplied along the paths from its source to its target.

    norm: spectral norm.   row: norm of the longest row.   factors: number of factors other than 1.
    """

    norm: float
    row: float
    factors: int


def blocks(network: Network, centres: Slopes, budget: Budget, keep: bool = False) -> dict[tuple[int, int], Block]:
    """All blocks that are not identically zero, keyed (target, source). keep: whether to keep the matrices."""
    by_norm: dict[tuple[int, int], Block] = {}
    for source in (0, *nonlinear_nodes(network)):
        composed = _composed(network, source, centres)
        size = network.nodes[source].size
        wanted = {
            t
            for t in composed
            if network.nodes[t].size * size <= MATRIX_ENTRIES and _affordable(network, t, size, budget)
        }
        matrices = _matrices(network, source, centres, wanted) if wanted else {}
        for target, bound in composed.items():
            by_norm[target, source] = _block(bound, matrices.get(target), keep, network.device)
    return by_norm | _with_rows(network, centres, budget, by_norm)


def _with_rows(
    network: Network, centres: Slopes, budget: Budget, by_norm: Mapping[tuple[int, int], Block]
) -> dict[tuple[int, int], Block]:
    """The blocks with one bound for all rows, given a bound for each row by pulling unit vectors back.

    Only targets whose rows the budget affords; the others are left out.
    """
    refined: dict[tuple[int, int], Block] = {}
    for target in pre_activations(network):
        sources = [k for t, k in by_norm if t == target and len(by_norm[t, k].rows) == 1]
        size = network.nodes[target].size
        if not sources or size == 1 or rows_cost(network, target) > budget.norm:
            continue
        chunk = max(8, CHUNK_ENTRIES // max(n.size for n in network.nodes[: target + 1]))
        parts: dict[int, list[Tensor]] = {k: [] for k in sources}
        for part in torch.arange(size, device=network.device).split(chunk):
            units = torch.nn.functional.one_hot(part, size).to(torch.float64)
            adjoints = vjp(network, units.reshape(1, -1, *network.nodes[target].shape), centres, target)
            for k in sources:
                parts[k].append(up(adjoints[k].size + adjoints[k].error, 2)[0])
        for k in sources:
            block = by_norm[target, k]
            refined[target, k] = replace(block, rows=torch.minimum(torch.cat(parts[k]), block.rows))
    return refined


def _affordable(network: Network, target: int, size: int, budget: Budget) -> bool:
    rows = network.nodes[target].size
    return min(rows, size) ** 2 * float(max(rows, size)) <= budget.norm


def _block(composed: _Composed, image: Vectors | None, keep: bool, device: torch.device) -> Block:
    if image is None:
        row, norm_ = (torch.tensor([v], dtype=torch.float64, device=device) for v in (composed.row, composed.norm))
        return Block(composed.norm, row, norm_)
    matrix = image.value.flatten(1).T  # a source unit was a row, and is a column now
    error = float(vector_norm_up(image.error))
    # a single factor's norm is verified already; a product of several may be far above the block's norm
    norm = composed.norm if composed.factors <= 1 else min(composed.norm, up(matrix_norm(matrix) + error, 2))
    rows = up(vector_norm_up(matrix) + error, 2).clamp(max=composed.row)
    columns = up(vector_norm_up(matrix.T) + image.error, 2).clamp(max=norm)
    return Block(norm, rows, columns, matrix.contiguous() if keep else None, error)


def _matrices(network: Network, source: int, centres: Slopes, wanted: set[int]) -> dict[int, Vectors]:
    """The transposed blocks from `source`, keyed by target: images of its unit vectors (source size, *target shape)."""
    node = network.nodes[source]
    chunk = max(8, CHUNK_ENTRIES // max(n.size for n in network.nodes))
    parts: dict[int, list[Vectors]] = {target: [] for target in wanted}
    for start in range(0, node.size, chunk):
        count = min(chunk, node.size - start)
        basis = torch.zeros(count, node.size, dtype=torch.float64, device=network.device)
        basis[torch.arange(count), torch.arange(start, start + count)] = 1.0
        images = jvp(network, source, basis.reshape(count, *node.shape), centres)
        for target in wanted:
            parts[target].append(images[target])
    return {
        target: Vectors(torch.cat([p.value for p in images]), torch.cat([p.error for p in images]))
        for target, images in parts.items()
    }


def _composed(network: Network, source: int, centres: Slopes) -> dict[int, _Composed]:
    """Norms of the blocks from `source`, multiplied along the paths (theory section 3, "Composition").

    Keyed by pre-activation node, all that `source` reaches; rounded up.
    """

    def affine(op: AffineOp, v: _Composed, shape: Shape) -> _Composed:
        norm, row, total = op.norm(shape), op.row_norm(shape), op.infinity_norm(shape)
        return _Composed(up(norm * v.norm), min(up(row * v.norm), up(total * v.row)), v.factors + (norm != 1.0))

    def add(parts: list[_Composed]) -> _Composed:
        if len(parts) == 1:
            return parts[0]
        return _Composed(up(sum(v.norm for v in parts), len(parts)), up(sum(v.row for v in parts), len(parts)), 2)

    def concat(op: Concat, parts: list[_Composed | None], shapes: list[Shape]) -> _Composed:
        present = [v for v in parts if v is not None]
        if len(present) == 1:
            return present[0]
        norm = up(math.hypot(*(v.norm for v in present)), len(present) + 2)
        return _Composed(norm, max(v.row for v in present), 2)

    def nonlinear(index: int, v: _Composed) -> _Composed | None:
        if index not in centres:
            return None
        slope = centres[index].largest
        return _Composed(up(slope * v.norm), up(slope * v.row), v.factors + (slope != 1.0))

    wanted = set(pre_activations(network))
    found = forward(network, source, _Composed(1.0, 1.0, 0), Forward(affine, add, concat, nonlinear))
    return {target: v for target, v in found if target in wanted}
