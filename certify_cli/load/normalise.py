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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from certify_cli.errors import ModelError
from certify_cli.load.interpret import Interpretation, evaluate
from certify_cli.load.patterns import fuse
from certify_cli.network.activations import Activation, from_onnx

TARGET_OPSET = 13
DOMAIN = "curvcert"
"""The domain of the operators that are ours: Select and Activation."""

MOVEMENTS = {
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather", "GatherElements", "GatherND",
    "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "Identity",
}  # fmt: skip


@dataclass
class Normal:
    """The rewritten graph: `nodes` in order, the constants they read, and what rewriting them cannot express."""

    found: Interpretation
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    origin: dict[str, NodeProto] = field(default_factory=dict)
    """Name of a rewritten node -> the node of the file that it comes from."""

    def emit(
        self, node: NodeProto, operator: str, inputs: list[str], output: str, domain: str = "", **attributes: Any
    ) -> str:
        """Append one node in place of (a part of) `node` and return the name of its value."""
        base = node.name or f"{node.op_type}_{node.output[0]}"
        name, count = base, 1
        while name in self.origin:
            count += 1
            name = f"{base}.{count}"
        self.origin[name] = node
        inputs = [self.same.get(value, value) for value in inputs]
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, domain=domain, **attributes))
        return output

    def constant(self, node: NodeProto, array: np.ndarray) -> str:
        name = f"{node.output[0]}/constant/{len(self.constants)}"
        self.constants[name] = array
        return name

    def part(self, node: NodeProto) -> str:
        """A fresh name for a value between the nodes that replace `node`."""
        return f"{node.output[0]}/part/{len(self.nodes)}"


Rewrite = Callable[[Normal, NodeProto], None]
REWRITES: dict[str, Rewrite] = {}


def rewrites(*operators: str) -> Callable[[Rewrite], Rewrite]:
    """Enter a rewriting for these operators; a second entry is refused."""

    def enter(rule: Rewrite) -> Rewrite:
        for operator in operators:
            if operator in REWRITES or operator in MOVEMENTS:
                raise ValueError(f"{operator} is entered twice")
            REWRITES[operator] = rule
        return rule

    return enter


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
        elif node.op_type in MOVEMENTS:
            _move(normal, node)
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


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Attributes as Python numbers, text and lists."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {key: value.decode() if isinstance(value, bytes) else value for key, value in values.items()}


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


def _move(normal: Normal, node: NodeProto) -> None:
    """Any movement: number the entries of the data operand, let the node itself move them, and read the index off."""
    found = normal.found
    moving = [value for value in node.input if value in found.values]
    if len(moving) != 1 or node.input[0] != moving[0]:
        raise found.refuse(node, "moves data to places that depend on the data, which is not supported")
    shape = found.shape(moving[0])
    outputs = evaluate(found, node, [_numbered(shape), *(found.constants.get(value) for value in node.input[1:])])
    for value, output in zip(node.output, outputs, strict=False):
        if value:
            _emit_index(normal, node, moving[0], value, output)


def _numbered(shape: tuple[int, ...]) -> np.ndarray:
    """1, 2, 3, ... row-major; 0 is left for zeros that are moved in."""
    return np.arange(1.0, np.prod(shape) + 1).reshape(shape)


def _emit_index(normal: Normal, node: NodeProto, source: str, value: str, numbered: np.ndarray) -> None:
    """`value` from `source`, both one sample: entry j is entry numbered[j] - 1 of the source, or zero."""
    before = normal.found.shape(source)
    if np.array_equal(numbered.ravel(), np.arange(1, np.prod(before) + 1)):
        if numbered.shape == before:
            normal.same[value] = normal.same.get(source, source)
            return
        target = normal.constant(node, np.array([-1, *numbered.shape[1:]], dtype=np.int64))
        normal.emit(node, "Reshape", [source, target], value)
        return
    index = normal.constant(node, numbered[0].astype(np.int64) - 1)
    normal.emit(node, "Select", [source, index], value, DOMAIN)


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
    moved = evaluate(found, node, [_numbered(found.shape(node.input[0])), *constants])[0] - frame
    if not frame.any():
        _emit_index(normal, node, node.input[0], node.output[0], moved)
        return
    bare = normal.part(node)
    _emit_index(normal, node, node.input[0], bare, moved)
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


# --- affine operators -------------------------------------------------------------------------------------------


@rewrites("Add", "Sub", "Mul", "Div", "MatMul", "Neg", "Sum")
def _as_it_is(normal: Normal, node: NodeProto) -> None:
    normal.emit(node, node.op_type, list(node.input), node.output[0])


