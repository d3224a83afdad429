"""Rewriting rules of the affine operators: each is brought to one form."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto

from certify_cli.load.onnx.operators import attributes_of, padding_of
from certify_cli.load.onnx.rewriting import RewrittenGraph, data_axis, emit_index, numbered_entries, rewrites


@rewrites("Add", "Sub", "Mul", "Div", "Neg", "Sum")
def _as_it_is(rewritten: RewrittenGraph, node: NodeProto) -> None:
    rewritten.emit(node, node.op_type, list(node.input), node.output[0])


@rewrites("Where")
def _where(rewritten: RewrittenGraph, node: NodeProto) -> None:
    """A choice by a constant condition: each operand times a mask of ones and zeros, and their sum."""
    trace = rewritten.trace
    condition, *operands = node.input
    if condition not in trace.constants:
        raise trace.refuse(node, "chooses by a condition that depends on the data, which is not supported")
    chosen = trace.constants[condition].astype(np.float64)
    terms = []
    for operand, mask in zip(operands, (chosen, 1 - chosen), strict=True):
        if operand in trace.values:
            terms.append(rewritten.fresh_value())
            rewritten.emit(node, "Mul", [operand, rewritten.constant(mask)], terms[-1])
        else:
            terms.append(rewritten.constant(np.where(mask > 0, trace.constants[operand], 0.0)))
    rewritten.emit(node, "Add", terms, node.output[0])


@rewrites("MatMul")
def _product(rewritten: RewrittenGraph, node: NodeProto) -> None:
    """A product; a matrix times a sample of one axis becomes that sample times the transposed matrix."""
    trace, (left, right) = rewritten.trace, node.input
    if right in trace.values and left in trace.constants and trace.values[right].ndim == 1:
        turned = rewritten.constant(np.ascontiguousarray(trace.constants[left].T))
        rewritten.emit(node, "MatMul", [right, turned], node.output[0])
        return
    rewritten.emit(node, "MatMul", [left, right], node.output[0])


@rewrites("Concat")
def _concat(rewritten: RewrittenGraph, node: NodeProto) -> None:
    trace = rewritten.trace
    output = node.output[0]
    data = [value for value in node.input if value in trace.values]
    if any((value in trace.unbatched) != (output in trace.unbatched) for value in data):
        raise trace.refuse(node, "joins values with and without a batch axis, which is not supported")
    axis = data_axis(trace, node, output, int(attributes_of(node)["axis"]))
    if len(data) == len(node.input):
        join(rewritten, node, data, output, axis)
        return
    _join_constants(rewritten, node, data, axis)


def _join_constants(rewritten: RewrittenGraph, node: NodeProto, data: list[str], axis: int) -> None:
    """A concatenation of data and constants: the data moved among zeros, plus a constant."""
    trace = rewritten.trace
    widths = [rewritten.shapes[value][axis] for value in data]
    shape = list(rewritten.shapes[data[0]])
    shape[axis] = sum(widths)
    joined = data[0]
    if len(data) > 1:
        joined = rewritten.fresh_value(tuple(shape))
        join(rewritten, node, data, joined, axis)
    numbers = iter(np.split(numbered_entries(tuple(shape)), np.cumsum(widths)[:-1], axis=axis))
    moved, frame = [], []
    for value in node.input:
        if value in trace.values:
            moved.append(next(numbers))
            frame.append(np.zeros_like(moved[-1]))
        else:
            constant = rewritten.constants[value]
            frame.append(constant[None] if node.output[0] in trace.unbatched else constant)
            moved.append(np.zeros_like(frame[-1]))
            if len(frame[-1]) != 1:
                raise trace.refuse(
                    node, "joins another constant to every sample of its batch; export with a free batch"
                )
    bare = rewritten.fresh_value(rewritten.shapes[node.output[0]])
    emit_index(rewritten, node, joined, bare, np.concatenate(moved, axis=axis))
    rewritten.emit(node, "Add", [bare, rewritten.constant(np.concatenate(frame, axis=axis))], node.output[0])


def join(rewritten: RewrittenGraph, node: NodeProto, parts: list[str], value: str, axis: int) -> None:
    """Append `value`, the concatenation of the parts; one movement where all parts are moved from the same value."""
    origins = [rewritten.movements.get(part) for part in parts]
    sources = {origin[0] if origin else None for origin in origins}
    if len(sources) == 1 and None not in sources:
        numbered = np.concatenate([origin[1] for origin in origins if origin], axis=axis)
        emit_index(rewritten, node, next(source for source in sources if source), value, numbered)
        return
    rewritten.emit(node, "Concat", parts, value, axis=axis)


@rewrites("Gemm")
def _gemm(rewritten: RewrittenGraph, node: NodeProto) -> None:
    """alpha A B + beta C: a product with bias C where alpha is 1, else a product, a scale and a sum."""
    trace, attributes = rewritten.trace, attributes_of(node)
    a, b, *rest = node.input
    if a not in trace.values or b not in trace.constants or attributes.get("transA", 0):
        raise trace.refuse(node, "must multiply the data by a constant matrix from the right; export a Linear layer")
    alpha, beta = (float(attributes.get(key, 1.0)) for key in ("alpha", "beta"))
    if a in trace.unbatched:
        _product_and_sum(rewritten, node, alpha, beta)
        return
    inputs = [a, b]
    bias = None
    if rest and rest[0]:
        bias = rest[0]
        if bias in trace.constants:
            # float32 numbers times a float32 beta: exact in float64
            rows = np.broadcast_to(trace.constants[bias] * beta, trace.values[node.output[0]].shape)
            if not (rows == rows[:1]).all():
                raise trace.refuse(node, "adds another bias to every sample of its batch; export with a free batch")
            bias = rewritten.constant(np.ascontiguousarray(rows[0]))
        elif beta != 1:
            raise trace.refuse(node, "adds a multiple of a value that depends on the input; use beta = 1")
    if alpha == 1 and bias in rewritten.constants:
        rewritten.emit(node, "Gemm", [*inputs, str(bias)], node.output[0], transB=int(attributes.get("transB", 0)))
        return
    product = rewritten.fresh_value() if alpha != 1 or bias else node.output[0]
    rewritten.emit(node, "Gemm", inputs, product, transB=int(attributes.get("transB", 0)))
    if alpha != 1:
        scaled = rewritten.fresh_value() if bias else node.output[0]
        rewritten.emit(node, "Mul", [product, rewritten.constant(np.array(alpha))], scaled)
        product = scaled
    if bias:
        rewritten.emit(node, "Add", [product, bias], node.output[0])


def _product_and_sum(rewritten: RewrittenGraph, node: NodeProto, alpha: float, beta: float) -> None:
    """Gemm where the sample is one matrix, without a batch axis."""
    trace = rewritten.trace
    a, b, *rest = node.input
    matrix = trace.constants[b].T if attributes_of(node).get("transB", 0) else trace.constants[b]
    bias = rest[0] if rest and rest[0] else None
    value = node.output[0]
    steps = [("MatMul", np.ascontiguousarray(matrix))]
    if alpha != 1:
        steps.append(("Mul", np.array(alpha)))
    if bias is not None:
        if bias not in trace.constants:
            raise trace.refuse(node, "adds a value that depends on the input to a single matrix; export a Linear layer")
        steps.append(("Add", trace.constants[bias] * beta))
    for number, (operator, constant) in enumerate(steps, start=1):
        after = value if number == len(steps) else rewritten.fresh_value()
        rewritten.emit(node, operator, [a, rewritten.constant(constant)], after)
        a = after


def spatial_pad(rewritten: RewrittenGraph, node: NodeProto, source: str, pads: list[tuple[int, int]]) -> str:
    """The value padded with zeros around its pixels; negative widths cut pixels off."""
    shape = rewritten.shapes[source]
    cut = [slice(max(-begin, 0), n - max(-end, 0)) for n, (begin, end) in zip(shape[2:], pads, strict=True)]
    added = [(max(begin, 0), max(end, 0)) for begin, end in pads]
    moved = np.pad(numbered_entries(shape)[(slice(None), slice(None), *cut)], [(0, 0), (0, 0), *added])
    padded = rewritten.fresh_value(moved.shape)
    emit_index(rewritten, node, source, padded, moved)
    return padded


@rewrites("Conv")
def _conv(rewritten: RewrittenGraph, node: NodeProto) -> None:
    """A convolution; unequal padding is a separate step before it."""
    kernel, kept = _convolution(rewritten, node)
    pads = padding_of(attributes_of(node), rewritten.trace.shape(node.input[0])[2:], kernel)
    source = node.input[0]
    if any(begin != end or begin < 0 for begin, end in pads):
        source, pads = spatial_pad(rewritten, node, source, pads), [(0, 0)] * len(pads)
    inputs = [source, *(value for value in node.input[1:] if value)]
    flat = [begin for begin, _ in pads] * 2
    rewritten.emit(node, "Conv", inputs, node.output[0], pads=flat, kernel_shape=kernel, **kept)


@rewrites("ConvTranspose")
def _conv_transpose(rewritten: RewrittenGraph, node: NodeProto) -> None:
    """A transposed convolution; unequal padding, which cuts pixels off its output, is a separate step after it."""
    trace, attributes = rewritten.trace, attributes_of(node)
    kernel, kept = _convolution(rewritten, node)
    if attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "") or attributes.get("output_shape"):
        raise trace.refuse(node, "leaves its padding to be worked out; export explicit pads")
    pads = padding_of(attributes, [0] * len(kernel), kernel)
    inputs = [value for value in node.input if value]
    kept |= {"output_padding": attributes["output_padding"]} if "output_padding" in attributes else {}
    if all(begin == end and begin >= 0 for begin, end in pads):
        flat = [begin for begin, _ in pads] * 2
        rewritten.emit(node, "ConvTranspose", inputs, node.output[0], pads=flat, kernel_shape=kernel, **kept)
        return
    batch, channels, *space = trace.shape(node.output[0])
    whole = rewritten.fresh_value((batch, channels, *(n + sum(pair) for n, pair in zip(space, pads, strict=True))))
    rewritten.emit(node, "ConvTranspose", inputs, whole, pads=[0] * 2 * len(kernel), kernel_shape=kernel, **kept)
    rewritten.alias(spatial_pad(rewritten, node, whole, [(-begin, -end) for begin, end in pads]), node.output[0])


def _convolution(rewritten: RewrittenGraph, node: NodeProto) -> tuple[list[int], dict[str, Any]]:
    """The kernel's shape, and the attributes that are kept."""
    trace, attributes = rewritten.trace, attributes_of(node)
    if any(value and value not in trace.constants for value in node.input[1:]):
        raise trace.refuse(node, "has weights that are computed from the input, which is not supported")
    kernel = list(trace.constants[node.input[1]].shape[2:])
    return kernel, {key: attributes[key] for key in ("strides", "dilations", "group") if key in attributes}


