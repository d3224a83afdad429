"""Rewrites scikit-learn's classifiers (operator set ai.onnx.ml) to standard operators.

Scaler and LinearClassifier are affine. ZipMap, Normalizer and the nodes that compute labels follow the scores, and are
omitted with the end of the model (`outputs`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from certify_cli.errors import ModelError
from certify_cli.load.onnx.neutral_names import Graph

DOMAIN = "ai.onnx.ml"


class _StandardGraph:
    """The graph with standard nodes in place of those of ai.onnx.ml, under construction."""

    def __init__(self, path: Path, graph: Graph) -> None:
        self.path, self.source = path, graph
        self.nodes: list[NodeProto] = []
        self.constants, self.origin = dict(graph.constants), dict(graph.origin)

    def refuse(self, node: NodeProto, why: str) -> ModelError:
        return ModelError(f"{self.path}: {self.origin[node.name]} {why}")

    def emit(self, node: NodeProto, operator: str, inputs: list[str], output: str, **attributes: Any) -> None:
        name = self.source.names.node()
        self.origin[name] = self.origin[node.name]
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))

    def constant(self, array: np.ndarray) -> str:
        name = self.source.names.value()
        self.constants[name] = array
        return name


def standardised(path: Path, graph: Graph) -> Graph:
    """The graph with every node of ai.onnx.ml rewritten. ModelError, naming the node, for others of that set."""
    rewritten = _StandardGraph(path, graph)
    for node in graph.nodes:
        if node.domain != DOMAIN:
            rewritten.nodes.append(node)
        elif node.op_type in REWRITES:
            REWRITES[node.op_type](rewritten, node, {a.name: helper.get_attribute_value(a) for a in node.attribute})
        else:
            raise rewritten.refuse(node, "does not stand behind the scores of the model, which is not supported")
    return replace(graph, nodes=tuple(rewritten.nodes), constants=rewritten.constants, origin=rewritten.origin)


def _scaler(rewritten: _StandardGraph, node: NodeProto, attributes: dict[str, Any]) -> None:
    """(x - offset) * scale."""
    offset, scale = (np.array(attributes.get(key, [fill]), np.float32) for key, fill in (("offset", 0), ("scale", 1)))
    centred = rewritten.source.names.value()
    rewritten.emit(node, "Sub", [node.input[0], rewritten.constant(offset)], centred)
    rewritten.emit(node, "Mul", [centred, rewritten.constant(scale)], node.output[0])


ENDS = {"NONE": None, "SOFTMAX": "Softmax", "LOGISTIC": "Sigmoid"}


def _linear_classifier(rewritten: _StandardGraph, node: NodeProto, attributes: dict[str, Any]) -> None:
    """Scores x W^T + b, one per class, and the transformation after them."""
    classes = len(attributes.get("classlabels_ints") or attributes.get("classlabels_strings") or [])
    weight = np.array(attributes.get("coefficients", []), np.float32)
    bias = np.array(attributes.get("intercepts", []), np.float32)
    end = attributes.get("post_transform", b"NONE").decode(errors="replace")
    if classes < 2 or weight.size % classes or bias.size not in (0, classes):
        raise rewritten.refuse(node, "holds no row of coefficients for every class, which is not supported")
    if end not in ENDS:
        raise rewritten.refuse(
            node, "ends in a transformation that is not supported; export raw scores or probabilities"
        )
    value, operator = node.output[1], ENDS[end]
    scores = value if operator is None else rewritten.source.names.value()
    steps = [("MatMul", rewritten.constant(np.ascontiguousarray(weight.reshape(classes, -1).T)))]
    if bias.size:
        steps.append(("Add", rewritten.constant(bias)))
    at = node.input[0]
    for number, (kind, constant) in enumerate(steps, start=1):
        after = scores if number == len(steps) else rewritten.source.names.value()
        rewritten.emit(node, kind, [at, constant], after)
        at = after
    if operator is not None:
        rewritten.emit(node, operator, [scores], value, **({"axis": 1} if operator == "Softmax" else {}))


REWRITES: dict[str, Callable[[_StandardGraph, NodeProto, dict[str, Any]], None]] = {
    "Scaler": _scaler,
    "LinearClassifier": _linear_classifier,
}
SUPPORTED = {*REWRITES, "ZipMap", "Normalizer"}
