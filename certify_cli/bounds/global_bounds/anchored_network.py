"""Bounds of every pre-activation's change, for slopes near given centres: the network's part of `anchored`.

Slopes enter as a centre and a radius for each unit. The centres are those of the global Lipschitz constants, in
two sets: LipLT's, and none at all (the product of norms). The linearised networks' norms are then those of the global
bounds, computed once, and only the radii belong to a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.lipschitz import Lipschitz
from certify_cli.bounds.linear_maps.weight_blocks import Block
from certify_cli.bounds.linear_maps.weighted_gram import weighted_gram_norms
from certify_cli.efforts import Budget
from certify_cli.network.activations import Activation
from certify_cli.network.activations.anchored_table import AnchoredTable, anchored_table
from certify_cli.network.graph import Network
from certify_cli.network.propagate import nonlinear_nodes, pre_activation
from certify_cli.numerics.rounding import UNDERFLOW, times, up, vector_norm_up

LEVELS = (0.0, 0.25, 0.5)
"""Levels c that `level_bound` tries besides the largest weight, as parts of it."""
SQUARABLE = 1e-140
"""Smaller numbers are raised to it previous they are squared, so that no square underflows."""
SHARES = 1e4
"""One eigenvalue for one sample may take the eigenvalue budget divided by this (`normal`: 250 units or inputs)."""
SQUARED_ENTRIES = 2**22
"""Number of entries up to which a block's squared entries are cached (32 MiB)."""


def level_bound(weights: Tensor, total: Tensor, parts: Tensor) -> Tensor:
    """Upper bound (batch,) of sum_i w_i q_i over all q with 0 <= q_i <= parts_i and sum q <= total.

    weights: w (batch, n), >= 0.   total: (batch,).   parts: (batch or 1, n).

    For every level c >= 0, w_i <= c + max(0, w_i - c), so the sum is at most c total + sum_i max(0, w_i - c) parts_i.
    The same holds for ||B diag(w) B^T||, with ||B||^2 as the total and the squared columns of B as parts.
    """
    top = weights.amax(1)
    best = times(top, total)
    for level in LEVELS:
        cut = top * level
        above = (weights - cut.unsqueeze(1)).clamp_(min=0.0) if level else weights
        best = torch.minimum(best, up(cut * total + (above * parts).sum(1), weights.shape[1] + 6) + UNDERFLOW)
    return best


def square_up(values: Tensor) -> Tensor:
    """Squares of non-negative numbers, rounded up, and never 0."""
    return up(values.clamp(min=SQUARABLE).square())


@dataclass(frozen=True, eq=False)
class Offsets:
    """Upper bounds of the change D_l of every pre-activation, per unit of ||d||, keyed by pre-activation.

    norm: of ||D_l||, (batch,).   rows: of every unit's |D_l|, (batch, size).
    """

    norm: Mapping[int, Tensor]
    rows: Mapping[int, Tensor]


Radii = Sequence[Mapping[int, Tensor]]
"""For every expansion of the global Lipschitz constants: by layer, upper bounds (batch, size) of |slope - centre|."""


