"""Reads the files of MNIST and of sets in its format, without torchvision, which takes a second to import."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BYTES = 8
"""The type of the entries, as the format's third byte names it: unsigned bytes."""


def read_idx(folder: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]] | None:
    """Images (N, height, width) and labels (N,) of the part; None where the files are missing or not as they should be.

    folder: of the plain files, as torchvision keeps them.
    """
    part = "train" if split == "train" else "t10k"
    images, labels = _array(folder / f"{part}-images-idx3-ubyte"), _array(folder / f"{part}-labels-idx1-ubyte")
    if images is None or labels is None or images.ndim != 3 or labels.shape != images.shape[:1]:
        return None
    return images, labels.astype(np.int64)


def _array(path: Path) -> NDArray[np.uint8] | None:
    """The array of one file: two zeros, the type, the number of axes; their lengths; the entries."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if len(content) < 4 or content[:3] != bytes((0, 0, BYTES)) or len(content) < 4 + 4 * content[3]:
        return None
    start = 4 + 4 * content[3]
    shape = [int(length) for length in np.frombuffer(content[4:start], dtype=">u4")]
    entries = np.frombuffer(content, dtype=np.uint8, offset=start)
    return entries.reshape(shape) if len(entries) == int(np.prod(shape, dtype=object)) else None
