"""Parts of a network whose form has a Lipschitz constant of its own (theory section 14).

Any H x + G phi(V x + b) with matrices of moderate size has that of `one_layer_sdp`. The blocks x - V^T D phi(V x + b)
have one of any size, convolutions included:

let d be a difference of two inputs, w = S V d that of the hidden values, with S diagonal in [a, b], and let the file
hold x + G phi(V x + c) with G = -V^T D + E^T, D >= 0 diagonal and E what rounding of the file left. Where E = 0 the
differences of outputs are (I - V^T D S V) d, a symmetric matrix with eigenvalues in [1 - b q, 1 - a q'] for
q >= ||D^(1/2) V||^2, and so

    L <= max(1 + max(0, -a) q, b q - 1) + s ||E|| ||V||,       s = max(|a|, |b|).

For a >= 0 the terms of E can be absorbed, as (V d, D w) >= (w, D w) / b: with y = ||D^(1/2) w||, e >= ||D^(-1/2) E||,

    ||(I - V^T D S V) d + E^T w||^2 <= ||d||^2 - (2/b - q) y^2 + 2 e y ||d|| + 2 e q^(1/2) y^2 + e^2 y^2

is at most (1 + e^2 / k) ||d||^2 where k = 2/b - q - 2 e q^(1/2) - e^2 > 0. The smaller of the two is the constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.expansion import weight_blocks
from certify_cli.bounds.global_bounds.one_layer_sdp import OneLayer, is_moderate, operations
from certify_cli.efforts import Budget
from certify_cli.network.activations import Activation
from certify_cli.network.affine import AffineOp, Dense, Scale, Shift
from certify_cli.network.convolution import Conv, ConvTranspose, taps_norm
from certify_cli.network.graph import Add, Network, Shape
from certify_cli.network.movement import Reshape
from certify_cli.network.propagate import nonlinear_nodes, pre_activation
from certify_cli.numerics.estimates import operator_norm_estimate
from certify_cli.numerics.norms import frobenius_norm
from certify_cli.numerics.rounding import TINY, UNIT, carries_gradient, gamma, number, times, up

ALIKE = 1e-3
"""Largest part of the returning weights, as a Frobenius norm, that may differ from -V^T D."""
SMALLEST = 1e-12
"""Of the entries of D, as a part of the largest one."""
SCALING = 8
"""Roundings of a weight times a row's factor or its root, of D V and of the difference E, at most."""
NEARLY = 1e-6
"""A constant so near 1 is not worth the general form's proof."""


@dataclass(frozen=True, eq=False)
class Recognised:
    """A part of a known form.   constant: its Lipschitz constant, up.   form: as a formula."""

    constant: float
    form: str


def recognised(part: Network, budget: Budget) -> Recognised | None:
    """What a network from one value to another, with one hidden layer, is; None where it is of no known form."""
    hidden = nonlinear_nodes(part)
    if len(hidden) != 1:
        return None
    op = part.nodes[hidden[0]].op
    if not isinstance(op, Activation) or not all(map(math.isfinite, op.slope_range)):
        return None
    returning = _returning(part, hidden[0], op)
    if returning is not None and returning.constant <= 1 + NEARLY:
        return returning
    general = _general(part, hidden[0], op, budget)
    found = [block for block in (returning, general) if block is not None]
    return min(found, key=lambda block: block.constant, default=None)


def _returning(part: Network, hidden: int, op: Activation) -> Recognised | None:
    """A part x - V^T D phi(V x + b): the sum of its input and of one hidden layer's image."""
    last = part.nodes[-1]
    if not isinstance(last.op, Add) or len(last.inputs) != 2 or 0 not in last.inputs:
        return None
    into = _weight(part, pre_activation(part, hidden), 0)
    back = _weight(part, max(last.inputs), hidden)
    if into is None or back is None:
        return None
    returning = back.transposed(into)
    if returning is None:
        return None
    constant = _constant(into, returning, back.errors, op.slope_range)
    return None if constant is None else Recognised(constant, "x - V^T D phi(V x + b)")


