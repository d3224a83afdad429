"""The rewritten graph, and the table of rewriting rules that append to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from certify_cli.load.onnx.interpret import Trace, evaluate

DOMAIN = "curvcert"
"""The domain of operators defined here: Select, Activation, MaxMin, MaxPool and AveragePool."""


@dataclass(frozen=True)
class Subgraph:
    """A part of the file's graph that was rewritten as a whole: `nodes` compute `value` from the values `inputs`."""

    nodes: tuple[NodeProto, ...]
    inputs: tuple[str, ...]
    value: str


@dataclass
class RewrittenGraph:
    """The rewritten graph of a trace.

    nodes: in order; the batch is the first axis of every value.   constants: by name.   shapes: for a batch of one.
    aliases: value -> the name under which a node computes it.
    origin: name of a rewritten node -> name of the file's node.
    movements: value -> the value it is moved from, and the numbers of its entries there (from 1; 0 for zeros).
    pairs: two values -> the value that holds both, sorted.
    subgraphs: the parts that were rewritten, for `subgraph_checks.check`.
    output: the logits, as a vector.
    """

    trace: Trace
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    movements: dict[str, tuple[str, np.ndarray]] = field(default_factory=dict)
    pairs: dict[tuple[str, ...], str] = field(default_factory=dict)
    subgraphs: list[Subgraph] = field(default_factory=list)
    output: str = ""

    def emit(
        self, node: NodeProto, operator: str, inputs: list[str], output: str, domain: str = "", **attributes: Any
    ) -> str:
        """Append one node in place of (a part of) `node` and return the name of its value."""
        name = self.trace.names.node()
        self.origin[name] = node.name
        inputs = [self.resolved(value) for value in inputs]
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, domain=domain, **attributes))
        return output

    def resolved(self, value: str) -> str:
        """The name under which a node computes the value."""
        return self.aliases.get(value, value)

    def alias(self, value: str, output: str) -> None:
        """Make `output` another name of `value`."""
        self.aliases[output] = self.resolved(value)

    def constant(self, array: np.ndarray) -> str:
        """The name of a new constant."""
        name = self.trace.names.value()
        self.constants[name] = array
        return name

    def fresh_value(self, shape: tuple[int, ...] | None = None) -> str:
        """A fresh name for an intermediate value of a rewriting."""
        name = self.trace.names.value()
        if shape is not None:
            self.shapes[name] = shape
        return name


Rewrite = Callable[[RewrittenGraph, NodeProto], None]
REWRITES: dict[str, Rewrite] = {}


def rewrites(*operators: str) -> Callable[[Rewrite], Rewrite]:
    """Enter a rewriting rule for these operators; ValueError for a second entry."""

    def enter(rule: Rewrite) -> Rewrite:
        for operator in operators:
            if operator in REWRITES:
                raise ValueError(f"{operator} is entered twice")
            REWRITES[operator] = rule
        return rule

    return enter


def numbered_entries(shape: tuple[int, ...]) -> np.ndarray:
    """1, 2, 3, ... row-major; 0 stands for zeros that are moved in."""
    return np.arange(1.0, np.prod(shape) + 1).reshape(shape)


def data_axis(trace: Trace, node: NodeProto, value: str, axis: int) -> int:
    """An axis of a value of the file, counted with the batch in front; ModelError where it is the batch."""
    axis = axis % trace.values[value].ndim
    if value in trace.unbatched:
        return axis + 1
    if axis == 0:
        raise trace.refuse(node, "works along the batch; every value must keep the batch on its first axis")
    return axis


def move(rewritten: RewrittenGraph, node: NodeProto) -> None:
    """Rewrite any movement of the first operand's entries, with constants between them.

    The index is read off numbered entries that the node itself moves, the constants off zeros.
    """
    trace = rewritten.trace
    source = node.input[0]
    if source not in trace.values or any(value in trace.values for value in node.input[1:]):
        raise trace.refuse(node, "moves data to places that depend on the data, which is not supported")
    constants = [trace.constants.get(value) for value in node.input[1:]]
    own = trace.values[source].shape
    frames = evaluate(trace, node, [np.zeros(own), *constants])
    moved = evaluate(trace, node, [numbered_entries(own), *constants])
    for value, frame, numbered in zip(node.output, frames, moved, strict=False):
        if not value:
            continue
        index = _of_one_sample(trace, node, source, trace.samples(value, numbered - frame))
        if not frame.any():
            emit_index(rewritten, node, source, value, index)
            continue
        bare = rewritten.fresh_value(index.shape)
        emit_index(rewritten, node, source, bare, index)
        rewritten.emit(node, "Add", [bare, rewritten.constant(trace.samples(value, frame)[:1])], value)


def _of_one_sample(trace: Trace, node: NodeProto, source: str, numbered: np.ndarray) -> np.ndarray:
    """The numbers of the first sample's entries (1, ...); ModelError unless each sample is moved alike by itself."""
    size, batch = trace.size(source), len(trace.samples(source, trace.values[source]))
    if len(numbered) != batch or not np.array_equal(numbered, np.rint(numbered)):
        raise trace.refuse(node, "mixes the entries that it moves, which is not supported")
    first = numbered[:1]
    if first.min() < 0 or first.max() > size:
        raise trace.refuse(node, "mixes the samples of a batch; every value must keep them on its first axis")
    for number in range(1, batch):
        if not np.array_equal(numbered[number : number + 1], np.where(first > 0, first + number * size, first)):
            raise trace.refuse(node, "mixes the samples of a batch; every value must keep them on its first axis")
    return first


def emit_index(rewritten: RewrittenGraph, node: NodeProto, source: str, value: str, numbered: np.ndarray) -> None:
    """Append `value`, whose entry j is entry numbered[j] - 1 of `source`, or zero; counted in one sample."""
    before = rewritten.shapes[source]
    rewritten.movements[value] = source, numbered
    if np.array_equal(numbered.ravel(), np.arange(1, np.prod(before) + 1)):
        if numbered.shape == before:
            rewritten.alias(source, value)
            return
        target = rewritten.constant(np.array([-1, *numbered.shape[1:]], dtype=np.int64))
        rewritten.emit(node, "Reshape", [source, target], value)
        return
    index = rewritten.constant(numbered[0].astype(np.int64) - 1)
    rewritten.emit(node, "Select", [source, index], value, DOMAIN)
