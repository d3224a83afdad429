"""The two walks over a network's graph, written once: a table of rules says what each kind of node does.

Forward, a value is computed at every node that a start reaches; backward, what arrives at a node is the sum over the
nodes that use it. A new propagation (of errors, of intervals, of norms) is a table of rules: it never looks at the
graph itself. A nonlinear node whose rule gives None is cut: nothing passes. Before every node it is asked whether time
has ended (`deadline`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from certify_cli.network.affine import AffineOp
from certify_cli.network.graph import Add, Concat, Network, Shape
from certify_cli.numerics.deadline import check

V = TypeVar("V")


@dataclass(frozen=True)
class Forward(Generic[V]):
    """Rules forward.

    affine: (operation, value, shape of its input) -> value.   add: of the summands that there are, in order.
    concat: (operation, a value or None for each part, shapes of the parts) -> value.
    nonlinear: (index of the node, value) -> value, or None.
    """

    affine: Callable[[AffineOp, V, Shape], V]
    add: Callable[[list[V]], V]
    concat: Callable[[Concat, list[V | None], list[Shape]], V]
    nonlinear: Callable[[int, V], V | None]


@dataclass(frozen=True)
class Backward(Generic[V]):
    """Rules backward.

    affine: (index of the node, its operation, value at its output, shape of its input) -> value at its input.
    split: (concatenation, value, shapes of the parts) -> a value for each part.
    nonlinear: (index of the node, value) -> value at its input, or None.
    merge: (index of a node, earlier sum of what arrives there, value) -> sum.
    """

    affine: Callable[[int, AffineOp, V, Shape], V]
    split: Callable[[Concat, V, list[Shape]], list[V]]
    nonlinear: Callable[[int, V], V | None]
    merge: Callable[[int, V, V], V]


def forward(
    network: Network, source: int, value: V, rules: Forward[V], among: Collection[int] | None = None
) -> Iterator[tuple[int, V]]:
    """Every node that `value` at node `source` reaches, itself first, with its value; only nodes of `among`, if given.

    A value is dropped after its last use.
    """
    last_use = {i: index for index, node in enumerate(network.nodes) for i in node.inputs}
    values = {source: value}
    yield source, value
    for index in range(source + 1, len(network.nodes)):
        node = network.nodes[index]
        shapes = [network.nodes[i].shape for i in node.inputs]
        parts = [values.get(i) for i in node.inputs]
        present = [part for part in parts if part is not None]
        image: V | None = None
        if present and (among is None or index in among):
            check()
            if isinstance(node.op, AffineOp):
                image = rules.affine(node.op, present[0], shapes[0])
            elif isinstance(node.op, Add):
                image = rules.add(present)
            elif isinstance(node.op, Concat):
                image = rules.concat(node.op, parts, shapes)
            else:
                image = rules.nonlinear(index, present[0])
        if image is not None:
            values[index] = image
            yield index, image
        for i in node.inputs:
            if last_use[i] == index:
                values.pop(i, None)


def backward(network: Network, start: int, value: V, rules: Backward[V]) -> V | None:
    """What arrives at the input from `value` at node `start`; None where nothing does."""
    values = {start: value}
    for index in range(start, 0, -1):
        if index not in values:
            continue
        check()
        here = values.pop(index)
        node = network.nodes[index]
        shapes = [network.nodes[i].shape for i in node.inputs]
        images: list[V | None]
        if isinstance(node.op, AffineOp):
            images = [rules.affine(index, node.op, here, shapes[0])]
        elif isinstance(node.op, Add):
            images = [here for _ in node.inputs]
        elif isinstance(node.op, Concat):
            images = [*rules.split(node.op, here, shapes)]
        else:
            images = [rules.nonlinear(index, here)]
        for i, image in zip(node.inputs, images, strict=True):
            if image is not None:
                values[i] = rules.merge(i, values[i], image) if i in values else image
    return values.get(0)
