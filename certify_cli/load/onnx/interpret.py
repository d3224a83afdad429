"""Evaluates an ONNX graph on one sample, node by node, in float64; folds constants and finds all shapes.

Weights are upcast exactly before any computation, so constants that the file leaves to be computed (a transposed
weight, sqrt(var + eps)) are those of float64 arithmetic on the stored weights. Integers and truth values computed from
constants (an index, a size) are decisions, not approximations: they are computed in the stored types, as in deployment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from certify_cli.errors import ModelError, first_line, shown
from certify_cli.load.onnx.model_input import ModelInput
from certify_cli.load.onnx.neutral_names import Graph, Names, Origin
from certify_cli.load.onnx.operators import OPERATORS, attributes_of
from certify_cli.load.onnx.outputs import FLOATS
from certify_cli.network.graph import MAX_VALUES

MAX_ENTRIES = 2**27
"""The largest value (entries) that a graph may make: 1 GiB in float64."""

FEW = 1024
"""Largest number of entries of an operand that shape inference reads."""

WIDE = (TensorProto.FLOAT, TensorProto.DOUBLE)


@dataclass(eq=False)
class Trace:
    """The trace of an evaluation on one sample: constants, and values that depend on the input.

    constants, values: by neutral name, in float64, of the file's shapes.
    native: constants in the file's own types, where these could be computed.
    kinds: the element type of every value in the file.
    nodes: those whose values depend on the input, in order.
    unbatched: values without a batch axis.
    """

    path: Path
    opset: int
    model_input: ModelInput
    origin: Mapping[str, Origin]
    names: Names
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    native: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    nodes: list[NodeProto] = field(default_factory=list)
    unbatched: set[str] = field(default_factory=set)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one sample's value with a batch of one in front; a single number has one axis."""
        own = self.values[name].shape
        return (1, *own) if name in self.unbatched else (1, *(own[1:] or (1,)))

    def size(self, name: str) -> int:
        """Number of entries of one sample's value."""
        return math.prod(self.shape(name))

    def samples(self, name: str, array: np.ndarray) -> np.ndarray:
        """A value of the file's shape with the batch as its first axis."""
        if name in self.unbatched:
            return array[None]
        return array[:, None] if array.ndim == 1 else array

    def to_file_shape(self, name: str, sample: np.ndarray) -> np.ndarray:
        """One sample's value (1, ...) in the file's own shape, repeated where the batch is fixed."""
        if name in self.unbatched:
            return sample[0]
        rows = np.repeat(sample, len(self.values[name]), axis=0)
        return rows[:, 0] if self.values[name].ndim == 1 else rows

    def refuse(self, node: NodeProto, why: str) -> ModelError:
        return ModelError(f"{self.path}: {self.origin[node.name]} {why}")


def interpret(
    path: Path, graph: Graph, nodes: Sequence[NodeProto], opset: int, model_input: ModelInput, sample: np.ndarray
) -> Trace:
    """The trace of `nodes` of the graph on one sample (1, ...).

    ModelError where a node cannot be computed, or its value loses the batch axis.
    """
    trace = Trace(path, opset, model_input, graph.origin, graph.names)
    trace.native = dict(graph.constants)
    trace.constants = {name: widen(array) for name, array in graph.constants.items()}
    trace.values[model_input.source] = model_input.to_file_shape(sample.astype(np.float64))
    trace.kinds[model_input.source] = model_input.kind
    if model_input.batch == 0:
        trace.unbatched.add(model_input.source)
    for node in nodes:
        data = [value for value in node.input if value in trace.values]
        _refuse_training(trace, node)
        if node.op_type in ("Shape", "Size") and data:
            _measure(trace, node, trace.values[data[0]].shape)
        elif data:
            _run(trace, node)
        else:
            _fold(trace, node)
    return trace


def _measure(trace: Trace, node: NodeProto, shape: tuple[int, ...]) -> None:
    """Enter the value of Shape or Size of data, which is a constant."""
    attributes = attributes_of(node)
    sizes = shape[attributes.get("start") : attributes.get("end")] if node.op_type == "Shape" else math.prod(shape)
    trace.constants[node.output[0]] = trace.native[node.output[0]] = np.array(sizes, dtype=np.int64)


def _run(trace: Trace, node: NodeProto) -> None:
    outputs = evaluate(trace, node, [trace.values.get(v, trace.constants.get(v)) if v else None for v in node.input])
    for value, array in zip(node.output, outputs, strict=False):
        if not value:
            continue
        if array.size > MAX_VALUES * (trace.model_input.batch or 1):
            raise trace.refuse(node, f"makes a value of shape {list(array.shape)}, which is too large to certify")
        if array.size == 0:
            raise trace.refuse(node, f"gives an empty value, of shape {list(array.shape)}; the shapes do not fit")
        if not trace.model_input.keeps_batch(array.shape):
            if array.ndim == 0 or not trace.model_input.whole:
                raise trace.refuse(
                    node,
                    f"turns one sample into a value of shape {list(array.shape)}; "
                    "every value must keep the batch on its first axis",
                )
            trace.unbatched.add(value)
        trace.values[value] = array
        trace.kinds[value] = kind_behind(trace, node)
    trace.nodes.append(node)


