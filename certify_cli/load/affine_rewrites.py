"""Rewritings of the affine operators and of max pooling: one form each."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, helper

from certify_cli.load.interpret import evaluate
from certify_cli.load.normal import Normal, attributes_of, emit_index, numbered_entries, rewrites


@rewrites("Add", "Sub", "Mul", "Div", "MatMul", "Neg", "Sum")
def _as_it_is(normal: Normal, node: NodeProto) -> None:
    normal.emit(node, node.op_type, list(node.input), node.output[0])


@rewrites("Concat")
def _concat(normal: Normal, node: NodeProto) -> None:
    axis = int(attributes_of(node)["axis"]) % len(normal.found.shape(node.output[0]))
    join(normal, node, list(node.input), node.output[0], axis)


def join(normal: Normal, node: NodeProto, parts: list[str], value: str, axis: int) -> None:
    """`value`: the parts one behind the other. What was cut from one value is put together as movement again."""
    origins = [normal.moved.get(part) for part in parts]
    sources = {origin[0] if origin else None for origin in origins}
    if len(sources) == 1 and None not in sources:
        numbered = np.concatenate([origin[1] for origin in origins if origin], axis=axis)
        emit_index(normal, node, next(source for source in sources if source), value, numbered)
        return
    normal.emit(node, "Concat", parts, value, axis=axis)


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
    moved = np.pad(numbered_entries(shape), widths)
    padded = normal.part(node)
    normal.shapes[padded] = moved.shape
    emit_index(normal, node, node.input[0], padded, moved)
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
