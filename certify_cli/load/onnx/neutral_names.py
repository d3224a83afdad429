"""An ONNX graph under neutral names.

The names in a file are untrusted text. They must not reach generated code (torch.fx writes Python from node names), the
attributes of a module, or the names that rewriting creates. Every node and value is therefore renamed before any other
code reads the graph; the file's names are kept as data, in `Graph.origin` and `Graph.called`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from onnx import GraphProto, NodeProto, numpy_helper

from certify_cli.errors import shown


@dataclass(frozen=True)
class Origin:
    """The file's name of a node (or else of its first output) and its operator, both escaped for printing."""

    name: str
    operator: str

    def __str__(self) -> str:
        return f"node '{self.name}' ({self.operator})"

    @classmethod
    def of(cls, node: NodeProto) -> Origin:
        return cls(shown(node.name or next(iter(node.output), "?")), shown(node.op_type))


class Names:
    """Source of fresh names, v0, v1, ... for values and n0, n1, ... for nodes: one for each graph."""

    def __init__(self) -> None:
        self._values, self._nodes = count(), count()

    def value(self) -> str:
        return f"v{next(self._values)}"

    def node(self) -> str:
        return f"n{next(self._nodes)}"


@dataclass(frozen=True, eq=False)
class Graph:
    """A renamed graph.

    nodes: in order.   constants: as stored.   origin: name of a node -> its `Origin`.
    called: name of a value -> the file's name.   names: source of further names.
    """

    nodes: Sequence[NodeProto]
    constants: Mapping[str, np.ndarray]
    origin: Mapping[str, Origin]
    called: Mapping[str, str]
    names: Names

    def named(self, called: str) -> str:
        """The neutral name of the value that the file calls `called`."""
        return next(name for name, text in self.called.items() if text == called)


@dataclass
class _Renaming:
    names: Names = field(default_factory=Names)
    values: dict[str, str] = field(default_factory=dict)

    def value(self, called: str) -> str:
        """The new name of a value; empty for an operand that is left out."""
        if not called:
            return ""
        if called not in self.values:
            self.values[called] = self.names.value()
        return self.values[called]


def neutral(graph: GraphProto) -> Graph:
    """The graph with every name replaced. Its names must have been checked (`file`)."""
    renaming = _Renaming()
    for declared in graph.input:
        renaming.value(declared.name)
    constants = {renaming.value(t.name): numpy_helper.to_array(t) for t in graph.initializer}
    origin, nodes = {}, []
    for node in graph.node:
        new = NodeProto(op_type=node.op_type, domain=node.domain, name=renaming.names.node())
        new.input.extend(renaming.value(value) for value in node.input)
        new.output.extend(renaming.value(value) for value in node.output)
        new.attribute.extend(node.attribute)
        origin[new.name] = Origin.of(node)
        nodes.append(new)
    called = {name: text for text, name in renaming.values.items()}
    return Graph(tuple(nodes), constants, origin, called, renaming.names)
