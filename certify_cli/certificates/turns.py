"""Which rivals to spend on: only one that is a sample's weakest can matter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from certify_cli.network.evaluated import Point


def weakest_in_turn(point: Point, radius: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples and rivals (count,) each: every sample's weakest rival, until it has had its turn.

    radius (batch, classes) is read anew each time: whoever is given a turn raises it in place. What results is the
    least radius over all rivals, at the price of few. Radii that are 0 or infinite end a sample's turns.
    """
    treated = point.own.clone()
    every = torch.arange(len(radius), device=radius.device)
    for _ in range(point.network.classes - 1):
        weakest = radius.masked_fill(point.own, torch.inf).argmin(1)
        found = radius[every, weakest]
        todo = (~treated[every, weakest] & (found > 0) & found.isfinite()).nonzero().squeeze(1)
        if not len(todo):
            return
        rival = weakest[todo]
        treated[todo, rival] = True
        yield todo, rival
