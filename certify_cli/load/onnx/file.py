"""Reading an ONNX file from anywhere: nothing is run, and nothing outside the model's folder is opened.

What comes out is what leads to the logits: as the file has it, self-contained, for onnxruntime; and with functions
inlined and every name replaced (`neutral`), for everything else. Its tensors hold as many bytes as they declare.
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
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from certify_cli.errors import ModelError, first_line, shown
from certify_cli.load.onnx import ml_operators
from certify_cli.load.onnx.neutral_names import Graph, Origin, neutral
from certify_cli.load.onnx.outputs import chosen_output, leading_to
from certify_cli.plain import integer

MAX_BYTES = 2**31 - 1
"""The largest file that protobuf can hold, and the most external data read for one model."""

OLDEST_OPSET = 7
"""Older operators broadcast by an attribute; exporters have not written them since 2018."""

CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap", "Optional", "OptionalGetElement", "OptionalHasElement"}
QUANTISED = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
    "MatMulInteger",
}  # fmt: skip
RANDOM = {
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial",
}  # fmt: skip
DEFAULT_DOMAINS = {"", "ai.onnx"}
RUNTIME_DOMAINS = ("ai.onnx", "com.microsoft", "com.ms.", "org.pytorch")
"""How the domains begin for which onnxruntime has kernels of its own: it prefers these to a function of the file."""

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


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """What leads to the logits of a file, and the digest of the file and its external data.

    model: as the file has it, with its own names, external data brought in and functions inlined.   graph: the same,
    renamed.
    output: the file's name of the tensor that holds the logits, or what becomes of them.
    """

    model: ModelProto
    graph: Graph
    output: str
    sha256: str
    opset: int
    stored_dtype: str
    notes: tuple[str, ...]

    @property
    def rows(self) -> int:
        """The first size that the output declares; 0 where it declares none."""
        sizes = self.model.graph.output[0].type.tensor_type.shape.dim
        return int(sizes[0].dim_value) if len(sizes) else 0

    @property
    def inputs(self) -> list[ValueInfoProto]:
        """The inputs that have no value in the file."""
        initialised = {tensor.name for tensor in self.model.graph.initializer}
        return [value for value in self.model.graph.input if value.name not in initialised]


def read_onnx(path: Path, output: str | None = None) -> OnnxFile:
    """The model in `path`; `output` names the output that holds the logits, where the file has several.

    Raises ModelError, naming the file and the place, for everything that is not a model or not safe.
    """
    raw = _bytes(path)
    model = ModelProto()
    try:
        model.ParseFromString(raw)
    except DecodeError:
        raise ModelError(f"{path}: not an ONNX model, or a truncated one; export or download it again") from None
    if not model.graph.node or model.ir_version <= 0 or not (model.opset_import or model.functions):
        raise ModelError(f"{path}: not an ONNX model (no operators in it); export or download it again")
    digest = hashlib.sha256(raw)
    _load_external_data(path, model, digest)
    _check_control_flow(path, model)
    name, notes = chosen_output(path, model.graph, output)
    _prune(model.graph, name)
    _check_operators(path, model)
    _check_names(path, model.graph)
    for where, tensor in _tensors(model):
        _check_tensor(path, where, tensor)
    opset = _check_opset(path, model)
    inlined = _inlined(path, model)
    deployed = model
    if model.functions:  # onnxruntime takes a function for the operator of its name, and may abort over it
        deployed = ModelProto()
        deployed.CopyFrom(inlined)
    for value in inlined.graph.output:
        if not value.type.tensor_type.HasField("shape"):  # the checker asks for one, and compares it with nothing
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, TensorProto.FLOAT, []))
    try:
        onnx.checker.check_model(inlined)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{path}: not a valid ONNX model: {shown(first_line(error), 300)}; export it anew") from error
    _check_attributes(path, inlined)
    for node in inlined.graph.node:
        if node.domain in DEFAULT_DOMAINS:
            node.domain = ""  # "ai.onnx" is the same operator set by its long name
    graph = ml_operators.standardised(path, neutral(inlined.graph))
    return OnnxFile(deployed, graph, name, digest.hexdigest(), opset, _stored_dtype(model), notes)


def _prune(graph: GraphProto, output: str) -> None:
    """Leave only what leads to the value `output`, which becomes the graph's one output."""
    nodes = leading_to(output, graph.node)
    needed = {name for node in nodes for name in node.input} | {output}
    kept = [value for value in graph.output if value.name == output] or [ValueInfoProto(name=output)]
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    for part, values in ((graph.node, nodes), (graph.output, kept), (graph.initializer, weights)):
        values = [type(value).FromString(value.SerializeToString()) for value in values]
        del part[:]
        part.extend(values)
    del graph.value_info[:]


def _inlined(path: Path, model: ModelProto) -> ModelProto:
    """A copy without functions. ModelError where some cannot be inlined: their calls would be read as operators."""
    copy = ModelProto()
    copy.CopyFrom(model)
    if not model.functions:
        return copy
    try:
        copy = onnx.inliner.inline_local_functions(copy)
    except Exception as error:  # the inliner's own errors have no common type
        text = shown(first_line(error), 300)
        raise ModelError(f"{path}: its functions cannot be inlined ({text}); export it anew") from error
    for node in copy.graph.node:
        if node.domain not in (*DEFAULT_DOMAINS, ml_operators.DOMAIN):
            raise ModelError(
                f"{path}: {describe(node)} calls a function that cannot be inlined (of another opset than the "
                "model's, or of itself); export it anew"
            )
    _check_operators(path, copy)
    return copy


