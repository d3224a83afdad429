"""A network's global bounds, computed once and shared by every method, batch and pair of classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.anchored import Anchored
from certify_cli.bounds.global_bounds.anchored_network import AnchoredNetwork
from certify_cli.bounds.global_bounds.curvature import Curvature
from certify_cli.bounds.global_bounds.lipschitz import Lipschitz, weight_blocks
from certify_cli.bounds.linear_maps.weight_blocks import Blocks
from certify_cli.efforts import NORMAL, Effort
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.network.graph import Network

MEMORY = 2**31
"""Bytes that the bounds of a batch may take, unless the caller states another figure."""


class PairTable:
    """A bound for each ordered pair of classes, computed when first used.

    expected: classes that will be predicted. Their pairs are computed in one batch with the first that is used: the
        rounding of a bound depends on its batch, and must not depend on the order of the samples.
    bound: from pairs (count, 2) to their bounds (count,).
    """

    def __init__(self, classes: int, expected: Tensor, bound: Callable[[Tensor], Tensor]) -> None:
        device = expected.device
        self._expected, self._bound = expected, bound
        self._value = torch.full((classes, classes), torch.nan, dtype=torch.float64, device=device)
        self._value.fill_diagonal_(0.0)

    def rows(self, predicted: Tensor) -> Tensor:
        """Bounds (batch, classes) of the margins z_y - z_i; 0 at i = y."""
        self._fill(predicted, swap=False)
        return self._value[predicted]

    def columns(self, predicted: Tensor) -> Tensor:
        """Bounds (batch, classes) of the reversed margins z_i - z_y."""
        self._fill(predicted, swap=True)
        return self._value.T[predicted]

    def _fill(self, predicted: Tensor, swap: bool) -> None:
        view = self._value.T if swap else self._value
        wanted = torch.zeros_like(self._value, dtype=torch.bool)
        wanted[predicted.unique()] = True
        if bool((wanted & view.isnan()).any()):
            wanted[self._expected] = True
        pairs = (wanted & view.isnan()).nonzero()
        if len(pairs):
            bound = self._bound(pairs.flip(1) if swap else pairs)
            # NaN marks a bound that is not computed yet; one that is NaN itself (0 times an overflow) becomes inf
            view[pairs[:, 0], pairs[:, 1]] = bound.masked_fill(bound.isnan(), torch.inf)


class ModelBounds:
    """Global bounds of one network at one effort. Each is computed when first used, and kept with the object."""

    def __init__(
        self, network: Network, effort: Effort = NORMAL, memory: int = MEMORY, expected: Tensor | None = None
    ) -> None:
        """memory: bytes for the bounds of a batch.   expected: classes that will be predicted (for `PairTable`)."""
        self.network = network
        self.effort = effort
        self.memory = memory
        self.budget = effort.budget
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
        return PairTable(self.network.classes, self.expected, self.lipschitz.of_margins)

    @cached_property
    def curvature_pairs(self) -> PairTable:
        """Upper bounds of -lambda_min of the margins' Hessians; the reversed pair's bound is that of lambda_max."""
        return PairTable(self.network.classes, self.expected, self.curvature.lower)
