"""scikit-learn's classifiers (operator set ai.onnx.ml) by standard operators.

Scaler and LinearClassifier are affine. ZipMap, Normalizer and what makes labels only ever stand behind the scores, and
are left out with the end of the model (`outputs`).
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


class _Rewriting:
    """The graph that grows: standard nodes in place of one of ai.onnx.ml."""

    def __init__(self, path: Path, graph: Graph) -> None:
        self.path, self.graph = path, graph
        self.nodes: list[NodeProto] = []
        self.constants, self.origin = dict(graph.constants), dict(graph.origin)

    def refuse(self, node: NodeProto, why: str) -> ModelError:
        return ModelError(f"{self.path}: {self.origin[node.name]} {why}")

    def emit(self, node: NodeProto, operator: str, inputs: list[str], output: str, **attributes: Any) -> None:
        name = self.graph.names.node()
        self.origin[name] = self.origin[node.name]
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))

    def constant(self, array: np.ndarray) -> str:
        name = self.graph.names.value()
        self.constants[name] = array
        return name


def standardised(path: Path, graph: Graph) -> Graph:
    """The graph with every node of ai.onnx.ml rewritten. ModelError, naming the node, for others of that set."""
    growing = _Rewriting(path, graph)
    for node in graph.nodes:
        if node.domain != DOMAIN:
            growing.nodes.append(node)
        elif node.op_type in REWRITES:
            REWRITES[node.op_type](growing, node, {a.name: helper.get_attribute_value(a) for a in node.attribute})
        else:
            raise growing.refuse(node, "does not stand behind the scores of the model, which is not supported")
    return replace(graph, nodes=tuple(growing.nodes), constants=growing.constants, origin=growing.origin)


def _scaler(growing: _Rewriting, node: NodeProto, attributes: dict[str, Any]) -> None:
    """(x - offset) * scale."""
    offset, scale = (np.array(attributes.get(key, [fill]), np.float32) for key, fill in (("offset", 0), ("scale", 1)))
    centred = growing.graph.names.value()
    growing.emit(node, "Sub", [node.input[0], growing.constant(offset)], centred)
    growing.emit(node, "Mul", [centred, growing.constant(scale)], node.output[0])


ENDS = {"NONE": None, "SOFTMAX": "Softmax", "LOGISTIC": "Sigmoid"}


def _linear_classifier(growing: _Rewriting, node: NodeProto, attributes: dict[str, Any]) -> None:
    """Scores x W^T + b, one a class, and what follows them."""
    classes = len(attributes.get("classlabels_ints") or attributes.get("classlabels_strings") or [])
    weight = np.array(attributes.get("coefficients", []), np.float32)
    bias = np.array(attributes.get("intercepts", []), np.float32)
    end = attributes.get("post_transform", b"NONE").decode(errors="replace")
    if classes < 2 or weight.size % classes or bias.size not in (0, classes):
        raise growing.refuse(node, "holds no row of coefficients for every class, which is not supported")
    if end not in ENDS:
        raise growing.refuse(node, "ends in a transformation that is not supported; export raw scores or probabilities")
    value, operator = node.output[1], ENDS[end]
    scores = value if operator is None else growing.graph.names.value()
    steps = [("MatMul", growing.constant(np.ascontiguousarray(weight.reshape(classes, -1).T)))]
    if bias.size:
        steps.append(("Add", growing.constant(bias)))
    at = node.input[0]
    for number, (kind, constant) in enumerate(steps, start=1):
        after = scores if number == len(steps) else growing.graph.names.value()
        growing.emit(node, kind, [at, constant], after)
        at = after
    if operator is not None:
        growing.emit(node, operator, [scores], value, **({"axis": 1} if operator == "Softmax" else {}))


REWRITES: dict[str, Callable[[_Rewriting, NodeProto, dict[str, Any]], None]] = {
    "Scaler": _scaler,
    "LinearClassifier": _linear_classifier,
}
SUPPORTED = {*REWRITES, "ZipMap", "Normalizer"}
