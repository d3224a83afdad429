"""What writing out a block and proving its norm costs, known before it is begun, and which blocks are worth it.

Costs are floating-point operations, as in `efforts.Budget`. A block has as many columns as its source has entries and
as many rows as its target. Unit vectors of the smaller side are carried through the nodes between the two, forward from
the source or backward from the target, and blocks of one source (or target) share these passes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from certify_cli.network.affine import AffineOp
from certify_cli.network.graph import Network
from certify_cli.network.propagate import nonlinear_nodes, pre_activation, pre_activations

Pair = tuple[int, int]
"""(target, source) of a block."""

ERRORS = 3.0
"""Multiply-adds of a pass that an entry of a value takes besides: its norm, for the error bound."""
LANCZOS = 80.0
"""Products of vectors with a Gram matrix, by multiplications an entry, that propose its largest eigenvalue."""


@dataclass(frozen=True)
class Passes:
    """The direction in which a block is written out.   forward: from the source, else from the target."""

    forward: bool
    node: int


@dataclass(frozen=True, eq=False)
class Costs:
    """Predicted operations for a network's blocks."""

    network: Network
    _until: list[float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        nodes = self.network.nodes
        each = (
            node.size * (2.0 * node.op.products + ERRORS) if isinstance(node.op, AffineOp) else node.size * ERRORS
            for node in nodes
        )
        object.__setattr__(self, "_until", list(accumulate(each)))

    def between(self, target: int, source: int) -> float:
        """One vector through the nodes behind `source`, up to `target`; branches that lead elsewhere are counted."""
        return self._until[target] - self._until[source]

    def passes(self, pair: Pair) -> Passes:
        """The cheaper direction: a unit vector of every entry of the smaller side."""
        target, source = pair
        forward = self.network.nodes[source].size <= self.network.nodes[target].size
        return Passes(forward, source if forward else target)

    def writing(self, pair: Pair) -> float:
        """All passes of one block."""
        target, source = pair
        return min(self.network.nodes[i].size for i in pair) * self.between(target, source)

    def rows(self, target: int, first: int) -> float:
        """A pass for every entry of `target`, back to node `first`."""
        return self.network.nodes[target].size * self.between(target, first)

    def entries(self, pair: Pair) -> int:
        """Entries of one block."""
        return self.network.nodes[pair[0]].size * self.network.nodes[pair[1]].size

    def cubed(self, pair: Pair) -> float:
        """min^2 max of a block's two sides, which `Budget.norm` limits."""
        small, large = sorted(self.network.nodes[i].size for i in pair)
        return small * small * float(large)

    def proving(self, pair: Pair) -> float:
        """The norm of the written block: half a Gram matrix of the smaller side, Cholesky factor and residual."""
        small = min(self.network.nodes[i].size for i in pair)
        return self.cubed(pair) + small * small * (small + LANCZOS)


def contributions(network: Network, norms: Mapping[Pair, float], radii: Mapping[int, float]) -> dict[Pair, float]:
    """What each block adds to the bound of the logits' Lipschitz constant, were its norm as given.

    radii: of the slopes at every nonlinear node (`lipschitz.Expansion`). The bound is linear in every single norm, so
    this is the most that a better one can take off. An estimate, no bound.
    """
    nodes, last = nonlinear_nodes(network), len(network.nodes) - 1
    arriving: dict[int, float] = {}
    for target in pre_activations(network):
        through = (norms.get((target, k), 0.0) * radii[k] * arriving[pre_activation(network, k)]
                   for k in nodes if k <= target)  # fmt: skip
        arriving[target] = norms.get((target, 0), 0.0) + sum(through)
    leaving = dict.fromkeys(pre_activations(network), 0.0)
    leaving[last] = 1.0
    for k in reversed(nodes):
        behind = sum(norms[t, k] * weight for t, weight in leaving.items() if (t, k) in norms)
        leaving[pre_activation(network, k)] += radii[k] * behind
    entering = {0: 1.0} | {k: radii[k] * arriving[pre_activation(network, k)] for k in nodes}
    return {(t, s): norm * entering[s] * leaving[t] for (t, s), norm in norms.items()}


def affordable(costs: Costs, candidates: Iterable[Pair], worth: Mapping[Pair, float], budget: float) -> set[Pair]:
    """The blocks to write out and prove, taken in the order of `worth` for their cost while the budget lasts."""
    spent, chosen = 0.0, set()
    price = {pair: costs.writing(pair) + costs.proving(pair) for pair in candidates}
    # products of norms that overflowed make a worth that is not a number: those come last
    gain = {pair: worth[pair] / max(cost, 1.0) if worth[pair] >= 0 else 0.0 for pair, cost in price.items()}
    for pair in sorted(price, key=lambda pair: (-gain[pair], pair)):
        if spent + price[pair] <= budget:
            spent += price[pair]
            chosen.add(pair)
    return chosen


def shared(costs: Costs, pairs: Collection[Pair], entries: int) -> dict[Pair, tuple[Passes, tuple[Pair, ...]]]:
    """By block its passes, and all blocks written out by the same: at most `entries` entries together, or one block."""
    groups: dict[Passes, list[list[Pair]]] = {}
    for pair in sorted(pairs):
        lists = groups.setdefault(costs.passes(pair), [[]])
        if sum(costs.entries(other) for other in lists[-1]) + costs.entries(pair) > entries:
            lists.append([])
        lists[-1].append(pair)
    return {pair: (passes, tuple(group)) for passes, lists in groups.items() for group in lists for pair in group}