def _fold(trace: Trace, node: NodeProto) -> None:
    """Enter the value of a node of constants, in float64 and in the file's own types."""
    outputs = evaluate(trace, node, [trace.constants.get(v) if v else None for v in node.input])
    native: list[np.ndarray | None] = [None] * len(outputs)
    if all(not value or value in trace.native for value in node.input):
        native = list(compute(trace, node, [trace.native.get(v) if v else None for v in node.input]))
    for value, wide, own in zip(node.output, outputs, native, strict=False):
        if not value:
            continue
        if own is not None:
            trace.native[value] = own
        exact = all(trace.constants[v].dtype.kind != "f" for v in node.input if v)
        if wide.dtype.kind != "f" and own is not None:
            wide = own
        elif wide.dtype.kind != "f" and not exact:
            raise trace.refuse(node, "computes an index from numbers whose type cannot be evaluated here")
        elif own is not None and own.shape != wide.shape:
            wide = widen(own)  # a computed length is a decision too
        trace.constants[value] = wide


def _refuse_training(trace: Trace, node: NodeProto) -> None:
    """ModelError for a dropout in training mode, which is random even for constants."""
    if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
        training = trace.constants.get(node.input[2])
        if training is None or bool(np.any(training)):
            raise trace.refuse(node, "is in training mode and draws random numbers; call model.eval() before exporting")


def kind_behind(trace: Trace, node: NodeProto) -> int:
    """The element type of a node's value in the file."""
    if node.op_type == "Cast":
        return int(attributes_of(node)["to"])
    if node.op_type == "CastLike":
        like = node.input[1]
        return trace.kinds.get(like) or int(helper.np_dtype_to_tensor_dtype(trace.native[like].dtype))
    return next(trace.kinds[value] for value in node.input if value in trace.kinds)


def keeps_type(trace: Trace, node: NodeProto) -> bool:
    """Whether a node is a cast of data without effect in exact arithmetic.

    That is a cast to the type they have, or to float32 or float64, to which evaluations are rounded anyway.
    """
    if node.op_type not in ("Cast", "CastLike") or node.input[0] not in trace.kinds:
        return False
    kind, before = kind_behind(trace, node), trace.kinds[node.input[0]]
    return kind == before or (kind in WIDE and before in FLOATS)


def evaluate(trace: Trace, node: NodeProto, inputs: list[Any]) -> list[np.ndarray]:
    """The outputs of one node, floats in float64 and finite."""
    arrays = widened(trace, node, inputs)
    for array in arrays:
        if array.dtype == np.float64 and not np.isfinite(array).all():
            raise trace.refuse(node, "gives NaN or infinite numbers; a network with them cannot be certified")
    return arrays


def widened(trace: Trace, node: NodeProto, inputs: list[Any]) -> list[np.ndarray]:
    """The outputs of one node, floats in float64; casts for which `keeps_type` holds are left out."""
    if keeps_type(trace, node):
        return [inputs[0]]
    return [widen(array) for array in compute(trace, node, inputs)]


def compute(trace: Trace, node: NodeProto, inputs: list[Any]) -> list[np.ndarray]:
    """The outputs of one node on operands of any type: by `OPERATORS`, else by onnx.reference."""
    feeds = {value: array for value, array in zip(node.input, inputs, strict=True) if value}
    if node.op_type not in OPERATORS:
        _check_size(trace, node, feeds)
    try:
        with np.errstate(all="ignore"):
            if node.op_type in OPERATORS:
                outputs = OPERATORS[node.op_type](node, inputs, trace.opset)
            else:
                outputs = ReferenceEvaluator(_alone(node, feeds, trace.opset)).run(None, feeds)  # type: ignore[assignment]
    except NotImplementedError as error:
        raise trace.refuse(node, f"is not supported at opset {trace.opset}; use a standard operator") from error
    except Exception as error:  # for shapes that do not fit, the evaluator raises any of numpy's exceptions
        if node.op_type in OPERATORS and type(error) is ValueError:
            raise trace.refuse(node, str(error)) from error
        shapes = ", ".join(str(list(np.shape(array))) for array in inputs if array is not None)
        text = shown(first_line(error), 200)
        raise trace.refuse(
            node, f"cannot be computed on operands of shapes {shapes} ({text}); the shapes do not fit"
        ) from error
    arrays = [np.asarray(array) for array in outputs]
    if any(array.dtype.kind not in "biufV" and array.dtype.name != "bfloat16" for array in arrays):
        raise trace.refuse(node, "gives something other than numbers, which is not supported")
    return arrays


def _check_size(trace: Trace, node: NodeProto, feeds: dict[str, np.ndarray]) -> None:
    """ModelError, before memory is allocated, where a value would be far larger than any that is certified.

    By ONNX's own shape inference, which is given small operands.
    """
    model = _alone(node, feeds, trace.opset)
    small = [(name, array) for name, array in feeds.items() if array.size <= FEW and array.dtype.kind in "biuf"]
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in small)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output
    except Exception:  # the evaluation itself will show what cannot be inferred
        return
    for value in inferred:
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if math.prod(sizes) > MAX_ENTRIES:
            raise trace.refuse(node, f"makes a value of shape {sizes}, which is too large to certify")


def _alone(node: NodeProto, feeds: dict[str, np.ndarray], opset: int) -> ModelProto:
    """A model of one node; the operands' types select the form of an overloaded operator."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    outputs = [ValueInfoProto(name=name) for name in node.output if name]
    return helper.make_model(
        helper.make_graph([node], "node", inputs, outputs), opset_imports=[helper.make_opsetid("", opset)]
    )


def widen(array: np.ndarray) -> np.ndarray:
    """Floats of any type, bfloat16 too, converted to float64, which is exact; other arrays unchanged."""
    is_float = np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"
    return array.astype(np.float64) if is_float else array