def describe(node: NodeProto) -> str:
    """`node 'name' (Type)`; a node without a name is named by its first output."""
    return str(Origin.of(node))


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


def _check_control_flow(path: Path, model: ModelProto) -> None:
    """ModelError for graphs within the graph, also where nothing reads what they give: no other check looks inside."""
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            if node.op_type in CONTROL_FLOW or any(a.HasField("g") or a.graphs for a in node.attribute):
                raise ModelError(
                    f"{path}: {describe(node)} is control flow, whose path may depend on the data; "
                    "export a model without it"
                )


def _check_operators(path: Path, model: ModelProto) -> None:
    """ModelError for operators that are refused by name, wherever they stand."""
    local = {(function.domain, function.name) for function in model.functions}
    for domain, name in sorted(local):
        if not domain or domain.startswith(RUNTIME_DOMAINS):
            raise ModelError(
                f"{path}: defines the function '{shown(name)}' in the domain '{shown(domain)}', where onnxruntime has "
                "operators of its own and would not run it; rename the function's domain"
            )
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            if node.op_type in QUANTISED or "QLinear" in node.op_type:
                raise ModelError(f"{path}: {describe(node)} is quantised; export the model in floating point")
            if node.op_type in RANDOM:
                raise ModelError(
                    f"{path}: {describe(node)} draws random numbers, so the model is no fixed function; "
                    "export it without"
                )
            if node.op_type == "BatchNormalization" and _is_training(node):
                raise ModelError(f"{path}: {describe(node)} is in training mode; call model.eval() before exporting")
            if node.domain == ml_operators.DOMAIN and node.op_type in ml_operators.SUPPORTED:
                continue
            if node.domain not in DEFAULT_DOMAINS and (node.domain, node.op_type) not in local:
                raise ModelError(
                    f"{path}: {describe(node)} comes from the operator set '{shown(node.domain)}', which is not "
                    "supported; export with standard ONNX operators"
                )
    if model.graph.sparse_initializer:
        raise ModelError(f"{path}: sparse weights are not supported; export dense ones")


def _is_training(node: NodeProto) -> bool:
    """A batch norm that takes its statistics from the batch says so, or (before opset 14) gives them as outputs."""
    flagged = any(a.name == "training_mode" and a.i for a in node.attribute)
    return flagged or len([name for name in node.output if name]) > 1


def _check_opset(path: Path, model: ModelProto) -> int:
    versions = sorted({entry.version for entry in model.opset_import if entry.domain in DEFAULT_DOMAINS})
    newest = onnx.defs.onnx_opset_version()
    if not versions:
        raise ModelError(f"{path}: names no version of the ONNX operators; export it anew")
    if len(versions) > 1:
        raise ModelError(f"{path}: names the opsets {', '.join(map(str, versions))} at once; export it anew")
    if not OLDEST_OPSET <= versions[0] <= newest:
        raise ModelError(
            f"{path}: opset {versions[0]} is not supported (supported: {OLDEST_OPSET} to {newest}); "
            "export with one in that range"
        )
    return int(versions[0])


def _check_attributes(path: Path, model: ModelProto) -> None:
    """Every attribute is one that its operator has: onnx.reference sets them on an object by their names."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for node in model.graph.node:
        domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
        version = versions.get(domain, versions.get("ai.onnx", 1))
        known = onnx.defs.get_schema(node.op_type, version, domain).attributes
        for attribute in node.attribute:
            if attribute.name not in known:
                raise ModelError(
                    f"{path}: {describe(node)} has the attribute '{shown(attribute.name)}', which its operator does "
                    "not have; export it anew"
                )


def _check_names(path: Path, graph: GraphProto) -> None:
    """Every value is written once, and before it is read."""
    written: set[str] = set()
    for kind, names in (
        ("inputs", [value.name for value in graph.input]),
        ("weights", [tensor.name for tensor in graph.initializer]),
    ):
        if len(set(names)) < len(names) or "" in names:
            raise ModelError(f"{path}: two {kind} have one name, or one has none; export it anew")
        written.update(names)
    later = {name for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            if name and name not in written:
                why = (
                    "which is computed only later: the graph has a cycle or is out of order"
                    if name in later
                    else "which is nowhere in the file"
                )
                raise ModelError(f"{path}: {describe(node)} reads the tensor '{shown(name)}', {why}; export it anew")
        for name in node.output:
            if name and name in written:
                raise ModelError(
                    f"{path}: {describe(node)} writes the tensor '{shown(name)}' a second time; export it anew"
                )
            if name:
                written.add(name)
    for value in graph.output:
        if value.name not in written:
            raise ModelError(f"{path}: the output '{shown(value.name)}' is computed nowhere; export it anew")


# --- tensors ----------------------------------------------------------------------------------------------------


def _tensors(model: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Every tensor of the model with words that say where it stands."""
    for tensor in model.graph.initializer:
        yield f"the weight '{shown(tensor.name)}'", tensor
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            for attribute in node.attribute:
                for tensor in _attribute_tensors(attribute):
                    yield f"a constant of {describe(node)}", tensor


def _attribute_tensors(attribute: AttributeProto) -> Iterator[TensorProto]:
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors


def _load_external_data(path: Path, model: ModelProto, digest: Any) -> None:
    """Bring external data in. Each file's name and length enter the digest: bytes that move from one file to the next
    would be another model under the same digest otherwise."""
    files: dict[str, bytes] = {}
    for where, tensor in _tensors(model):
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
    """The bytes of a plain file beside the model; anything else is refused before it is opened."""
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
