"""Evaluates a part of a network: the value of one node from given values of earlier nodes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from certify_cli.network.affine import AffineOp
from certify_cli.network.graph import Network, Nonlinear


class OutsideError(Exception):
    """The value depends on the input other than through the given nodes."""


def needed(network: Network, target: int, given: set[int]) -> list[int]:
    """The nodes between the given ones and `target`, in order. OutsideError where the given ones do not suffice."""
    found, stack = set(), [target]
    while stack:
        node = stack.pop()
        if node in given or node in found:
            continue
        if node == 0:
            raise OutsideError
        found.add(node)
        stack.extend(network.nodes[node].inputs)
    return sorted(found)


def value_and_size(network: Network, target: int, given: Mapping[int, Tensor]) -> tuple[Tensor, Tensor, float]:
    """The value of node `target`, the size of its terms, and the sum of the deviations of the activations used.

    The size, of the value's shape, is the sum of the absolute terms of each entry, to which rounding errors are
    relative.
    """
    values = dict(given)
    sizes = {node: value.abs() for node, value in given.items()}
    deviation = 0.0
    for index in needed(network, target, set(given)):
        node = network.nodes[index]
        values[index] = node.op.apply(*(values[i] for i in node.inputs))
        incoming = [sizes[i] for i in node.inputs]
        if isinstance(node.op, AffineOp):
            bias = node.op.bias()
            sizes[index] = node.op.absolute(incoming[0]) + (0.0 if bias is None else bias.abs())
        elif isinstance(node.op, Nonlinear):
            shape = network.nodes[node.inputs[0]].shape
            moved = getattr(node.op, "largest_change", lambda size: size)(incoming[0])
            sizes[index] = values[index].abs() + node.op.lipschitz_constant(shape) * moved
            deviation += getattr(node.op, "deviation", 0.0)
        else:
            sizes[index] = node.op.apply(*incoming)
    return values[target], sizes[target], deviation
