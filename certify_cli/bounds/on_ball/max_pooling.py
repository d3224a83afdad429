"""Group maps between planes on boxes: what `relaxation.LinearRelaxation` are for activations (theory section 7).

For x in a box [l, u] and any weights in [0, 1],

    max_j x_j <= sum_i lam_i x_i + max_j ( (1 - lam_j) u_j + lam_j l_j ) - sum_i lam_i l_i ,

as x_j - sum lam_i x_i is largest at u_j and the other l_i; and max_j x_j >= x_w for the sample's winner w. A smallest
member is minus the largest of what is negated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.network.graph import Shape
from certify_cli.network.pooling import GroupMap, Groups
from certify_cli.network.propagate import Vectors
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, gamma, up, vector_norm_up


def offset_loss(vectors: Vectors, below: Tensor, above: Tensor, far: Tensor) -> Tensor:
    """sum of v below where v >= 0 and of -v above elsewhere, and what the vectors' own error adds: (batch, rows).

    below, above (batch, size): constants >= 0 of the lines or planes. far (batch,). inf for NaN (0 times infinity).
    As |v| (below + above) / 2 + v (below - above) / 2, whose rounding is in proportion to the first part.
    """
    v, size = vectors.value.flatten(2), vectors.magnitudes.flatten(2)
    even = (size @ (0.5 * (below + above)).unsqueeze(2)).squeeze(2)
    odd = (v @ (0.5 * (below - above)).unsqueeze(2)).squeeze(2)
    apart = (even + odd).clamp(min=0.0) + gamma(2 * v.shape[2] + 8) * even
    return (up(apart, 3) + up(vectors.error * far.unsqueeze(1)) + UNDERFLOW).nan_to_num(nan=torch.inf, posinf=torch.inf)


@dataclass(frozen=True, eq=False)
class Side:
    """The largest members: below is the winner, above a weighted sum.

    winner (batch, lanes, groups, members): 1 at the sample's winner, else 0; weights, likewise, of the plane above; the
    planes' constants `below`, `above` and `reach`, at least |q| for either plane, (batch, lanes, groups); `decided`,
    likewise, where no other member can win: there the group is its winner, exactly.
    """

    winner: Tensor
    weights: Tensor
    decided: Tensor
    below: Tensor
    above: Tensor
    reach: Tensor

    @classmethod
    def of(cls, members: Tensor, z: Tensor, error: Tensor, low: Tensor, high: Tensor) -> Side:
        """All (batch, lanes, entries): z within `error` of the exact values, whose offsets are in [low, high]."""
        padding = members < 0

        def gathered(t: Tensor, pad: float) -> Tensor:
            return t[:, :, members.clamp(min=0)].masked_fill(padding, pad)

        values, off = gathered(z, -torch.inf), gathered(error, 0.0)
        lo, hi = gathered(low, 0.0), gathered(high, 0.0)
        off = up(off + 4 * UNIT * (values.abs().nan_to_num(posinf=0.0) + off - lo + hi), 4)  # and the sums below
        best, place = values.max(3)
        top, bottom = values + hi, values + lo
        level = bottom.amax(3, keepdim=True)
        if top.shape[3] > 2:  # two members at most are above the level
            level = torch.maximum(level, top.topk(3, dim=3).values[..., 2:])
        weights = ((top - level) / (top - bottom)).nan_to_num(nan=1.0).clamp(min=0.0, max=1.0)
        weights = torch.where(top > level, weights, torch.zeros_like(weights))
        own = torch.nn.functional.one_hot(place, values.shape[3]).bool()
        winner, others = own.to(weights.dtype), (top + off).masked_fill(own, -torch.inf)
        decided = others.amax(3, keepdim=True) <= (bottom - off).gather(3, place.unsqueeze(3))
        weights = torch.where(decided, winner, weights)
        slack = 4 * off.amax(3) + 4 * (values.shape[3] + 4) * UNIT * (weights * -lo).sum(3)
        above = (values + ((1 - weights) * hi + weights * lo)).amax(3) - best - (weights * lo).sum(3)
        reach = up(2 * torch.maximum(-lo, hi).sum(3), values.shape[3] + 1)
        return cls(winner, weights, decided[..., 0], up(slack, 4), up(above.clamp(min=0.0) + slack, 4), reach)

    def relaxation(self, v: Tensor) -> Tensor:
        """(batch, rows, lanes, groups) to (batch, rows, lanes, groups, members)."""
        v = v.unsqueeze(4)
        return v * torch.where(v < 0, self.weights.unsqueeze(1), self.winner.unsqueeze(1))

    def winners(self, v: Tensor) -> Tensor:
        """Likewise, where the group is decided; nothing elsewhere."""
        return (v * self.decided.unsqueeze(1)).unsqueeze(4) * self.winner.unsqueeze(1)


@dataclass(frozen=True, eq=False)
class MaxPoolRelaxation:
    """A group map on values of `shape`: a `Side` for each of its signs."""

    shape: Shape
    groups: Groups
    gain: float
    sides: tuple[Side, ...]

    @classmethod
    def of(cls, op: GroupMap, shape: Shape, z: Tensor, error: Tensor, low: Tensor, high: Tensor) -> MaxPoolRelaxation:
        """Pre-activations z (batch, ...) within `error` of the exact ones, whose offsets are in [low, high]."""
        found = op.groups(shape)
        groups = Groups(found.channels, found.members.to(z.device), found.signs)
        z, error, low, high = (t.reshape(len(z), groups.channels, -1) for t in (z, error, low, high))
        sides = {1: (z, low, high), -1: (-z, -high, -low)}
        parts = [
            Side.of(groups.members, values, error, least, most)
            for values, least, most in (sides[sign] for sign in groups.signs)
        ]
        return cls(shape, groups, op.lipschitz_constant(shape), tuple(parts))

    def _parts(self, v: Tensor) -> tuple[Tensor, ...]:
        """The rows (batch, rows, *shape of the output) side by side, (batch, rows, lanes, groups) each."""
        return v.reshape(*v.shape[:2], len(self.sides), self.groups.channels, -1).unbind(2)

    @property
    def open(self) -> Tensor:
        """Which outputs are not decided, (batch, size)."""
        return torch.stack([~side.decided for side in self.sides], dim=1).flatten(1)

    def back(self, vectors: Vectors) -> Vectors:
        return self._sent(vectors, Side.relaxation)

    def _sent(self, vectors: Vectors, through: Callable[[Side, Tensor], Tensor]) -> Vectors:
        members, lanes = self.groups.members, self.groups.channels
        entries = torch.Size(self.shape).numel() // lanes
        v = vectors.value
        image = v.new_zeros(len(self.sides[0].winner), v.shape[1], lanes, entries + 1)  # the last one takes the padding
        for sign, side, part in zip(self.groups.signs, self.sides, self._parts(v), strict=True):
            passed = sign * through(side, sign * part)
            image.index_add_(3, members.reshape(-1) % (entries + 1), passed.flatten(3))
        # a group's weights add up to at most its members, and gain^2 bounds the groups that hold an entry
        norm = up((members.shape[1] * len(self.sides)) ** 0.5 * max(1.0, self.gain), 3)
        terms = len(self.sides) * int(max(1.0, self.gain) ** 2) + 4
        error = up(norm * (vectors.error + gamma(terms) * vectors.size), 4) + UNDERFLOW
        return Vectors(image[..., :-1].reshape(*image.shape[:2], *self.shape), error.expand(image.shape[:2]))

    def loss(self, vectors: Vectors) -> Tensor:
        """Upper bounds (batch, rows) of -<v, q>; see `relaxation.Relaxation`."""
        total = torch.zeros_like(vectors.error)
        for sign, side, part in zip(self.groups.signs, self.sides, self._parts(vectors.value), strict=True):
            rows = Vectors(sign * part, vectors.error)
            total = total + offset_loss(
                rows, side.below.flatten(1), side.above.flatten(1), vector_norm_up(side.reach.flatten(1))
            )
        return up(total, len(self.sides))


@dataclass(frozen=True, eq=False)
class DecidedGroups:
    """What a group map is for certain: the decided groups' winners; open groups are cut."""

    relaxation: MaxPoolRelaxation

    def back(self, vectors: Vectors) -> Vectors:
        return self.relaxation._sent(vectors, Side.winners)
