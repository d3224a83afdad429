"""Reads FILE.npz: arrays x (N, ...) and, with labels, y (N,). Sizes are checked before reading; pickles are refused."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from certify_cli.data.arrays import check_samples, of_arrays
from certify_cli.data.source import CHANNELS, MAX_BYTES, Source
from certify_cli.errors import DataError, UsageError, first_line, listed, shown

DEFLATE_RATIO = 1040
"""Largest possible ratio of sizes: deflate compresses by at most 1032."""

LARGE, LARGE_RATIO = 2**30, 100
"""An array of more than LARGE bytes must not unpack to more than LARGE_RATIO times its size in the file."""

LONGEST_HEADER = 2**16
"""Longest header of an array in bytes; numpy itself reads no longer ones."""

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
"""First bytes of a zip file, and of an empty one."""

_UNREADABLE = (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, RuntimeError, NotImplementedError)


def open_npz(path: Path, layout: str) -> Source:
    """The data set in an .npz file. Raises DataError for a file that breaks the convention."""
    arrays = read_arrays(path, (("x",), ("x", "y")), "rename them to x (samples) and y (labels)")
    x, notes = arrays["x"], []
    check_samples(str(path), x)
    if layout == "nhwc" and x.ndim == 4:
        x = x.transpose(0, 3, 1, 2)
    elif x.ndim == 3:  # grey images: no channels, first or last
        x = x[:, None]
    elif layout == "nhwc":
        raise UsageError(f"--data-layout nhwc: {path} holds x of shape {x.shape}, which is not (N, H, W, C)")
    elif x.ndim == 4 and x.shape[3] in CHANNELS and x.shape[1] not in CHANNELS:
        notes.append(f"{path.name}: x of shape {x.shape} looks like NHWC; if it is, say --data-layout nhwc")
    return of_arrays(str(path), path.name, x, arrays.get("y"), tuple(notes))


def read_arrays(path: Path, keys: Sequence[Sequence[str]], advice: str) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file that holds exactly one of the sets of `keys`; `advice` ends the error otherwise."""
    try:
        _refuse_other_files(path)
        _check_headers(path, [sorted(names) for names in keys], advice)
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays}
    except MemoryError as error:
        raise DataError(f"{path}: its arrays do not fit into memory; split the file") from error
    except _UNREADABLE as error:
        raise DataError(f"{path}: not a readable .npz file ({first_line(error)})") from error


def read_rows(path: Path, keys: Sequence[str], advice: str) -> dict[str, NDArray[Any]]:
    """The arrays that a run wrote beside its records: numbers, one row per sample; `index` and `rival` are integers.

    DataError for anything else.
    """
    arrays = read_arrays(path, (keys,), advice)
    for key, array in arrays.items():
        kinds, axes = ("iu", (1,)) if key in ("index", "rival") else ("f", range(2, 10))
        if array.dtype.kind not in kinds or array.dtype.itemsize > 8 or array.ndim not in axes:
            raise DataError(f"{path}: {key} has type {shown(str(array.dtype))} and shape {array.shape}; {advice}")
        if len(array) != len(arrays["index"]):
            raise DataError(f"{path}: {key} has {len(array)} rows, index has {len(arrays['index'])}; {advice}")
    if "x" in arrays and arrays["x"].shape != arrays["d"].shape:
        raise DataError(f"{path}: x has shape {arrays['x'].shape}, d has shape {arrays['d'].shape}; {advice}")
    return arrays


def _refuse_other_files(path: Path) -> None:
    """DataError for a file that is not a zip file, or is truncated."""
    with path.open("rb") as file:
        start = file.read(4)
    if start not in _ZIP:
        raise DataError(
            f"{path}: not an .npz file; write one with numpy.savez(FILE, x=..., y=...), where x holds the samples "
            "(N, ...) and y, where labels are known, N integers"
        )
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: an .npz file that is cut off or damaged at its end; copy or write it again")


def _check_headers(path: Path, allowed: Sequence[Sequence[str]], advice: str) -> None:
    """DataError, from the headers alone, for other keys, objects, and sizes that are impossible or too large."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        keys = sorted(entry.filename.removesuffix(".npy") for entry in entries)
        if keys not in allowed:
            raise DataError(f"{path}: holds the arrays {listed(keys) or '(none)'}; {advice}")
        for entry in entries:
            key = entry.filename.removesuffix(".npy")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(
                    f"{path}: {key} is compressed in a way that numpy does not write; save it with np.savez"
                )
            if entry.file_size > DEFLATE_RATIO * entry.compress_size + 1024:
                raise DataError(f"{path}: {key} claims to unpack to an impossible {entry.file_size} bytes")
            if entry.file_size > max(LARGE, LARGE_RATIO * entry.compress_size):
                raise DataError(
                    f"{path}: {key} would unpack to {entry.file_size} bytes, more than {LARGE_RATIO} times what it "
                    "takes in the file; save it with np.savez, uncompressed, if that is what it holds"
                )
            shape, dtype, header = _header(archive, entry)
            if dtype.hasobject:
                raise DataError(f"{path}: {key} holds Python objects, which are never unpickled; save numbers")
            size = math.prod(shape) * dtype.itemsize
            if size > MAX_BYTES:
                raise DataError(f"{path}: {key} of shape {shape} would take {size} bytes; the limit is {MAX_BYTES}")
            if header + size != entry.file_size:
                raise DataError(f"{path}: {key} of shape {shape} does not match its {entry.file_size} bytes")


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, type and header length of one array."""
    with archive.open(entry) as opened:
        file = io.BytesIO(opened.read(LONGEST_HEADER))
        version = npy.read_magic(file)
        # versions 2 and 3 differ only in the encoding of field names, which plain arrays do not have
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        try:
            shape, _, dtype = read(file)
        except Exception as error:  # numpy evaluates a literal here, which may raise many types
            raise ValueError(f"garbled header of {shown(entry.filename)}: {first_line(error)}") from error
        return shape, dtype, file.tell()
