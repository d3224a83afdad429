"""An estimate of the rounding errors of a network's logits: the tolerance with which records are compared.

A part of the logit itself would not do: it may be small after large numbers have cancelled, or large beside others that
matter. Neither its own magnitude nor the largest logit's bounds the distance of two honest evaluations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from certify_cli.network.activations import Activation
from certify_cli.network.affine import AffineOp
from certify_cli.network.graph import Add, Network, Op

UNIT = 2.0**-53
TIMES = 256
"""Factor on the estimate that makes it a tolerance."""


def logit_error(network: Network, x: Tensor) -> Tensor:
    """An estimate (batch, classes) of the distance of two evaluations of a logit at x (batch, *shape) in float64.

    Every intermediate value is moved up or down, at random, by the rounding of the numbers that it adds up. The logits'
    movement and the last sum's own rounding, TIMES, are the estimate.
    """
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        exact, moved, magnitude = [x], [x], x.abs()
        for node in network.nodes[1:]:
            inputs = [exact[i] for i in node.inputs]
            value, shifted = node.op.apply(*inputs), node.op.apply(*(moved[i] for i in node.inputs))
            magnitude = _summand_magnitude(node.op, value, inputs)
            sign = 2.0 * torch.randint(0, 2, value.shape, generator=draw, dtype=x.dtype) - 1.0
            exact.append(value)
            moved.append(shifted + 4 * UNIT * magnitude * sign)
        return TIMES * ((moved[-1] - exact[-1]).abs() + UNIT * magnitude.broadcast_to(exact[-1].shape))


def _summand_magnitude(op: Op, value: Tensor, inputs: list[Tensor]) -> Tensor:
    """The sum of the magnitudes of the numbers that each entry of a node's value adds up."""
    if isinstance(op, AffineOp):
        bias = op.bias()
        return op.absolute(inputs[0].abs()) + (0.0 if bias is None else bias.abs())
    if isinstance(op, Add):
        return torch.stack([part.abs() for part in inputs]).sum(0)
    return value.abs() + inputs[0].abs() if isinstance(op, Activation) else value.abs()
