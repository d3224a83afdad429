"""Reads torchvision's data sets by name, and folders of images through its ImageFolder.

torchvision is imported for what its files alone do not give: downloads, other formats than MNIST's, folders.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certify_cli.data.idx import read_idx
from certify_cli.data.source import MAX_PIXELS, Samples, Source, refuse_many, unit_range
from certify_cli.errors import DataError, first_line

DIGIT_NAMES = tuple("0123456789")
GARMENTS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
HIRAGANA = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
IMAGES = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""Formats of image files that are read, whatever their names: for some others Pillow would run other programs."""
GREY, COLOUR = (1, 28, 28), (3, 32, 32)

_DAMAGED = (OSError, ValueError, RuntimeError, AssertionError, EOFError, KeyError, pickle.UnpicklingError)


@dataclass(frozen=True)
class VisionSet:
    """One of torchvision's sets.

    kind: its class there.   axes: of its stored pixels.   shape: of a sample.   classes: names; None: torchvision's.
    """

    kind: str
    axes: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...] | None = None

    def arguments(self, split: str) -> dict[str, Any]:
        return {"split": split} if self.kind == "SVHN" else {"train": split == "train"}


SETS = {
    "mnist": VisionSet("MNIST", "nhw", GREY, DIGIT_NAMES),
    "fashion-mnist": VisionSet("FashionMNIST", "nhw", GREY, GARMENTS),
    "kmnist": VisionSet("KMNIST", "nhw", GREY, HIRAGANA),
    "cifar10": VisionSet("CIFAR10", "nhwc", COLOUR),
    "cifar100": VisionSet("CIFAR100", "nhwc", COLOUR),
    "svhn": VisionSet("SVHN", "nchw", COLOUR, DIGIT_NAMES),
}


def default_root() -> Path:
    """$CURVCERT_DATA, else a folder in the user's cache."""
    if named := os.environ.get("CURVCERT_DATA"):
        return Path(named)
    if sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "curvcert" / "data"


def open_set(
    name: str, root: str | Path | None, split: str, offline: bool, notify: Callable[[str], None] | None
) -> Source:
    """One of `SETS`, downloaded into `root` when it is missing there and `offline` allows."""
    row = SETS[name]
    folder = Path(root) if root is not None else default_root()
    stored = read_idx(folder / row.kind / "raw", split) if row.axes == "nhw" else None
    pixels, labels, classes, notes = (
        (*stored, row.classes, ()) if stored else _by_torchvision(name, folder, split, offline, notify)
    )

    def take(indices: Sequence[int]) -> Samples:
        return Samples(_nchw(unit_range(pixels[list(indices)]), row.axes))

    return Source(name, len(pixels), take, labels, classes, notes=notes)


def _by_torchvision(
    name: str, folder: Path, split: str, offline: bool, notify: Callable[[str], None] | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...], tuple[str, ...]]:
    """Pixels, labels, names of the classes and notes of one of `SETS`."""
    row = SETS[name]
    kind = getattr(_datasets(), row.kind)
    arguments = row.arguments(split)
    notes: tuple[str, ...] = ()
    try:
        data = kind(folder, download=False, **arguments)
    except RuntimeError as missing:
        if offline:
            raise DataError(
                f"{name}: not found (or damaged) in {folder}, and --offline forbids its download; "
                "run once without --offline, or name its folder with --data-root"
            ) from missing
        notes = (f"downloaded {name} into {folder}",)
        data = _download(name, kind, folder, arguments, notify)
    except _DAMAGED as error:
        raise DataError(f"{name}: the copy in {folder} is damaged ({first_line(error)}); delete it") from error

    pixels: NDArray[np.uint8] = np.asarray(data.data)
    labels = np.asarray(data.labels if row.kind == "SVHN" else data.targets, dtype=np.int64)
    return pixels, labels, row.classes or tuple(data.classes), notes


