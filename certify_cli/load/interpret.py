"""One run of an ONNX graph on one sample, node by node, in float64: constants folded, shapes known, values at hand.

Weights are upcast exactly before anything is computed, so constants that the file leaves to be computed (a transposed
weight, sqrt(var + eps)) are those of float64 arithmetic on the stored weights. Each node is computed by
`onnx.reference`, the standard's own definition of the operators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from certify_cli.errors import ModelError, first_line
from certify_cli.load.onnx_file import describe


class BatchNormalization(OpRun):
    """Evaluation mode, as the standard defines it for a node of one output.

    Below opset 14 onnx.reference mixes the batch's own statistics in; nodes in training mode are refused on reading.
    """

    op_domain = ""

    def _run(
        self, x: Any, gain: Any, shift: Any, mean: Any, variance: Any, epsilon: float = 1e-5, **unused: Any
    ) -> Any:
        axes = (-1, *[1] * (x.ndim - 2))
        centred = (x - mean.reshape(axes)) / np.sqrt(variance.reshape(axes) + epsilon)
        return ((gain.reshape(axes) * centred + shift.reshape(axes)).astype(x.dtype),)


CORRECTED: list[type[OpRun]] = [BatchNormalization]
"""Operators that onnx.reference gets wrong, for its `new_ops`."""

MAX_ENTRIES = 2**28
"""The largest value (entries) that a graph may make: 2 GiB in float64."""

SHAPE_SETS_SIZE = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Reshape": 1}
"""Operators whose output may be far larger than what they read, with the operand that says how large."""


@dataclass
class Interpretation:
    """What one run shows. `constants` do not depend on the input; `values` (one sample, batch first) do."""

    path: Path
    opset: int
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    nodes: list[NodeProto] = field(default_factory=list)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def refuse(self, node: NodeProto, why: str) -> ModelError:
        return ModelError(f"{self.path}: {describe(node)} {why}")


def interpret(path: Path, graph: GraphProto, opset: int, name: str, sample: np.ndarray) -> Interpretation:
    """Run `graph` on `sample` (1, ...) for the input `name`. ModelError where a node cannot be computed, or gives up
    the batch axis. Nodes whose value is constant are dropped from `nodes`."""
    found = Interpretation(path, opset)
    found.constants = {tensor.name: widen(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    found.values[name] = sample.astype(np.float64)
    for node in graph.node:
        data = [value for value in node.input if value in found.values]
        if node.op_type == "Shape" and data:
            start, end = (_integer(node, key) for key in ("start", "end"))
            found.constants[node.output[0]] = np.array(found.shape(data[0])[start:end], dtype=np.int64)
            continue
        if node.op_type == "Size" and data:
            found.constants[node.output[0]] = np.array(found.values[data[0]].size, dtype=np.int64)
            continue
        outputs = evaluate(
            found, node, [found.values.get(v, found.constants.get(v)) if v else None for v in node.input]
        )
        if not data:
            found.constants.update(zip(node.output, outputs, strict=False))
            continue
        for value, array in zip(node.output, outputs, strict=False):
            if value and (array.ndim == 0 or array.shape[0] != 1):
                raise found.refuse(
                    node,
                    f"turns one sample into a value of shape {list(array.shape)}; "
                    "every value must keep the batch on its first axis",
                )
            found.values[value] = array
        found.nodes.append(node)
    return found


def evaluate(found: Interpretation, node: NodeProto, inputs: list[Any]) -> list[np.ndarray]:
    """The outputs of one node, floats in float64."""
    operand = SHAPE_SETS_SIZE.get(node.op_type)
    if operand is not None and len(inputs) > operand and inputs[operand] is not None:
        entries = math.prod(int(v) for v in np.ravel(inputs[operand]))
        if abs(entries) * (inputs[0].size if node.op_type == "Tile" else 1) > MAX_ENTRIES:
            raise found.refuse(node, f"makes a value of {abs(entries)} entries, which is too large to certify")
    feeds = {value: array for value, array in zip(node.input, inputs, strict=True) if value}
    try:
        evaluator = ReferenceEvaluator(_alone(node, feeds, found.opset), new_ops=CORRECTED)
        with np.errstate(all="ignore"):
            outputs = evaluator.run(None, feeds)
    except NotImplementedError as error:
        raise found.refuse(node, f"is not supported at opset {found.opset}; use a standard operator") from error
    except Exception as error:  # the evaluator reports ill-fitting shapes by whatever numpy happens to raise
        shapes = ", ".join(str(list(np.shape(array))) for array in inputs if array is not None)
        raise found.refuse(
            node, f"cannot be computed on operands of shapes {shapes} ({first_line(error)}); the shapes do not fit"
        ) from error
    arrays = [widen(np.asarray(array)) for array in outputs]
    for array in arrays:
        if array.dtype == np.float64 and not np.isfinite(array).all():
            raise found.refuse(node, "gives NaN or infinite numbers; a network with them cannot be certified")
    return arrays


def _alone(node: NodeProto, feeds: dict[str, np.ndarray], opset: int) -> ModelProto:
    """A model of one node; the operands' types decide which form of an overloaded operator is evaluated."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    outputs = [ValueInfoProto(name=name) for name in node.output if name]
    return helper.make_model(
        helper.make_graph([node], "node", inputs, outputs), opset_imports=[helper.make_opsetid("", opset)]
    )


def widen(array: np.ndarray) -> np.ndarray:
    """Any float type (bfloat16 too) as float64, which holds it exactly; everything else as it is."""
    is_float = np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"
    return array.astype(np.float64) if is_float else array


def _integer(node: NodeProto, key: str) -> int | None:
    return next((int(a.i) for a in node.attribute if a.name == key), None)
