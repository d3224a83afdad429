"""Reading an ONNX file from anywhere: nothing is run, and nothing outside the model's folder is opened.

What comes out is one self-contained `ModelProto` whose tensors hold as many bytes as they declare, or a ModelError.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from certify_cli.errors import ModelError, first_line

MAX_BYTES = 2**31 - 1
"""The largest file that protobuf can hold, and the most external data read for one model."""

OLDEST_OPSET = 7
"""Older operators broadcast by an attribute; exporters have not written them since 2018."""

CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap", "Optional", "OptionalGetElement", "OptionalHasElement"}
QUANTISED = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
    "MatMulInteger",
}  # fmt: skip
DEFAULT_DOMAINS = {"", "ai.onnx"}

FLOATS: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}
NUMBERS = set(FLOATS) | {
    TensorProto.BOOL, TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64,
    TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
}  # fmt: skip


@dataclass(frozen=True)
class OnnxFile:
    """A parsed model, its functions inlined, and the digest of the file and its external data."""

    model: ModelProto
    sha256: str
    opset: int
    stored_dtype: str

    @property
    def graph(self) -> GraphProto:
        return self.model.graph


def read_onnx(path: Path) -> OnnxFile:
    """The model in `path`. Raises ModelError, naming the file and the place, for everything that is not one."""
    raw = _bytes(path)
    model = ModelProto()
    try:
        model.ParseFromString(raw)
    except DecodeError:
        raise ModelError(f"{path}: not an ONNX model, or a truncated one; export or download it again") from None
    if not model.graph.node or model.ir_version <= 0 or not (model.opset_import or model.functions):
        raise ModelError(f"{path}: not an ONNX model (no operators in it); export or download it again")
    digest = hashlib.sha256(raw)
    _check_graph_free_of_refused(path, model)
    _load_tensors(path, model, digest)
    if model.functions:
        try:
            model = onnx.inliner.inline_local_functions(model)
        except Exception as error:  # the inliner's own errors have no common type
            raise ModelError(
                f"{path}: its functions cannot be inlined ({first_line(error)}); export it anew"
            ) from error
    opset = _check_opset(path, model)
    for node in model.graph.node:
        node.domain = ""  # "ai.onnx" is the same operator set by its long name
    _check_names(path, model.graph)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{path}: not a valid ONNX model: {first_line(error)}; export it anew") from error
    return OnnxFile(model, digest.hexdigest(), opset, _stored_dtype(model))


def describe(node: NodeProto) -> str:
    """`node 'name' (Type)`; a node without a name is named by its first output."""
    name = node.name or next(iter(node.output), "?")
    return f"node {name!r} ({node.op_type})"


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ModelError(f"{path}: not a file; give the path of an ONNX model")
        if size == 0:
            raise ModelError(f"{path}: the file is empty; export or download it again")
        if size > MAX_BYTES:
            raise ModelError(f"{path}: {size} bytes is more than ONNX allows in one file; use external data")
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error


def _check_graph_free_of_refused(path: Path, model: ModelProto) -> None:
    local = {(function.domain, function.name) for function in model.functions}
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            if node.op_type in CONTROL_FLOW or any(a.HasField("g") or a.graphs for a in node.attribute):
                raise ModelError(
                    f"{path}: {describe(node)} is control flow, whose path may depend on the data; "
                    "export a model without it"
                )
            if node.op_type in QUANTISED or "QLinear" in node.op_type:
                raise ModelError(f"{path}: {describe(node)} is quantised; export the model in floating point")
            if node.op_type == "BatchNormalization" and _is_training(node):
                raise ModelError(f"{path}: {describe(node)} is in training mode; call model.eval() before exporting")
            if node.domain not in DEFAULT_DOMAINS and (node.domain, node.op_type) not in local:
                raise ModelError(
                    f"{path}: {describe(node)} comes from the operator set {node.domain!r}, which is not supported; "
                    "export with standard ONNX operators"
                )
    if model.graph.sparse_initializer:
        raise ModelError(f"{path}: sparse weights are not supported; export dense ones")


def _is_training(node: NodeProto) -> bool:
    """A batch norm that takes its statistics from the batch says so, or (before opset 14) gives them as outputs."""
    flagged = any(a.name == "training_mode" and a.i for a in node.attribute)
    return flagged or len([name for name in node.output if name]) > 1


def _check_opset(path: Path, model: ModelProto) -> int:
    versions = [entry.version for entry in model.opset_import if entry.domain in DEFAULT_DOMAINS]
    newest = onnx.defs.onnx_opset_version()
    if not versions:
        raise ModelError(f"{path}: names no version of the ONNX operators; export it anew")
    if not OLDEST_OPSET <= versions[0] <= newest:
        raise ModelError(
            f"{path}: opset {versions[0]} is not supported (supported: {OLDEST_OPSET} to {newest}); "
            "export with one in that range"
        )
    return int(versions[0])


def _check_names(path: Path, graph: GraphProto) -> None:
    """Every value is written once, and before it is read."""
    written = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    later = {name for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            if name and name not in written:
                why = (
                    "which is computed only later: the graph has a cycle or is out of order"
                    if name in later
                    else "which is nowhere in the file"
                )
                raise ModelError(f"{path}: {describe(node)} reads the tensor {name!r}, {why}; export it anew")
        for name in node.output:
            if name and name in written:
                raise ModelError(f"{path}: {describe(node)} writes the tensor {name!r} a second time; export it anew")
        written.update(node.output)
    for value in graph.output:
        if value.name not in written:
            raise ModelError(f"{path}: the output {value.name!r} is computed nowhere; export it anew")


# --- tensors ----------------------------------------------------------------------------------------------------


def _tensors(model: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Every tensor of the model with words that say where it stands."""
    for tensor in model.graph.initializer:
        yield f"the weight {tensor.name!r}", tensor
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            for attribute in node.attribute:
                for tensor in _attribute_tensors(attribute):
                    yield f"a constant of {describe(node)}", tensor


