"""Norms of all rows of a sample's linearised network, from its columns: one pass an input, for all layers at once.

A row of A_l = dz_l/dx takes a pass backward for each unit; in deep networks there are far more units than inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.network.activations import Activation
from certify_cli.network.graph import Network, Shape
from certify_cli.network.movement import Select
from certify_cli.network.pooling import GroupMap
from certify_cli.network.propagate import NodeJvp, Slope, Winners, jvp, nonlinear_nodes, pre_activation, vjp_cost
from certify_cli.numerics.rounding import up

CHUNK_ENTRIES, FEWEST = 2**19, 32
"""Columns pass in chunks whose widest value has about this many entries, 4 MiB: they stay in the cache. But with fewer
than so many columns, deep layers would read their weights more often than they use them."""


@dataclass(frozen=True, eq=False)
class RowNorms:
    """One sample's network linearised at its own slopes.

    nodes: the linear map that stands for each nonlinear node.
    rows: by pre-activation, (size,): upper bounds of the norms of the rows of A_l.
    """

    nodes: Mapping[int, NodeJvp]
    rows: Mapping[int, Tensor]


def columns_cost(network: Network) -> float:
    """Estimate of the floating-point operations for the columns of one sample."""
    return network.nodes[0].size * vjp_cost(network, len(network.nodes) - 1)


def row_norms(network: Network, values: Sequence[Tensor]) -> RowNorms:
    """Of a single sample; values: of every node, (1, *shape)."""
    nodes: dict[int, NodeJvp] = {}
    for k in nonlinear_nodes(network):
        op, before = network.nodes[k].op, pre_activation(network, k)
        z = values[before]
        if isinstance(op, Activation):
            nodes[k] = Slope(op.slope(z))
        elif isinstance(op, GroupMap):
            nodes[k] = _winners(op, z, network.nodes[before].shape, network.nodes[k].shape)
    size, shape = network.nodes[0].size, network.input_shape
    chunk = max(FEWEST, CHUNK_ENTRIES // max(node.size for node in network.nodes))
    squares: dict[int, Tensor] = {}
    errors: dict[int, Tensor] = {}
    for part in torch.arange(size, device=network.device).split(chunk):
        units = torch.nn.functional.one_hot(part, size).to(torch.float64).reshape(-1, *shape)
        for target, image in jvp(network, 0, units, nodes).items():
            square = image.value.flatten(1).square().sum(0)
            squares[target] = squares[target] + square if target in squares else square
            error = image.error.square().sum()
            errors[target] = errors[target] + error if target in errors else error
    # an entry of a computed column is within the column's error of the exact one
    rows = {t: up(up(s, 2 * size + 4).sqrt() + up(errors[t], 2 * size + 4).sqrt(), 4) for t, s in squares.items()}
    return RowNorms(nodes, rows)


def _winners(op: GroupMap, z: Tensor, shape: Shape, out: Shape) -> Winners:
    groups = op.groups(shape)
    members = groups.members.to(z.device)
    lanes = z.reshape(groups.channels, -1)
    channel = torch.arange(groups.channels, device=z.device).unsqueeze(1) * lanes.shape[1]
    index = []
    for sign in groups.signs:
        values = (sign * lanes)[:, members.clamp(min=0)].masked_fill(members < 0, -torch.inf)
        index.append(
            members.expand(groups.channels, -1, -1).gather(2, values.argmax(2, keepdim=True))[..., 0] + channel
        )
    return Winners(Select(torch.stack(index).reshape(out), z[0].numel()), shape)
