"""Samples and labels as arrays, whether an .npz file held them or a program has them in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from certify_cli.data.source import Samples, Source, refuse_many, unit_range
from certify_cli.errors import DataError, UsageError, quoted, shown

if TYPE_CHECKING:
    from certify_cli.data.datasets import Dataset


def check_samples(where: str, x: NDArray[Any]) -> None:
    """DataError, beginning with `where`, unless x holds numbers, one row per sample."""
    if x.ndim < 2 or min(x.shape) < 1:
        raise DataError(f"{where}: x has shape {x.shape}; (N, ...) with at least one sample is expected")
    if x.dtype.kind not in "biuf" or x.dtype.itemsize > 8:
        raise DataError(f"{where}: x has type {shown(str(x.dtype))}; integers or floats of up to 64 bits are expected")


def of_arrays(where: str, name: str, x: NDArray[Any], y: NDArray[Any] | None, notes: tuple[str, ...] = ()) -> Source:
    """The data set of checked samples x (N, ...) and labels y (N,), or None.

    Integers in x are divided by 255; samples of three axes are images, channels first. where: begins an error's
    sentence.   name: of the data set. Raises DataError for labels that are none.
    """

    def take(indices: Sequence[int]) -> Samples:
        chosen = x[list(indices)]
        floats = unit_range(chosen)
        exact = x.dtype.kind != "f" or x.dtype.itemsize <= 4 or np.array_equal(floats, chosen, equal_nan=True)
        return Samples(floats, () if exact else (f"{name}: float64 values of x are rounded to float32",))

    return Source(name, len(x), take, _labels(where, y, len(x)), image=x.ndim == 4, notes=notes)


def _labels(where: str, y: NDArray[Any] | None, count: int) -> NDArray[np.int64] | None:
    if y is None:
        return None
    if y.shape != (count,):
        raise DataError(f"{where}: y has shape {y.shape}, but x holds {count} samples; ({count},) is expected")
    if y.dtype.kind not in "iu":
        raise DataError(f"{where}: y has type {shown(str(y.dtype))}; labels are integers")
    if y.min() < 0 or y.max() >= 2**31:
        raise DataError(f"{where}: y holds the label {y.min() if y.min() < 0 else y.max()}; classes count from 0")
    return y.astype(np.int64)


def dataset(x: Any, y: Any = None, name: str = "arrays") -> Dataset:
    """A data set of samples in memory.

    x: a tensor or array (N, ...), or batches of them such as a DataLoader gives: x, or pairs (x, y).
    y: labels (N,), for samples that are not paired with theirs. Samples keep their shape; they are float32, and
    integers in x are divided by 255. Raises DataError for anything else.
    """
    from certify_cli.data.datasets import select_samples

    if not hasattr(x, "__array__") and isinstance(x, Iterable):
        x, y = _joined(x, y, name)
    samples = _array(x, f"{name}: x")
    check_samples(name, samples)
    source = of_arrays(name, name, samples, None if y is None else _array(y, f"{name}: y"))
    return select_samples(source, 0, None, None)


def _joined(batches: Iterable[Any], y: Any, name: str) -> tuple[NDArray[Any], Any]:
    """All samples of the batches, and their labels, or y."""
    xs, ys, values = [], [], 0
    for batch in batches:
        paired = isinstance(batch, list | tuple)
        if paired and len(batch) != 2:
            raise DataError(f"{name}: a batch has {len(batch)} parts; x, or a pair of x and y, is expected")
        xs.append(_array(batch[0] if paired else batch, f"{name}: x"))
        if not xs[-1].ndim:
            raise DataError(f"{name}: x is {quoted(type(batch).__name__)}; a tensor or an array is expected")
        values += xs[-1].size
        refuse_many(values)
        if paired:
            ys.append(_array(batch[1], f"{name}: y"))
    if not xs:
        raise DataError(f"{name}: no sample is given")
    if ys and y is not None:
        raise UsageError("labels are given twice: the batches are pairs of x and y, and there is a y besides")
    if ys and len(ys) != len(xs):
        raise DataError(f"{name}: some batches have labels and some have none")
    if len({array.shape[1:] for array in xs}) > 1:
        raise DataError(f"{name}: samples of several shapes; they must have one")
    return np.concatenate(xs), np.concatenate(ys) if ys else y


def _array(values: Any, what: str) -> NDArray[Any]:
    """A tensor or array in memory, as numpy has it; 16-bit floats, which numpy may lack, as float32."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if values.is_floating_point() and values.element_size() < 4:
            values = values.float()
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{what} is {quoted(type(values).__name__)}; a tensor or an array is expected") from None
