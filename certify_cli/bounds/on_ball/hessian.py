"""Curvature on a ball: the Hessian sum of theory section 3 with slopes, curvatures and adjoints as they are on it.

    Hess f = sum over nonlinear nodes l of  A_l^T diag(v_l o phi''(z_l)) A_l

at every point of the ball. Ranges of z_l there give ranges of phi' and phi'', interval arithmetic backward gives ranges
of v_l, and Lipschitz constants on the ball bound A_l. Every figure is a Hessian bound on the whole ball, not a
remainder from its centre, so that the tangent at any of its points may use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.linear_maps.weighted_gram import weighted_gram_norms
from certify_cli.bounds.on_ball.interval_ranges import Ranges, pre_activation_bounds
from certify_cli.efforts import Budget
from certify_cli.network.activations import Activation
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.network.propagate import interval_vjp, nonlinear_nodes, pre_activation, pre_activations
from certify_cli.numerics.rounding import UNDERFLOW, times, up, vector_norm_up


def sharp_on_balls(model_bounds: ModelBounds) -> bool:
    """Whether the effort affords an eigenvalue for each pair and ball in the first layer, where the bound is sharp;
    without them the bound on a ball is seldom below the global one."""
    layers = nonlinear_nodes(model_bounds.network)
    matrices = [model_bounds.curvature.stack(layer).matrix for layer in layers[:1]]
    return any(matrix is not None and _affordable(matrix, model_bounds.effort.ball_eigenvalue) for matrix in matrices)


@dataclass(frozen=True, eq=False)
class BallCurvature:
    """Curvature of margins z_a - z_b on the balls around samples that `ranges` hold on.

    pairs (count, 2): classes (a, b); which (count,): each pair's sample. `lower` and `upper` (count,) bound -lambda_min
    and lambda_max of the Hessian at every point of the ball, up, never below 0 and never above the bound that holds
    everywhere. Every node must have curvature (`why_no_curvature`).
    """

    model_bounds: ModelBounds
    samples: EvaluatedPoints
    ranges: Ranges
    pairs: Tensor
    which: Tensor

    @property
    def network(self) -> Network:
        return self.model_bounds.network

    @property
    def operations(self) -> float:
        """Floating-point operations that one eigenvalue may take."""
        return self.model_bounds.effort.ball_eigenvalue

    @cached_property
    def lower(self) -> Tensor:
        everywhere = self.model_bounds.curvature_pairs.rows(self.pairs[:, 0])
        return self._least(-1.0, everywhere)

    @cached_property
    def upper(self) -> Tensor:
        everywhere = self.model_bounds.curvature_pairs.columns(self.pairs[:, 0])
        return self._least(1.0, everywhere)

    def _least(self, sign: float, everywhere: Tensor) -> Tensor:
        return torch.minimum(self._sum(sign), everywhere.gather(1, self.pairs[:, 1:]).squeeze(1))

    def _sum(self, sign: float) -> Tensor:
        layers = nonlinear_nodes(self.network)
        terms = [self._term(layer, self._weights(layer, sign)) for layer in layers]
        return (
            up(torch.stack(terms).sum(0), len(layers))
            if terms
            else self.pairs.new_zeros(len(self.pairs), dtype=torch.float64)
        )

    def _term(self, layer: int, weights: Tensor) -> Tensor:
        """The least of three bounds of lambda_max(A_l^T diag(w) A_l); v phi'' is at most |v| sup |phi''|."""
        lip, row = (bound[self.which] for bound in self._lipschitz[pre_activation(self.network, layer)])
        bottom, top = self._curvatures[layer]
        bend = torch.maximum(-bottom, top).amax(1)[self.which]
        found = [times(weights.amax(1), lip, lip), times(self._adjoint_norms[layer][0], bend, row, lip)]
        stack = self.model_bounds.curvature.stack(layer)
        if stack.matrix is not None and _affordable(stack.matrix, self.operations):
            ratio = self._growth(layer)[self.which]
            found.append(times(_gram(stack.matrix, weights, stack.matrix_error), stack.parts, ratio, ratio))
        return torch.stack(found).nan_to_num(nan=torch.inf, posinf=torch.inf).amin(0)

    def _growth(self, layer: int) -> Tensor:
        """The largest ratio of a source's Lipschitz constant on the ball to that on the whole space, which is in T."""
        ratios = [torch.zeros_like(self.ranges.radius)]
        for source in (s for t, s in self.model_bounds.weights if t == pre_activation(self.network, layer)):
            everywhere = self.model_bounds.lipschitz.to_output(source)
            if everywhere > 0:
                ratios.append(up(self._source_lipschitz(source) / everywhere))
        return torch.stack(ratios).amax(0)

    def _weights(self, layer: int, sign: float) -> Tensor:
        """w (count, size): the largest of 0 and sign v phi'' over the ball."""
        low, high = self._adjoints[layer]
        bottom, top = (bound[self.which] for bound in self._curvatures[layer])
        corners = torch.stack([low * bottom, low * top, high * bottom, high * top])
        return up((sign * corners).amax(0).clamp(min=0.0))

    def _activation(self, layer: int) -> Activation:
        op = self.network.nodes[layer].op
        if not isinstance(op, Activation):
            raise TypeError(f"{op.title} has no curvature")
        return op

    @cached_property
    def _spans(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Every pre-activation's range, (batch, *shape)."""
        return {k: pre_activation_bounds(self.samples, self.ranges, k) for k in nonlinear_nodes(self.network)}

    @cached_property
    def _slopes(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {k: self._activation(k).slope_on(*span) for k, span in self._spans.items()}

    @cached_property
    def _curvatures(self) -> dict[int, tuple[Tensor, Tensor]]:
        found = {k: self._activation(k).curvature_on(*span) for k, span in self._spans.items()}
        return {k: (low.flatten(1), high.flatten(1)) for k, (low, high) in found.items()}

    @cached_property
    def _steepest(self) -> dict[int, Tensor]:
        """sup |phi'| of every unit, (batch, size)."""
        return {k: torch.maximum(-low, high).flatten(1) for k, (low, high) in self._slopes.items()}

    @cached_property
    def _lipschitz(self) -> dict[int, tuple[Tensor, Tensor]]:
        """For every head: bounds (batch,) of the norms of A_l on the ball: spectral, and of its longest row.

        The product of norms with the slopes of the ball, ||W_lk diag(s_k)|| where that is affordable.
        """
        known, weights = self.model_bounds.lipschitz, self.model_bounds.weights
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for target in pre_activations(self.network):
            lip, row = torch.zeros_like(self.ranges.radius), torch.zeros_like(self.ranges.radius)
            for source in (s for t, s in weights if t == target):
                block = weights[target, source]
                if source == 0:
                    part, reach = torch.full_like(lip, block.norm), torch.ones_like(lip)
                else:
                    before, steepest = found[pre_activation(self.network, source)][0], self._steepest[source]
                    reach = self._reach(source, before)
                    part = times(reach, block.norm)
                    if block.matrix is not None and _affordable(block.matrix, self.operations):
                        square = _gram(block.matrix.T, up(steepest.square()), block.matrix_error)
                        part = torch.minimum(part, times(up(square.sqrt()), before))
                lip, row = up(lip + part), up(row + times(reach, float(block.rows.max())))
            lip = lip.clamp(max=known.to_pre_activation(target))
            found[target] = lip, torch.minimum(row, lip).clamp(max=known.rows(target))
        return found

    def _source_lipschitz(self, source: int) -> Tensor:
        """Lipschitz constants (batch,) of input -> value of `source`."""
        if source == 0:
            return torch.ones_like(self.ranges.radius)
        return self._reach(source, self._lipschitz[pre_activation(self.network, source)][0])

    def _reach(self, source: int, before: Tensor) -> Tensor:
        return times(self._steepest[source].amax(1), before).clamp(max=self.model_bounds.lipschitz.to_output(source))

    @cached_property
    def _adjoints(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Ranges (count, size) of v_l: intervals backward, what holds everywhere, and the norms behind each column."""
        eye = torch.eye(self.network.classes, dtype=torch.float64, device=self.pairs.device)
        slopes = {k: (low[self.which], high[self.which]) for k, (low, high) in self._slopes.items()}
        here = interval_vjp(self.network, eye[self.pairs[:, 0]] - eye[self.pairs[:, 1]], slopes)
        different, row = self.pairs.unique(dim=0, return_inverse=True)
        everywhere = self.model_bounds.curvature.adjoints(different).ranges
        found = {}
        for k, (low, high) in here.items():
            (least, most), (_, reach) = everywhere[k], self._adjoint_norms[k]
            found[k] = (
                torch.fmax(torch.fmax(low.flatten(1), least[row]), -reach),
                torch.fmin(torch.fmin(high.flatten(1), most[row]), reach),
            )
        return found

    @cached_property
    def _adjoint_norms(self) -> dict[int, tuple[Tensor, Tensor]]:
        """For every layer: bounds (count,) of ||v_l||, and (count, size or 1) of |v_l|, from the logits backward."""
        last, zero = len(self.network.nodes) - 1, torch.zeros_like(self.ranges.radius)[self.which]
        behind = dict.fromkeys(pre_activations(self.network), zero)
        found = {}
        for k in reversed(nonlinear_nodes(self.network)):
            norm, entries = zero, zero.unsqueeze(1)
            for target in (t for t, s in self.model_bounds.weights if s == k):
                block = self.model_bounds.weights[target, k]
                if target == last and block.matrix is not None:
                    row = block.matrix[self.pairs[:, 0]] - block.matrix[self.pairs[:, 1]]
                    error = 2 * block.matrix_error + UNDERFLOW
                    part, each = up(vector_norm_up(row) + error, 3), up(row.abs() + error, 3)
                else:
                    arriving = torch.full_like(zero, up(2.0**0.5)) if target == last else behind[target]
                    part, each = times(arriving, block.norm), times(arriving.unsqueeze(1), block.columns)
                norm, entries = up(norm + part), up(entries + each)
            found[k] = norm, entries
            steepest = self._steepest[k].amax(1)[self.which]
            behind[pre_activation(self.network, k)] = up(
                behind[pre_activation(self.network, k)] + times(norm, steepest)
            )
        return found


def _affordable(matrix: Tensor, operations: float) -> bool:
    """Whether an eigenvalue of T^T diag(w) T may be proved for every sample."""
    rows, columns = matrix.shape
    side = min(rows, columns)
    return 3.0 * side**3 + 2.0 * rows * columns * side <= operations


def _gram(matrix: Tensor, weights: Tensor, error: float) -> Tensor:
    """Proved upper bounds (batch,) of lambda_max(T^T diag(w) T); an overflow is its own sample's alone."""
    finite = weights.isfinite().all(1)
    weights = torch.where(finite.unsqueeze(1), weights, 0.0)
    value = weighted_gram_norms(matrix, weights, Budget(norm=0.0, eigenvalues=torch.inf), error)
    return value.masked_fill(~finite, torch.inf)
