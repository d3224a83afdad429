"""Rewrites an ONNX graph of any exporter and opset to few operators of one opset, which are converted and lowered.

The input is a `Trace`, in which shapes are known and constants are folded:

- every data movement (slices, transposes, splits, padding by copies, nearest-neighbour resizing, ...) is read off
  numbered entries and becomes one `Select`, or a Reshape where the order is kept, with the batch free;
- an activation, in one node or decomposed into several, becomes one `Activation`;
- each affine operator is rewritten to one form, at TARGET_OPSET.

A new operator is one entry in REWRITES (or a name in MOVEMENTS).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from certify_cli.errors import ModelError
from certify_cli.load.onnx import affine_rewrites as _affine  # noqa: F401  (enters its rewritings)
from certify_cli.load.onnx import max_min_rewrites as _pairs  # noqa: F401  (likewise)
from certify_cli.load.onnx import pool_rewrites as _pools  # noqa: F401  (likewise)
from certify_cli.load.onnx.interpret import Trace, keeps_type
from certify_cli.load.onnx.operators import attributes_of
from certify_cli.load.onnx.patterns import fuse
from certify_cli.load.onnx.refused_blocks import block_of
from certify_cli.load.onnx.rewriting import DOMAIN, REWRITES, RewrittenGraph, Subgraph, move, rewrites
from certify_cli.network.activations import ACTIVATIONS, Activation, from_onnx

TARGET_OPSET = 13
LARGE = 2**16
"""Number of entries from which on a weight counts as large."""
MOVEMENTS = {
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather", "GatherElements", "GatherND",
    "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "Identity", "Pad", "Resize", "Upsample",
}  # fmt: skip
BATCHED = {
    "Conv",
    "ConvTranspose",
    "BatchNormalization",
    "MaxPool",
    "AveragePool",
    "GlobalMaxPool",
    "GlobalAveragePool",
}
PRODUCTS = {"Mul", "Div", "MatMul"}
"""Not affine where both operands depend on the input."""


def normalise(trace: Trace, output: str) -> RewrittenGraph:
    """Rewrite the part that leads to the value `output`. ModelError, naming node and operator, for unsupported ones."""
    producers = {value: node for node in trace.nodes for value in node.output if value}
    fused = _fuse_all(trace, producers)
    rewritten = RewrittenGraph(trace, shapes={name: trace.shape(name) for name in trace.values})
    for node in _leading_to(output, trace.nodes, producers, fused):
        if node.output[0] in fused:
            activation, argument = fused[node.output[0]]
            _emit_activation(rewritten, node, activation, argument)
            before = _between(argument, node, trace.nodes, producers)
            rewritten.subgraphs.append(Subgraph(before, (argument,), node.output[0]))
            continue
        for value in node.input:
            if value in trace.constants:
                rewritten.constants[value] = _per_sample(trace, trace.constants[value])
        _rewrite(rewritten, node)
        data = tuple(dict.fromkeys(value for value in node.input if value in trace.values))
        rewritten.subgraphs += [Subgraph((node,), data, value) for value in node.output if value in trace.values]
    _flatten(rewritten, output)
    return rewritten


def _flatten(rewritten: RewrittenGraph, output: str) -> None:
    """Reshape the logits to a vector, where all other axes have one entry; a single logit z becomes (0, z)."""
    rewritten.output = output
    if not rewritten.nodes:
        return
    shape = rewritten.shapes[output]
    size = max(shape)
    last = next(node for node in rewritten.trace.nodes if output in node.output)
    if len(shape) != 2 and int(np.prod(shape)) == size:
        rewritten.output = rewritten.fresh_value((1, size))
        target = rewritten.constant(np.array([-1, size], dtype=np.int64))
        rewritten.emit(last, "Reshape", [output, target], rewritten.output)
    if size == 1:
        single, rewritten.output = rewritten.output, rewritten.fresh_value((1, 2))
        rewritten.emit(last, "MatMul", [single, rewritten.constant(np.array([[0.0, 1.0]]))], rewritten.output)


def _rewrite(rewritten: RewrittenGraph, node: NodeProto) -> None:
    trace = rewritten.trace
    data = [value for value in node.input if value in trace.values]
    if node.op_type in BATCHED and data and data[0] in trace.unbatched:
        raise trace.refuse(node, "takes a batch of images, and here a value without a batch axis; export with one")
    if node.op_type not in REWRITES or node.op_type == "Pow" or (node.op_type in PRODUCTS and len(data) > 1):
        block = block_of(trace, node)
        if block is not None:
            raise trace.refuse(node, f"is not supported: it is part of {block}")
    activation = _plain_activation(trace, node)
    if activation is not None:
        _emit_activation(rewritten, node, activation, node.input[0])
    elif node.op_type in REWRITES:
        REWRITES[node.op_type](rewritten, node)
    else:
        raise trace.refuse(
            node, "is not supported: an affine operator or an activation of the table is needed; replace the layer"
        )


def _per_sample(trace: Trace, constant: np.ndarray) -> np.ndarray:
    """The constant without its repetition along a fixed batch, where it has one."""
    batch = trace.model_input.batch or 1
    if batch > 1 and constant.ndim > 1 and len(constant) == batch and (constant == constant[:1]).all():
        return constant[:1]
    return constant


def _between(
    argument: str, node: NodeProto, nodes: list[NodeProto], producers: dict[str, NodeProto]
) -> tuple[NodeProto, ...]:
    """The nodes that compute a fused activation from its argument, in order."""
    needed, stack = set(), list(node.output)
    while stack:
        name = stack.pop()
        if name != argument and name in producers and name not in needed:
            needed.add(name)
            stack.extend(producers[name].input)
    return tuple(other for other in nodes if needed & set(other.output))


def _fuse_all(trace: Trace, producers: dict[str, NodeProto]) -> dict[str, tuple[Activation, str]]:
    fused = {}
    for node in trace.nodes:
        try:
            match = fuse(node, producers, trace.constants)
        except ModelError as error:
            raise trace.refuse(node, f"ends an activation that cannot be used: {error}") from error
        if match is not None and trace.values[match[1]].shape == trace.values[node.output[0]].shape:
            fused[node.output[0]] = match
    return fused


def _leading_to(
    output: str, nodes: list[NodeProto], producers: dict[str, NodeProto], fused: dict[str, tuple[Activation, str]]
) -> list[NodeProto]:
    """The nodes that lead to `output`, in order; only the argument of a fused activation is followed."""
    needed, stack = set(), [output]
    while stack:
        name = stack.pop()
        if name in needed or name not in producers:
            continue
        needed.add(name)
        stack.extend([fused[name][1]] if name in fused else producers[name].input)
    return [node for node in nodes if needed & set(node.output)]


# --- activations ------------------------------------------------------------------------------------------------


def _plain_activation(trace: Trace, node: NodeProto) -> Activation | None:
    attributes = attributes_of(node)
    operator = node.op_type
    if operator == "Clip":
        for key, value in zip(("min", "max"), node.input[1:], strict=False):
            if value:
                attributes[key] = _scalar(trace, node, value)
        if not {"min", "max"} & set(attributes):
            return None
    if operator == "PRelu" and np.ptp(trace.constants.get(node.input[1], 0.0)) > 0:
        return None
    if operator == "PRelu":
        operator, attributes = "LeakyRelu", {"alpha": _scalar(trace, node, node.input[1])}
    try:
        return from_onnx(operator, attributes)
    except ModelError as error:
        raise trace.refuse(node, f"cannot be used: {error}") from error


def _scalar(trace: Trace, node: NodeProto, name: str) -> float:
    array = trace.constants.get(name)
    if array is None or (array.size > 1 and np.ptp(array) > 0):
        raise trace.refuse(node, f"needs one constant number for {name!r}; replace the layer")
    return float(np.ravel(array)[0])


def _emit_activation(
    rewritten: RewrittenGraph, node: NodeProto, activation: Activation, argument: str, output: str | None = None
) -> None:
    row = {"name": activation.name, "parameters": activation.parameters, "deviation": activation.deviation}
    rewritten.emit(node, "Activation", [argument], output or node.output[0], DOMAIN, row=json.dumps(row))


# --- data movement ----------------------------------------------------------------------------------------------

rewrites(*MOVEMENTS)(move)


@rewrites("Dropout")
def _dropout(rewritten: RewrittenGraph, node: NodeProto) -> None:
    if len(node.output) > 1 and any(node.output[1] in other.input for other in rewritten.trace.nodes):
        raise rewritten.trace.refuse(node, "gives its mask to other nodes, which is not supported")
    rewritten.alias(node.input[0], node.output[0])


@rewrites("Cast", "CastLike")
def _cast(rewritten: RewrittenGraph, node: NodeProto) -> None:
    """A cast to a wider float type or float32 has no effect in exact arithmetic; one to 16 bits is refused."""
    trace = rewritten.trace
    if trace.values[node.output[0]].dtype != np.float64:
        raise trace.refuse(node, "rounds data to another type, which is not supported; drop the cast")
    if not keeps_type(trace, node):
        raise trace.refuse(
            node,
            "rounds data to 16 bits, a step function of them, which is not supported; export the model in float32, or "
            "with an input of the weights' type",
        )
    rewritten.alias(node.input[0], node.output[0])


@rewrites("Clip")
def _clip(rewritten: RewrittenGraph, node: NodeProto) -> None:
    """A Clip without bounds, the identity; with a bound it is an activation."""
    rewritten.alias(node.input[0], node.output[0])


@rewrites("PRelu")
def _leaky_by_channel(rewritten: RewrittenGraph, node: NodeProto) -> None:
    """max(x, 0) + slope min(x, 0), where slopes differ by channel."""
    above, below, scaled = (rewritten.fresh_value() for _ in range(3))
    _emit_activation(rewritten, node, ACTIVATIONS["relu"](), node.input[0], above)
    _emit_activation(rewritten, node, ACTIVATIONS["clip"](high=0.0), node.input[0], below)
    rewritten.emit(node, "Mul", [below, node.input[1]], scaled)
    rewritten.emit(node, "Add", [above, scaled], node.output[0])


@rewrites("Pow")
def _power(rewritten: RewrittenGraph, node: NodeProto) -> None:
    trace = rewritten.trace
    power = trace.constants.get(node.input[1])
    if power is None or not (power == 1).all() or trace.shape(node.output[0]) != trace.shape(node.input[0]):
        raise trace.refuse(
            node, "is not supported: a power of the data is no activation of the table; replace the layer"
        )
    rewritten.alias(node.input[0], node.output[0])


def _narrowed(array: np.ndarray) -> np.ndarray:
    """A large array of float64 in float32, if that is exact: the model passes through memory several times."""
    if array.dtype != np.float64 or array.size < LARGE:
        return array
    narrow = array.astype(np.float32)
    return narrow if np.array_equal(narrow, array) else array


def to_model(rewritten: RewrittenGraph, source: str) -> ModelProto:
    """The rewritten graph as an ONNX model in float64 with a free batch, every value's shape declared.

    Large weights are written in float32 where that holds them exactly; the lowering widens them again.
    """

    def declare(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.DOUBLE, ["N", *rewritten.shapes[name][1:]])

    output = rewritten.resolved(rewritten.output)
    read = {value for node in rewritten.nodes for value in node.input}
    initializers = [
        numpy_helper.from_array(_narrowed(array), name) for name, array in rewritten.constants.items() if name in read
    ]
    made = [
        node.output[0] for node in rewritten.nodes if node.output[0] in rewritten.shapes and node.output[0] != output
    ]
    graph = helper.make_graph(
        rewritten.nodes,
        "curvcert",
        [declare(source)],
        [declare(output)],
        initializers,
        value_info=[declare(v) for v in made],
    )
    opsets = [helper.make_opsetid("", TARGET_OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets)
