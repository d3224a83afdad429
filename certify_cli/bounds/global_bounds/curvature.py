"""Global curvature: upper bounds of -lambda_min and lambda_max of every margin's Hessian (theory section 3).

    Hess f = sum over nonlinear nodes l of  A_l^T diag(v_l o phi''(z_l)) A_l

holds at every point, with A_l = dz_l/dx and v_l the margin's adjoint at node l's output. Each layer's term is bounded
by the smallest result of the rules in `RULES`, and the terms add up. The rules in `COMPOSITION` are the published
compositional bound, unrolled so that each layer may use another rule. The others keep the signs of v_l phi'', for which
they need intervals of v_l over all inputs: with v_l taken at a sample the bound fails from three layers on.

The pre-activation is written z_l = T u with one block of u per source, each of norm at most ||d||: T stacks the blocks
W_lk scaled by the Lipschitz constants of their sources, so ||u||^2 <= parts * ||d||^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.expansion import node_lipschitz
from certify_cli.bounds.global_bounds.lipschitz import Lipschitz
from certify_cli.bounds.linear_maps.weight_blocks import Block
from certify_cli.bounds.linear_maps.weighted_gram import weighted_gram_norms
from certify_cli.efforts import Budget
from certify_cli.network.activations import Activation
from certify_cli.network.affine import AffineOp
from certify_cli.network.graph import Network, Shape
from certify_cli.network.propagate import interval_vjp, nonlinear_nodes, pre_activation, pre_activations
from certify_cli.numerics.eigen import largest_eigenvalue
from certify_cli.numerics.estimates import Maps, weighted_gram_estimates
from certify_cli.numerics.norms import frobenius_norm, gram, matrix_norm
from certify_cli.numerics.rounding import (
    UNDERFLOW,
    UNIT,
    carries_gradient,
    number,
    power_of_two,
    root_sum_square,
    times,
    up,
    vector_norm_up,
)


def why_no_curvature(network: Network) -> str | None:
    """None if every nonlinear node has a bounded second derivative, else a sentence that names the first without."""
    for k in nonlinear_nodes(network):
        op = network.nodes[k].op
        if not isinstance(op, Activation) or op.curvature_range is None:
            return f"{network.nodes[k].name} ({op.title}) has no bounded second derivative"
    return None


@dataclass(frozen=True, eq=False)
class Stack:
    """The matrix T of one layer, z_l = T u (see the module's docstring). Norms and errors are upper bounds.

    parts: number of blocks of u.   norm: spectral norm.   rows: norms of the rows, (size,).
    matrix: T (size, all sources' sizes), or None where it is too large to write out.
    matrix_error: Frobenius norm of the difference between `matrix` and T.
    maps: T as operators, where it has one block of affine layers in a row and is not written out.
    """

    parts: int
    norm: float
    rows: Tensor
    matrix: Tensor | None
    matrix_error: float
    maps: Maps | None = None


@dataclass(frozen=True, eq=False)
class Adjoints:
    """Bounds of the adjoints v_l of a batch of margins that hold for all inputs, keyed by layer.

    norms: upper bounds (count,) of ||v_l||.   ranges: lower and upper bounds (count, size) of the entries of v_l.
    """

    norms: Mapping[int, Tensor]
    ranges: Mapping[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Term:
    """One layer's term of the Hessian for a batch of margins: the argument of every rule.

    weights: w (count, size), upper bounds of the positive part of -v phi'' over all inputs.
    adjoints: bounds of all layers' adjoints, for the same margins.
    """

    curvature: Curvature
    layer: int
    weights: Tensor
    adjoints: Adjoints

    @property
    def adjoint(self) -> Tensor:
        """Upper bounds (count,) of ||v_l||."""
        return self.adjoints.norms[self.layer]

    @property
    def stack(self) -> Stack:
        return self.curvature.stack(self.layer)

    @property
    def curvature_sup(self) -> float:
        """Upper bound h of |phi''|."""
        return _activation(self.curvature.network, self.layer).curvature_sup


def _activation(network: Network, layer: int) -> Activation:
    op = network.nodes[layer].op
    if not isinstance(op, Activation):
        raise TypeError(f"{op.title} has no curvature")
    return op


def largest_weight(term: Term) -> Tensor:
    """max_i w_i Lip_l^2."""
    lip = term.curvature.lipschitz.to_pre_activation(pre_activation(term.curvature.network, term.layer))
    return times(term.weights.amax(1), lip, lip)


def weighted_gram(term: Term) -> Tensor | None:
    """lambda_max(T^T diag(w) T) * parts: sharp for the first layer, whose T is the weight matrix itself."""
    stack = term.stack
    if stack.maps is not None and carries_gradient(term.weights):
        return weighted_gram_estimates(stack.maps, term.weights)
    if stack.matrix is None:
        return times(term.weights.amax(1), stack.norm, stack.norm, stack.parts)
    value = weighted_gram_norms(stack.matrix, term.weights, term.curvature.budget, stack.matrix_error)
    return times(value, stack.parts)


def longest_row(term: Term) -> Tensor:
    """h V row_l Lip_l: the compositional bound with |A_l d| <= row_l in every entry."""
    lipschitz, target = term.curvature.lipschitz, pre_activation(term.curvature.network, term.layer)
    return times(term.adjoint, term.curvature_sup, lipschitz.rows(target), lipschitz.to_pre_activation(target))


def scaled_rows(term: Term) -> Tensor | None:
    """h V ||diag(||T_1||, ..., ||T_q||) T|| * parts: the published J_k, with ||.|| verified."""
    norm = term.curvature.scaled_rows_norm(term.layer)
    return None if norm is None else times(term.adjoint, term.curvature_sup, norm, term.stack.parts)


def two_layers(term: Term) -> Tensor | None:
    """h ||y|| ||A|| ||T|| * parts with ||A||^2 = lambda_max((G^T G) o (T T^T)), G the next weights, y their adjoint.

    ||G diag(delta) T||_F^2 = delta^T ((G^T G) o (T T^T)) delta and ||delta|| <= h ||T|| (the residual-block rule).
    """
    norm = term.curvature.two_layer_norm(term.layer)
    if norm is None:
        return None
    outer = term.curvature.later_adjoint(term.layer, term.adjoints)
    return times(outer, term.curvature_sup, norm, term.stack.norm, term.stack.parts)


RULES: dict[str, Callable[[Term], Tensor | None]] = {
    "largest weight": largest_weight,
    "weighted Gram": weighted_gram,
    "longest row": longest_row,
    "scaled rows": scaled_rows,
    "two layers": two_layers,
}
"""Upper bounds (count,) of one and the same term; None where the rule does not apply. The smallest counts."""

COMPOSITION = ("longest row", "scaled rows", "two layers")
"""The rules that use |v_l| and |phi''| alone: the published compositional bound and refinements of it."""


@dataclass(frozen=True, eq=False)
class Curvature:
    """Curvature bounds of a network's margins that hold on the whole input space.

    weights: the network's blocks W_lk.   lipschitz: its global Lipschitz constants.
    """

    network: Network
    weights: Mapping[tuple[int, int], Block]
    lipschitz: Lipschitz
    budget: Budget

    def terms(self, pairs: Tensor, rules: tuple[str, ...] = tuple(RULES)) -> Tensor:
        """Upper bounds (count, layers) of each layer's part of -lambda_min of the Hessian of z_a - z_b.

        pairs: (count, 2), classes (a, b). The bound of lambda_max is that of the reversed pair (b, a).
        """
        layers = nonlinear_nodes(self.network)
        if not layers:
            return torch.zeros(len(pairs), 1, dtype=torch.float64, device=pairs.device)
        adjoints = self.adjoints(pairs)
        return torch.stack([self._term(layer, adjoints, rules) for layer in layers], dim=1)

    def lower(self, pairs: Tensor, rules: tuple[str, ...] = tuple(RULES)) -> Tensor:
        """Upper bounds (count,), >= 0, of -lambda_min of the Hessian of z_a - z_b over all inputs."""
        terms = self.terms(pairs, rules)
        return up(terms.sum(1), terms.shape[1] + 1)

    def _term(self, layer: int, adjoints: Adjoints, rules: tuple[str, ...]) -> Tensor:
        term = Term(self, layer, self._signed_weights(layer, *adjoints.ranges[layer]), adjoints)
        values = [value for name in rules if (value := RULES[name](term)) is not None]
        return torch.stack(values).amin(0)

    def _signed_weights(self, layer: int, low: Tensor, high: Tensor) -> Tensor:
        """w (count, size), up: the largest of 0 and -v phi'' over all v_l in [low, high] and all z_l."""
        bottom, top = _activation(self.network, layer).curvature_range or (-math.inf, math.inf)
        corners = torch.stack([-low * bottom, -low * top, -high * bottom, -high * top]).amax(0)
        return up(corners.clamp(min=0.0), 1)

    def adjoints(self, pairs: Tensor) -> Adjoints:
        """Bounds of all layers' adjoints, for margins of pairs (count, 2).

        Ranges come from interval arithmetic backward, intersected, for the centres and radii of each expansion of the
        Lipschitz constants, with v^C_l +- sum over later k of ||B_kl e_i|| r_k V_k; V_k bounds ||v_k||.
        """
        layers = nonlinear_nodes(self.network)
        norms = {k: self.lipschitz.sensitivity(k, pairs) for k in layers}
        eye = torch.eye(self.network.classes, dtype=torch.float64, device=pairs.device)
        slopes = {k: _activation(self.network, k).slope_range for k in layers}
        ranges = interval_vjp(self.network, eye[pairs[:, 0]] - eye[pairs[:, 1]], slopes)
        for layer in layers:
            low, high = (t.flatten(1) for t in ranges[layer])
            for expansion in self.lipschitz.expansions:
                rows = expansion.adjoint_rows(layer, pairs)
                spread = rows.error.unsqueeze(1)
                for k in layers:
                    if k > layer and (block := expansion.blocks.get((pre_activation(self.network, k), layer))):
                        deviation = times(norms[k], expansion.radii[k])
                        spread = spread + times(block.columns.unsqueeze(0), deviation.unsqueeze(1))
                spread = up(spread + 2.0**-52 * rows.value.abs(), 2 * len(self.network.nodes))
                low, high = torch.maximum(low, rows.value - spread), torch.minimum(high, rows.value + spread)
            ranges[layer] = low, high
        return Adjoints(norms, ranges)

    @cached_property
    def _stacks(self) -> dict[int, Stack]:
        return {}

    def stack(self, layer: int) -> Stack:
        """T of one layer (see the module's docstring)."""
        if layer not in self._stacks:
            target = pre_activation(self.network, layer)
            sources = sorted(s for t, s in self.weights if t == target)
            blocks = [(self.weights[target, s], self.lipschitz.to_output(s)) for s in sources]
            norm = up(root_sum_square([times(b.norm, lip) for b, lip in blocks]), len(blocks) + 2)
            size = self.network.nodes[target].size
            rows = vector_norm_up(torch.stack([times(b.rows, lip).expand(size) for b, lip in blocks], dim=1))
            matrix, error = None, 0.0
            if all(b.matrix is not None for b, _ in blocks):
                matrix = torch.cat([b.matrix * lip for b, lip in blocks if b.matrix is not None], dim=1)
                scaling = UNIT * frobenius_norm(matrix)
                error = up(sum(times(b.matrix_error, lip) for b, lip in blocks) + scaling, len(blocks) + 2) + UNDERFLOW
                if len(blocks) > 1:
                    norm = min(norm, up(matrix_norm(matrix) + error, 2))
            maps = self._maps(target, *sources) if matrix is None and len(sources) == 1 else None
            self._stacks[layer] = Stack(len(blocks), norm, rows, matrix, error, maps)
        return self._stacks[layer]

    def _maps(self, target: int, source: int) -> Maps | None:
        """A block times the Lipschitz constant of its source, by the affine layers between the two."""
        layers: list[tuple[AffineOp, Shape]] = []
        at = target
        while at != source:
            node = self.network.nodes[at]
            if not isinstance(node.op, AffineOp):
                return None
            layers.insert(0, (node.op, self.network.nodes[node.inputs[0]].shape))
            at = node.inputs[0]
        lip, shape = self.lipschitz.to_output(source), self.network.nodes[target].shape

        def linear(v: Tensor) -> Tensor:
            for op, _ in layers:
                v = op.linear(v)
            return (lip * v).flatten(1)

        def transpose(u: Tensor) -> Tensor:
            u = lip * u.reshape(-1, *shape)
            for op, before in reversed(layers):
                u = op.transpose(u, before)
            return u

        return Maps(linear, transpose, self.network.nodes[source].shape, self.weights[target, source].rows)

    @cached_property
    def _norms(self) -> dict[tuple[str, int], float | None]:
        return {}

    def scaled_rows_norm(self, layer: int) -> float | None:
        """||diag(||T_1||, ..., ||T_q||) T||, up; None where T is not written out."""
        if ("rows", layer) not in self._norms:
            stack = self.stack(layer)
            value = None
            if stack.matrix is not None:
                scale, height = power_of_two(stack.matrix), power_of_two(stack.rows)
                scaled = (stack.matrix / scale) * (stack.rows / height).unsqueeze(1)
                rounding = UNIT * frobenius_norm(scaled) + UNDERFLOW
                value = times(up(matrix_norm(scaled) + rounding, 2), scale, height)
                value = up(value + times(number(stack.rows.max()), stack.matrix_error))
            self._norms["rows", layer] = value
        return self._norms["rows", layer]

    def two_layer_norm(self, layer: int) -> float | None:
        """||A|| of the rule `two_layers`, up; None where a matrix is not written out."""
        if ("two", layer) not in self._norms:
            self._norms["two", layer] = self._two_layer_norm(layer)
        return self._norms["two", layer]

    def _two_layer_norm(self, layer: int) -> float | None:
        stack = self.stack(layer)
        later = [self.weights[t, s] for t, s in sorted(self.weights) if s == layer]
        size = self.network.nodes[layer].size
        if stack.matrix is None or any(b.matrix is None for b in later) or size**3 > self.budget.norm:
            return None
        after = torch.cat([b.matrix for b in later if b.matrix is not None], dim=0)
        first, second = power_of_two(after), power_of_two(stack.matrix)
        after, before = after / first, stack.matrix / second
        error = up(math.hypot(*(b.matrix_error for b in later)) / first, len(later) + 3)
        before_error = up(stack.matrix_error / second)
        (left,), (left_error,) = gram(after.T.unsqueeze(0))
        (right,), (right_error,) = gram(before.unsqueeze(0))
        # |P o Q - P' o Q'|_F <= |P - P'|_F max|Q'| + max|P| |Q - Q'|_F, where no entry of P or Q exceeds the diagonal
        product = left * right
        largest_left, largest_right = float(left.diagonal().max()), float(right.diagonal().max())
        left_slack = float(left_error) + 2 * error * frobenius_norm(after) + error * error
        right_slack = float(right_error) + 2 * before_error * frobenius_norm(before) + before_error * before_error
        slack = left_slack * (largest_right + 2 * right_slack) + right_slack * (largest_left + 2 * left_slack)
        slack += UNIT * frobenius_norm(product) + UNDERFLOW
        scaled = up(math.sqrt(float(largest_eigenvalue(product.unsqueeze(0), up(slack, 12)))), 2)
        return times(scaled, first, second)

    def later_adjoint(self, layer: int, adjoints: Adjoints) -> Tensor:
        """Upper bounds (count,) of the norm of the stacked adjoints at all pre-activations and logits after `layer`."""
        norms = []
        last = len(self.network.nodes) - 1
        for target in (t for t in pre_activations(self.network) if (t, layer) in self.weights):
            own = math.sqrt(2.0) * (1 + 2.0**-50) if target == last else 0.0
            norm = torch.full_like(adjoints.norms[layer], own)
            for k in (
                k for k in nonlinear_nodes(self.network) if pre_activation(self.network, k) == target and k > layer
            ):
                norm = up(norm + times(adjoints.norms[k], node_lipschitz(self.network, k)))
            norms.append(norm)
        return vector_norm_up(torch.stack(norms, dim=1))
