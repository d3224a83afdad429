"""Linear blocks between nodes: norms of W_lk, A_l and B_lk (theory sections 2 to 4).

A block is the linear map from a source (the input, or a nonlinear node's output) to a later target (a pre-activation,
or the logits) in the network in which every nonlinear node is replaced by a centre slope, or cut. With all of them cut
the blocks are the network's own weights W_lk; with centre slopes they are A_l (from the input) and B_lk.

Products of norms are there at once. What is dearer (blocks written out, their norms proved, a norm for every row) is
chosen by its cost beforehand (`block_costs`), and computed when it is first asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.block_costs import Costs, Pair, Passes, affordable, contributions, shared
from certify_cli.efforts import Budget
from certify_cli.network.affine import AffineOp, Dense, Shift
from certify_cli.network.graph import Concat, Network, Shape
from certify_cli.network.movement import Reshape
from certify_cli.network.propagate import Slopes, jvp, nonlinear_nodes, pre_activations, vjp
from certify_cli.network.walk import Forward, forward
from certify_cli.numerics.norms import matrix_norm
from certify_cli.numerics.rounding import root_sum_square, up, vector_norm_up

MATRIX_PART, SHARED_PART = 16, 4
"""Of the memory, one part in so many may go into the entries of one block that is written out as a matrix (of 2 GiB:
128 MiB), and of all blocks that are written out by the same passes."""
CHUNK_ENTRIES = 2**20
"""Unit vectors pass through the network in chunks whose widest value has about this many entries (8 MiB)."""


@dataclass(frozen=True, eq=False)
class Written:
    """A block written out.   norm: None where it was not to be proved.   matrix: None where it is not kept.

    The other figures are those of `Block`.
    """

    norm: float | None
    rows: Tensor
    columns: Tensor
    matrix: Tensor | None
    matrix_error: float


@dataclass(frozen=True, eq=False)
class _Composed:
    """Norms of one block, multiplied along the paths from its source to its target.

    norm: spectral norm.   row: norm of the longest row.   factors: number of factors other than 1.
    """

    norm: float
    row: float
    factors: int


@dataclass(frozen=True, eq=False)
class Block:
    """The linear map from one source to one target. Every figure is an upper bound, computed when first asked for."""

    family: Blocks
    pair: Pair

    @cached_property
    def _composed(self) -> _Composed:
        return self.family.composed[self.pair]

    @cached_property
    def _written(self) -> Written | None:
        return self.family.written(self.pair)

    @cached_property
    def norm(self) -> float:
        """The spectral norm."""
        if self.pair not in self.family.proved or self._written is None or self._written.norm is None:
            return self._composed.norm
        return min(self._composed.norm, self._written.norm)

    @cached_property
    def rows(self) -> Tensor:
        """Euclidean norms of the rows, one entry each, or a single entry that holds for all."""
        rows = self.family.pulled_rows(self.pair) if self._written is None else self._written.rows
        longest = self.family.one_entry(self._composed.row)
        return longest if rows is None else torch.minimum(rows, longest)

    @cached_property
    def columns(self) -> Tensor:
        """The same of the columns."""
        if self._written is None:
            return self.family.one_entry(self.norm)
        return torch.minimum(self._written.columns, self.family.one_entry(self.norm))

    @property
    def matrix(self) -> Tensor | None:
        """The block itself, (target size, source size), or None where it is not written out."""
        return None if self._written is None else self._written.matrix

    @property
    def matrix_error(self) -> float:
        """Frobenius norm of the difference between `matrix` and the exact block."""
        return 0.0 if self._written is None else self._written.matrix_error

    @cached_property
    def magnitudes(self) -> Tensor:
        """|matrix|, entry by entry; cached, since every interval pass needs it."""
        if self.matrix is None:
            raise ValueError("this block is not written out as a matrix")
        return self.matrix.abs()


class Blocks(Mapping[Pair, Block]):
    """All blocks of one network that are not identically zero, keyed (target, source).

    network, centres: the network and the slopes of its nonlinear nodes; a node without one is cut.
    composed: products of norms.   proved: the blocks whose own norm is proved, as far as the budget goes.
    """

    def __init__(
        self, network: Network, centres: Slopes, radii: Mapping[int, float], budget: Budget, keep: bool = False
    ) -> None:
        """radii: of the slopes around the centres; they say which blocks count most.   keep: whether matrices are kept.

        Matrices that are kept are written out where the budget of one matrix affords it; others serve the norm alone.
        """
        self.network, self.centres = network, centres
        self._budget, self._keep, self._costs = budget, keep, Costs(network)
        self.composed: dict[Pair, _Composed] = {}
        for source in (0, *nonlinear_nodes(network)):
            self.composed |= {(t, source): found for t, found in _composed(network, source, centres).items()}
        self._blocks = {pair: Block(self, pair) for pair in self.composed}
        small = {pair for pair in self.composed if self._costs.entries(pair) <= budget.memory // (8 * MATRIX_PART)}
        small = {pair for pair in small if self._costs.cubed(pair) <= budget.norm}
        # a single factor's norm is verified already; a product of several may be far above the block's norm
        products = {pair for pair in small if self.composed[pair].factors > 1}
        worth = contributions(network, {pair: found.norm for pair, found in self.composed.items()}, radii)
        self.proved = affordable(self._costs, products, worth, budget.blocks)
        cheap = small if keep else small - (products - self.proved)
        if budget.writing < math.inf:
            cheap = {p for p in cheap if self._single(p) is not None or self._costs.writing(p) <= budget.writing}
        self._shared = shared(self._costs, cheap, budget.memory // (8 * SHARED_PART))
        self._written: dict[Pair, Written] = {}
        self._pulled: dict[int, dict[int, Tensor]] = {}

    def __getitem__(self, pair: Pair) -> Block:
        return self._blocks[pair]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def one_entry(self, value: float) -> Tensor:
        """A number as a tensor (1,), which carries the number's gradient, if it has one."""
        return torch.as_tensor(value, dtype=torch.float64, device=self.network.device).reshape(1)

    def written(self, pair: Pair) -> Written | None:
        """The block written out, with all that share its passes; None where that is too dear."""
        if pair in self._shared and pair not in self._written and (weight := self._single(pair)) is not None:
            passes, _ = self._shared[pair]
            self._written[pair] = self._figures(pair, passes, weight, weight.new_zeros(1))
        elif pair in self._shared and pair not in self._written:
            passes, group = self._shared[pair]
            for other, (matrix, error) in self._matrices(passes, group).items():
                self._written[other] = self._figures(other, passes, matrix, error)
        return self._written.get(pair)

    def _single(self, pair: Pair) -> Tensor | None:
        """The block's matrix where it is the weight of a single dense layer, and nothing else but shapes and biases."""
        target, source = pair
        weight = None
        while target != source:
            node = self.network.nodes[target]
            if isinstance(node.op, Dense) and weight is None and len(node.shape) == 1 and node.op.weight_error == 0:
                weight = node.op.weight
            elif not isinstance(node.op, Shift | Reshape):
                return None
            target = node.inputs[0]
        return weight

    def _figures(self, pair: Pair, passes: Passes, matrix: Tensor, errors: Tensor) -> Written:
        """The figures of a matrix (target size, source size), with an error bound for each row or each column."""
        total = vector_norm_up(errors) if bool(errors.any()) else errors.new_zeros(())
        by_row, by_column = (total, errors) if passes.forward else (errors, total)
        rows = up(vector_norm_up(matrix) + by_row, 2)
        columns = up(vector_norm_up(matrix.T) + by_column, 2)
        norm = up(matrix_norm(matrix) + float(total.detach()), 2) if pair in self.proved else None
        return Written(norm, rows, columns, matrix.contiguous() if self._keep else None, float(total.detach()))

    def _matrices(self, passes: Passes, group: tuple[Pair, ...]) -> dict[Pair, tuple[Tensor, Tensor]]:
        """By block its matrix (target size, source size) and error bounds of the columns (forward) or of the rows."""
        network = self.network
        first, last = min(source for _, source in group), max(target for target, _ in group)
        parts: dict[Pair, list[tuple[Tensor, Tensor]]] = {pair: [] for pair in group}
        for units in self._units(passes.node, first, last):
            if passes.forward:
                found = jvp(network, first, units[0], self.centres, last)
                images = {pair: (found[pair[0]].value, found[pair[0]].error) for pair in group}
            else:
                pulled = vjp(network, units, self._behind(first), last)
                images = {pair: (pulled[pair[1]].value[0], pulled[pair[1]].error[0]) for pair in group}
            for pair, (value, error) in images.items():
                parts[pair].append((value.flatten(1), error))
        joined = {}
        for pair in group:
            values, errors = zip(*parts.pop(pair), strict=True)
            matrix = torch.cat(values)
            joined[pair] = matrix.T if passes.forward else matrix, torch.cat(errors)
        return joined

    def _behind(self, first: int) -> Slopes:
        """The centres of the nodes behind `first`; what arrives there goes no further."""
        return {k: slope for k, slope in self.centres.items() if k > first}

    def _units(self, node: int, first: int, last: int) -> Iterator[Tensor]:
        """The unit vectors of a node, (1, chunk, *shape), in chunks that fit the widest value between two nodes."""
        shape, size = self.network.nodes[node].shape, self.network.nodes[node].size
        chunk = max(8, CHUNK_ENTRIES // max(n.size for n in self.network.nodes[first : last + 1]))
        for part in torch.arange(size, device=self.network.device).split(chunk):
            units = torch.zeros(len(part), size, dtype=torch.float64, device=self.network.device)
            units[torch.arange(len(part)), part] = 1.0
            yield units.reshape(1, len(part), *shape)

    @cached_property
    def _pullable(self) -> dict[int, tuple[int, ...]]:
        """By target the sources whose blocks' rows are pulled back by unit vectors, as far as the budget goes."""
        chosen, spent = {}, 0.0
        for target in pre_activations(self.network):
            sources = tuple(s for t, s in self.composed if t == target and (t, s) not in self._shared)
            cost = self._costs.rows(target, min(sources, default=0))
            fits = 0 < cost <= self._budget.norm and spent + cost <= self._budget.blocks
            if sources and self.network.nodes[target].size > 1 and fits:
                chosen[target], spent = sources, spent + cost
        return chosen

    def pulled_rows(self, pair: Pair) -> Tensor | None:
        """Norms (target size,) of the rows of a block that is not written out; None where these are too dear."""
        target, source = pair
        if source not in self._pullable.get(target, ()):
            return None
        if target not in self._pulled:
            sources = self._pullable[target]
            first = min(sources)
            size, device = self.network.nodes[target].size, self.network.device
            # made beforehand: small pieces between large ones that come and go would keep these from being used again
            norms = {k: torch.empty(size, dtype=torch.float64, device=device) for k in sources}
            done = 0
            for units in self._units(target, first, target):
                adjoints = vjp(self.network, units, self._behind(first), target)
                for k in sources:
                    norms[k][done : done + units.shape[1]] = up(adjoints[k].size + adjoints[k].error, 2)[0]
                done += units.shape[1]
            self._pulled[target] = norms
        return self._pulled[target][source]


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
        norm = up(root_sum_square([v.norm for v in present]), len(present) + 2)
        return _Composed(norm, max(v.row for v in present), 2)

    def nonlinear(index: int, v: _Composed) -> _Composed | None:
        if index not in centres:
            return None
        slope = centres[index].largest
        return _Composed(up(slope * v.norm), up(slope * v.row), v.factors + (slope != 1.0))

    wanted = set(pre_activations(network))
    found = forward(network, source, _Composed(1.0, 1.0, 0), Forward(affine, add, concat, nonlinear))
    return {target: v for target, v in found if target in wanted}
