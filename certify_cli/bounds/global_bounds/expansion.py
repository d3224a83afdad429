"""Expansions of a network: the product of norms and LipLT, on any DAG (theory section 3).

Both are one recursion. Replace every nonlinear node's slope range [a, b] by a centre c and a radius r; then, from a
source s, with B the blocks of the network linearised at the centres,

    m_l = ||B_ls|| + sum over nonlinear k between s and l of  ||B_lk|| r_k m_k

bounds the change of pre-activation l per unit of change at s. c = (a + b)/2, r = (b - a)/2 is LipLT; c cut (0) and
r = max |slope| is the product of norms. Both hold, so the smaller of the two is the bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.bounds.linear_maps.weight_blocks import Block, Blocks
from certify_cli.efforts import Budget
from certify_cli.network.activations import Activation
from certify_cli.network.graph import Network, Nonlinear
from certify_cli.network.propagate import (
    Slope,
    Slopes,
    Vectors,
    nonlinear_nodes,
    pre_activation,
    pre_activations,
    vjp,
)
from certify_cli.numerics.rounding import UNIT, times, up, vector_norm_up

ROW_ENTRIES = 2**21
"""Entries of rows of logits, or of differences of such rows, that are held at once: 16 MiB, which are used again."""


def node_lipschitz(network: Network, index: int) -> float:
    """Upper bound of the Lipschitz constant of nonlinear node `index` alone."""
    op = network.nodes[index].op
    if not isinstance(op, Nonlinear):
        raise TypeError(f"{op.title} is affine")
    return op.lipschitz_constant(network.nodes[pre_activation(network, index)].shape)


@dataclass(frozen=True, eq=False)
class Expansion:
    """A network as its linearisation at centre slopes, plus a deviation of the slopes at every nonlinear node.

    centres: centre slope by node; nodes without one are cut.
    radii: by node, upper bounds r_k of |slope - centre|.
    blocks: of the network linearised at the centres, keyed (target, source).
    """

    network: Network
    centres: Slopes
    radii: Mapping[int, float]
    blocks: Mapping[tuple[int, int], Block]

    @cached_property
    def _changes(self) -> dict[int, dict[int, float]]:
        """By source and target, m_ls, up; 0 where the target does not depend on the source."""
        return {}

    def change(self, target: int, source: int) -> float:
        """Upper bound of the change of `target` per unit of change at `source`, whose output is a free variable."""
        table = self._changes.setdefault(source, {})
        for t in pre_activations(self.network):
            if source <= t <= target and t not in table:  # no block is asked for that leads further than `target`
                terms = [self.blocks[t, source].norm] if (t, source) in self.blocks else []
                for k in nonlinear_nodes(self.network):
                    if source < k <= t and (t, k) in self.blocks:
                        previous = table.get(pre_activation(self.network, k), 0.0)
                        if previous:
                            terms.append(times(self.blocks[t, k].norm, self.radii[k], previous))
                table[t] = up(sum(terms), len(terms)) if terms else 0.0
        return table.get(target, 0.0)

    def rows(self, target: int) -> Tensor:
        """Upper bounds (size or 1,) of the change of each unit of `target` per unit of change of the input."""
        zero = torch.zeros(1, dtype=torch.float64, device=self.network.device)
        total = self.blocks[target, 0].rows if (target, 0) in self.blocks else zero
        count = 1
        for k in nonlinear_nodes(self.network):
            if k <= target and (target, k) in self.blocks:
                total = total + times(
                    self.blocks[target, k].rows, self.radii[k], self.change(pre_activation(self.network, k), 0)
                )
                count += 1
        return up(total, count)

    @cached_property
    def row_entries(self) -> int:
        """Entries of one logit's unit vector, and of its derivatives at all nodes that they reach."""
        last, nodes = len(self.network.nodes) - 1, self.network.nodes
        return self.network.classes + sum(node.size for i, node in enumerate(nodes) if (last, i) in self.blocks)

    @cached_property
    def _logit_rows(self) -> LogitRows:
        """Of all classes; only where these are few (ROW_ENTRIES)."""
        return LogitRows.of(self, torch.arange(self.network.classes, device=self.network.device))

    def adjoint_rows(self, source: int, pairs: Tensor) -> Vectors:
        """v_source (count, size) of the margins z_a - z_b in the linearised network; pairs: (count, 2)."""
        return self._logit_rows.difference(source, pairs)

    def adjoint_norms(self, source: int, pairs: Tensor) -> Tensor:
        """Upper bounds (count,) of ||v_source|| in the linearised network."""
        return self._logit_rows.norms(source, pairs)

    def sensitivity(self, source: int, pairs: Tensor) -> Tensor:
        """Upper bounds (count,) of the Lipschitz constants of the margins as functions of `source` (0: the input)."""
        if self.network.classes * self.row_entries <= ROW_ENTRIES:
            return self._sensitivity(source, pairs, self._logit_rows)
        total = torch.zeros(len(pairs), dtype=torch.float64, device=pairs.device)
        for index in _in_parts(pairs, max(2, ROW_ENTRIES // self.row_entries)):
            part = pairs[index]
            total[index] = self._sensitivity(source, part, LogitRows.of(self, part.unique()))
        return total

    def _sensitivity(self, source: int, pairs: Tensor, rows: LogitRows) -> Tensor:
        total = rows.norms(source, pairs)
        count = 1
        for k in nonlinear_nodes(self.network):
            if k > source and k in rows.rows:
                change = self.change(pre_activation(self.network, k), source)
                total = total + times(rows.norms(k, pairs), self.radii[k], change)
                count += 1
        return up(total, count)


@dataclass(frozen=True, eq=False)
class LogitRows:
    """Derivatives of some logits in an expansion's linearised network.

    classes: (rows,), ascending.   rows: by source k, v_k (1, rows, *shape), where there is any dependence.
    """

    network: Network
    classes: Tensor
    rows: Mapping[int, Vectors]

    @classmethod
    def of(cls, expansion: Expansion, classes: Tensor) -> LogitRows:
        network = expansion.network
        units = torch.zeros(1, len(classes), network.classes, dtype=torch.float64, device=network.device)
        units[0, torch.arange(len(classes)), classes] = 1.0
        rows, last = vjp(network, units, expansion.centres), len(network.nodes) - 1
        return cls(network, classes, {k: found for k, found in rows.items() if (last, k) in expansion.blocks})

    def difference(self, source: int, pairs: Tensor) -> Vectors:
        """v_source (count, size) of the margins z_a - z_b."""
        rows = self.rows.get(source)
        if rows is None:
            size = self.network.nodes[source].size
            zero = torch.zeros(len(pairs), size, dtype=torch.float64, device=pairs.device)
            return Vectors(zero, zero[:, 0])
        value, error = rows.value[0].flatten(1), rows.error[0]
        a, b = torch.searchsorted(self.classes, pairs.T.contiguous())
        difference = value[a] - value[b]
        return Vectors(difference, up(error[a] + error[b] + UNIT * vector_norm_up(difference), 4))

    def norms(self, source: int, pairs: Tensor) -> Tensor:
        """Upper bounds (count,) of ||v_source||, in parts that fit ROW_ENTRIES."""
        if source not in self.rows:
            return torch.zeros(len(pairs), dtype=torch.float64, device=pairs.device)
        at_once = max(1, ROW_ENTRIES // self.network.nodes[source].size)
        rows = (self.difference(source, part) for part in pairs.split(at_once))
        return torch.cat([up(vector_norm_up(part.value) + part.error, 2) for part in rows])


def _in_parts(pairs: Tensor, most: int) -> Iterator[Tensor]:
    """Positions of all pairs, in parts with at most `most` different classes each, or a pair.

    The side with fewer classes, the predicted ones, is in every part as a whole, so that each rival is in one part.
    """
    few, many = sorted((0, 1), key=lambda side: len(pairs[:, side].unique()))
    for some in pairs[:, few].unique().split(max(1, most // 2)):
        here = torch.isin(pairs[:, few], some).nonzero()[:, 0]
        for others in pairs[here, many].unique().split(max(1, most - len(some))):
            yield here[torch.isin(pairs[here, many], others)]


def _slopes(network: Network) -> dict[int, float]:
    """The Lipschitz constant of every nonlinear node."""
    return {k: node_lipschitz(network, k) for k in nonlinear_nodes(network)}


def product_expansion(network: Network, weights: Mapping[tuple[int, int], Block]) -> Expansion:
    """The product of norms: every nonlinear node is cut, and its radius is its Lipschitz constant.

    weights: the network's blocks W_lk.
    """
    return Expansion(network, {}, _slopes(network), weights)


def lipschitz_expansion(network: Network, budget: Budget) -> Expansion:
    """LipLT: centres are the midpoints of the activations' slope ranges. Group maps (max pooling, MaxMin) are cut."""
    centres: dict[int, Slope] = {}
    radii: dict[int, float] = {}
    for k in nonlinear_nodes(network):
        op = network.nodes[k].op
        if isinstance(op, Activation):
            low, high = op.slope_range
            middle = 0.5 * (low + high)
            centres[k], radii[k] = Slope(middle), up(max(high - middle, middle - low), 1)
        else:
            radii[k] = node_lipschitz(network, k)
    return Expansion(network, centres, radii, Blocks(network, centres, radii, budget))


def weight_blocks(network: Network, budget: Budget) -> Blocks:
    """The network's own weights W_lk between consecutive nonlinear nodes, as matrices where the budget affords it."""
    return Blocks(network, {}, _slopes(network), budget, keep=True)
