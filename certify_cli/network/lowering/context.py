"""Lowering rules: the tables in which they are entered, and the context that they are given.

A layer is looked up by its exact type, never by its bases: a subclass that overrides `forward` may compute anything,
and must not inherit its parent's bound. Values in a graph are `Data` (a network node), constants (tensors and Python
values: parameters, indices and all that is computed from them alone), or tuples of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from certify_cli.errors import LayerError, first_line, quoted, shown
from certify_cli.network.graph import Builder, Op, Shape
from certify_cli.network.movement import Reshape, Select


@dataclass(frozen=True)
class Data:
    """A value that depends on the input: a node of the network, batch first."""

    index: int


class LoweringContext:
    """The layer that is being lowered: adds nodes under its name, and raises errors that name it.

    name, kind: of the layer, as users know them.
    """

    def __init__(self, builder: Builder, name: str, kind: str) -> None:
        self.builder, self.name, self.kind = builder, shown(name), shown(kind)

    def shape(self, value: Data) -> Shape:
        return self.builder.shape(value.index)

    def add(self, op: Op, *values: Data) -> Data:
        return Data(self.builder.add(self.name, op, *(value.index for value in values)))

    def refuse(self, why: str) -> NoReturn:
        raise LayerError(f"layer {quoted(self.name)} ({self.kind}): {why}")

    def data(self, value: Any) -> Data:
        """`value`, which must be data."""
        if not isinstance(value, Data):
            self.refuse("its input must be a value computed from the model's input; simplify the export")
        return value

    def constant(self, value: Any) -> Tensor:
        """`value`, which must be a constant, as a float64 tensor."""
        if isinstance(value, Data) or value is None:
            self.refuse("this operand must be a constant, and is computed from the input; replace the layer")
        return torch.as_tensor(value, dtype=torch.float64)

    def per_sample(self, value: Any, rank: int) -> Tensor:
        """A constant that meets data of `rank` axes (batch not counted), with any batch axis of length one removed."""
        tensor = self.constant(value)
        if tensor.dim() == rank + 1:
            if tensor.shape[0] != 1:
                self.refuse(f"its constant has {tensor.shape[0]} entries along the batch; export with a free batch")
            tensor = tensor[0]
        if tensor.dim() > rank:
            self.refuse(f"its constant of shape {tuple(tensor.shape)} adds axes in front of the batch")
        return tensor

    def move(self, function: Callable[[Tensor], Tensor], value: Data) -> Data:
        """Data movement by `function` (batch first): a Reshape or a Select node, read off numbered entries.

        Two samples with different numbers are moved together: a function that mixes samples or loses the batch axis is
        refused.
        """
        shape = self.shape(value)
        size = torch.Size(shape).numel()
        numbered = torch.arange(1, 2 * size + 1, dtype=torch.float64).reshape(2, *shape)
        try:
            moved = function(numbered)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            self.refuse(f"cannot be applied to samples of shape {shape} with the batch in front: {first_line(error)}")
        if moved.dim() == 0 or moved.shape[0] != 2:
            self.refuse("gives up the batch axis; every value must keep the samples on its first axis")
        first, second = moved.round().to(torch.int64)
        if not torch.equal(second, torch.where(first > 0, first + size, first)) or bool((first > size).any()):
            self.refuse("mixes the samples of a batch; every value must keep the samples on its first axis")
        index = first - 1
        if index.numel() == size and torch.equal(index.flatten(), torch.arange(size)):
            target = tuple(index.shape)
            return value if target == shape else self.add(Reshape(target), value)
        return self.add(Select(index, size, title=self.kind.lower()), value)

    def broadcast(self, value: Data, shape: Shape) -> Data:
        """The value repeated along axes of length one, and along new axes behind the batch, to `shape`."""
        own = self.shape(value)
        return self.move(lambda t: t.reshape(2, *[1] * (len(shape) - len(own)), *own).expand(2, *shape), value)


Rule = Callable[..., Any]
MODULES: dict[type[nn.Module], Rule] = {}
"""Exact module type -> rule(context, module, *args, **kwargs)."""
FUNCTIONS: dict[Callable[..., Any], Rule] = {}
"""Function in a `call_function` node -> rule(context, *args, **kwargs)."""


def lowers(*keys: Any) -> Callable[[Rule], Rule]:
    """Enter a rule for these module types or functions; ValueError for a second entry of one key."""

    def enter(rule: Rule) -> Rule:
        for key in keys:
            table: dict[Any, Rule] = MODULES if isinstance(key, type) else FUNCTIONS
            if key in table:
                raise ValueError(f"{key} is entered twice")
            table[key] = rule
        return rule

    return enter
