"""Samples before any of them is chosen: what each kind of data set gives to `data.load_data`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHANNELS = (1, 3, 4)
"""How many channels an image has: grey, RGB, RGBA."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Taken:
    """The chosen samples: `x` float32 (n, *shape), images NCHW; `notes` are sentences for the user."""

    x: Floats
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Source:
    """A data set of `count` samples that converts only those that are asked for.

    `take` maps positions to samples; `labels` is int64 (count,) or None; `classes` are names in label order.
    """

    name: str
    count: int
    take: Callable[[Sequence[int]], Taken]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...] | None = None
    image: bool = True
    notes: tuple[str, ...] = ()


def unit_range(values: NDArray[Any]) -> Floats:
    """Float32 samples: integers divided by 255 in float32, floats (and truth values) as they are."""
    floats = values.astype(np.float32)
    return floats / np.float32(255) if values.dtype.kind in "iu" else floats
