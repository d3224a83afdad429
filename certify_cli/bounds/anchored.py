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
from typing import Protocol

import torch
from torch import Tensor

from certify_cli.bounds.blocks import Block
from certify_cli.bounds.lipschitz import Lipschitz
from certify_cli.network.activations import Activation
from certify_cli.network.evaluate import Evaluation
from certify_cli.network.graph import Network
from certify_cli.network.linearised import Slope, Vectors, head, nonlinear_nodes
from certify_cli.network.unit_table import Units, UnitTable
from certify_cli.numerics.rounding import UNDERFLOW, times, up, vector_norm_up

LEVELS = (0.0, 0.25, 0.5)
"""Where `level_bound` cuts the weights, as parts of the largest; the largest itself is always tried."""
TINY = 1e-140
"""Numbers below it are raised to it before they are squared."""
SQUARED_ENTRIES = 2**22
"""Largest block whose squared entries are kept (32 MiB)."""


class Samples(Protocol):
    """What the bounds ask of a batch of samples (a `certificates.point.Point` has it)."""

    @property
    def network(self) -> Network: ...

    @property
    def prediction(self) -> Tensor: ...

    @property
    def evaluation(self) -> Evaluation: ...

    @property
    def slopes(self) -> Mapping[int, Slope]: ...

    @property
    def adjoints(self) -> Mapping[int, Vectors]: ...

    @property
    def gradient_norm(self) -> Tensor: ...


def level_bound(weights: Tensor, total: Tensor, parts: Tensor) -> Tensor:
    """Upper bound of sum_i w_i q_i over all q with 0 <= q_i <= parts_i and sum q <= total.

    weights (batch, ..., n) >= 0, total (batch,), parts (batch or 1, n). Returns (batch, ...). For every c >= 0,
    w_i <= c + max(0, w_i - c), so the sum is at most c total + sum_i max(0, w_i - c) parts_i. The same holds for
    ||B diag(w) B^T||, with ||B||^2 as the total and the squared columns of B as parts.
    """
    top = weights.amax(-1)
    total = total.reshape(-1, *[1] * (top.dim() - 1))
    best = times(top, total)
    for level in LEVELS:
        cut = top * level
        above = (weights - cut.unsqueeze(-1)).clamp_(min=0.0) if level else weights
        best = torch.minimum(best, up(cut * total + _dots(above, parts), weights.shape[-1] + 6) + UNDERFLOW)
    return best


def _dots(weights: Tensor, parts: Tensor) -> Tensor:
    """sum_i w_i parts_i: (batch, ..., n) and (batch or 1, n) to (batch, ...)."""
    if len(parts) == 1:
        return weights @ parts[0]
    return (
        (weights.flatten(1, -2) @ parts.unsqueeze(2)).reshape(weights.shape[:-1])
        if weights.dim() > 2
        else (weights * parts).sum(1)
    )


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

    def around(self, samples: Samples) -> Anchored:
        return Anchored(self, samples)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return nonlinear_nodes(self.network)

    @cached_property
    def _tables(self) -> dict[tuple[str, tuple[tuple[str, float | None], ...]], UnitTable]:
        return {}

    def table(self, layer: int) -> UnitTable:
        """The layer's activation, tabulated; layers of one activation share a table."""
        op = self.network.nodes[layer].op
        if not isinstance(op, Activation):
            raise TypeError(f"{op.title} has no anchored constants")
        key = op.name, tuple(op.parameters.items())
        if key not in self._tables:
            self._tables[key] = UnitTable(op)
        return self._tables[key]

    @cached_property
    def _pairs(self) -> Tensor:
        ones = torch.ones(self.network.classes, self.network.classes, device=self.network.device)
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
        target = head(self.network, layer)
        return all(source == 0 for t, source in self.weights if t == target)

    def offsets(self, radii: Radii, batch: int) -> Offsets:
        """Bounds of D_l / ||d|| in every network whose slopes lie within `radii` of the expansions' centres.

        m_l = ||B_l0|| + sum over k of ||B_lk diag(r_k)|| m_k, and the same with one row of B_l for one unit.
        """
        norms: dict[int, Tensor] = {}
        rows: dict[int, Tensor] = {}
        for target in sorted({head(self.network, k) for k in self.layers}):
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
            radius, before = radii[k], norms[head(self.network, k)]
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
                flaw = times(largest, self.weights[target, k].matrix_error)
                row = torch.minimum(row, up(exact + flaw.unsqueeze(1)))
            whole, unit = whole + times(norm, before), unit + times(row, before.unsqueeze(1))
            count += 1
        return up(whole, count), up(unit, count)


