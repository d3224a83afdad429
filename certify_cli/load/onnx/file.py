"""Reads an ONNX file safely: nothing is run, and nothing outside the model's folder is opened.

The result holds only the part that leads to the logits, in two forms: as in the file, self-contained, for onnxruntime;
and with functions inlined and every name replaced (`neutral_names`), for everything else. Every tensor is checked to
hold as many bytes as it declares.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from certify_cli.errors import ModelError, first_line, shown
from certify_cli.load.onnx import ml_operators
from certify_cli.load.onnx.neutral_names import Graph, Origin, neutral
from certify_cli.load.onnx.outputs import chosen_output, leading_to
from certify_cli.load.onnx.tensors import MAX_BYTES, check_tensor, load_external_data, stored_dtype, tensors

OLDEST_OPSET = 7
"""Before it, operators broadcast by an attribute; exporters have not written such files since 2018."""

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
"""Beginnings of the domains for which onnxruntime has kernels of its own, which it prefers to the file's functions."""


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """The part of a file that leads to its logits.

    model: under the file's own names, with external data read and functions inlined.   graph: the same, renamed.
    output: the file's name of the tensor that holds the logits, or a function of them.
    sha256: digest of the file and its external data.   stored_dtype: of the weights.   notes: sentences for the user.
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
        """First size that the output declares; 0 without one."""
        sizes = self.model.graph.output[0].type.tensor_type.shape.dim
        return int(sizes[0].dim_value) if len(sizes) else 0

    @property
    def inputs(self) -> list[ValueInfoProto]:
        """The inputs without an initial value in the file."""
        initialised = {tensor.name for tensor in self.model.graph.initializer}
        return [value for value in self.model.graph.input if value.name not in initialised]


def read_onnx(path: Path, output: str | None = None) -> OnnxFile:
    """The model in `path`.   output: name of the output that holds the logits, where the file has several.

    ModelError, naming the file and what is at fault in it, for everything that is not a model or not safe.
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
    load_external_data(path, model, digest)
    _check_control_flow(path, model)
    name, notes = chosen_output(path, model.graph, output)
    _prune(model.graph, name)
    _check_operators(path, model)
    _check_names(path, model.graph)
    for where, tensor in tensors(model):
        check_tensor(path, where, tensor)
    opset = _check_opset(path, model)
    inlined = _inlined(path, model)
    deployed = model
    if model.functions:  # onnxruntime may abort where a function has an operator's name
        deployed = ModelProto()
        deployed.CopyFrom(inlined)
    for value in inlined.graph.output:
        if not value.type.tensor_type.HasField("shape"):  # the checker requires one, but does not compare it
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, TensorProto.FLOAT, []))
    try:
        onnx.checker.check_model(inlined)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{path}: not a valid ONNX model: {shown(first_line(error), 300)}; export it anew") from error
    _check_attributes(path, inlined)
    for node in inlined.graph.node:
        if node.domain in DEFAULT_DOMAINS:
            node.domain = ""  # "ai.onnx" is a second name of the default domain
    graph = ml_operators.standardised(path, neutral(inlined.graph))
    return OnnxFile(deployed, graph, name, digest.hexdigest(), opset, stored_dtype(model), notes)


def _prune(graph: GraphProto, output: str) -> None:
    """Remove all that does not lead to the value `output`, which becomes the graph's only output."""
    nodes = leading_to(output, graph.node)
    needed = {name for node in nodes for name in node.input} | {output}
    kept = [value for value in graph.output if value.name == output] or [ValueInfoProto(name=output)]
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    for part, values in ((graph.node, nodes), (graph.output, kept), (graph.initializer, weights)):
        if values is weights and len(weights) == len(graph.initializer):
            continue  # nothing to remove, and a copy may be large
        values = [type(value).FromString(value.SerializeToString()) for value in values]
        del part[:]
        part.extend(values)
    del graph.value_info[:]


def _inlined(path: Path, model: ModelProto) -> ModelProto:
    """A copy with functions inlined. ModelError where one cannot be: its calls would be taken for operators."""
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
                f"{path}: {Origin.of(node)} calls a function that cannot be inlined (of another opset than the "
                "model's, or of itself); export it anew"
            )
    _check_operators(path, copy)
    return copy


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
    """ModelError for graphs within the graph, also unused ones: no other check looks inside."""
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            if node.op_type in CONTROL_FLOW or any(a.HasField("g") or a.graphs for a in node.attribute):
                raise ModelError(
                    f"{path}: {Origin.of(node)} is control flow, whose path may depend on the data; "
                    "export a model without it"
                )


def _check_operators(path: Path, model: ModelProto) -> None:
    """ModelError for unsupported domains, quantised, random and training-mode operators, in functions too."""
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
                raise ModelError(f"{path}: {Origin.of(node)} is quantised; export the model in floating point")
            if node.op_type in RANDOM:
                raise ModelError(
                    f"{path}: {Origin.of(node)} draws random numbers, so the model is no fixed function; "
                    "export it without"
                )
            if node.op_type == "BatchNormalization" and _is_training(node):
                raise ModelError(f"{path}: {Origin.of(node)} is in training mode; call model.eval() before exporting")
            if node.domain == ml_operators.DOMAIN and node.op_type in ml_operators.SUPPORTED:
                continue
            if node.domain not in DEFAULT_DOMAINS and (node.domain, node.op_type) not in local:
                raise ModelError(
                    f"{path}: {Origin.of(node)} comes from the operator set '{shown(node.domain)}', which is not "
                    "supported; export with standard ONNX operators"
                )
    if model.graph.sparse_initializer:
        raise ModelError(f"{path}: sparse weights are not supported; export dense ones")


def _is_training(node: NodeProto) -> bool:
    """Whether a batch norm takes its statistics from the batch: by its attribute or, before opset 14, its outputs."""
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
    """ModelError for attributes that an operator does not have: onnx.reference would set them on an object by name."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for node in model.graph.node:
        domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
        version = versions.get(domain, versions.get("ai.onnx", 1))
        known = onnx.defs.get_schema(node.op_type, version, domain).attributes
        for attribute in node.attribute:
            if attribute.name not in known:
                raise ModelError(
                    f"{path}: {Origin.of(node)} has the attribute '{shown(attribute.name)}', which its operator does "
                    "not have; export it anew"
                )


def _check_names(path: Path, graph: GraphProto) -> None:
    """ModelError unless every value is written exactly once, and before it is read."""
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
                raise ModelError(f"{path}: {Origin.of(node)} reads the tensor '{shown(name)}', {why}; export it anew")
        for name in node.output:
            if name and name in written:
                raise ModelError(
                    f"{path}: {Origin.of(node)} writes the tensor '{shown(name)}' a second time; export it anew"
                )
            if name:
                written.add(name)
    for value in graph.output:
        if value.name not in written:
            raise ModelError(f"{path}: the output '{shown(value.name)}' is computed nowhere; export it anew")