@rewrites("BatchNormalization")
def _batch_norm(rewritten: RewrittenGraph, node: NodeProto) -> None:
    trace, attributes = rewritten.trace, attributes_of(node)
    if attributes.get("spatial", 1) != 1:
        raise trace.refuse(
            node, "normalises every pixel by itself, which is not supported; export with opset 9 or newer"
        )
    if any(value not in trace.constants for value in node.input[1:]):
        raise trace.refuse(node, "has statistics that are computed from the input, which is not supported")
    epsilon = float(attributes.get("epsilon", np.float32(1e-5)))
    rewritten.emit(node, "BatchNormalization", list(node.input), node.output[0], epsilon=epsilon)


@rewrites("GlobalAveragePool", "ReduceMean", "ReduceSum")
def _reduce(rewritten: RewrittenGraph, node: NodeProto) -> None:
    trace, attributes = rewritten.trace, attributes_of(node)
    source = node.input[0]
    rank = trace.values[source].ndim
    axes, keep, operator = attributes.get("axes"), int(attributes.get("keepdims", 1)), node.op_type
    if operator == "GlobalAveragePool":
        axes, operator = list(range(2, rank)), "ReduceMean"
    elif len(node.input) > 1 and node.input[1]:
        axes = trace.constants[node.input[1]].ravel().tolist()
    if not axes and attributes.get("noop_with_empty_axes", 0):
        rewritten.alias(source, node.output[0])
        return
    counted = sorted({int(axis) % rank for axis in axes or range(rank)})
    if 0 in counted and source not in trace.unbatched:
        raise trace.refuse(node, "reduces over the batch; every value must keep the batch on its first axis")
    axes = [data_axis(trace, node, source, axis) for axis in counted]
    output = node.output[0]
    if not keep and len(axes) == len(rewritten.shapes[source]) - 1:
        # a single number per sample keeps one axis
        keep, output = 1, rewritten.fresh_value()
        target = rewritten.constant(np.array([-1, 1], dtype=np.int64))
    if operator == "ReduceMean":
        rewritten.emit(node, operator, [source], output, axes=axes, keepdims=keep)
    else:
        where = rewritten.constant(np.array(axes, dtype=np.int64))
        rewritten.emit(node, operator, [source, where], output, keepdims=keep)
    if output != node.output[0]:
        rewritten.emit(node, "Reshape", [output, target], node.output[0])