@dataclass(frozen=True, eq=False)
class AnchoredNetwork:
    """The part of the anchored bounds that does not depend on the sample, for one network.

    Every nonlinear node must have a bounded second derivative (`why_no_curvature`).
    """

    network: Network
    weights: Mapping[tuple[int, int], Block]
    lipschitz: Lipschitz
    budget: Budget

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return nonlinear_nodes(self.network)

    def table(self, layer: int) -> AnchoredTable:
        """Anchored constants of the layer's activation, tabulated."""
        op = self.network.nodes[layer].op
        if not isinstance(op, Activation):
            raise TypeError(f"{op.title} has no anchored constants")
        return anchored_table(op)

    @cached_property
    def _pairs(self) -> Tensor:
        ones = torch.ones(self.network.classes, self.network.classes, dtype=torch.bool, device=self.network.device)
        return ones.nonzero()

    def _pair_table(self, values: Tensor) -> Tensor:
        return values.reshape(self.network.classes, self.network.classes)

    @cached_property
    def sensitivities(self) -> dict[int, Tensor]:
        """By layer, upper bounds (classes, classes) of ||v_l|| for every pair's margin, over all inputs."""
        return {k: self._pair_table(self.lipschitz.sensitivity(k, self._pairs)) for k in self.layers}

    @cached_property
    def centre_adjoints(self) -> list[dict[int, Tensor]]:
        """Per expansion and by layer (0 is the input): ||v^C_l||, up, (classes, classes), for every pair's margin."""
        return [
            {k: self._pair_table(e.adjoint_norms(k, self._pairs)) for k in (0, *self.layers)}
            for e in self.lipschitz.expansions
        ]

    @cached_property
    def _squares(self) -> dict[tuple[int, int], Tensor]:
        return {}

    def _squared(self, key: tuple[int, int], block: Block) -> Tensor | None:
        """The transposed block's entries, squared, up; None where it is not written out as a matrix, or large."""
        if block.matrix is None or block.matrix.numel() > SQUARED_ENTRIES:
            return None
        if key not in self._squares:
            self._squares[key] = square_up(block.matrix.abs()).T.contiguous()
        return self._squares[key]

    def follows_input(self, layer: int) -> bool:
        """Whether the layer's pre-activation depends on the input alone, through constant A_l."""
        target = pre_activation(self.network, layer)
        return all(source == 0 for t, source in self.weights if t == target)

    def weighted_squares(self, layer: int, weights: Tensor, norm: Tensor, rows: Tensor) -> Tensor:
        """Upper bounds (count,) of sum_i w_i D_i^2 / ||d||^2 at one layer.

        weights: w (count, size), >= 0.   norm, rows: bounds of D per unit of ||d||, as in `Offsets`.

        Where D = W d, and W is small, the bound is a proved lambda_max(W^T diag(w) W).
        """
        bound = level_bound(weights, times(norm, norm), square_up(rows))
        block = self.weights.get((pre_activation(self.network, layer), 0))
        if block is None or block.matrix is None or not self.follows_input(layer):
            return bound
        share = self.budget.eigenvalues / SHARES
        if 3.0 * min(block.matrix.shape) ** 3 > share:
            return bound
        budget = Budget(self.budget.norm, share * len(weights), memory=self.budget.memory)
        return torch.minimum(bound, weighted_gram_norms(block.matrix, weights, budget, block.matrix_error))

    def offsets(self, radii: Radii, batch: int) -> Offsets:
        """Bounds of D_l / ||d|| that hold whenever the slopes lie within `radii` of the expansions' centres.

        m_l = ||B_l0|| + sum over k of ||B_lk diag(r_k)|| m_k, and the same with one row of B_l for one unit.
        """
        norms: dict[int, Tensor] = {}
        rows: dict[int, Tensor] = {}
        for target in sorted({pre_activation(self.network, k) for k in self.layers}):
            bounds = [self._offset(target, number, radius, norms, batch) for number, radius in enumerate(radii)]
            unit = torch.stack([bound[1] for bound in bounds]).amin(0)
            whole = torch.stack([bound[0] for bound in bounds]).amin(0)
            whole = torch.minimum(whole, vector_norm_up(unit))
            norms[target], rows[target] = whole, torch.minimum(unit, whole.unsqueeze(1))
        return Offsets(norms, rows)

    def _offset(
        self, target: int, number: int, radii: Mapping[int, Tensor], norms: Mapping[int, Tensor], batch: int
    ) -> tuple[Tensor, Tensor]:
        """The bounds of `offsets` by one expansion: of the norm, (batch,), and of every unit, (batch, size)."""
        expansion, size = self.lipschitz.expansions[number], self.network.nodes[target].size
        whole = torch.zeros(batch, dtype=torch.float64, device=self.network.device)
        unit = whole.unsqueeze(1).expand(batch, size)
        direct = expansion.blocks.get((target, 0))
        if direct is not None:
            whole, unit = whole + direct.norm, unit + direct.rows
        count = 1
        for k in (k for k in self.layers if k <= target):
            block = expansion.blocks.get((target, k))
            if block is None:
                continue
            radius, previous = radii[k], norms[pre_activation(self.network, k)]
            squares = square_up(radius)
            largest = radius.amax(1)
            columns = square_up(block.columns).expand(radius.shape[1]).unsqueeze(0)
            gram = level_bound(squares, whole.new_full((batch,), times(block.norm, block.norm)), columns)
            norm = torch.minimum(up(gram.sqrt()), times(largest, block.norm))
            row = times(block.rows.unsqueeze(0), largest.unsqueeze(1))
            # only the product of norms has the network's weights as its blocks, and those are kept as matrices
            squared = self._squared((target, k), self.weights[target, k]) if not expansion.centres else None
            if squared is not None:
                exact = up((squares @ squared + UNDERFLOW).sqrt(), radius.shape[1] + 4)
                error_term = times(largest, self.weights[target, k].matrix_error)
                row = torch.minimum(row, up(exact + error_term.unsqueeze(1)))
            whole, unit = whole + times(norm, previous), unit + times(row, previous.unsqueeze(1))
            count += 1
        return up(whole, count), up(unit, count)
