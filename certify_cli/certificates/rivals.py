"""Which rivals a ball has still to be proved for: only these cost a row that is pulled back.

A proof that the margin towards a rival stays positive on a ball holds on every smaller ball around the same sample,
whatever bound gave it. So each rival keeps the largest ball that it is proved on, first that of the global Lipschitz
constant, and is asked for on larger ones alone. On a ball, the logits' own ranges settle most rivals of many: with D_i
the change of logit i,

    margin_i(x + d) = margin_i(x) + D_y - D_i >= margin_i(x) - (high D_i - low D_y) .

A ball is proved once every rival is, each by any of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from certify_cli.bounds.global_bounds.model_bounds import ModelBounds
from certify_cli.bounds.on_ball.affine_loss import AffineLoss
from certify_cli.bounds.on_ball.interval_ranges import Ranges
from certify_cli.certificates.closed_form import lipschitz_radius
from certify_cli.network.evaluated import EvaluatedPoints
from certify_cli.numerics.rounding import difference_down, up

ROW = 8
"""An estimate of the numbers that are held at once for each entry of a row that is pulled back."""


@dataclass(frozen=True, eq=False)
class Rivals:
    """Some rivals of each sample; classes: (batch, count), one of them repeated where a sample has fewer."""

    classes: Tensor

    @classmethod
    def of(cls, asked: Tensor) -> Rivals:
        """Those that a mask (batch, classes) names, in ascending order, and at least one of each sample."""
        count = int(asked.sum(1).max())
        order = (~asked).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
        return cls(torch.where(asked.gather(1, order), order, order[:, :1]))

    @property
    def repeated(self) -> Tensor:
        """Mask (batch, count): entries that repeat the first one."""
        same = self.classes == self.classes[:, :1]
        return torch.cat([torch.zeros_like(same[:, :1]), same[:, 1:]], dim=1)

    def of_table(self, table: Tensor) -> Tensor:
        """The entries (batch, count) of a table (batch, classes)."""
        return table.gather(1, self.classes)

    def largest_in(self, table: Tensor, values: Tensor) -> Tensor:
        """A table (batch, classes) with the larger of its own entries and of the rivals' `values` (batch, count)."""
        return table.scatter_reduce(1, self.classes, values, "amax")

    def cotangents(self, point: EvaluatedPoints) -> Tensor:
        """The margins as linear forms in the logits: (batch, count, classes)."""
        rows = torch.zeros(*self.classes.shape, point.network.classes, dtype=point.x.dtype, device=point.x.device)
        own = point.prediction.reshape(-1, 1, 1).expand(-1, rows.shape[1], 1)
        rows.scatter_(2, own, 1.0)
        return rows.scatter_add_(2, self.classes.unsqueeze(2), -torch.ones_like(rows[..., :1]))

    def parts(self, most: int) -> Iterator[Rivals]:
        """The same in order, at most so many of a sample at a time."""
        return (Rivals(part) for part in self.classes.split(most, dim=1))


Losses = Callable[[Rivals], AffineLoss]
"""Rivals (batch, count) -> upper bounds (batch, count) of their margins' losses on the samples' balls."""


def rows_at_once(model_bounds: ModelBounds, batch: int) -> int:
    """How many rows of every sample may be pulled back at once within half of the memory."""
    network = model_bounds.network
    row = 8 * batch * (ROW * max(node.size for node in network.nodes) + 2 * network.classes)
    return max(1, model_bounds.memory // (2 * row))


def losses_in_parts(losses: Losses, rivals: Rivals, most: int) -> AffineLoss:
    """The losses of all rivals, (batch, count), of at most so many at a time."""
    found = [losses(part) for part in rivals.parts(most)]
    return AffineLoss(torch.cat([loss.rate for loss in found], 1), torch.cat([loss.constant for loss in found], 1))


def settled_by_ranges(point: EvaluatedPoints, ranges: Ranges) -> Tensor:
    """Mask (batch, classes) of the rivals that the ranges of the logits alone keep below the prediction."""
    last = len(point.network.nodes) - 1
    lowest = ranges.low[last].gather(1, point.prediction.unsqueeze(1))
    return difference_down(point.margin_low, up(ranges.high[last] - lowest, 1)) > 0


class ProvedRivals:
    """By sample and rival the largest ball on which the rival is proved to stay below the prediction.

    radius: (samples, classes), >= 0, inf at the prediction; updated in place.
    """

    def __init__(self, model_bounds: ModelBounds, point: EvaluatedPoints) -> None:
        """Begins with what the global Lipschitz constants prove."""
        lipschitz = model_bounds.lipschitz_pairs.rows(point.prediction)
        self.radius = lipschitz_radius(point.margin_low, lipschitz).masked_fill(point.own, torch.inf)

    def unproved(self, index: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Mask (count, classes): rivals not proved on balls of `radius` (count,) around the samples `index` (count,).

        And the rival (count,) with the smallest proof, which is in the mask in any case: its loss says how far the ball
        can grow.
        """
        known = self.radius[index]
        nearest = known.argmin(1)
        return ~(known >= radius.unsqueeze(1)) | torch.nn.functional.one_hot(nearest, known.shape[1]).bool(), nearest

    def enter(self, index: Tensor, radius: Tensor) -> Tensor:
        """Enter proofs on balls of `radius` (count, classes), 0 or NaN where there is none, around `index` (count,).

        Returns the largest balls of every rival that are proved by now, (count, classes).
        """
        self.radius[index] = known = torch.fmax(self.radius[index], radius)
        return known
