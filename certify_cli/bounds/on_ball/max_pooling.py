"""Linear bounds of group maps (max pooling, MaxMin) on boxes (theory section 7).

They are for group maps what `relaxation.backward.LinearRelaxation` is for activations.

For x in a box [l, u] and any weights in [0, 1],

    max_j x_j <= sum_i lam_i x_i + max_j ( (1 - lam_j) u_j + lam_j l_j ) - sum_i lam_i l_i ,

as x_j - sum lam_i x_i is largest at u_j and the other l_i; and max_j x_j >= x_w for the sample's winner w, the member
that is the largest at the sample. A minimum is minus the maximum of the negated members.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.network.graph import Shape
from certify_cli.network.linear_forms import Forms, WholeForms
from certify_cli.network.pooling import GroupMap, Groups
from certify_cli.network.propagate import Vectors
from certify_cli.numerics.rounding import UNDERFLOW, UNIT, gamma, up


def offset_loss(forms: Forms, below: Tensor, above: Tensor) -> Tensor:
    """Upper bounds (batch, rows) of -<v, q> for linear relaxations: v times the constant below, or -v times that above.

    forms: v, at the node's output.   below, above: (batch, *shape), the relaxations' constants, >= 0.
    NaN (0 times infinity) gives inf.

    The sum is |v| (below + above) / 2 + v (below - above) / 2, whose rounding is in proportion to the first part.
    """
    even = forms.dot(forms.magnitudes, 0.5 * (below + above))
    odd = forms.dot(forms.values, 0.5 * (below - above))
    total = (even + odd).clamp(min=0.0) + gamma(2 * forms.count + 8) * even
    return (up(total, 3) + UNDERFLOW).nan_to_num(nan=torch.inf, posinf=torch.inf)


@dataclass(frozen=True, eq=False)
class Side:
    """Linear bounds of groups' maxima: the winner from below, a weighted sum of the members from above.

    winner: (batch, channels, groups, members), 1 at the sample's winner, else 0.
    weights: (batch, channels, groups, members), of the sum above.
    decided: (batch, channels, groups), where no other member can win on the box: there the maximum is the winner.
    contending: (batch, channels, groups, members), those of other groups that can win: narrower ranges of the rest
        would leave these two bounds as they are.
    below, above: (batch, channels, groups), constants of the two bounds, >= 0, up.
    """

    winner: Tensor
    weights: Tensor
    decided: Tensor
    contending: Tensor
    below: Tensor
    above: Tensor

    @classmethod
    def of(cls, members: Tensor, z: Tensor, error: Tensor, low: Tensor, high: Tensor) -> Side:
        """Of values z (batch, channels, entries) within `error` of the exact ones, whose offsets are in [low, high].

        members: (groups, members), indices of entries, -1 for none.
        """
        padding = members < 0

        def gathered(t: Tensor, pad: float) -> Tensor:
            return t[:, :, members.clamp(min=0)].masked_fill(padding, pad)

        values, off = gathered(z, -torch.inf), gathered(error, 0.0)
        lo, hi = gathered(low, 0.0), gathered(high, 0.0)
        off = up(off + 4 * UNIT * (values.abs().nan_to_num(posinf=0.0) + off - lo + hi), 4)  # and the sums below
        best, argmax = values.max(3)
        top, bottom = values + hi, values + lo
        level = bottom.amax(3, keepdim=True)
        contending = top + off >= level
        if top.shape[3] > 2:  # at most two members are above the level
            level = torch.maximum(level, top.topk(3, dim=3).values[..., 2:])
        weights = ((top - level) / (top - bottom)).nan_to_num(nan=1.0).clamp(min=0.0, max=1.0)
        weights = torch.where(top > level, weights, torch.zeros_like(weights))
        own = torch.nn.functional.one_hot(argmax, values.shape[3]).bool()
        winner, others = own.to(weights.dtype), (top + off).masked_fill(own, -torch.inf)
        decided = others.amax(3, keepdim=True) <= (bottom - off).gather(3, argmax.unsqueeze(3))
        weights = torch.where(decided, winner, weights)
        slack = 4 * off.amax(3) + 4 * (values.shape[3] + 4) * UNIT * (weights * -lo).sum(3)
        above = (values + ((1 - weights) * hi + weights * lo)).amax(3) - best - (weights * lo).sum(3)
        constants = up(slack, 4), up(above.clamp(min=0.0) + slack, 4)
        return cls(winner, weights, decided[..., 0], contending & ~decided, *constants)

    def relaxation(self, v: Tensor) -> Tensor:
        """v through the bound that its sign selects: (batch, rows, channels, groups) -> (..., members)."""
        v = v.unsqueeze(4)
        return v * torch.where(v < 0, self.weights.unsqueeze(1), self.winner.unsqueeze(1))

    def winners(self, v: Tensor) -> Tensor:
        """v at the winners of decided groups, 0 elsewhere: (batch, rows, channels, groups) -> (..., members)."""
        return (v * self.decided.unsqueeze(1)).unsqueeze(4) * self.winner.unsqueeze(1)


@dataclass(frozen=True, eq=False)
class MaxPoolRelaxation:
    """A linear relaxation of a group map on values of `shape`.

    groups: of the map, on the values' device.   lipschitz: the map's Lipschitz constant.
    sides: the bounds of the groups of each sign; of the negated values for minima.
    """

    shape: Shape
    groups: Groups
    lipschitz: float
    sides: tuple[Side, ...]

    @classmethod
    def of(cls, op: GroupMap, shape: Shape, z: Tensor, error: Tensor, low: Tensor, high: Tensor) -> MaxPoolRelaxation:
        """On pre-activations z (batch, ...) within `error` of the exact ones, whose offsets are in [low, high]."""
        on_cpu = op.groups(shape)
        groups = Groups(on_cpu.channels, on_cpu.members.to(z.device), on_cpu.signs)
        z, error, low, high = (t.reshape(len(z), groups.channels, -1) for t in (z, error, low, high))
        sides = {1: (z, low, high), -1: (-z, -high, -low)}
        parts = [
            Side.of(groups.members, values, error, lower, upper)
            for values, lower, upper in (sides[sign] for sign in groups.signs)
        ]
        return cls(shape, groups, op.lipschitz_constant(shape), tuple(parts))

    def _parts(self, v: Tensor) -> tuple[Tensor, ...]:
        """The rows (batch, rows, *shape of the output) by side, (batch, rows, channels, groups) each."""
        return v.reshape(*v.shape[:2], len(self.sides), self.groups.channels, -1).unbind(2)

    @property
    def undecided(self) -> Tensor:
        """(batch, size): whether another entry than the sample's winner can be the output."""
        return torch.stack([~side.decided for side in self.sides], dim=1).flatten(1)

    @property
    def contending(self) -> Tensor:
        """(batch, size of the input): whether a narrower range of this entry could change the two bounds of a side."""
        masks = [side.contending.to(side.winner.dtype) for side in self.sides]
        return (self._scattered(masks) > 0).flatten(1)

    def back(self, forms: Forms) -> WholeForms:
        """The forms in the input of the map made linear by the bounds that their signs select, as computed."""
        return WholeForms(self.pulled(forms.whole().values, Side.relaxation))

    def rounding(self, size: Tensor) -> Tensor:
        """Upper bounds of the Euclidean rounding errors of `pulled`, for rows of norm `size`."""
        return up(self._norm * gamma(self._terms) * size, 4) + UNDERFLOW

    @property
    def _norm(self) -> float:
        """Of the map made linear, up."""
        # a group's weights add up to at most its members, and lipschitz^2 bounds the groups that have an entry
        members = self.groups.members.shape[1] * len(self.sides)
        return up(members**0.5 * max(1.0, self.lipschitz), 3)

    @property
    def _terms(self) -> int:
        return len(self.sides) * int(max(1.0, self.lipschitz) ** 2) + 4

    def pulled(self, v: Tensor, through: Callable[[Side, Tensor], Tensor]) -> Tensor:
        """Rows v (batch or 1, rows, *shape of the output) in the input, by the rule `through` of each side."""
        parts = zip(self.groups.signs, self.sides, self._parts(v), strict=True)
        image = self._scattered([sign * through(side, sign * part) for sign, side, part in parts])
        return image.reshape(*image.shape[:2], *self.shape)

    def _scattered(self, parts: Sequence[Tensor]) -> Tensor:
        """Figures (..., channels, groups, members) of each side, added up by entry: (..., channels, entries)."""
        entries = torch.Size(self.shape).numel() // self.groups.channels
        # the last entry collects the padding
        image = parts[0].new_zeros(*parts[0].shape[:-2], entries + 1)
        for part in parts:
            image.index_add_(-1, self.groups.members.reshape(-1) % (entries + 1), part.flatten(-2))
        return image[..., :-1]

    def loss(self, forms: Forms) -> Tensor:
        """Upper bounds (batch, rows) of -<v, q>; see `relaxation.backward.Relaxation`."""
        parts = zip(self.groups.signs, self.sides, self._parts(forms.whole().values), strict=True)
        losses = [offset_loss(WholeForms(sign * part), side.below, side.above) for sign, side, part in parts]
        return up(torch.stack(losses).sum(0), len(self.sides))


@dataclass(frozen=True, eq=False)
class DecidedGroups:
    """The part of a group map that is linear on the box: winners of decided groups. Undecided groups are cut.

    shape: of the map's output.
    """

    relaxation: MaxPoolRelaxation
    shape: Shape

    def back(self, vectors: Vectors) -> Vectors:
        image = self.relaxation.pulled(vectors.value, Side.winners)
        error = up(self.relaxation._norm * vectors.error + self.relaxation.rounding(vectors.size), 4)
        return Vectors(image, error.expand(image.shape[:2]))

    def push(self, vectors: Vectors) -> Vectors:
        """The transpose of `back`: (batch, *shape of the input) to (batch, *shape of the output)."""
        relaxation = self.relaxation
        entries = vectors.value.reshape(len(vectors.value), relaxation.groups.channels, -1)
        members = entries[:, :, relaxation.groups.members.clamp(min=0)]
        image = torch.stack([(members * side.winner).sum(3) * side.decided for side in relaxation.sides], dim=1)
        error = up(relaxation._norm * vectors.error + relaxation.rounding(vectors.size), 4)
        return Vectors(image.reshape(-1, *self.shape), error)