def _download(
    name: str, kind: Callable[..., Any], folder: Path, arguments: dict[str, Any], notify: Callable[[str], None] | None
) -> Any:
    """The set after its download. torchvision's messages are kept from stdout, which is for data."""
    chatter: Any = io.StringIO() if notify is None else sys.stderr
    if notify is not None:
        notify(f"downloading {name} into {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
            return kind(folder, download=True, **arguments)
    except _DAMAGED as error:
        raise DataError(
            f"{name}: the download into {folder} failed ({first_line(error)}); "
            "try again, or put the files there by hand and name the folder with --data-root"
        ) from error


def _nchw(x: NDArray[np.float32], axes: str) -> NDArray[np.float32]:
    if axes == "nhw":
        return x[:, None]
    return x.transpose(0, 3, 1, 2) if axes == "nhwc" else x


def open_folder(path: Path, resize: tuple[int, int] | None) -> Source:
    """The images below `path`: one class per subfolder (torchvision's ImageFolder), unlabelled without subfolders."""
    files, labels, classes = _listed(path)

    def take(indices: Sequence[int]) -> Samples:
        return _read(path, [files[i] for i in indices], resize)

    notes = () if resize is None else (f"{path.name}: images resized to {resize[0]}x{resize[1]} (bilinear)",)
    return Source(path.name, len(files), take, labels, classes, notes=notes)


def _listed(path: Path) -> tuple[list[Path], NDArray[np.int64] | None, tuple[str, ...] | None]:
    datasets = _datasets()
    try:
        if any(entry.is_dir() for entry in path.iterdir()):
            folder = datasets.ImageFolder(path)
            files = [Path(file) for file, _ in folder.samples]
            return files, np.asarray(folder.targets, dtype=np.int64), tuple(folder.classes)
        files = sorted(file for file in path.iterdir() if datasets.folder.is_image_file(file.name))
    except OSError as error:
        raise DataError(f"{path}: not a folder of images ({first_line(error)})") from error
    if not files:
        raise DataError(f"{path}: holds no image ({', '.join(datasets.folder.IMG_EXTENSIONS)})")
    return files, None, None


def _read(path: Path, files: Sequence[Path], resize: tuple[int, int] | None) -> Samples:
    """Images of one size: one channel if all of them are grey, else RGB."""
    from PIL import Image

    images: list[Image.Image] = []
    for file in files:
        try:
            if not file.is_file():  # reading a pipe would block
                raise DataError(f"{file}: not a plain file")
            with Image.open(file, formats=IMAGES) as opened:
                width, height = opened.size
                if width * height > MAX_PIXELS:
                    raise DataError(f"{file}: an image of {height}x{width} pixels; at most {MAX_PIXELS} are read")
                refuse_many(len(files) * (width * height if resize is None else resize[0] * resize[1]))
                if opened.mode.startswith(("I", "F")):
                    raise DataError(f"{file}: mode {opened.mode}; only images of 8 bits a channel can be read")
                image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
        except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise DataError(f"{file}: not a readable image ({first_line(error)})") from error
        if resize is not None:
            image = image.resize((resize[1], resize[0]), Image.Resampling.BILINEAR)
        elif images and image.size != images[0].size:
            first = images[0].size
            raise DataError(
                f"{path}: images differ in size ({files[0].relative_to(path)} is {first[1]}x{first[0]}, "
                f"{file.relative_to(path)} {image.size[1]}x{image.size[0]}); give one with --resize HEIGHT WIDTH"
            )
        images.append(image)
    grey = all(image.mode == "L" for image in images)
    pixels = np.stack([np.asarray(image if grey else image.convert("RGB")) for image in images])
    x = _nchw(unit_range(pixels), "nhw" if grey else "nhwc")
    return Samples(x, (f"{path.name}: all images are grey and are read with one channel",) if grey else ())


def _datasets() -> ModuleType:
    from certify_cli.torchvision_schemas import import_torchvision

    import_torchvision()
    from torchvision import datasets

    return datasets