@rewrites("Concat")
def _concat(normal: Normal, node: NodeProto) -> None:
    axis = int(attributes_of(node)["axis"]) % len(normal.found.shape(node.output[0]))
    normal.emit(node, "Concat", list(node.input), node.output[0], axis=axis)


@rewrites("Gemm")
def _gemm(normal: Normal, node: NodeProto) -> None:
    """alpha A B + beta C as a product (with C as its bias where alpha is 1) and, otherwise, a scale and a sum."""
    found, attributes = normal.found, attributes_of(node)
    a, b, *rest = node.input
    if b not in found.constants or attributes.get("transA", 0):
        raise found.refuse(node, "must multiply the data by a constant matrix from the right; export a Linear layer")
    alpha, beta = (float(attributes.get(key, 1.0)) for key in ("alpha", "beta"))
    width = found.shape(node.output[0])[1]
    inputs = [a, b]
    bias = None
    if rest and rest[0]:
        bias = rest[0]
        if bias in found.constants:
            # float32 numbers times a float32 beta: exact in float64
            row = np.broadcast_to(found.constants[bias] * beta, (1, width))[0]
            bias = normal.constant(node, np.ascontiguousarray(row))
        elif beta != 1:
            raise found.refuse(node, "adds a multiple of a value that depends on the input; use beta = 1")
    if alpha == 1 and bias in normal.constants:
        normal.emit(node, "Gemm", [*inputs, str(bias)], node.output[0], transB=int(attributes.get("transB", 0)))
        return
    product = normal.part(node) if alpha != 1 or bias else node.output[0]
    normal.emit(node, "Gemm", inputs, product, transB=int(attributes.get("transB", 0)))
    if alpha != 1:
        scaled = normal.part(node) if bias else node.output[0]
        normal.emit(node, "Mul", [product, normal.constant(node, np.array(alpha))], scaled)
        product = scaled
    if bias:
        normal.emit(node, "Add", [product, bias], node.output[0])


