"""Loads the chosen samples of a named set, a .npz file or a folder of images.

Pixels are in [0, 1]: perturbation norms and radii are in this unit. Mean and std are not applied to the data; they
become the network's first nodes (`load.preprocessing.fit`).
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from certify_cli.data.source import MAX_PIXELS, Floats, Samples, Source
from certify_cli.errors import DataError, UsageError, quoted, shown

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("test", "train")
LAYOUTS = ("nchw", "nhwc")
DIGITS_TEST = 360
"""The last 360 of scikit-learn's 1797 digits are the test split, the first 1437 the train split."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Chosen samples in order.

    x: float32 (N, *shape), images NCHW in [0, 1].   y: int64 (N,), or None without labels.
    indices: the samples' positions in the source.   classes: names in label order, where the source has them.
    image: whether a sample is an image.   notes: sentences for the user.
    sha256: of x (float32, little-endian, row-major), then y (int64, little-endian).
    """

    name: str
    x: Tensor
    y: Tensor | None
    indices: tuple[int, ...]
    classes: tuple[str, ...] | None
    image: bool
    sha256: str
    notes: tuple[str, ...]


def load_data(
    source: str,
    *,
    root: str | Path | None = None,
    split: str = "test",
    samples: str | int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    data_layout: str = "nchw",
    resize: tuple[int, int] | None = None,
    offline: bool = False,
    notify: Callable[[str], None] | None = None,
) -> Dataset:
    """Load samples of `source`: "digits", a torchvision set's name, FILE.npz or a folder of images.

    root: folder of torchvision's sets (default: $CURVCERT_DATA, else the user's cache). A missing set is downloaded
        there, unless `offline`; `notify` receives a sentence before.
    samples: "100" (the first hundred) or "0:1000", counted after shuffling.
    data_layout: of an npz file.   resize: (height, width), for a folder.
    UsageError for an argument, DataError for the data.
    """
    if split not in SPLITS:
        raise UsageError(f"--split {quoted(split)} is not one of {', '.join(SPLITS)}")
    if data_layout not in LAYOUTS:
        raise UsageError(f"--data-layout {quoted(data_layout)} is not one of {', '.join(LAYOUTS)}")
    if resize is not None and (min(resize) < 1 or resize[0] * resize[1] > MAX_PIXELS):
        raise UsageError(
            f"--resize {resize[0]} {resize[1]} is not a height and width of at least one pixel, and of at most "
            f"{MAX_PIXELS} pixels together"
        )
    start, stop = parse_samples(samples)
    opened = _open(str(source), root, split, data_layout, resize, offline, notify)
    return select_samples(opened, start, stop, seed if shuffle else None)


def named_shape(source: str) -> tuple[int, ...] | None:
    """The shape of a sample in a set known by name, without reading it; None for files."""
    from certify_cli.data.torchvision_sets import SETS

    name = source.lower()
    if name == "digits":
        return (1, 8, 8)
    return SETS[name].shape if name in SETS else None


def parse_samples(samples: str | int | None) -> tuple[int, int | None]:
    """(start, stop) of a `--samples` text: "100", "0:1000", "500:", ":20"; stop None is the end. Raises UsageError."""
    if samples is None:
        return 0, None
    match = re.fullmatch("(?:([0-9]{0,18}):)?([0-9]{0,18})", str(samples))
    if match is None or not any(match.groups()):
        raise UsageError(f"--samples {quoted(samples)} is neither a count such as 100 nor a range such as 0:1000")
    start, stop = int(match[1] or 0), int(match[2]) if match[2] else None
    if stop is not None and stop <= start:
        raise UsageError(f"--samples {quoted(samples)} chooses no sample at all")
    return start, stop


def _open(
    source: str,
    root: str | Path | None,
    split: str,
    data_layout: str,
    resize: tuple[int, int] | None,
    offline: bool,
    notify: Callable[[str], None] | None,
) -> Source:
    from certify_cli.data import npz
    from certify_cli.data import torchvision_sets as vision

    path = Path(source)
    named = source.lower() == "digits" or source.lower() in vision.SETS
    is_folder = not named and os.path.isdir(path)
    is_file = not named and os.path.isfile(path)
    if not (named or is_folder or is_file):
        names = ", ".join(["digits", *vision.SETS])
        raise DataError(f"{source}: no such file or folder, and not a data set known by name ({names})")
    kind = "a data set known by name" if named else "a folder" if is_folder else "a file"
    if resize is not None and not is_folder:
        raise UsageError(f"--resize is for folders of images, and {source} is {kind}")
    if data_layout != "nchw" and not is_file:
        raise UsageError(f"--data-layout is for .npz files, and {source} is {kind}")
    if split != "test" and not named:
        raise UsageError(f"--split is for data sets known by name, and {source} is {kind}")
    if source.lower() == "digits":
        return _digits(split)
    if named:
        return vision.open_set(source.lower(), root, split, offline, notify)
    if is_folder:
        return vision.open_folder(path, resize)
    return npz.open_npz(path, data_layout)


def _digits(split: str) -> Source:
    table = digits_table()
    part = slice(-DIGITS_TEST, None) if split == "test" else slice(None, -DIGITS_TEST)
    images, labels = table[part, :-1].reshape(-1, 8, 8), table[part, -1].astype(np.int64)

    def take(indices: Sequence[int]) -> Samples:
        return Samples((images[list(indices), None] / 16).astype(np.float32))

    return Source("digits", len(labels), take, labels, tuple("0123456789"))


def digits_table() -> NDArray[np.float64]:
    """scikit-learn's digits, a row a sample: 64 pixels and the label."""
    found = find_spec("sklearn")
    for folder in (found.submodule_search_locations or ()) if found else ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():  # without the import, which takes a second
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    data, target = load_digits(return_X_y=True)
    return np.column_stack([data, target])


