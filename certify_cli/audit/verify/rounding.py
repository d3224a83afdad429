"""What rounding does to a network's logits, estimated: records are compared with it, never with a part of some logit.

A logit may be small after large numbers cancelled, and large beside others that matter: neither its own size nor the
largest logit's tells how far two honest evaluations may be apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from certify_cli.network.activations import Activation
from certify_cli.network.affine import AffineOp
from certify_cli.network.graph import Add, Network, Op

UNIT = 2.0**-53
TIMES = 256
"""How much further than the estimate two evaluations may be apart."""


def blur(network: Network, x: Tensor) -> Tensor:
    """(batch, classes): by how much a logit may differ between two evaluations in float64 at x (batch, *shape).

    Every value on the way is moved, up or down by chance, by the rounding of what is added up in it; what becomes of
    that is taken TIMES, and the last sum's own rounding is added.
    """
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        exact, moved, size = [x], [x], x.abs()
        for node in network.nodes[1:]:
            inputs = [exact[i] for i in node.inputs]
            value, shifted = node.op.apply(*inputs), node.op.apply(*(moved[i] for i in node.inputs))
            size = _added_up(node.op, value, inputs)
            sign = 2.0 * torch.randint(0, 2, value.shape, generator=draw, dtype=x.dtype) - 1.0
            exact.append(value)
            moved.append(shifted + 4 * UNIT * size * sign)
        return TIMES * ((moved[-1] - exact[-1]).abs() + UNIT * size.broadcast_to(exact[-1].shape))


def _added_up(op: Op, value: Tensor, inputs: list[Tensor]) -> Tensor:
    """The size of what is added up in each entry of a node's value."""
    if isinstance(op, AffineOp):
        bias = op.bias()
        return op.absolute(inputs[0].abs()) + (0.0 if bias is None else bias.abs())
    if isinstance(op, Add):
        return torch.stack([part.abs() for part in inputs]).sum(0)
    return value.abs() + inputs[0].abs() if isinstance(op, Activation) else value.abs()
