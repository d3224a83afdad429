"""A network's global bounds, computed once and shared by every method, batch and pair of classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.anchored import Anchored
from certify_cli.bounds.global_bounds.anchored_network import AnchoredNetwork
from certify_cli.bounds.global_bounds.curvature import Curvature
from certify_cli.bounds.global_bounds.expansion import weight_blocks
from certify_cli.bounds.global_bounds.lipschitz import Lipschitz
from certify_cli.bounds.linear_maps.weight_blocks import Blocks
from certify_cli.efforts import MEMORY, NORMAL, Effort
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network
from certify_cli.numerics.rounding import carries_gradient

PAIR = 8
"""An estimate of the numbers that the bound of a pair keeps for each entry of the widest node."""


class PairTable:
    """A bound for each ordered pair of a predicted class and another, computed when first used.

    Only the pairs of predicted classes are held: as many numbers for each as there are classes.

    expected: classes that will be predicted. Their pairs are computed in one batch with the first that is used: the
        rounding of a bound depends on its batch, and must not depend on the order of the samples.
    bound: from pairs (count, 2) to their bounds (count,).   most: pairs that it takes at once.
    """

    def __init__(self, classes: int, expected: Tensor, bound: Callable[[Tensor], Tensor], most: int) -> None:
        self._classes, self._expected, self._bound, self._most = classes, expected, bound, most
        self._rows: dict[int, Tensor] = {}
        self._columns: dict[int, Tensor] = {}

    def rows(self, predicted: Tensor) -> Tensor:
        """Bounds (batch, classes) of the margins z_y - z_i; 0 at i = y."""
        return self._found(predicted, self._rows, self._columns)

    def columns(self, predicted: Tensor) -> Tensor:
        """Bounds (batch, classes) of the reversed margins z_i - z_y."""
        return self._found(predicted, self._columns, self._rows)

    def _found(self, predicted: Tensor, table: dict[int, Tensor], reversed_: dict[int, Tensor]) -> Tensor:
        if not table.keys() >= set(predicted.tolist()):
            every = torch.cat([predicted, self._expected]).unique()
            new = torch.stack([y for y in every if int(y) not in table])
            value = torch.full((len(new), self._classes), torch.nan, dtype=torch.float64, device=new.device)
            value.scatter_(1, new.unsqueeze(1), 0.0)
            for i, known in reversed_.items():
                value[:, i] = known[new]
            row, rival = value.isnan().nonzero().unbind(1)
            pairs = torch.stack([new[row], rival], 1)
            pairs = pairs.flip(1) if table is self._columns else pairs
            bounds = [self._bound(part) for part in pairs.split(self._most)]
            value[row, rival] = (
                torch.cat(bounds).nan_to_num(nan=torch.inf, posinf=torch.inf) if bounds else value[:0, 0]
            )
            table.update(zip(new.tolist(), value, strict=True))
        return torch.stack([table[y] for y in predicted.tolist()])


class ModelBounds:
    """Global bounds of one network at one effort. Each is computed when first used, and kept with the object."""

    def __init__(
        self, network: Network, effort: Effort = NORMAL, memory: int = MEMORY, expected: Tensor | None = None
    ) -> None:
        """memory: bytes for the bounds of a batch.   expected: classes that will be predicted (for `PairTable`).

        Raises ValueError for weights that carry a gradient: their figures would be estimates, not rounded.
        """
        if carries_gradient(*network.constants):
            raise ValueError("weights that carry a gradient are for training; nothing is claimed of them")
        self.network = network
        self.effort = effort
        self.memory = memory
        self.budget = replace(effort.budget, memory=memory)
        none = torch.zeros(0, dtype=torch.long, device=network.device)
        self.expected = none if expected is None else expected.unique()

    @cached_property
    def weights(self) -> Blocks:
        """The network's blocks W_lk."""
        return weight_blocks(self.network, self.budget)

    @cached_property
    def lipschitz(self) -> Lipschitz:
        return Lipschitz.of(self.network, self.weights, self.budget)

    @cached_property
    def curvature(self) -> Curvature:
        return Curvature(self.network, self.weights, self.lipschitz, self.budget)

    @cached_property
    def anchored_network(self) -> AnchoredNetwork:
        """The network's part of the anchored bounds; every nonlinear node must have a bounded second derivative."""
        return AnchoredNetwork(self.network, self.weights, self.lipschitz, self.budget)

    def anchored_at(self, samples: EvaluatedPoints) -> Anchored:
        """Bounds around the samples; every nonlinear node must have a bounded second derivative."""
        return Anchored(self.anchored_network, samples)

    @cached_property
    def lipschitz_pairs(self) -> PairTable:
        """Upper bounds of the margins' Lipschitz constants."""
        return self._pairs(self.lipschitz.of_margins)

    @cached_property
    def curvature_pairs(self) -> PairTable:
        """Upper bounds of -lambda_min of the margins' Hessians; the reversed pair's bound is that of lambda_max."""
        return self._pairs(self.curvature.lower)

    def _pairs(self, bound: Callable[[Tensor], Tensor]) -> PairTable:
        widest = max(node.size for node in self.network.nodes)
        return PairTable(self.network.classes, self.expected, bound, max(1, self.memory // (8 * PAIR * widest)))
