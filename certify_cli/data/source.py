"""Data sets before samples are chosen: the common form of every kind of source, read by `datasets.load_data`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certify_cli.errors import DataError

CHANNELS = (1, 3, 4)
"""Numbers of channels of an image: grey, RGB, RGBA."""

MAX_PIXELS = 2**24
"""Largest number of pixels of one image, checked before it is unpacked."""
MAX_BYTES = 16 * 2**30
"""Largest size of all chosen samples as float32, and of one array of a file, checked before reading."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Samples:
    """The chosen samples.   x: float32 (n, *shape), images NCHW.   notes: sentences for the user."""

    x: Floats
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Source:
    """A data set of `count` samples, of which only the chosen ones are converted.

    take: maps positions to samples.   labels: int64 (count,) or None.   classes: names in label order.
    """

    name: str
    count: int
    take: Callable[[Sequence[int]], Samples]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...] | None = None
    image: bool = True
    notes: tuple[str, ...] = ()


def refuse_many(values: int) -> None:
    """DataError where so many float32 values exceed MAX_BYTES."""
    if 4 * values > MAX_BYTES:
        raise DataError(f"the chosen samples would take {4 * values} bytes, the limit is {MAX_BYTES}; say --samples")


def unit_range(values: NDArray[Any]) -> Floats:
    """Float32 samples: integers divided by 255 in float32, floats and truth values unchanged.

    DataError where they would take too much memory.
    """
    refuse_many(values.size)
    floats = values.astype(np.float32)
    return floats / np.float32(255) if values.dtype.kind in "iu" else floats
