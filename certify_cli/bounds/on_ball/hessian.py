"""Curvature on a ball: the Hessian sum of theory section 3, with slopes, curvatures and adjoints bounded on the ball.

    Hess f = sum over nonlinear nodes l of  A_l^T diag(v_l o phi''(z_l)) A_l

at every point of the ball. Ranges of z_l there give ranges of phi' and phi'', interval arithmetic backward gives ranges
of v_l, and Lipschitz constants on the ball bound A_l. Each bound holds for the Hessian at every point of
the ball, not only for the remainder from its centre, so that a tangent at any point of the ball may use it.
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
    """Whether the effort affords an eigenvalue for each pair and ball in the first layer, where the bound is sharp.

    Without these eigenvalues the bound on a ball is seldom below the global one.
    """
    layers = nonlinear_nodes(model_bounds.network)
    matrices = [model_bounds.curvature.stack(layer).matrix for layer in layers[:1]]
    return any(matrix is not None and _affordable(matrix, model_bounds.effort.ball_eigenvalue) for matrix in matrices)


@dataclass(frozen=True, eq=False)
class BallCurvature:
    """Curvature of margins z_a - z_b at every point of the balls of `ranges`.

    pairs: (count, 2), classes (a, b).   which: (count,), the sample of each pair.
    lower, upper: (count,), upper bounds of -lambda_min and of lambda_max of the Hessian, >= 0 and at most the global
        bound.

    Every nonlinear node must have a bounded second derivative (`why_no_curvature`).
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
        return self._capped(-1.0, everywhere)

    @cached_property
    def upper(self) -> Tensor:
        everywhere = self.model_bounds.curvature_pairs.columns(self.pairs[:, 0])
        return self._capped(1.0, everywhere)

    def _capped(self, sign: float, everywhere: Tensor) -> Tensor:
        """The sum over the layers, at most the global bound of each pair; sign: -1 for lower, 1 for upper."""
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
        """Upper bounds (count,) of lambda_max(A_l^T diag(w) A_l): the smallest of three.

        They use the largest weight, |v| sup |phi''| in place of the weights, and where it is affordable an eigenvalue.
        """
        lip, row = (bound[self.which] for bound in self._lipschitz[pre_activation(self.network, layer)])
        bottom, top = self._curvatures[layer]
        steepest = torch.maximum(-bottom, top).amax(1)[self.which]  # sup |phi''|
        bounds = [times(weights.amax(1), lip, lip), times(self._adjoint_norms[layer][0], steepest, row, lip)]
        stack = self.model_bounds.curvature.stack(layer)
        if stack.matrix is not None and _affordable(stack.matrix, self.operations):
            ratio = self._lipschitz_ratio(layer)[self.which]
            bounds.append(times(_gram(stack.matrix, weights, stack.matrix_error), stack.parts, ratio, ratio))
        return torch.stack(bounds).nan_to_num(nan=torch.inf, posinf=torch.inf).amin(0)

    def _lipschitz_ratio(self, layer: int) -> Tensor:
        """The largest ratio (batch,), up, of a source's Lipschitz constant on the ball to that in T."""
        ratios = [torch.zeros_like(self.ranges.radius)]
        for source in (s for t, s in self.model_bounds.weights if t == pre_activation(self.network, layer)):
            everywhere = self.model_bounds.lipschitz.to_output(source)
            if everywhere > 0:
                ratios.append(up(self._source_lipschitz(source) / everywhere))
        return torch.stack(ratios).amax(0)

    def _weights(self, layer: int, sign: float) -> Tensor:
        """w (count, size), up: the largest of 0 and sign v phi'' over the ball."""
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
    def _intervals(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Lower and upper bounds of the pre-activation by nonlinear node, (batch, *shape)."""
        return {k: pre_activation_bounds(self.samples, self.ranges, k) for k in nonlinear_nodes(self.network)}

    @cached_property
    def _slopes(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Bounds of phi' by nonlinear node, (batch, *shape)."""
        return {k: self._activation(k).slope_on(*interval) for k, interval in self._intervals.items()}

    @cached_property
    def _curvatures(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Bounds of phi'' by nonlinear node, (batch, size)."""
        bounds = {k: self._activation(k).curvature_on(*interval) for k, interval in self._intervals.items()}
        return {k: (low.flatten(1), high.flatten(1)) for k, (low, high) in bounds.items()}

    @cached_property
    def _steepest(self) -> dict[int, Tensor]:
        """sup |phi'| of every unit, (batch, size)."""
        return {k: torch.maximum(-low, high).flatten(1) for k, (low, high) in self._slopes.items()}

    @cached_property
    def _lipschitz(self) -> dict[int, tuple[Tensor, Tensor]]:
        """By pre-activation: upper bounds (batch,) of A_l's spectral norm and longest row on the ball.

        They are products of norms with the slopes of the ball, with ||W_lk diag(s_k)|| where that is affordable.
        """
        everywhere, weights = self.model_bounds.lipschitz, self.model_bounds.weights
        norms: dict[int, tuple[Tensor, Tensor]] = {}
        for target in pre_activations(self.network):
            lip, row = torch.zeros_like(self.ranges.radius), torch.zeros_like(self.ranges.radius)
            for source in (s for t, s in weights if t == target):
                block = weights[target, source]
                if source == 0:
                    part, source_lip = torch.full_like(lip, block.norm), torch.ones_like(lip)
                else:
                    previous, steepest = norms[pre_activation(self.network, source)][0], self._steepest[source]
                    source_lip = self._through(source, previous)
                    part = times(source_lip, block.norm)
                    if block.matrix is not None and _affordable(block.matrix, self.operations):
                        square = _gram(block.matrix.T, up(steepest.square()), block.matrix_error)
                        part = torch.minimum(part, times(up(square.sqrt()), previous))
                lip, row = up(lip + part), up(row + times(source_lip, float(block.rows.max())))
            lip = lip.clamp(max=everywhere.to_pre_activation(target))
            norms[target] = lip, torch.minimum(row, lip).clamp(max=everywhere.rows(target))
        return norms

    def _source_lipschitz(self, source: int) -> Tensor:
        """Lipschitz constants (batch,) of input -> value of `source`."""
        if source == 0:
            return torch.ones_like(self.ranges.radius)
        return self._through(source, self._lipschitz[pre_activation(self.network, source)][0])

    def _through(self, source: int, previous: Tensor) -> Tensor:
        """Lipschitz constants (batch,) of nonlinear node `source` from those of its pre-activation."""
        return times(self._steepest[source].amax(1), previous).clamp(max=self.model_bounds.lipschitz.to_output(source))

    @cached_property
    def _adjoints(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Bounds (count, size) of v_l by layer: the tightest of three.

        They are interval arithmetic backward on the ball, the global bounds, and |v_l| by norms (`_adjoint_norms`).
        """
        eye = torch.eye(self.network.classes, dtype=torch.float64, device=self.pairs.device)
        slopes = {k: (low[self.which], high[self.which]) for k, (low, high) in self._slopes.items()}
        on_ball = interval_vjp(self.network, eye[self.pairs[:, 0]] - eye[self.pairs[:, 1]], slopes)
        different, row = self.pairs.unique(dim=0, return_inverse=True)
        everywhere = self.model_bounds.curvature.adjoints(different).ranges
        bounds = {}
        for k, (low, high) in on_ball.items():
            (global_low, global_high), (_, magnitude) = everywhere[k], self._adjoint_norms[k]
            bounds[k] = (
                torch.fmax(torch.fmax(low.flatten(1), global_low[row]), -magnitude),
                torch.fmin(torch.fmin(high.flatten(1), global_high[row]), magnitude),
            )
        return bounds

    @cached_property
    def _adjoint_norms(self) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer: upper bounds of ||v_l||, (count,), and of the entries of |v_l|, (count, size or 1)."""
        last, zero = len(self.network.nodes) - 1, torch.zeros_like(self.ranges.radius)[self.which]
        at_pre_activation = dict.fromkeys(pre_activations(self.network), zero)  # norms of the adjoints there
        bounds = {}
        for k in reversed(nonlinear_nodes(self.network)):
            norm, entries = zero, zero.unsqueeze(1)
            for target in (t for t, s in self.model_bounds.weights if s == k):
                block = self.model_bounds.weights[target, k]
                if target == last and block.matrix is not None:
                    row = block.matrix[self.pairs[:, 0]] - block.matrix[self.pairs[:, 1]]
                    error = 2 * block.matrix_error + UNDERFLOW
                    part, each = up(vector_norm_up(row) + error, 3), up(row.abs() + error, 3)
                else:
                    arriving = torch.full_like(zero, up(2.0**0.5)) if target == last else at_pre_activation[target]
                    part, each = times(arriving, block.norm), times(arriving.unsqueeze(1), block.columns)
                norm, entries = up(norm + part), up(entries + each)
            bounds[k] = norm, entries
            steepest = self._steepest[k].amax(1)[self.which]
            at = pre_activation(self.network, k)
            at_pre_activation[at] = up(at_pre_activation[at] + times(norm, steepest))
        return bounds


def _affordable(matrix: Tensor, operations: float) -> bool:
    """Whether an eigenvalue of T^T diag(w) T may be proved for every sample."""
    rows, columns = matrix.shape
    side = min(rows, columns)
    return 3.0 * side**3 + 2.0 * rows * columns * side <= operations


def _gram(matrix: Tensor, weights: Tensor, error: float) -> Tensor:
    """Proved upper bounds (batch,) of lambda_max(T^T diag(w) T); inf for the samples whose weights are not finite."""
    finite = weights.isfinite().all(1)
    weights = torch.where(finite.unsqueeze(1), weights, 0.0)
    value = weighted_gram_norms(matrix, weights, Budget(norm=0.0, eigenvalues=torch.inf), error)
    return value.masked_fill(~finite, torch.inf)