def _general(part: Network, hidden: int, op: Activation, budget: Budget) -> Recognised | None:
    """A part H x + G phi(V x + b) whose matrices the budget affords."""
    inputs, size, last = part.nodes[0].size, part.nodes[hidden].size, len(part.nodes) - 1
    if carries_gradient(*part.constants) or operations(inputs, size) > budget.norm:
        return None
    blocks = weight_blocks(part, budget)
    found: list[Tensor] = []
    errors: list[float] = []
    for target, source in ((last, 0), (last, hidden), (pre_activation(part, hidden), 0)):
        block = blocks.get((target, source))
        if block is None:
            found.append(torch.zeros(part.nodes[target].size, part.nodes[source].size, dtype=torch.float64))
            errors.append(0.0)
        elif block.matrix is None:
            return None
        else:
            found.append(block.matrix)
            errors.append(block.matrix_error)
    h, g, v = (matrix.to(part.device) for matrix in found)
    constant = OneLayer(h, g, v, (errors[0], errors[1], errors[2]), op.slope_range).constant()
    form = "H x + G phi(V x + b)" if bool(h.any()) else "G phi(V x + b)"
    return Recognised(constant, form) if math.isfinite(constant) else None


@dataclass(frozen=True, eq=False)
class _Weight:
    """A chain of affine operations with one layer among scales: the layer, whose weight contains the scales.

    errors: roundings in units of the weight's last places.   shape: of what the chain takes.
    """

    op: Dense | Conv | ConvTranspose
    errors: int
    shape: Shape

    def norm_of(self, weight: Tensor) -> float:
        """Upper bound of the norm of the same layer with another weight, whose entries took SCALING more roundings.

        Where this one's weight carries a gradient, an estimate from below.
        """
        assert isinstance(self.op, Dense | Conv)  # of which `transposed` makes the other's weight
        op = replace(self.op, weight=weight, weight_error=self.errors + SCALING)
        if carries_gradient(self.op.weight):
            back = partial(op.transpose, shape=self.shape)
            return float(operator_norm_estimate(op.linear, back, self.shape, weight))
        return float(op.norm(self.shape))

    def transposed(self, like: _Weight) -> Tensor | None:
        """The transpose's weight as one of the layer `like`; None where it is another kind of map."""
        own, other = self.op, like.op
        if isinstance(own, Dense) and isinstance(other, Dense):
            return own.weight.T if own.weight.T.shape == other.weight.shape else None
        if not isinstance(other, Conv):
            return None
        if isinstance(own, ConvTranspose):
            fits = (own.stride, own.padding, own.dilation) == (other.stride, other.padding, other.dilation)
            return own.weight if fits and own.weight.shape == other.weight.shape else None
        if isinstance(own, Conv) and {*own.stride, *other.stride} == {1}:
            spans = [d * (k - 1) for d, k in zip(own.dilation, own.weight.shape[2:], strict=True)]
            padding = tuple(span - p for span, p in zip(spans, own.padding, strict=True))
            flipped = own.weight.transpose(0, 1).flip(tuple(range(2, own.weight.dim())))
            fits = padding == other.padding and own.dilation == other.dilation
            return flipped if fits and flipped.shape == other.weight.shape else None
        return None