def _attribute_tensors(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors


def _load_tensors(path: Path, model: ModelProto, digest: Any) -> None:
    """Bring external data in, and hold every tensor to what it declares."""
    files: dict[str, bytes] = {}
    for where, tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            _load_external(path, where, tensor, files)
        _check_tensor(path, where, tensor)
    for name in sorted(files):
        digest.update(files[name])


def _load_external(path: Path, where: str, tensor: TensorProto, files: dict[str, bytes]) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if location not in files:
        files[location] = _sibling(path, where, location, sum(map(len, files.values())))
    data = files[location]
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", len(data) - offset))
    except ValueError:
        raise ModelError(f"{path}: {where} has an unreadable place in {location!r}; export it anew") from None
    if offset < 0 or length < 0 or offset + length > len(data):
        raise ModelError(
            f"{path}: {where} lies outside its data file {location!r} of {len(data)} bytes; the file is truncated or "
            "belongs to another model"
        )
    tensor.raw_data = data[offset : offset + length]
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _sibling(path: Path, where: str, location: str, read_so_far: int) -> bytes:
    """The bytes of a plain file beside the model; anything else is refused before it is opened."""
    if not location or location in (".", "..") or Path(location).name != location or "\\" in location:
        raise ModelError(
            f"{path}: {where} points to {location!r}, which is not a plain file in the model's own folder; "
            "put the data beside the model"
        )
    file = path.parent / location
    try:
        if file.is_symlink():
            raise ModelError(f"{path}: the data file {location!r} is a link; put the file itself beside the model")
        if not file.is_file():
            raise ModelError(f"{path}: the data file {location!r} is missing; put it beside the model")
        if file.stat().st_size + read_so_far > MAX_BYTES:
            raise ModelError(f"{path}: the data file {location!r} is larger than {MAX_BYTES} bytes")
        with os.fdopen(os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as stream:
            return stream.read()
    except OSError as error:
        raise ModelError(f"{path}: the data file {location!r} cannot be read: {error.strerror or error}") from error


def _check_tensor(path: Path, where: str, tensor: TensorProto) -> None:
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
    if tensor.data_type in FLOATS and not np.isfinite(onnx.numpy_helper.to_array(tensor).astype(np.float64)).all():
        raise ModelError(f"{path}: {where} holds NaN or infinite numbers; a network with them cannot be certified")


def _stored_dtype(model: ModelProto) -> str:
    """The type of the weights; where several occur, the one that most numbers have."""
    counts: dict[str, int] = {}
    for _, tensor in _tensors(model):
        if tensor.data_type in FLOATS:
            name = FLOATS[tensor.data_type]
            counts[name] = counts.get(name, 0) + math.prod(tensor.dims)
    return max(counts, key=lambda name: counts[name]) if counts else "float32"
