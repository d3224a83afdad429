"""Anchored bounds: Lipschitz and curvature bounds of differences from the sample (theory section 3, "Anchored").

At a sample x, let sigma_k be the secant slopes from z_k(x), S_k = diag phi'(z_k(x)), and S'_k the same at x + d. Then

    z_l(x+d) - z_l(x) = D_l     the network linearised with the slopes sigma, applied to d
    grad f(x+d) - grad f(x)   = sum_l A_l(x+d)^T (S'_l - S_l) v_l(x)        (adjoint anchored)
                              = sum_l A_l(x)^T   (S'_l - S_l) v_l(x+d)      (Jacobian anchored)
    f(x+d) - f(x) - <g, d>    = sum_l < v_l(x), phi(z_l + D_l) - phi(z_l) - S_l D_l >

hold exactly on any DAG: they are the differences of two linear networks, resolved layer by layer (section 4 proves the
last). |S'_l - S_l| <= h_l |D_l| entrywise, h_l being a Lipschitz constant of phi' around z_l(x), and |D_l| is anchored.
A_l(x+d) in the second line and v_l(x+d) in the third are not: they need constants that hold everywhere. Anchoring both
factors at once claims too much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.anchored_network import AnchoredNetwork, Offsets, level_bound, square_up
from certify_cli.bounds.global_bounds.expansion import Expansion
from certify_cli.network.activations.anchored_table import AnchoredConstants
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.propagate import pre_activation
from certify_cli.numerics.rounding import times, up, vector_norm_up


class Anchored:
    """Bounds around each sample of a batch, valid for every d.

    All methods take index (count,), the samples, and rival (count,), the class that each margin is taken against. They
    return upper bounds (count,), inf where a bound overflows. Figures that do not depend on the rival are cached.
    """

    def __init__(self, network: AnchoredNetwork, samples: EvaluatedPoints) -> None:
        self._network = network
        self._samples = samples
        self._pre_activations = {k: pre_activation(network.network, k) for k in network.layers}

    def lipschitz(self, index: Tensor, rival: Tensor) -> Tensor:
        """L_x:  |f(x+d) - f(x)| <= L_x ||d||.

        For any centres of the slopes, L_x = ||g^C|| + sum_k ||v^C_k o r_k|| m_k. Three choices are tried and the
        smallest bound counts: phi'(z_k), where g^C and v^C are the sample's own, and the two of the global constants.
        """
        prediction = self._samples.prediction[index]
        own = self._samples.gradient_norm[index, rival]
        for k, target in self._pre_activations.items():
            value, error = self._adjoint(k, index, rival)
            radius = self._slope_radii[k][index]
            weighted = vector_norm_up(up(value.abs() * radius)) + times(radius.amax(1), error)
            own = own + times(up(weighted), self._changes.norm[target][index])
        bounds = [up(own, len(self._pre_activations))]
        for table, radii in zip(self._network.centre_adjoints, self._secant_radii, strict=True):
            total = table[0][prediction, rival]
            for k, target in self._pre_activations.items():
                moved = self._changes.norm[target][index]
                total = total + times(table[k][prediction, rival], radii[k][index].amax(1), moved)
            bounds.append(up(total, len(self._pre_activations)))
        return _nan_to_inf(torch.stack(bounds).amin(0))

    def change(self, index: Tensor, rival: Tensor) -> Tensor:
        """C_x:  ||grad f(x+d) - grad f(x)|| <= C_x ||d||, the smaller of the two bounds that anchor one factor.

        The gradient differs by no more than C_x t ||d|| at x + t d, so C_x may replace a Hessian's bound wherever that
        is integrated from the sample.
        """
        return torch.minimum(self.adjoint_anchored(index, rival), self.jacobian_anchored(index, rival))

    def adjoint_anchored(self, index: Tensor, rival: Tensor) -> Tensor:
        """sum_l || A_l(x+d)^T (S'_l - S_l) v_l(x) || / ||d||, with the global Lipschitz constant of z_l for A_l(x+d).

        Where A_l is constant the term is at most lambda_max(W^T diag(h o |v|) W), h as in the module's docstring.
        """
        terms = []
        for k, target in self._pre_activations.items():
            value, error = self._adjoint(k, index, rival)
            slope_lipschitz = self._units[k].slope_lipschitz[index]
            moved, rows = self._changes.norm[target][index], self._changes.rows[target][index]
            everywhere = self._network.lipschitz.to_pre_activation(target)
            weights = up(value.abs() * slope_lipschitz)
            if self._network.follows_input(k):
                term = level_bound(weights, times(moved, moved), square_up(rows))
            else:
                by_rows = vector_norm_up(times(weights, rows))
                term = times(torch.minimum(times(weights.amax(1), moved), by_rows), everywhere)
            terms.append(term + times(slope_lipschitz.amax(1), error, moved, everywhere))
        return _total(terms, index)

    def jacobian_anchored(self, index: Tensor, rival: Tensor) -> Tensor:
        """sum_l || A_l(x)^T (S'_l - S_l) v_l(x+d) || / ||d||, with the global bound of ||v_l||."""
        prediction = self._samples.prediction[index]
        terms = [
            times(self._network.sensitivities[k][prediction, rival], self._sample_factors[k][index])
            for k in self._network.layers
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

    def _remainder(self, index: Tensor, rival: Tensor, curvatures: Mapping[int, tuple[Tensor, Tensor]]) -> Tensor:
        """sum_l sum_i w_li D_li^2 / ||d||^2, with w >= 0 and w >= -v times the mean second derivative.

        curvatures: by layer, (below, above), (batch, size) each: the mean second derivative is in [-below, above].

        Both factors are anchored here, as the remainder identity holds at the sample.
        """
        terms = []
        for k, target in self._pre_activations.items():
            value, error = self._adjoint(k, index, rival)
            below, above = (bound[index] for bound in curvatures[k])
            moved, rows = self._changes.norm[target][index], self._changes.rows[target][index]
            weights = up(torch.maximum(value * below, -value * above))
            term = self._network.weighted_squares(k, weights, moved, rows)
            terms.append(term + times(torch.maximum(below, above).amax(1), error, moved, moved))
        return _total(terms, index)

    def _adjoint(self, layer: int, index: Tensor, rival: Tensor) -> tuple[Tensor, Tensor]:
        """v_l of the margins at the samples, (count, size), and the bound (count,) of its Euclidean error."""
        vectors = self._samples.adjoints[layer]
        return vectors.value[index, rival].flatten(1), vectors.error[index, rival]

    def _slope(self, layer: int) -> tuple[Tensor, Tensor]:
        """phi'(z_l) at the samples and the bound of its error, (batch, size)."""
        slope = self._samples.slopes[layer]
        value = torch.as_tensor(slope.value, dtype=torch.float64).flatten(1)
        return value, torch.as_tensor(slope.error, dtype=torch.float64).flatten(1)

    @cached_property
    def _units(self) -> dict[int, AnchoredConstants]:
        """Anchored constants of every unit at the samples, by layer."""
        evaluation = self._samples.evaluation
        return {
            k: self._network.table(k)(evaluation.values[target].flatten(1), evaluation.errors[target].flatten(1))
            for k, target in self._pre_activations.items()
        }

    @cached_property
    def _slope_radii(self) -> dict[int, Tensor]:
        """Upper bounds (batch, size) of |secant slope - phi'(z)|, by layer."""
        radii = {}
        for k, units in self._units.items():
            slope, error = self._slope(k)
            radii[k] = up(torch.maximum(units.secant_high - slope, slope - units.secant_low).clamp(min=0.0) + error, 3)
        return radii

    @cached_property
    def _secant_radii(self) -> list[dict[int, Tensor]]:
        """Upper bounds (batch, size) of |secant slope - centre|, per expansion and by layer."""
        return [
            {
                k: up(torch.maximum(units.secant_high - centre, centre - units.secant_low).clamp(min=0.0))
                for k, units in self._units.items()
                for centre in (_centre(expansion, k),)
            }
            for expansion in self._network.lipschitz.expansions
        ]

    @cached_property
    def _changes(self) -> Offsets:
        """Bounds of the pre-activations' change D_l from the sample, per unit of ||d||: slopes are the secants."""
        return self._network.offsets(self._secant_radii, len(self._samples.prediction))

    @cached_property
    def _jacobian(self) -> Offsets:
        """Bounds of ||A_l(x)|| and of its rows' norms: slopes are those at the sample."""
        slopes = {k: self._slope(k) for k in self._pre_activations}
        radii = [
            {k: up((value - _centre(expansion, k)).abs() + error, 2) for k, (value, error) in slopes.items()}
            for expansion in self._network.lipschitz.expansions
        ]
        return self._network.offsets(radii, len(self._samples.prediction))

    @cached_property
    def _sample_factors(self) -> dict[int, Tensor]:
        """Upper bounds (batch,) of ||A_l(x)^T (S'_l - S_l) v|| / (||d|| ||v||) over all v, by layer.

        The smaller of two: D_l unit by unit with the norm of A_l, and A_l row by row with the norm of D_l.
        """
        factors, jacobian, moved = {}, self._jacobian, self._changes
        for k, target in self._pre_activations.items():
            slope_lipschitz = self._units[k].slope_lipschitz
            by_offset = times(times(slope_lipschitz, moved.rows[target]).amax(1), jacobian.norm[target])
            by_jacobian = times(times(slope_lipschitz, jacobian.rows[target]).amax(1), moved.norm[target])
            factors[k] = torch.minimum(by_offset, by_jacobian)
        return factors


def _centre(expansion: Expansion, layer: int) -> float:
    """The centre slope of a whole layer in an expansion; 0 where the layer is cut."""
    slope = expansion.centres.get(layer)
    return 0.0 if slope is None else float(slope.value)


def _total(terms: list[Tensor], index: Tensor) -> Tensor:
    """The sum of the layers' terms, up; each term is itself a sum of two."""
    if not terms:
        return torch.zeros(len(index), dtype=torch.float64, device=index.device)
    return _nan_to_inf(up(torch.stack(terms).sum(0), len(terms) + 1))


def _nan_to_inf(bound: Tensor) -> Tensor:
    """The bound, inf where it is NaN (0 times an overflow)."""
    return bound.masked_fill(bound.isnan(), math.inf)
