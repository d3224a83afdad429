"""An ONNX graph of any exporter and opset -> the few operators of one opset that are converted and lowered.

Works on an `Interpretation`: shapes are known, constants are folded, so that

- every data movement (slices, transposes, splits, padding by copies, nearest-neighbour resizing, ...) is read off
  numbered entries and becomes one `Select`, or a Reshape where the order stays; whatever the opset's form, and with
  the batch free;
- activations, in one node or decomposed, become one `Activation`;
- the affine operators are rewritten to one form each, at TARGET_OPSET.

A new operator is one entry in REWRITES (or a name in MOVEMENTS).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from certify_cli.errors import ModelError
from certify_cli.load import affine_rewrites as _affine  # noqa: F401  (enters its rewritings)
from certify_cli.load import sorted_pairs as _pairs  # noqa: F401  (likewise)
from certify_cli.load.interpret import Interpretation, evaluate
from certify_cli.load.normal import DOMAIN, REWRITES, Normal, attributes_of, emit_index, numbered_entries, rewrites
from certify_cli.load.patterns import fuse
from certify_cli.network.activations import Activation, from_onnx

TARGET_OPSET = 13
MOVEMENTS = {
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather", "GatherElements", "GatherND",
    "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "Identity",
}  # fmt: skip


def normalise(found: Interpretation, output: str) -> Normal:
    """Rewrite what leads to the value `output`. ModelError, naming node and operator, for what is not supported."""
    makers = {value: node for node in found.nodes for value in node.output if value}
    fused = _fuse_all(found, makers)
    normal = Normal(found, shapes={name: value.shape for name, value in found.values.items()})
    for node in _leading_to(output, found.nodes, makers, fused):
        if node.output[0] in fused:
            _emit_activation(normal, node, *fused[node.output[0]])
            continue
        for value in node.input:
            if value in found.constants:
                normal.constants[value] = found.constants[value]
        activation = _plain_activation(found, node)
        if activation is not None:
            _emit_activation(normal, node, activation, node.input[0])
        elif node.op_type in REWRITES:
            REWRITES[node.op_type](normal, node)
        else:
            raise found.refuse(
                node,
                "is not supported: an affine operator or an activation of the table is needed; replace the layer",
            )
    return normal


def _fuse_all(found: Interpretation, makers: dict[str, NodeProto]) -> dict[str, tuple[Activation, str]]:
    fused = {}
    for node in found.nodes:
        try:
            match = fuse(node, makers, found.constants)
        except ModelError as error:
            raise found.refuse(node, f"ends an activation that cannot be used: {error}") from error
        if match is not None and found.shape(match[1]) == found.shape(node.output[0]):
            fused[node.output[0]] = match
    return fused


def _leading_to(
    output: str, nodes: list[NodeProto], makers: dict[str, NodeProto], fused: dict[str, tuple[Activation, str]]
) -> list[NodeProto]:
    """The nodes that `output` needs, in order; a fused activation needs its argument only."""
    needed, stack = set(), [output]
    while stack:
        name = stack.pop()
        if name in needed or name not in makers:
            continue
        needed.add(name)
        stack.extend([fused[name][1]] if name in fused else makers[name].input)
    return [node for node in nodes if needed & set(node.output)]


# --- activations ------------------------------------------------------------------------------------------------


def _plain_activation(found: Interpretation, node: NodeProto) -> Activation | None:
    attributes = attributes_of(node)
    operator = node.op_type
    if operator == "Clip":
        for key, value in zip(("min", "max"), node.input[1:], strict=False):
            if value:
                attributes[key] = _scalar(found, node, value)
    if operator == "PRelu":
        operator, attributes = "LeakyRelu", {"alpha": _scalar(found, node, node.input[1])}
    try:
        return from_onnx(operator, attributes)
    except ModelError as error:
        raise found.refuse(node, f"cannot be used: {error}") from error


def _scalar(found: Interpretation, node: NodeProto, name: str) -> float:
    array = found.constants.get(name)
    if array is None or (array.size > 1 and np.ptp(array) > 0):
        raise found.refuse(node, f"needs one constant number for {name!r}; replace the layer")
    return float(np.ravel(array)[0])


def _emit_activation(normal: Normal, node: NodeProto, activation: Activation, argument: str) -> None:
    row = {"name": activation.name, "parameters": activation.parameters, "deviation": activation.deviation}
    normal.emit(node, "Activation", [argument], node.output[0], DOMAIN, row=json.dumps(row))


# --- data movement ----------------------------------------------------------------------------------------------


@rewrites(*MOVEMENTS)
def _move(normal: Normal, node: NodeProto) -> None:
    """Any movement: number the entries of the data operand, let the node itself move them, and read the index off."""
    found = normal.found
    moving = [value for value in node.input if value in found.values]
    if len(moving) != 1 or node.input[0] != moving[0]:
        raise found.refuse(node, "moves data to places that depend on the data, which is not supported")
    shape = found.shape(moving[0])
    outputs = evaluate(
        found, node, [numbered_entries(shape), *(found.constants.get(value) for value in node.input[1:])]
    )
    for value, output in zip(node.output, outputs, strict=False):
        if value:
            emit_index(normal, node, moving[0], value, output)


@rewrites("Upsample", "Resize")
def _resize(normal: Normal, node: NodeProto) -> None:
    mode = attributes_of(node).get("mode", "nearest")
    if mode != "nearest":
        raise normal.found.refuse(node, f"resizes by {mode!r}, which is not supported; use nearest")
    _move(normal, node)


@rewrites("Pad")
def _pad(normal: Normal, node: NodeProto) -> None:
    """Whatever the mode: what the node makes of zeros is its frame, and the rest is movement (zeros moved in)."""
    found = normal.found
    constants = [found.constants.get(value) for value in node.input[1:]]
    frame = evaluate(found, node, [np.zeros(found.shape(node.input[0])), *constants])[0]
    moved = evaluate(found, node, [numbered_entries(found.shape(node.input[0])), *constants])[0] - frame
    if not frame.any():
        emit_index(normal, node, node.input[0], node.output[0], moved)
        return
    bare = normal.part(node)
    emit_index(normal, node, node.input[0], bare, moved)
    normal.emit(node, "Add", [bare, normal.constant(node, frame)], node.output[0])


@rewrites("Dropout")
def _dropout(normal: Normal, node: NodeProto) -> None:
    training = normal.found.constants.get(node.input[2]) if len(node.input) > 2 else None
    if training is not None and bool(training):
        raise normal.found.refuse(node, "is in training mode; call model.eval() before exporting")
    if len(node.output) > 1 and any(node.output[1] in other.input for other in normal.found.nodes):
        raise normal.found.refuse(node, "gives its mask to other nodes, which is not supported")
    normal.same[node.output[0]] = normal.same.get(node.input[0], node.input[0])


@rewrites("Cast", "CastLike")
def _cast(normal: Normal, node: NodeProto) -> None:
    """Between float types nothing happens in exact arithmetic; the interpretation has widened both sides."""
    if normal.found.values[node.output[0]].dtype != np.float64:
        raise normal.found.refuse(node, "rounds data to another type, which is not supported; drop the cast")
    normal.same[node.output[0]] = normal.same.get(node.input[0], node.input[0])


def to_model(normal: Normal, source: str, output: str) -> ModelProto:
    """The rewritten graph as an ONNX model in float64 with a free batch, every value's shape declared."""

    def declare(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["N", *normal.shapes[name][1:]])

    output = normal.same.get(output, output)
    read = {value for node in normal.nodes for value in node.input}
    initializers = [numpy_helper.from_array(array, name) for name, array in normal.constants.items() if name in read]
    made = [node.output[0] for node in normal.nodes if node.output[0] in normal.shapes and node.output[0] != output]
    graph = helper.make_graph(
        normal.nodes,
        "curvcert",
        [declare(source)],
        [declare(output)],
        initializers,
        value_info=[declare(v) for v in made],
    )
    opsets = [helper.make_opsetid("", TARGET_OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets)
