"""Anchored bounds: one end of every difference is the sample itself (theory section 3, "Anchored").

At a sample x, let sigma_k be the secant slopes from z_k(x), S_k = diag phi'(z_k(x)), and S'_k the same at x + d. Then

    z_l(x+d) - z_l(x) = D_l     the network linearised with the slopes sigma, applied to d
    grad f(x+d) - grad f(x)   = sum_l A_l(x+d)^T (S'_l - S_l) v_l(x)        (adjoint anchored)
                              = sum_l A_l(x)^T   (S'_l - S_l) v_l(x+d)      (Jacobian anchored)
    f(x+d) - f(x) - <g, d>    = sum_l < v_l(x), phi(z_l + D_l) - phi(z_l) - S_l D_l >

hold exactly on any DAG: they are the differences of two linear networks, resolved layer by layer (section 4 proves the
last). |S'_l - S_l| <= bend_l |D_l| entrywise, and |D_l| is anchored. What is not: A_l(x+d) in the second line and
v_l(x+d) in the third need constants that hold everywhere. Anchoring both factors at once over-claims.

Secants and slopes enter as a centre and a per-unit radius, once with the centres of LipLT and once cut (the product of
norms), so that the linearised networks' norms are those of the global bounds and only the radii belong to the sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.lipschitz import Expansion, Lipschitz
from certify_cli.bounds.linear_maps.weight_blocks import Block
from certify_cli.bounds.linear_maps.weighted_gram import weighted_gram_norms
from certify_cli.efforts import Budget
from certify_cli.network.activations import Activation
from certify_cli.network.activations.anchored_table import AnchoredConstants, AnchoredTable, anchored_table
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.propagate import nonlinear_nodes, pre_activation
from certify_cli.numerics.rounding import UNDERFLOW, times, up, vector_norm_up

LEVELS = (0.0, 0.25, 0.5)
"""Where `level_bound` cuts the weights, as parts of the largest; the largest itself is always tried."""
TINY = 1e-140
"""Numbers below it are raised to it before they are squared."""
SHARES = 1e4
"""A sample may spend this part of the budget for eigenvalues on one of them (`normal`: 250 units or inputs)."""
SQUARED_ENTRIES = 2**22
"""Largest block whose squared entries are kept (32 MiB)."""


def level_bound(weights: Tensor, total: Tensor, parts: Tensor) -> Tensor:
    """Upper bound (batch,) of sum_i w_i q_i over all q with 0 <= q_i <= parts_i and sum q <= total.

    weights (batch, n) >= 0, total (batch,), parts (batch or 1, n). For every c >= 0, w_i <= c + max(0, w_i - c), so the
    sum is at most c total + sum_i max(0, w_i - c) parts_i. The same holds for ||B diag(w) B^T||, with ||B||^2 as the
    total and the squared columns of B as parts.
    """
    top = weights.amax(1)
    best = times(top, total)
    for level in LEVELS:
        cut = top * level
        above = (weights - cut.unsqueeze(1)).clamp_(min=0.0) if level else weights
        best = torch.minimum(best, up(cut * total + (above * parts).sum(1), weights.shape[1] + 6) + UNDERFLOW)
    return best


def _square(values: Tensor) -> Tensor:
    """Squares, rounded up, of non-negative numbers; none vanishes."""
    return up(values.clamp(min=TINY).square())


@dataclass(frozen=True, eq=False)
class Offsets:
    """Per unit of ||d||, keyed by head: `norm` (batch,) of a whole vector of pre-activations, `rows` (batch, size) of
    each unit. Upper bounds."""

    norm: Mapping[int, Tensor]
    rows: Mapping[int, Tensor]


Radii = Sequence[Mapping[int, Tensor]]
"""For every expansion of the global Lipschitz constants, per layer: at least |slope - centre|, (batch, size)."""


@dataclass(frozen=True, eq=False)
class AnchoredBounds:
    """What the anchored bounds of one network share: all of it independent of the sample.

    Every nonlinear node must have a curvature.
    """

    network: Network
    weights: Mapping[tuple[int, int], Block]
    lipschitz: Lipschitz
    budget: Budget

    def around(self, samples: EvaluatedPoints) -> Anchored:
        return Anchored(self, samples)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return nonlinear_nodes(self.network)

    def table(self, layer: int) -> AnchoredTable:
        """The layer's activation, tabulated."""
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
        """Global bounds (classes, classes) of ||v_l|| of every pair's margin."""
        return {k: self._pair_table(self.lipschitz.sensitivity(k, self._pairs)) for k in self.layers}

    @cached_property
    def centre_adjoints(self) -> list[dict[int, Tensor]]:
        """||v^C_l|| (classes, classes) of every pair's margin, per expansion; 0 is the input."""
        return [
            {k: self._pair_table(e.adjoint_norms(k, self._pairs)) for k in (0, *self.layers)}
            for e in self.lipschitz.expansions
        ]

    @cached_property
    def _squares(self) -> dict[tuple[int, int], Tensor]:
        return {}

    def _squared(self, key: tuple[int, int], block: Block) -> Tensor | None:
        """The transposed block's entries, squared and rounded up; None where it is not written out, or large."""
        if block.matrix is None or block.matrix.numel() > SQUARED_ENTRIES:
            return None
        if key not in self._squares:
            self._squares[key] = _square(block.matrix.abs()).T.contiguous()
        return self._squares[key]

    def first(self, layer: int) -> bool:
        """Whether the layer sees nothing but the input, so that A_l is the same everywhere."""
        target = pre_activation(self.network, layer)
        return all(source == 0 for t, source in self.weights if t == target)

    def squares(self, layer: int, weights: Tensor, reach: Tensor, rows: Tensor) -> Tensor:
        """Upper bound (count,) of sum_i w_i D_i^2 / ||d||^2 at a layer whose D is bounded by `reach` and `rows`.

        Where D = W d, and the matrix is small, it is a proved lambda_max(W^T diag(w) W).
        """
        bound = level_bound(weights, times(reach, reach), _square(rows))
        block = self.weights.get((pre_activation(self.network, layer), 0))
        if block is None or block.matrix is None or not self.first(layer):
            return bound
        share = self.budget.eigenvalues / SHARES
        if 3.0 * min(block.matrix.shape) ** 3 > share:
            return bound
        budget = Budget(self.budget.norm, share * len(weights))
        return torch.minimum(bound, weighted_gram_norms(block.matrix, weights, budget, block.matrix_error))

    def offsets(self, radii: Radii, batch: int) -> Offsets:
        """Bounds of D_l / ||d|| in every network whose slopes lie within `radii` of the expansions' centres.

        m_l = ||B_l0|| + sum over k of ||B_lk diag(r_k)|| m_k, and the same with one row of B_l for one unit.
        """
        norms: dict[int, Tensor] = {}
        rows: dict[int, Tensor] = {}
        for target in sorted({pre_activation(self.network, k) for k in self.layers}):
            ways = [self._offset(target, number, radius, norms, batch) for number, radius in enumerate(radii)]
            unit = torch.stack([way[1] for way in ways]).amin(0)
            whole = torch.stack([way[0] for way in ways]).amin(0)
            whole = torch.minimum(whole, vector_norm_up(unit))
            norms[target], rows[target] = whole, torch.minimum(unit, whole.unsqueeze(1))
        return Offsets(norms, rows)

    def _offset(
        self, target: int, number: int, radii: Mapping[int, Tensor], norms: Mapping[int, Tensor], batch: int
    ) -> tuple[Tensor, Tensor]:
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
            radius, before = radii[k], norms[pre_activation(self.network, k)]
            squares = _square(radius)
            largest = radius.amax(1)
            columns = _square(block.columns).expand(radius.shape[1]).unsqueeze(0)
            gram = level_bound(squares, whole.new_full((batch,), times(block.norm, block.norm)), columns)
            norm = torch.minimum(up(gram.sqrt()), times(largest, block.norm))
            row = times(block.rows.unsqueeze(0), largest.unsqueeze(1))
            # the blocks of the product of norms are the network's weights, which are kept as matrices
            squared = self._squared((target, k), self.weights[target, k]) if not expansion.centres else None
            if squared is not None:
                exact = up((squares @ squared + UNDERFLOW).sqrt(), radius.shape[1] + 4)
                error_term = times(largest, self.weights[target, k].matrix_error)
                row = torch.minimum(row, up(exact + error_term.unsqueeze(1)))
            whole, unit = whole + times(norm, before), unit + times(row, before.unsqueeze(1))
            count += 1
        return up(whole, count), up(unit, count)


