"""A network as a chain of parts, each joined to the next by a single value (theory section 14).

Where every path from the input to the logits passes through a node, the network is a composition, and Lipschitz
constants multiply. A part that is a residual block of a known form has its own constant (`residual_blocks`), which may
be far below what norms alone prove: three blocks that are 1-Lipschitz by design have 1, not 2.3. Everything else is a
part with the constants of its expansions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.expansion import (
    Expansion,
    lipschitz_expansion,
    product_expansion,
    weight_blocks,
)
from certify_cli.bounds.global_bounds.residual_blocks import Recognised, recognised
from certify_cli.efforts import Budget
from certify_cli.network.affine import Dense, Shift
from certify_cli.network.convolution import Conv, ConvTranspose
from certify_cli.network.graph import Add, Input, Network
from certify_cli.network.propagate import nonlinear_nodes, vjp_cost
from certify_cli.numerics.rounding import number, times, up

WEIGHTED = (Dense, Conv, ConvTranspose)
"""Layers with weights."""
NOTHING = Budget(norm=0.0, eigenvalues=0.0)
"""With which no general form is tried."""


@dataclass(frozen=True, eq=False)
class Part:
    """The nodes after `first` up to `last`, which read no node before `first`: a network of its own.

    block: what it was recognised as.
    """

    first: int
    last: int
    network: Network
    block: Recognised | None
    expansions: tuple[Expansion, ...]

    @cached_property
    def constant(self) -> float:
        """Lipschitz constant, up, from node `first` to node `last`."""
        by_norms = min(e.change(self.last - self.first, 0) for e in self.expansions)
        return by_norms if self.block is None else min(by_norms, self.block.constant)

    def change(self, target: int, source: int) -> float:
        """Lipschitz constant, up, from node `source` to node `target`, which are nodes of this part."""
        if source == target:
            return 1.0
        if (source, target) == (self.first, self.last):
            return self.constant
        return min(e.change(target - self.first, source - self.first) for e in self.expansions)


@dataclass(frozen=True, eq=False)
class Chain:
    """The parts of a network, first to last; the last one ends with the logits."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, network: Network, budget: Budget, norms_alone: bool = False) -> Chain | None:
        """The chain of a network; None where no part of it is recognised.

        norms_alone: for training, which differentiates norms: without LipLT and the general form.
        """
        blocks = recognised_blocks(network, NOTHING if norms_alone else budget)
        if not blocks:
            return None
        ends = sorted({0, len(network.nodes) - 1} | {node for pair in blocks for node in pair})
        pairs = list(pairwise(ends))
        each = replace(budget, blocks=budget.blocks / len(pairs))
        parts = tuple(_part(network, pair, blocks.get(pair), each, norms_alone) for pair in pairs)
        if network.device.type != "cpu" and not all(part.network.constants for part in parts):
            return None  # a part without a tensor does not know its device
        return cls(parts)

    def _of(self, node: int) -> int:
        """The number of the part that has a node (not as its input)."""
        return next(i for i, part in enumerate(self.parts) if part.first < node <= part.last)

    def _before(self, number: int) -> float:
        return times(1.0, *(part.constant for part in self.parts[:number]))

    def to_node(self, target: int) -> float:
        """Lipschitz constant, up, from the input to a pre-activation (which the input may be) or the logits."""
        if target == 0:
            return 1.0
        at = self._of(target)
        return times(self._before(at), self.parts[at].change(target, self.parts[at].first))

    def longest_row(self, target: int) -> float:
        """Lipschitz constant, up, from the input to any one unit of a pre-activation or of the logits."""
        if target == 0:
            return 1.0
        at = self._of(target)
        part = self.parts[at]
        return times(self._before(at), min(number(e.rows(target - part.first).max()) for e in part.expansions))

    def sensitivity(self, source: int, pairs: Tensor) -> Tensor:
        """Lipschitz constants (count,), up, of margins z_a - z_b as functions of node `source` (0: the input)."""
        head = self.parts[-1]
        at = 0 if source == 0 else self._of(source)
        inside = at == len(self.parts) - 1
        start = source - head.first if inside else 0
        margins = torch.stack([e.sensitivity(start, pairs) for e in head.expansions]).amin(0)
        if start == 0 and head.block is not None:
            margins = margins.clamp(max=up(math.sqrt(2) * head.block.constant, 2))
        if inside:
            return margins
        part = self.parts[at]
        return times(margins, part.change(part.last, source), *(later.constant for later in self.parts[at + 1 : -1]))


def recognised_blocks(network: Network, budget: Budget) -> dict[tuple[int, int], Recognised]:
    """The parts of a known form, by the nodes at which they begin and end, in order.

    Tried are residual blocks (a sum, from the node where its branches part), and what lies between two affine layers
    that follow each other directly: sandwich layers.
    """
    cuts = [0, *bottlenecks(network), len(network.nodes) - 1]
    pairs = [(first, last) for first, last in pairwise(cuts) if isinstance(network.nodes[last].op, Add)]
    joints = [node for node in cuts[1:-1] if _is_joint(network, node)]
    ends = sorted({node for pair in pairs for node in pair} | {0, *joints} if joints else set())
    pairs += [pair for pair in pairwise(ends) if pair not in pairs]
    found = {pair: recognised(between(network, *pair), budget) for pair in sorted(pairs)}
    return {pair: part for pair, part in found.items() if part is not None}


def _is_joint(network: Network, node: int) -> bool:
    """Whether a layer with weights ends here, and the next node's layer has weights, too."""
    after = network.nodes[node + 1].op
    while isinstance(network.nodes[node].op, Shift):
        node = network.nodes[node].inputs[0]
    return isinstance(after, WEIGHTED) and isinstance(network.nodes[node].op, WEIGHTED)


def bottlenecks(network: Network) -> list[int]:
    """The nodes between input and logits through which every path leads, in order."""
    found, earliest = [], len(network.nodes) - 1
    for node in range(len(network.nodes) - 1, 1, -1):
        earliest = min(earliest, *network.nodes[node].inputs)
        if earliest == node - 1:
            found.append(node - 1)
    return found[::-1]


def between(network: Network, first: int, last: int) -> Network:
    """The part of a network from node `first`, as its input, to node `last`. No later node may read an earlier one."""
    given = replace(network.nodes[first], op=Input(), inputs=())
    inner = network.nodes[first + 1 : last + 1]
    return Network((given, *(replace(node, inputs=tuple(i - first for i in node.inputs)) for node in inner)))


def _part(network: Network, pair: tuple[int, int], block: Recognised | None, budget: Budget, norms_alone: bool) -> Part:
    own = between(network, *pair)
    expansions = [product_expansion(own, weight_blocks(own, budget))]
    outputs = network.classes if pair[1] == len(network.nodes) - 1 else 1
    affordable = outputs * vjp_cost(own, len(own.nodes) - 1) <= budget.blocks
    if not norms_alone and affordable and nonlinear_nodes(own):
        expansions.append(lipschitz_expansion(own, budget))
    return Part(*pair, own, block, tuple(expansions))
