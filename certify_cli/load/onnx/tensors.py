"""The tensors of an ONNX file: external data, and checks that each holds what it declares."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, TensorProto

from certify_cli.errors import ModelError, shown
from certify_cli.load.onnx.neutral_names import Origin
from certify_cli.plain import integer

MAX_BYTES = 2**31 - 1
"""The largest file that protobuf can hold, and the most external data read for one model."""

FLOAT_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}
NUMBERS = set(FLOAT_NAMES) | {
    TensorProto.BOOL, TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64,
    TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
}  # fmt: skip


def tensors(model: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Every tensor of the model, with a phrase that says where it is."""
    for tensor in model.graph.initializer:
        yield f"the weight '{shown(tensor.name)}'", tensor
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            for attribute in node.attribute:
                for tensor in _attribute_tensors(attribute):
                    yield f"a constant of {Origin.of(node)}", tensor


def _attribute_tensors(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors


def load_external_data(path: Path, model: ModelProto, digest: Any) -> None:
    """Read external data into the model's tensors, and add it to the digest.

    The digest includes each data file's name and length: otherwise bytes could move from one file to the next, and make
    another model, without a change of digest.
    """
    files: dict[str, bytes] = {}
    for where, tensor in tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            _load_external(path, where, tensor, files)
    for name in sorted(files):
        encoded = name.encode("utf-8", "surrogatepass")
        digest.update(f"{len(encoded)}:".encode() + encoded + f"{len(files[name])}:".encode())
        digest.update(files[name])


def _load_external(path: Path, where: str, tensor: TensorProto, files: dict[str, bytes]) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if location not in files:
        files[location] = _sibling(path, where, location, sum(map(len, files.values())))
    data = files[location]
    try:
        offset = integer(entries.get("offset", "0"))
        length = integer(entries.get("length", str(len(data) - offset)))
    except ValueError:
        raise ModelError(f"{path}: {where} has an unreadable place in '{shown(location)}'; export it anew") from None
    if offset < 0 or length < 0 or offset + length > len(data):
        raise ModelError(
            f"{path}: {where} lies outside its data file '{shown(location)}' of {len(data)} bytes; the file is "
            "truncated or belongs to another model"
        )
    tensor.raw_data = data[offset : offset + length]
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _sibling(path: Path, where: str, location: str, read_so_far: int) -> bytes:
    """The bytes of a plain file beside the model; ModelError for anything else, before it is opened."""
    if not location or location in (".", "..") or Path(location).name != location or "\\" in location:
        raise ModelError(
            f"{path}: {where} points to '{shown(location)}', which is not a plain file in the model's own folder; "
            "put the data beside the model"
        )
    file = path.parent / location
    try:
        if file.is_symlink():
            raise ModelError(
                f"{path}: the data file '{shown(location)}' is a link; put the file itself beside the model"
            )
        if not file.is_file():
            raise ModelError(f"{path}: the data file '{shown(location)}' is missing; put it beside the model")
        if file.stat().st_size + read_so_far > MAX_BYTES:
            raise ModelError(f"{path}: the data file '{shown(location)}' is larger than {MAX_BYTES} bytes")
        with os.fdopen(os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as stream:
            return stream.read()
    except OSError as error:
        raise ModelError(
            f"{path}: the data file '{shown(location)}' cannot be read: {error.strerror or error}"
        ) from error


def check_tensor(path: Path, where: str, tensor: TensorProto) -> None:
    """ModelError for types that are not supported, for NaN and infinity, and where size and content disagree."""
    if tensor.data_type not in NUMBERS:
        known = tensor.data_type in TensorProto.DataType.values()
        kind = TensorProto.DataType.Name(tensor.data_type).lower() if known else f"number {tensor.data_type}"
        raise ModelError(f"{path}: {where} has the type {kind}, which is not supported; export the model in float32")
    count = math.prod(tensor.dims)
    if any(d < 0 for d in tensor.dims):
        raise ModelError(f"{path}: {where} has a negative size {list(tensor.dims)}; export it anew")
    if tensor.HasField("raw_data"):
        held = len(tensor.raw_data) / onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    else:
        lists = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
        held = max(len(values) for values in lists)
    if held != count:
        raise ModelError(
            f"{path}: {where} declares {count} numbers (shape {list(tensor.dims)}) and holds {held:g}; "
            "the file is damaged"
        )
    if tensor.data_type not in FLOAT_NAMES:
        return
    values = onnx.numpy_helper.to_array(tensor)
    if tensor.data_type == TensorProto.BFLOAT16:  # numpy itself does not know the type
        values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ModelError(f"{path}: {where} holds NaN or infinite numbers; a network with them cannot be certified")


def stored_dtype(model: ModelProto) -> str:
    """The type of the weights; of several types the most frequent, counted in numbers."""
    counts: dict[str, int] = {}
    for _, tensor in tensors(model):
        if tensor.data_type in FLOAT_NAMES:
            name = FLOAT_NAMES[tensor.data_type]
            counts[name] = counts.get(name, 0) + math.prod(tensor.dims)
    return max(counts, key=lambda name: counts[name]) if counts else "float32"
