"""Network: the one form that every bound, certificate and command sees.

A network is a list of nodes in topological order. Node 0 is the input, the last node holds the logits. A node is

- an affine operation (`affine.AffineOp`) of one earlier node,
- a join (`Add`, `Concat`) of several earlier nodes, which is affine too, or
- a nonlinear node: an elementwise `Activation`, or a group map such as `MaxPool`.

The batch is the first axis of every tensor, and no part of any shape in here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from certify_cli.errors import shown
from certify_cli.numerics.deadline import check

MAX_VALUES = 2**24
"""Largest number of entries of one sample's value at a node; checked before memory is allocated."""

Shape = tuple[int, ...]


class Op(Protocol):
    """The operation of a node: a map from the values of its inputs (batch first) to its value."""

    @property
    def title(self) -> str: ...

    def output_shape(self, *shapes: Shape) -> Shape: ...

    def apply(self, *values: Tensor) -> Tensor: ...


class Nonlinear(ABC):
    """A nonlinear node's operation: an activation, or a group map. Everything else in a network is affine."""

    @abstractmethod
    def lipschitz_constant(self, shape: Shape) -> float:
        """Upper bound of the Euclidean Lipschitz constant on values of `shape`."""


@dataclass(frozen=True)
class Input:
    """The input, node 0; its value is given."""

    title: str = "input"

    def output_shape(self, *shapes: Shape) -> Shape:
        raise AssertionError("the input's shape is given, not derived")

    def apply(self, *values: Tensor) -> Tensor:
        raise AssertionError("the input's value is given, not computed")


@dataclass(frozen=True)
class Add:
    """Sum of two or more values of one shape."""

    title: str = "add"

    def output_shape(self, *shapes: Shape) -> Shape:
        if len(set(shapes)) != 1:
            raise ValueError(f"cannot add values of shapes {', '.join(map(str, shapes))}")
        return shapes[0]

    def apply(self, *values: Tensor) -> Tensor:
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total


@dataclass(frozen=True)
class Concat:
    """Concatenation along `axis` (counted without the batch, never negative)."""

    axis: int
    title: str = "concat"

    def output_shape(self, *shapes: Shape) -> Shape:
        rest = {shape[: self.axis] + shape[self.axis + 1 :] for shape in shapes}
        if len(rest) != 1:
            raise ValueError(f"cannot concatenate values of shapes {', '.join(map(str, shapes))}")
        length = sum(shape[self.axis] for shape in shapes)
        return (*shapes[0][: self.axis], length, *shapes[0][self.axis + 1 :])

    def apply(self, *values: Tensor) -> Tensor:
        return torch.cat(values, dim=self.axis + 1)

    def split(self, value: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        """The value cut into one part per input: the transpose of the concatenation."""
        return torch.split(value, [shape[self.axis] for shape in shapes], dim=self.axis + 1)


@dataclass(frozen=True, eq=False)
class Node:
    """One node.   inputs: indices of earlier nodes.   shape: of its value, without the batch."""

    name: str
    op: Op
    inputs: tuple[int, ...]
    shape: Shape

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, eq=False)
class Network:
    """A classifier: `nodes[0]` is the input, `nodes[-1]` the logits of shape (classes,). float64 throughout."""

    nodes: tuple[Node, ...]

    @property
    def input_shape(self) -> Shape:
        return self.nodes[0].shape

    @property
    def classes(self) -> int:
        return self.nodes[-1].shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are (CPU for a network without any)."""
        return next((tensor.device for tensor in self.constants), torch.device("cpu"))

    @property
    def constants(self) -> list[Tensor]:
        """Every tensor that a node holds: weights, offsets, indices."""
        return [t for node in self.nodes for t in vars(node.op).values() if isinstance(t, Tensor)]

    def to(self, device: torch.device | str) -> Network:
        """The same network with its weights on `device`."""
        return Network(tuple(replace(node, op=_moved(node.op, device)) for node in self.nodes))

    def values(self, x: Tensor) -> list[Tensor]:
        """The value of every node at x (batch, *input_shape)."""
        values = [x]
        for node in self.nodes[1:]:
            check()
            values.append(node.op.apply(*(values[i] for i in node.inputs)))
        return values

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        return self.values(x)[-1]


def _moved(op: Op, device: torch.device | str) -> Op:
    tensors = {f.name: value.to(device) for f in fields(op) if isinstance(value := getattr(op, f.name), Tensor)}  # type: ignore[arg-type]
    return replace(op, **tensors) if tensors else op  # type: ignore[type-var]


def refuse_large(shape: Sequence[int], what: str = "its value") -> None:
    """ValueError where a value of `shape` has more than MAX_VALUES entries."""
    if math.prod(shape) > MAX_VALUES:
        raise ValueError(f"{what} of shape {tuple(shape)} is too large; the limit is {MAX_VALUES} entries")


class Builder:
    """Builds a network node by node. Shapes are derived from the operations.

    Names come from files. They are escaped (`errors.shown`) and made unique here, so that they can be printed anywhere.
    """

    def __init__(self, input_shape: Shape, name: str = "input") -> None:
        self._nodes: list[Node] = [Node(shown(name), Input(), (), tuple(input_shape))]
        self._names = {self._nodes[0].name}
        self._copies: dict[str, int] = {}

    def shape(self, index: int) -> Shape:
        return self._nodes[index].shape

    def add(self, name: str, op: Op, *inputs: int) -> int:
        """Append a node and return its index. ValueError if the shapes do not fit, or the value would be too large."""
        shape = op.output_shape(*(self._nodes[i].shape for i in inputs))
        refuse_large(shape)
        name = unique = shown(name)
        while unique in self._names:
            self._copies[name] = self._copies.get(name, 1) + 1
            unique = f"{name}.{self._copies[name]}"
        self._names.add(unique)
        self._nodes.append(Node(unique, op, inputs, shape))
        return len(self._nodes) - 1

    def order(self, output: int) -> dict[int, int]:
        """Index here -> index in the network of `build(output)`, for the input and all nodes that lead to `output`."""
        needed = {0, output}
        for index in range(output, 0, -1):
            if index in needed:
                needed.update(self._nodes[index].inputs)
        return {old: new for new, old in enumerate(sorted(needed))}

    def build(self, output: int) -> Network:
        """The network that ends in node `output`; nodes that do not lead there are left out."""
        order = self.order(output)
        nodes = tuple(
            Node(node.name, node.op, tuple(order[i] for i in node.inputs), node.shape)
            for node in (self._nodes[old] for old in order)
        )
        return Network(nodes)
