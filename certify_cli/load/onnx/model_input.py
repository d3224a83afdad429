"""A model's input: the shape of one sample, and how samples are put into what the file takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ValueInfoProto

from certify_cli.errors import ModelError, shown
from certify_cli.load.onnx.outputs import FLOATS

MAX_ENTRIES = 2**28
"""The largest sample (entries): 2 GiB in float64."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelInput:
    """source: the input's (neutral) name.   shape: one sample's, without the batch.   kind: its element type in ONNX.

    batch: how many samples the file takes at once; None for any number, 0 where it has no batch axis at all.
    """

    source: str
    shape: Shape
    kind: int
    batch: int | None

    @property
    def whole(self) -> bool:
        """Whether the file takes one sample and no more, so that a value may do without a batch axis."""
        return self.batch in (0, 1)

    def keeps_batch(self, shape: Shape) -> bool:
        """Whether the first axis of a value of this shape (of a run on one sample) is the batch."""
        return len(shape) > 0 and shape[0] == (self.batch or 1)

    def to_file_shape(self, sample: np.ndarray) -> np.ndarray:
        """One sample (1, *shape) in the file's own shape: repeated where its batch is fixed."""
        return sample[0] if self.batch == 0 else np.repeat(sample, self.batch or 1, axis=0)

    def feeds(self, samples: np.ndarray) -> list[np.ndarray]:
        """What to run the file on, one after the other, so that every sample (n, *shape) is met once, in order; the
        last one is repeated where a fixed batch is not full."""
        if self.batch is None:
            return [samples]
        if self.batch == 0:
            return list(samples)
        missing = -len(samples) % self.batch
        full = np.concatenate([samples, np.repeat(samples[-1:], missing, axis=0)])
        return np.split(full, len(full) // self.batch)


def readings(
    path: Path,
    inputs: Sequence[ValueInfoProto],
    named: Callable[[str], str],
    sample_shape: Callable[[], Shape | None],
    layout: str | None,
) -> list[ModelInput]:
    """The ways to read the model's input, the likelier one first: a first axis of more than one entry may be a fixed
    batch, or an axis of a sample.

    named: a value's neutral name.   sample_shape: the data's, for sizes that the file leaves free; None without data.
    """
    if len(inputs) != 1:
        listed = ", ".join(shown(value.name) for value in inputs)
        raise ModelError(f"{path}: the model has {len(inputs)} inputs ({listed}); export a classifier of one input")
    value = inputs[0]
    tensor, called = value.type.tensor_type, shown(value.name)
    if tensor.elem_type not in FLOATS:
        raise ModelError(f"{path}: the input '{called}' is not a floating-point tensor; export one that takes floats")
    dims = [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in tensor.shape.dim]
    if not tensor.HasField("shape"):
        dims = [None] * (1 + len(sample_shape() or ()))
    if not dims or dims == [None]:
        raise ModelError(
            f"{path}: the input '{called}' does not say how many axes it has, or has the batch's alone; export it "
            "as a batch of samples, only the batch and the image's size free"
        )
    ways: list[tuple[list[int | None], int | None]] = [(dims[1:], dims[0])] if len(dims) > 1 else []
    if dims[0] is not None and (dims[0] > 1 or len(dims) == 1):
        ways.append((dims, 0))
    found = []
    for sample, batch in ways:
        shape = _resolved(path, called, sample, sample_shape, layout)
        if math.prod(shape) * (batch or 1) > MAX_ENTRIES:
            raise ModelError(f"{path}: the input '{called}' of shape {list(shape)} is too large to certify")
        found.append(ModelInput(named(value.name), shape, tensor.elem_type, batch))
    return found


def _resolved(
    path: Path, called: str, dims: list[int | None], sample_shape: Callable[[], Shape | None], layout: str | None
) -> Shape:
    """One sample's shape, free sizes taken from the data: as they are, with the channels last, or flat."""
    if None not in dims:
        return tuple(size for size in dims if size is not None)
    described = [size if size is not None else "free" for size in dims]
    data = sample_shape()
    if data is None:
        raise ModelError(
            f"{path}: the input '{called}' leaves sizes of a sample free ({described}), and there are no data to take "
            "them from; say --input-shape, such as --input-shape 3,32,32"
        )
    forms = [data, (*data[1:], data[0]), (math.prod(data),)]
    if layout == "nhwc":
        forms.insert(0, forms.pop(1))
    for form in forms:
        if len(form) == len(dims) and all(size in (None, n) for size, n in zip(dims, form, strict=True)):
            return form
    raise ModelError(
        f"{path}: the input '{called}' takes samples of shape {described}, and the data's are of shape {list(data)}; "
        "they do not fit"
    )
