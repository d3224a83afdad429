"""The network's values at a sample, with proved bounds of their rounding errors (theory sections 6 and 10).

The bounds are entrywise, for float64: with E the error of its input, an affine node has |W| E + gamma_(k+1)
(|W| |h| + |b|), an activation s E plus its row's evaluation error. They hold for dot products summed in any order, with
or without fused multiply-add; `exact_kernels` switches off the kernels for which they do not (TF32, Winograd and FFT
convolution).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.network.activations import Activation
from certify_cli.network.affine import AffineOp
from certify_cli.network.graph import Add, Concat, Network, Node
from certify_cli.network.pooling import GroupMap
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, gamma, up

SAFETY = 1.001
"""Covers the rounding of the error bounds, which are sums of non-negative terms: relative error far below 0.1 %."""


@contextmanager
def exact_kernels() -> Iterator[None]:
    """Context in which torch uses plain dot products only, no TF32 and no cuDNN; without gradients."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=False), torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Every node's value (batch, *shape), and upper bounds of |computed - exact| of the same shape."""

    values: list[Tensor]
    errors: list[Tensor]

    @property
    def logits(self) -> Tensor:
        return self.values[-1]

    @property
    def logit_errors(self) -> Tensor:
        return self.errors[-1]


def evaluate(network: Network, x: Tensor) -> Evaluation:
    """Values and error bounds of every node at x (batch, *input_shape), taken as exact float64 numbers."""
    values, errors = [x], [torch.zeros_like(x)]
    for node in network.nodes[1:]:
        inputs = [values[i] for i in node.inputs]
        value = node.op.apply(*inputs)
        errors.append(_error(node, inputs, [errors[i] for i in node.inputs]) * SAFETY + UNDERFLOW)
        values.append(value)
    return Evaluation(values, errors)


def deviation(network: Network) -> Tensor:
    """Upper bound (classes,) of |deployed logit - exact logit| at any input.

    The bounds concern the exact activations; a deployed operator may differ from them, as torch's softplus returns z
    beyond its threshold (theory section 0).
    """
    errors = [torch.zeros(1, *network.input_shape, dtype=torch.float64, device=network.device)]
    for node in network.nodes[1:]:
        inputs = [errors[i] for i in node.inputs]
        op = node.op
        if isinstance(op, AffineOp):
            error = op.absolute(inputs[0]) * SAFETY
        elif isinstance(op, Activation):
            error = op.lipschitz * inputs[0] * SAFETY + op.deviation
        else:
            error = _error_of_joins(node, inputs) * SAFETY
        errors.append(error)
    return errors[-1][0]


def _error(node: Node, inputs: list[Tensor], errors: list[Tensor]) -> Tensor:
    op = node.op
    if isinstance(op, AffineOp):
        (h,), (e,) = inputs, errors
        rounding = gamma(op.terms + 1)
        bias = op.bias()
        terms = op.absolute(h.abs() + e)
        if bias is not None:
            terms = terms + bias.abs()
        return op.absolute(e) + rounding * terms
    if isinstance(op, Activation):
        return op.lipschitz * errors[0] + op.value_error(inputs[0])
    joined = _error_of_joins(node, errors)
    if isinstance(op, Add):
        total = torch.stack([h.abs() + e for h, e in zip(inputs, errors, strict=True)]).sum(0)
        joined = joined + gamma(len(inputs)) * total
    return joined


def _error_of_joins(node: Node, errors: list[Tensor]) -> Tensor:
    """Errors of the inputs, carried through a node that moves, selects or adds numbers; without the sum's rounding."""
    if isinstance(node.op, Add | Concat):
        return node.op.apply(*errors)
    if isinstance(node.op, GroupMap):  # |max a - max b| <= max |a - b|
        return node.op.largest_change(*errors)
    raise TypeError(f"no rounding rule for {type(node.op).__name__}")


def margins(logits: Tensor, errors: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """Margins z_y - z_i towards every class i, 0 at i = y, and upper bounds of their errors; both (batch, classes)."""
    top = logits.gather(1, prediction.unsqueeze(1))
    top_error = errors.gather(1, prediction.unsqueeze(1))
    value = top - logits
    return value, up(top_error + errors + UNIT * value.abs(), 4)
