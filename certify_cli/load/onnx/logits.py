"""Finds a model's logits: its output, or the operand of the softmax that is followed by reshapings only."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from certify_cli.load.onnx.interpret import Trace, evaluate
from certify_cli.load.onnx.operators import attributes_of
from certify_cli.load.onnx.outputs import CLASSIFIERS, RESHAPING, SOFTMAX


def logits(trace: Trace, output: str) -> tuple[str, list[NodeProto], list[str]]:
    """The value that holds the logits, the nodes between it and `output` in order, and a note on omitted nodes.

    A softmax over all entries of a sample changes no prediction, nor do reshapings after it that keep the order of the
    entries. The same holds for the logistic function at the end of a linear classifier or of a model with one logit.
    """
    producers = {value: node for node in trace.nodes for value in node.output if value}
    tail: list[NodeProto] = []
    name = output
    while (producer := producers.get(name)) is not None and producer.input[0] in trace.values:
        if producer.op_type in SOFTMAX and _over_the_sample(trace, producer):
            return producer.input[0], [producer, *tail], [_left_out(producer)]
        single = trace.size(name) == 1
        if producer.op_type == "Sigmoid" and (single or trace.origin[producer.name].operator in CLASSIFIERS):
            return producer.input[0], [producer, *tail], [_left_out(producer)]
        if producer.op_type not in RESHAPING or not _keeps_order(trace, producer):
            break
        tail.insert(0, producer)
        name = producer.input[0]
    return output, [], []


def _left_out(node: NodeProto) -> str:
    return f"the final {node.op_type} is left out: it changes no prediction, and margins are of logits"


def _over_the_sample(trace: Trace, node: NodeProto) -> bool:
    """Whether a softmax runs over all entries of a sample; below opset 13 it includes the axes after its own."""
    shape = trace.values[node.input[0]].shape
    old = trace.opset < 13
    axis = int(attributes_of(node).get("axis", 1 if old else -1)) % len(shape)
    if axis == 0 and not old and node.input[0] not in trace.unbatched:
        return False  # along the batch, which may have as many entries as there are classes
    width = int(np.prod(shape[axis:])) if old else shape[axis]
    return width == trace.size(node.input[0])


def _keeps_order(trace: Trace, node: NodeProto) -> bool:
    shape = trace.values[node.input[0]].shape
    numbered = np.arange(1.0, np.prod(shape) + 1).reshape(shape)
    moved = evaluate(trace, node, [numbered, *(trace.constants.get(value) for value in node.input[1:])])[0]
    return np.array_equal(moved.ravel(), numbered.ravel())
