"""Certificates of a batch: what every method returns, and how two of them are combined."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify_cli.numerics.trees import Batched


@dataclass(frozen=True, eq=False)
class Certificates(Batched):
    """One row a sample (batch,). NaN stands for "this method has none".

    `radius` is certified for the prediction: rounded down, 0 where nothing is certified, inf where nothing can flip
    it. `rival` is the class that decides it, and `gradient`, `curvature_lower`, `curvature_upper` and `lipschitz`
    (upper bounds) belong to the margin towards it. `attack` is the distance, rounded up, from the sample to the row of
    `witness` (batch, *input shape), whose replay changed the prediction; NaN and the sample itself where there is none.
    `near` (batch, *input shape) is where the tangent that gave the radius was taken (the sample itself if none was): a
    search for attacks starts there.
    """

    radius: Tensor
    rival: Tensor
    gradient: Tensor
    curvature_lower: Tensor
    curvature_upper: Tensor
    lipschitz: Tensor
    attack: Tensor
    witness: Tensor
    near: Tensor
    method: Tensor
    """Index of the method that gave the radius, in the order of the table of methods."""

    def best_of(self, other: Certificates) -> Certificates:
        """The larger certified radius and the smaller attack, sample by sample; ties go to self."""
        best = self.where(other.radius > self.radius, other)
        nearest = self.where(other.attack < torch.nan_to_num(self.attack, nan=torch.inf), other)
        return replace(best, attack=nearest.attack, witness=nearest.witness)