def _weight(network: Network, target: int, source: int) -> _Weight | None:
    """The affine operations from `source` to `target`, if they are one layer and scales by unit or by channel."""
    path: list[int] = []
    while target != source:
        node = network.nodes[target]
        if not isinstance(node.op, Dense | Conv | ConvTranspose | Scale | Shift | Reshape) or target < source:
            return None
        path.insert(0, target)
        target = node.inputs[0]
    layers = [i for i in path if isinstance(network.nodes[i].op, Dense | Conv | ConvTranspose)]
    if len(layers) != 1:
        return None
    layer = network.nodes[layers[0]].op
    assert isinstance(layer, Dense | Conv | ConvTranspose)  # as selected
    taken, given = network.nodes[network.nodes[layers[0]].inputs[0]].shape, network.nodes[layers[0]].shape
    if (len(taken) != 1) if isinstance(layer, Dense) else (layer.groups != 1):
        return None
    weight, errors = layer.weight, getattr(layer, "weight_error", 0)
    for i in path:
        op: AffineOp = network.nodes[i].op  # type: ignore[assignment]  # as selected
        if isinstance(op, Reshape) and op.shape != network.nodes[network.nodes[i].inputs[0]].shape:
            return None
        if isinstance(op, Scale):
            before = i < layers[0]
            scale = _by_channel(op.weight, taken if before else given)
            if scale is None:
                return None
            axis = int(before) if not isinstance(layer, ConvTranspose) else int(not before)
            scale = scale.reshape(*[1] * axis, -1, *[1] * (weight.dim() - axis - 1))
            if not is_moderate(scale) or not is_moderate(weight * scale):  # the product may not be near the exact one
                return None
            weight = weight * scale
            errors += op.weight_error + 1
    return _Weight(replace(layer, weight=weight, offset=None), errors, taken)


def _by_channel(scale: Tensor, shape: Shape) -> Tensor | None:
    """A scale of values of `shape` as one factor a channel, or one in all; None where it is finer."""
    if scale.numel() == 1:
        return scale.reshape(1)
    padded = (1,) * (len(shape) - scale.dim()) + tuple(scale.shape)
    return scale.reshape(-1) if padded == (shape[0], *[1] * (len(shape) - 1)) else None


def _constant(into: _Weight, returning: Tensor, roundings: int, slopes: tuple[float, float]) -> float | None:
    """The module's bound for V = `into`, G^T = `returning`, a weight of the same kind, and phi's slopes.

    roundings: of `returning`, in units of its last places.

    None where G is not near -V^T D, or sizes are beyond what squares of float64 allow.
    """
    v, g = into.op.weight.detach(), returning.detach()
    low, high = slopes
    diagonal = -(g * v).flatten(1).sum(1) / v.flatten(1).square().sum(1).clamp(min=TINY)
    largest = number(diagonal.max())
    if not is_moderate(v) or not is_moderate(g) or not 0.0 < largest < math.inf:
        return None
    diagonal = diagonal.clamp(min=SMALLEST * largest)  # any positive numbers will do; E takes what they miss
    by_row = diagonal.reshape(-1, *[1] * (v.dim() - 1))
    rest = g + by_row * v
    if not frobenius_norm(rest) <= ALIKE * frobenius_norm(g):
        return None
    errors = gamma(roundings + SCALING) * g.abs() + gamma(into.errors + SCALING) * by_row * v.abs()
    root = by_row.sqrt()
    weight_norm, root_norm = into.norm_of(v), into.norm_of(root * v)
    q = times(root_norm, root_norm)
    missed = up(_loose(rest) + _loose(errors), 2)
    e = up(_loose(rest / root) + _loose(errors / root), 6)
    found = up(max(1 + max(0.0, -low) * q, high * q - 1), 4)
    found = up(found + times(max(abs(low), abs(high)), missed, weight_norm), 2)
    if low >= 0 and high > 0:
        spare = 2 / high * (1 - 4 * UNIT) - up(q + times(2 * e, root_norm) + e * e, 8)
        if spare > 0:
            found = min(found, up(math.sqrt(up(1 + e * e / spare, 4)), 2))
    return found if math.isfinite(found) else None


def _loose(weight: Tensor) -> float:
    """Upper bound of the norm of the map with these weights, without a proof of its own."""
    return taps_norm(weight) if weight.dim() > 2 else frobenius_norm(weight)