def _explicit_pads(normal: Normal, node: NodeProto, kernel: list[int]) -> list[int]:
    """[begin..., end...], `auto_pad` worked out."""
    attributes = attributes_of(node)
    rule = attributes.get("auto_pad", "NOTSET")
    if rule in ("NOTSET", ""):
        return [int(p) for p in attributes.get("pads", [0] * 2 * len(kernel))]
    if rule == "VALID":
        return [0] * 2 * len(kernel)
    strides = attributes.get("strides", [1] * len(kernel))
    dilations = attributes.get("dilations", [1] * len(kernel))
    begin, end = [], []
    for n, k, s, d in zip(normal.found.shape(node.input[0])[2:], kernel, strides, dilations, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        small, large = total // 2, total - total // 2
        begin.append(small if rule == "SAME_UPPER" else large)
        end.append(large if rule == "SAME_UPPER" else small)
    return begin + end


def _spatial_pad(normal: Normal, node: NodeProto, pads: list[int]) -> str:
    """The node's input with zeros around its pixels."""
    half, shape = len(pads) // 2, normal.found.shape(node.input[0])
    widths = [(0, 0), (0, 0), *zip(pads[:half], pads[half:], strict=True)]
    moved = np.pad(_numbered(shape), widths)
    padded = normal.part(node)
    normal.shapes[padded] = moved.shape
    _emit_index(normal, node, node.input[0], padded, moved)
    return padded


@rewrites("Conv", "ConvTranspose")
def _conv(normal: Normal, node: NodeProto) -> None:
    found, attributes = normal.found, attributes_of(node)
    if any(value and value not in found.constants for value in node.input[1:]):
        raise found.refuse(node, "has weights that are computed from the input, which is not supported")
    kernel = list(found.constants[node.input[1]].shape[2:])
    kept = {key: attributes[key] for key in ("strides", "dilations", "group", "output_padding") if key in attributes}
    if node.op_type == "ConvTranspose" and (
        attributes.get("auto_pad", "NOTSET") != "NOTSET" or attributes.get("output_shape")
    ):
        raise found.refuse(node, "leaves its padding to be worked out; export explicit pads")
    pads = _explicit_pads(normal, node, kernel)
    source, half = node.input[0], len(pads) // 2
    if pads[:half] != pads[half:]:
        if node.op_type == "ConvTranspose":
            raise found.refuse(node, "pads unevenly, which is not supported; use the same padding on both sides")
        source, pads = _spatial_pad(normal, node, pads), [0] * len(pads)
    inputs = [source, *(value for value in node.input[1:] if value)]
    normal.emit(node, node.op_type, inputs, node.output[0], pads=pads, kernel_shape=kernel, **kept)


@rewrites("BatchNormalization")
def _batch_norm(normal: Normal, node: NodeProto) -> None:
    found, attributes = normal.found, attributes_of(node)
    if attributes.get("spatial", 1) != 1:
        raise found.refuse(
            node, "normalises every pixel by itself, which is not supported; export with opset 9 or newer"
        )
    if any(value not in found.constants for value in node.input[1:]):
        raise found.refuse(node, "has statistics that are computed from the input, which is not supported")
    epsilon = float(attributes.get("epsilon", np.float32(1e-5)))
    normal.emit(node, "BatchNormalization", list(node.input), node.output[0], epsilon=epsilon)


@rewrites("AveragePool")
def _average_pool(normal: Normal, node: NodeProto) -> None:
    found, attributes = normal.found, attributes_of(node)
    kernel = [int(k) for k in attributes["kernel_shape"]]
    pads, half = _explicit_pads(normal, node, kernel), len(kernel)
    strides, ceil = attributes.get("strides", [1] * half), int(attributes.get("ceil_mode", 0))
    if any(d != 1 for d in attributes.get("dilations", [])):
        raise found.refuse(node, "averages over dilated windows, which is not supported; use dilation 1")
    form = {"kernel_shape": kernel, "strides": strides}
    if pads[:half] == pads[half:]:
        include = int(attributes.get("count_include_pad", 0))
        form |= {"pads": pads, "ceil_mode": ceil, "count_include_pad": include}
        normal.emit(node, "AveragePool", [node.input[0]], node.output[0], **form)
        return
    if ceil:
        raise found.refuse(node, "pads unevenly and rounds its size up, which is not supported; use one of the two")
    padded = _spatial_pad(normal, node, pads)
    if attributes.get("count_include_pad", 0):
        normal.emit(node, "AveragePool", [padded], node.output[0], **form)
        return
    # the mean over the whole window, times its size, over the number of its pixels inside the image
    mean, total = normal.part(node), f"{normal.part(node)}/sum"
    normal.emit(node, "AveragePool", [padded], mean, **form)
    normal.emit(node, "Mul", [mean, normal.constant(node, np.array(float(np.prod(kernel))))], total)
    image = np.ones((1, 1, *found.shape(node.input[0])[2:]))
    widths = [(0, 0), (0, 0), *zip(pads[:half], pads[half:], strict=True)]
    whole = helper.make_node("AveragePool", ["x"], ["y"], **form)
    inside = evaluate(found, whole, [np.pad(image, widths)])[0] * np.prod(kernel)
    normal.emit(node, "Div", [total, normal.constant(node, np.rint(inside))], node.output[0])


@rewrites("MaxPool", "GlobalMaxPool")
def _max_pool(normal: Normal, node: NodeProto) -> None:
    found, attributes = normal.found, attributes_of(node)
    kernel = [int(k) for k in attributes.get("kernel_shape", found.shape(node.input[0])[2:])]
    pads, half = _explicit_pads(normal, node, kernel), len(kernel)
    if pads[:half] != pads[half:]:
        raise found.refuse(node, "pads unevenly, which is not supported; use the same padding on both sides")
    if len(node.output) > 1 and node.output[1] and any(node.output[1] in other.input for other in found.nodes):
        raise found.refuse(node, "gives its indices to other nodes, which is not supported")
    kept = {key: attributes[key] for key in ("strides", "dilations", "ceil_mode") if key in attributes}
    normal.emit(node, "MaxPool", [node.input[0]], node.output[0], kernel_shape=kernel, pads=pads, **kept)


@rewrites("GlobalAveragePool", "ReduceMean", "ReduceSum")
def _reduce(normal: Normal, node: NodeProto) -> None:
    found, attributes = normal.found, attributes_of(node)
    rank = len(found.shape(node.input[0]))
    axes, keep, operator = attributes.get("axes"), int(attributes.get("keepdims", 1)), node.op_type
    if operator == "GlobalAveragePool":
        axes, operator = list(range(2, rank)), "ReduceMean"
    elif len(node.input) > 1 and node.input[1]:
        axes = found.constants[node.input[1]].ravel().tolist()
    if not axes and attributes.get("noop_with_empty_axes", 0):
        normal.same[node.output[0]] = normal.same.get(node.input[0], node.input[0])
        return
    axes = sorted(int(axis) % rank for axis in axes or range(rank))
    if 0 in axes:
        raise found.refuse(node, "reduces over the batch; every value must keep the batch on its first axis")
    if operator == "ReduceMean":
        normal.emit(node, operator, [node.input[0]], node.output[0], axes=axes, keepdims=keep)
    else:
        where = normal.constant(node, np.array(axes, dtype=np.int64))
        normal.emit(node, operator, [node.input[0], where], node.output[0], keepdims=keep)


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
