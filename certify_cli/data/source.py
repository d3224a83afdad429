"""Samples before any of them is chosen: what each kind of data set gives to `data.load_data`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certify_cli.errors import DataError

CHANNELS = (1, 3, 4)
"""How many channels an image has: grey, RGB, RGBA."""

MAX_PIXELS = 2**24
"""Of one image: one that unpacks to more is refused unread."""
MAX_BYTES = 16 * 2**30
"""Of the chosen samples together as float32, and of one array of a file: more is refused unread."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Samples:
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
    take: Callable[[Sequence[int]], Samples]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...] | None = None
    image: bool = True
    notes: tuple[str, ...] = ()


def refuse_many(values: int) -> None:
    """DataError where so many float32 values are too many to be held."""
    if 4 * values > MAX_BYTES:
        raise DataError(f"the chosen samples would take {4 * values} bytes, the limit is {MAX_BYTES}; say --samples")


def unit_range(values: NDArray[Any]) -> Floats:
    """Float32 samples: integers divided by 255 in float32, floats (and truth values) as they are.

    DataError where they would take too much memory.
    """
    refuse_many(values.size)
    floats = values.astype(np.float32)
    return floats / np.float32(255) if values.dtype.kind in "iu" else floats