class Anchored:
    """Bounds of the margins towards every class, (batch, classes), around each sample, for every d. Rounded up; inf
    where nothing is known. Computed when first asked for."""

    def __init__(self, bounds: AnchoredBounds, samples: Samples) -> None:
        self._bounds = bounds
        self._samples = samples
        self._batch = len(samples.prediction)
        self._heads = {k: head(bounds.network, k) for k in bounds.layers}

    @cached_property
    def lipschitz(self) -> Tensor:
        """L_x:  |f(x+d) - f(x)| <= L_x ||d||.

        With the slopes' own centres, L_x = ||g^C|| + sum_k ||v^C_k o r_k|| m_k; with centres at phi'(z_k) these are
        the gradient and the adjoints at the sample.
        """
        bounds, reach = self._bounds, self._reach.norm
        own, ways = self._samples.gradient_norm, []
        for k in bounds.layers:
            vectors, units, slope = self._adjoint(k), self._units[k], self._slope(k)
            radius = torch.maximum(units.secant_high - slope.value, slope.value - units.secant_low).clamp(min=0.0)
            radius = up(radius + slope.error, 3)
            moved = up((_dots(_square(vectors.value.abs()), _square(radius)) + UNDERFLOW).sqrt(), radius.shape[1] + 6)
            largest = radius.amax(1, keepdim=True)
            own = own + times(up(moved + times(largest, vectors.error)), reach[self._heads[k]].unsqueeze(1))
        ways.append(up(own, len(bounds.layers)))
        for table, radii in zip(bounds.centre_adjoints, self._secant_radii, strict=True):
            total = self._rows(table[0])
            for k in bounds.layers:
                scale = times(radii[k].amax(1), reach[self._heads[k]])
                total = total + times(self._rows(table[k]), scale.unsqueeze(1))
            ways.append(up(total, len(bounds.layers)))
        return _sure(torch.stack(ways).amin(0))

    @cached_property
    def change(self) -> Tensor:
        """C_x:  ||grad f(x+d) - grad f(x)|| <= C_x ||d||: the lesser of the two forms in which one factor is anchored.

        As the difference of gradients is that much at every point on the way to d, |f(x+d) - f - <g, d>| is at most
        C_x ||d||^2 / 2, and C_x may replace a Hessian's bound wherever that is integrated from the sample.
        """
        return _sure(torch.minimum(self.adjoint_anchored, self.jacobian_anchored))

    @cached_property
    def adjoint_anchored(self) -> Tensor:
        """sum_l || A_l(x+d)^T (S'_l - S_l) v_l(x) ||, with the global Lipschitz constant of z_l for A_l(x+d).

        Where A_l is constant the term is at most lambda_max(W^T diag(bend o |v|) W).
        """
        terms = []
        for k in self._bounds.layers:
            target, vectors, units = self._heads[k], self._adjoint(k), self._units[k]
            reach, rows = self._reach.norm[target], self._reach.rows[target]
            everywhere = self._bounds.lipschitz.to_head(target)
            size = vectors.value.abs()
            weights = up(size * units.bend.unsqueeze(1))
            if self._bounds.first(k):
                term = level_bound(weights, times(reach, reach), _square(rows))
            else:
                term = times(weights.amax(2), reach.unsqueeze(1))
                squares = _square(times(units.bend, rows))
                summed = _dots(_square(size), squares) + UNDERFLOW
                term = times(torch.minimum(term, up(summed.sqrt(), size.shape[2] + 6)), everywhere)
            flaw = times(units.bend.amax(1), reach, everywhere)
            terms.append(up(term + times(vectors.error, flaw.unsqueeze(1))))
        return self._sum(terms)

    @cached_property
    def jacobian_anchored(self) -> Tensor:
        """sum_l || A_l(x)^T (S'_l - S_l) v_l(x+d) ||, with the global bound of ||v_l||."""
        terms = []
        here = self._jacobian
        for k in self._bounds.layers:
            target, bend = self._heads[k], self._units[k].bend
            by_offset = times(times(bend, self._reach.rows[target]).amax(1), here.norm[target])
            by_row = times(times(bend, here.rows[target]).amax(1), self._reach.norm[target])
            terms.append(
                times(self._rows(self._bounds.sensitivities[k]), torch.minimum(by_offset, by_row).unsqueeze(1))
            )
        return self._sum(terms)

    @cached_property
    def lower(self) -> Tensor:
        """M_x:  f(x+d) >= f(x) + <g, d> - M_x ||d||^2 / 2. A bound of f alone, never of a Hessian."""
        return torch.minimum(self.change, self._remainder(1.0))

    @cached_property
    def upper(self) -> Tensor:
        """M+_x:  f(x+d) <= f(x) + <g, d> + M+_x ||d||^2 / 2."""
        return torch.minimum(self.change, self._remainder(-1.0))

    def _remainder(self, sign: float) -> Tensor:
        """Of sign * f: sum_l sum_i w_li D_li^2 / ||d||^2, w = the part of -v k that is positive, k between -sink and
        rise. Here both factors are anchored, for it is an identity of f at the sample (section 4)."""
        terms = []
        for k in self._bounds.layers:
            target, vectors, units = self._heads[k], self._adjoint(k), self._units[k]
            reach = self._reach.norm[target]
            down, up_ = (units.sink, units.rise) if sign > 0 else (units.rise, units.sink)
            value = vectors.value
            weights = up(torch.maximum(value * down.unsqueeze(1), value * -up_.unsqueeze(1)))
            term = level_bound(weights, times(reach, reach), _square(self._reach.rows[target]))
            flaw = times(torch.maximum(down, up_).amax(1), reach, reach)
            terms.append(up(term + times(vectors.error, flaw.unsqueeze(1))))
        return self._sum(terms)

    def _sum(self, terms: list[Tensor]) -> Tensor:
        if not terms:
            return torch.zeros_like(self._samples.gradient_norm)
        return _sure(up(torch.stack(terms).sum(0), len(terms)))

    def _rows(self, table: Tensor) -> Tensor:
        return table[self._samples.prediction]

    def _adjoint(self, layer: int) -> Vectors:
        """v_l at the sample: value (batch, classes, size)."""
        vectors = self._samples.adjoints[layer]
        return Vectors(vectors.value.flatten(2), vectors.error)

    def _slope(self, layer: int) -> PointSlope:
        slope = self._samples.slopes[layer]
        value = torch.as_tensor(slope.value, dtype=torch.float64, device=self._samples.prediction.device)
        error = torch.as_tensor(slope.error, dtype=torch.float64, device=value.device).expand_as(value)
        return PointSlope(value.flatten(1), error.flatten(1))

    @cached_property
    def _units(self) -> dict[int, Units]:
        evaluation = self._samples.evaluation
        return {
            k: self._bounds.table(k)(evaluation.values[target].flatten(1), evaluation.errors[target].flatten(1))
            for k, target in self._heads.items()
        }

    @cached_property
    def _secant_radii(self) -> list[dict[int, Tensor]]:
        found = []
        for expansion in self._bounds.lipschitz.expansions:
            radii = {}
            for k, units in self._units.items():
                centre = _centre(expansion.centres.get(k))
                radii[k] = up(torch.maximum(units.secant_high - centre, centre - units.secant_low).clamp(min=0.0), 1)
            found.append(radii)
        return found

    @cached_property
    def _reach(self) -> Offsets:
        """Of the secants: how far the pre-activations move from the sample, per unit of ||d||."""
        return self._bounds.offsets(self._secant_radii, self._batch)

    @cached_property
    def _jacobian(self) -> Offsets:
        """Of the slopes at the sample: bounds of ||A_l(x)|| and of its rows."""
        radii = []
        for expansion in self._bounds.lipschitz.expansions:
            centres = {k: _centre(expansion.centres.get(k)) for k in self._heads}
            slopes = {k: self._slope(k) for k in self._heads}
            radii.append({k: up((slopes[k].value - centres[k]).abs() + slopes[k].error, 2) for k in self._heads})
        return self._bounds.offsets(radii, self._batch)


@dataclass(frozen=True, eq=False)
class PointSlope:
    """phi'(z_l) at the samples: `value` and the bound `error` of what is wrong with it, (batch, size)."""

    value: Tensor
    error: Tensor


def _centre(slope: Slope | None) -> float:
    """The slope that an expansion gives a whole layer; 0 where it cuts it."""
    return 0.0 if slope is None else float(slope.value)


def _sure(bound: Tensor) -> Tensor:
    """NaN (0 times an overflow) says nothing, which is inf."""
    return bound.masked_fill(bound.isnan(), math.inf)