class Anchored:
    """Bounds around each sample, for every d. `index` (count,) picks samples, `rival` (count,) the class towards which
    the margin is taken; results are (count,), rounded up, inf where nothing is known.

    What belongs to a sample alone is computed once, when first asked for.
    """

    def __init__(self, bounds: AnchoredBounds, samples: EvaluatedPoints) -> None:
        self._bounds = bounds
        self._samples = samples
        self._pre_activations = {k: pre_activation(bounds.network, k) for k in bounds.layers}

    def lipschitz(self, index: Tensor, rival: Tensor) -> Tensor:
        """L_x:  |f(x+d) - f(x)| <= L_x ||d||.

        With the slopes' own centres, L_x = ||g^C|| + sum_k ||v^C_k o r_k|| m_k; with centres at phi'(z_k) these are
        the gradient and the adjoints at the sample.
        """
        prediction = self._samples.prediction[index]
        own = self._samples.gradient_norm[index, rival]
        for k, target in self._pre_activations.items():
            value, error = self._adjoint(k, index, rival)
            radius = self._slope_radii[k][index]
            moved = vector_norm_up(up(value.abs() * radius)) + times(radius.amax(1), error)
            own = own + times(up(moved), self._reach.norm[target][index])
        ways = [up(own, len(self._pre_activations))]
        for table, radii in zip(self._bounds.centre_adjoints, self._secant_radii, strict=True):
            total = table[0][prediction, rival]
            for k, target in self._pre_activations.items():
                reach = self._reach.norm[target][index]
                total = total + times(table[k][prediction, rival], radii[k][index].amax(1), reach)
            ways.append(up(total, len(self._pre_activations)))
        return _sure(torch.stack(ways).amin(0))

    def change(self, index: Tensor, rival: Tensor) -> Tensor:
        """C_x:  ||grad f(x+d) - grad f(x)|| <= C_x ||d||: the lesser of the two forms in which one factor is anchored.

        The gradient differs by no more than C_x t ||d|| at x + t d, so C_x may replace a Hessian's bound wherever that
        is integrated from the sample.
        """
        return torch.minimum(self.adjoint_anchored(index, rival), self.jacobian_anchored(index, rival))

    def adjoint_anchored(self, index: Tensor, rival: Tensor) -> Tensor:
        """sum_l || A_l(x+d)^T (S'_l - S_l) v_l(x) ||, with the global Lipschitz constant of z_l for A_l(x+d).

        Where A_l is constant the term is at most lambda_max(W^T diag(bend o |v|) W).
        """
        terms = []
        for k, target in self._pre_activations.items():
            value, error = self._adjoint(k, index, rival)
            bend = self._units[k].slope_lipschitz[index]
            reach, rows = self._reach.norm[target][index], self._reach.rows[target][index]
            everywhere = self._bounds.lipschitz.to_pre_activation(target)
            weights = up(value.abs() * bend)
            if self._bounds.first(k):
                term = level_bound(weights, times(reach, reach), _square(rows))
            else:
                by_rows = vector_norm_up(times(weights, rows))
                term = times(torch.minimum(times(weights.amax(1), reach), by_rows), everywhere)
            terms.append(term + times(bend.amax(1), error, reach, everywhere))
        return _total(terms, index)

    def jacobian_anchored(self, index: Tensor, rival: Tensor) -> Tensor:
        """sum_l || A_l(x)^T (S'_l - S_l) v_l(x+d) ||, with the global bound of ||v_l||."""
        prediction = self._samples.prediction[index]
        terms = [
            times(self._bounds.sensitivities[k][prediction, rival], self._sample_factors[k][index])
            for k in self._bounds.layers
        ]
        return _total(terms, index)

    def lower(self, index: Tensor, rival: Tensor) -> Tensor:
        """M_x:  f(x+d) >= f(x) + <g, d> - M_x ||d||^2 / 2. A bound of f alone, not of its gradient or Hessian."""
        return self._remainder(
            index, rival, {k: (units.curvature_below, units.curvature_above) for k, units in self._units.items()}
        )

    def upper(self, index: Tensor, rival: Tensor) -> Tensor:
        """M+_x:  f(x+d) <= f(x) + <g, d> + M+_x ||d||^2 / 2."""
        return self._remainder(
            index, rival, {k: (units.curvature_above, units.curvature_below) for k, units in self._units.items()}
        )

    def _remainder(self, index: Tensor, rival: Tensor, bends: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
        """sum_l sum_i w_li D_li^2 / ||d||^2, w >= 0 at least -v times the mean second derivative, which is at least
        -bends[l][0] and at most bends[l][1]. Both factors are anchored here: it is an identity at the sample."""
        terms = []
        for k, target in self._pre_activations.items():
            value, error = self._adjoint(k, index, rival)
            falls, rises = (bend[index] for bend in bends[k])
            reach, rows = self._reach.norm[target][index], self._reach.rows[target][index]
            weights = up(torch.maximum(value * falls, -value * rises))
            term = self._bounds.squares(k, weights, reach, rows)
            terms.append(term + times(torch.maximum(falls, rises).amax(1), error, reach, reach))
        return _total(terms, index)

    def _adjoint(self, layer: int, index: Tensor, rival: Tensor) -> tuple[Tensor, Tensor]:
        """v_l of the margins at the sample, (count, size), and the bound (count,) of its Euclidean error."""
        vectors = self._samples.adjoints[layer]
        return vectors.value[index, rival].flatten(1), vectors.error[index, rival]

    def _slope(self, layer: int) -> tuple[Tensor, Tensor]:
        """phi'(z_l) at the samples and the bound of its error, (batch, size)."""
        slope = self._samples.slopes[layer]
        value = torch.as_tensor(slope.value, dtype=torch.float64).flatten(1)
        return value, torch.as_tensor(slope.error, dtype=torch.float64).flatten(1)

    @cached_property
    def _units(self) -> dict[int, AnchoredConstants]:
        evaluation = self._samples.evaluation
        return {
            k: self._bounds.table(k)(evaluation.values[target].flatten(1), evaluation.errors[target].flatten(1))
            for k, target in self._pre_activations.items()
        }

    @cached_property
    def _slope_radii(self) -> dict[int, Tensor]:
        """At least |secant slope - phi'(z)|."""
        found = {}
        for k, units in self._units.items():
            slope, error = self._slope(k)
            found[k] = up(torch.maximum(units.secant_high - slope, slope - units.secant_low).clamp(min=0.0) + error, 3)
        return found

    @cached_property
    def _secant_radii(self) -> list[dict[int, Tensor]]:
        """At least |secant slope - centre|, for each expansion."""
        return [
            {
                k: up(torch.maximum(units.secant_high - centre, centre - units.secant_low).clamp(min=0.0))
                for k, units in self._units.items()
                for centre in (_centre(expansion, k),)
            }
            for expansion in self._bounds.lipschitz.expansions
        ]

    @cached_property
    def _reach(self) -> Offsets:
        """Of the secants: how far the pre-activations move from the sample, per unit of ||d||."""
        return self._bounds.offsets(self._secant_radii, len(self._samples.prediction))

    @cached_property
    def _jacobian(self) -> Offsets:
        """Of the slopes at the sample: bounds of ||A_l(x)|| and of its rows."""
        slopes = {k: self._slope(k) for k in self._pre_activations}
        radii = [
            {k: up((value - _centre(expansion, k)).abs() + error, 2) for k, (value, error) in slopes.items()}
            for expansion in self._bounds.lipschitz.expansions
        ]
        return self._bounds.offsets(radii, len(self._samples.prediction))

    @cached_property
    def _sample_factors(self) -> dict[int, Tensor]:
        """max ||A_l(x)^T (S'_l - S_l) v|| / (||d|| ||v||), (batch,): |D_l| by its rows and A_l by its norm, or vice
        versa."""
        found, here, moved = {}, self._jacobian, self._reach
        for k, target in self._pre_activations.items():
            bend = self._units[k].slope_lipschitz
            by_offset = times(times(bend, moved.rows[target]).amax(1), here.norm[target])
            by_jacobian = times(times(bend, here.rows[target]).amax(1), moved.norm[target])
            found[k] = torch.minimum(by_offset, by_jacobian)
        return found


def _centre(expansion: Expansion, layer: int) -> float:
    """The slope that an expansion gives a whole layer; 0 where it cuts it."""
    slope = expansion.centres.get(layer)
    return 0.0 if slope is None else float(slope.value)


def _total(terms: list[Tensor], index: Tensor) -> Tensor:
    """Sum of the layers' terms, each itself a sum of two, rounded up."""
    if not terms:
        return torch.zeros(len(index), dtype=torch.float64, device=index.device)
    return _sure(up(torch.stack(terms).sum(0), len(terms) + 1))


def _sure(bound: Tensor) -> Tensor:
    """NaN (0 times an overflow) says nothing, which is inf."""
    return bound.masked_fill(bound.isnan(), math.inf)