def select_samples(source: Source, start: int, stop: int | None, seed: int | None) -> Dataset:
    """Samples `start` to `stop` (None: the end) of a source, shuffled before by `seed` if given."""
    import torch

    order = list(range(source.count))
    if seed is not None:
        # keys from random(), the one stream that Python promises never to change for a given seed
        draw = random.Random(seed)
        order.sort(key=[draw.random() for _ in order].__getitem__)
    indices = tuple(order[start:stop])
    if not indices:
        raise UsageError(f"--samples starts at {start}, but {source.name} holds {source.count} samples")
    notes = list(source.notes)
    if stop is not None and stop > source.count:
        notes.append(f"{source.name} holds {source.count} samples, fewer than --samples asks for")

    taken = source.take(indices)
    notes.extend(taken.notes)
    x = np.ascontiguousarray(taken.x, dtype=np.float32)
    _refuse_non_finite(source.name, x, indices)
    if source.image and (x.min() < 0 or x.max() > 1):
        notes.append(
            f"{source.name}: pixels lie in [{x.min():.6g}, {x.max():.6g}], not in [0, 1]; radii are in the file's unit"
        )
    y = None if source.labels is None else np.ascontiguousarray(source.labels[list(indices)])
    return Dataset(
        name=source.name,
        x=torch.from_numpy(x),
        y=None if y is None else torch.from_numpy(y),
        indices=indices,
        classes=None if source.classes is None else tuple(map(shown, source.classes)),
        image=source.image,
        sha256=digest_of(x, y),
        notes=tuple(notes),
    )


def _refuse_non_finite(name: str, x: Floats, indices: Sequence[int]) -> None:
    finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    if not finite.all():
        raise DataError(f"{name}: sample {indices[int(finite.argmin())]} holds a NaN or an infinite value")


def digest_of(x: Floats, y: NDArray[np.int64] | None) -> str:
    """SHA-256 of x (float32, little-endian, row-major), then y (int64, little-endian)."""
    digest = hashlib.sha256(np.ascontiguousarray(x, dtype="<f4").data)
    if y is not None:
        digest.update(np.ascontiguousarray(y, dtype="<i8").data)
    return digest.hexdigest()
