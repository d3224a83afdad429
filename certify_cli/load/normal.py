"""The graph that normalising grows, and the table of rewritings that grow it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from certify_cli.load.interpret import Interpretation

DOMAIN = "curvcert"
"""The domain of the operators that are ours: Select, Activation and MaxMin."""


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
    moved: dict[str, tuple[str, np.ndarray]] = field(default_factory=dict)
    """Value -> what it is moved from, and the numbers of its entries there (0 for zeros)."""

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
            if operator in REWRITES:
                raise ValueError(f"{operator} is entered twice")
            REWRITES[operator] = rule
        return rule

    return enter


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Attributes as Python numbers, text and lists."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {key: value.decode() if isinstance(value, bytes) else value for key, value in values.items()}


def numbered_entries(shape: tuple[int, ...]) -> np.ndarray:
    """1, 2, 3, ... row-major; 0 is left for zeros that are moved in."""
    return np.arange(1.0, np.prod(shape) + 1).reshape(shape)


def emit_index(normal: Normal, node: NodeProto, source: str, value: str, numbered: np.ndarray) -> None:
    """`value` from `source`, both one sample: entry j is entry numbered[j] - 1 of the source, or zero."""
    before = normal.shapes[source]
    normal.moved[value] = source, numbered
    if np.array_equal(numbered.ravel(), np.arange(1, np.prod(before) + 1)):
        if numbered.shape == before:
            normal.same[value] = normal.same.get(source, source)
            return
        target = normal.constant(node, np.array([-1, *numbered.shape[1:]], dtype=np.int64))
        normal.emit(node, "Reshape", [source, target], value)
        return
    index = normal.constant(node, numbered[0].astype(np.int64) - 1)
    normal.emit(node, "Select", [source, index], value, DOMAIN)
