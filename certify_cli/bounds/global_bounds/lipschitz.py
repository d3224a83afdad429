"""Global Lipschitz constants of a network: the smallest of what its expansions and its residual blocks prove."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.chain import Chain
from certify_cli.bounds.global_bounds.expansion import (
    Expansion,
    lipschitz_expansion,
    node_lipschitz,
    product_expansion,
)
from certify_cli.bounds.linear_maps.weight_blocks import Block
from certify_cli.efforts import Budget
from certify_cli.network.graph import Network
from certify_cli.network.propagate import pre_activation, vjp_cost
from certify_cli.numerics.rounding import number, up


@dataclass(frozen=True, eq=False)
class Lipschitz:
    """Global Lipschitz constants of a network, rounded up: the smallest of the product of norms, LipLT and the chain.

    chain: of the parts between the network's residual blocks, where some of these are recognised.
    """

    network: Network
    expansions: tuple[Expansion, ...]
    chain: Chain | None = None

    @classmethod
    def of(cls, network: Network, weights: Mapping[tuple[int, int], Block], budget: Budget) -> Lipschitz:
        """LipLT is left out where the derivatives of all logits, which every margin takes, are beyond the budget."""
        expansions = [product_expansion(network, weights)]
        if network.classes * vjp_cost(network, len(network.nodes) - 1) <= budget.blocks:
            expansions.append(lipschitz_expansion(network, budget))
        return cls(network, tuple(expansions), Chain.of(network, budget))

    def to_pre_activation(self, target: int) -> float:
        """Lipschitz constant of input -> pre-activation (or logits) `target`."""
        by_chain = [] if self.chain is None else [self.chain.to_node(target)]
        return min([e.change(target, 0) for e in self.expansions] + by_chain)

    def to_output(self, source: int) -> float:
        """Lipschitz constant of input -> value of `source` (a nonlinear node, or 0: the input itself)."""
        return (
            1.0
            if source == 0
            else up(node_lipschitz(self.network, source) * self.to_pre_activation(pre_activation(self.network, source)))
        )

    def rows(self, target: int) -> float:
        """Lipschitz constant of input -> any one unit of pre-activation `target`."""
        by_chain = [] if self.chain is None else [self.chain.longest_row(target)]
        by_rows = [number(e.rows(target).max()) for e in self.expansions]
        return min([*by_rows, self.to_pre_activation(target), *by_chain])

    def sensitivity(self, source: int, pairs: Tensor) -> Tensor:
        """Lipschitz constants (count,) of margins z_a - z_b as functions of `source` (0: the input)."""
        found = [e.sensitivity(source, pairs) for e in self.expansions]
        if self.chain is not None:
            found.append(self.chain.sensitivity(source, pairs))
        return torch.stack(found).amin(0)

    def of_margins(self, pairs: Tensor) -> Tensor:
        """Lipschitz constants (count,), up, of margins z_a - z_b of pairs (count, 2) of classes."""
        return self.sensitivity(0, pairs)
