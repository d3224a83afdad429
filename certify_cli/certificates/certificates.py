"""Certificates of a batch: the result of every method, and how two results are combined."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify_cli.numerics.trees import Batched


@dataclass(frozen=True, eq=False)
class Certificates(Batched):
    """Certified radii and attacks, one row per sample, (batch,) unless stated; NaN where the method has no figure.

    radius: certified for the prediction; rounded down, 0 where nothing is certified, inf where no rival can win.
    rival: the class that decides the radius.
    gradient, curvature_lower, curvature_upper, lipschitz: upper bounds for the margin towards the rival: of the
    gradient's norm, of -lambda_min and lambda_max of the Hessian, and of the Lipschitz constant.
    attack: distance, rounded up, from the sample to its witness; NaN where there is none.
    witness (batch, *input shape): a point whose replay changed the prediction; the sample where there is none.
    near (batch, *input shape): where the tangent that gave the radius was taken, the sample unless at a further point.
    A search for attacks starts there, because such points lie close to the decision boundary.
    method: index of the method that gave the radius, in the table of methods.
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

    def best_of(self, other: Certificates) -> Certificates:
        """Per sample the larger certified radius and the smaller attack; on a tie those of self."""
        best = self.where(other.radius > self.radius, other)
        nearest = self.where(other.attack < torch.nan_to_num(self.attack, nan=torch.inf), other)
        return replace(best, attack=nearest.attack, witness=nearest.witness)
