"""A model's input: the shape of one sample, and the conversion of samples to the file's own shape."""

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
    """The input of an ONNX model.

    source: its neutral name.   shape: of one sample, without the batch.   kind: its element type in ONNX.
    batch: number of samples that the file takes at once; None for any number, 0 where it has no batch axis.
    """

    source: str
    shape: Shape
    kind: int
    batch: int | None

    @property
    def whole(self) -> bool:
        """Whether the file takes exactly one sample, so that its values need no batch axis."""
        return self.batch in (0, 1)

    def keeps_batch(self, shape: Shape) -> bool:
        """Whether the first axis of a value of this shape, computed from one sample, is the batch."""
        return len(shape) > 0 and shape[0] == (self.batch or 1)

    def to_file_shape(self, sample: np.ndarray) -> np.ndarray:
        """One sample (1, *shape) in the file's own shape, repeated where the batch is fixed."""
        return sample[0] if self.batch == 0 else np.repeat(sample, self.batch or 1, axis=0)

    def feeds(self, samples: np.ndarray) -> list[np.ndarray]:
        """The arrays on which to run the file to evaluate all samples (n, *shape) in order.

        The last sample is repeated to fill a fixed batch.
        """
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
    """The possible readings of the model's input, the likelier first.

    A first axis of more than one entry may be a fixed batch or an axis of a sample.
    named: maps the file's name of a value to its neutral name.
    sample_shape: returns the shape of the data's samples, for sizes that the file leaves free; None without data.
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
    """One sample's shape. Free sizes are those of the data, channels first, channels last or flattened."""
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
